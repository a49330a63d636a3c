# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Text
#
# A text classifier on a phone often keeps a pretrained embedding table frozen and trains the
# layers behind it. (A table that is trained needs no attack: the rows of its gradient that are not
# zero are the words.) Its input is a sequence of L vectors of d numbers, here an array of shape
# `(L, 1, d)`: L pixels with d channels.
#
# Embeddings are dense and look like noise, so no cosine or wavelet basis fits. But the server
# knows the table: every vector is **one of its V rows**. The sentence is a matrix with a single one
# per position, L numbers out of V times L, and sparser than any image.
#
# Run it as a script (`python notebooks/03_text_embeddings.py`) or open it with jupytext. It takes
# half a minute on two CPU cores and downloads nothing.

# %%
import collections
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np

from jgia import AresOptions, Normalization, client_update, make_victim
from jgia.attacks import ares
from jgia.sparse import (
    Composition,
    ConvOperator,
    DenseOperator,
    Identity,
    LassoOptions,
    from_planes,
    masked_lasso,
    masked_least_squares,
)

key_craft, key_client, key_attack = jax.random.split(jax.random.key(0), 3)
LENGTH, DIMENSIONS, VOCABULARY = 12, 32, 1000

# %% [markdown]
# ## Messages
#
# Invented notes to a doctor, with invented names. The server knows how people write, not what
# these clients wrote.

# %%
NAMES = "anna ben carla david elena farid grace henry ines jakob karim lena marco nadia oscar paula"
WHO = "my son", "my mother", "my husband", "my daughter", "our neighbor", "my father"
HAS = "has", "complains about", "suffers from", "was treated for", "worries about"
WHAT = (
    ("chest pain", "a racing heart", "high blood pressure", "swollen ankles"),
    ("an itchy rash", "a burning skin", "a dark mole", "dry eczema"),
    ("a dry cough", "short breath", "asthma at night", "a bad cold"),
)
SINCE = "since monday", "for two weeks", "after surgery", "every morning", "since march"
CLASSES = ("cardiology", "dermatology", "pneumology")


def note(rng: np.random.Generator) -> tuple[list[str], int]:
    """A message as words, and the department it belongs to."""
    label = int(rng.integers(len(CLASSES)))
    name = rng.choice(NAMES.split())
    parts = rng.choice(WHO), name, rng.choice(HAS), rng.choice(WHAT[label]), rng.choice(SINCE)
    return [word for part in parts for word in str(part).split()][:LENGTH], label


def notes(seed: int, number: int) -> tuple[list[list[str]], np.ndarray]:
    """Messages and their labels."""
    rng = np.random.default_rng(seed)
    texts, labels = zip(*(note(rng) for _ in range(number)), strict=True)
    return list(texts), np.asarray(labels, np.int32)


private, labels = notes(seed=1, number=8)
public, _ = notes(seed=2, number=400)
for text in private[:3]:
    print(" ".join(text))

# %% [markdown]
# ## An embedding table
#
# Built the classical way: how much more often two words are neighbors than chance would have it
# (positive pointwise mutual information), and the leading singular vectors of that matrix. The
# text is English that every Python has, the documentation of its standard library, besides
# other people's notes. Real tables are larger and made alike in the one respect that matters
# here: words of one kind have similar vectors, which makes them hard to tell apart.

# %%
MODULES = (
    "argparse asyncio collections concurrent.futures configparser csv datetime decimal difflib "
    "email fractions functools heapq http.client inspect ipaddress itertools json locale logging "
    "mailbox math optparse os pathlib pickle random re shutil smtplib socket sqlite3 ssl "
    "statistics string subprocess tarfile tempfile textwrap threading unittest urllib "
    "urllib.request uuid weakref xml.dom zipfile"
)


def documentation() -> list[list[str]]:
    """Lower-case words of the docstrings of standard modules and what they contain."""
    texts = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        members = [value for key, value in sorted(vars(module).items()) if key[0] != "_"]
        for item in (module, *members):
            members += [v for _, v in sorted(vars(item).items())] if isinstance(item, type) else []
        texts += [str(getattr(item, "__doc__", None) or "") for item in (module, *members)]
    return [re.findall(r"[a-z]+", text.lower()) for text in dict.fromkeys(texts)]


def embedding_table(corpus: list[list[str]]) -> tuple[list[str], np.ndarray]:
    """The vocabulary and its table (V, d), rows of unit norm."""
    counts = collections.Counter(word for text in corpus for word in text)
    in_notes = dict.fromkeys(word for text in public for word in text)
    words = dict.fromkeys([*in_notes, *(word for word, _ in counts.most_common(VOCABULARY))])
    words = sorted(list(words)[:VOCABULARY])
    number = {word: i for i, word in enumerate(words)}
    together = np.full((VOCABULARY, VOCABULARY), 0.01)
    for text in corpus:
        ids = [number[word] for word in text if word in number]
        for distance in (1, 2, 3):
            np.add.at(together, (ids[:-distance], ids[distance:]), 1 / distance)
    together += together.T
    chance = np.outer(together.sum(axis=1), together.sum(axis=0)) / together.sum()
    left, values, _ = np.linalg.svd(np.maximum(np.log(together / chance), 0))
    table = left[:, :DIMENSIONS] * np.sqrt(values[:DIMENSIONS])
    return words, table / np.linalg.norm(table, axis=1, keepdims=True)


words, table = embedding_table(documentation() + public)
number = {word: i for i, word in enumerate(words)}
cosines = table @ table.T - 2 * np.eye(VOCABULARY)
print(f"{len(words)} words, {DIMENSIONS} dimensions; median cosine of a word and the most alike "
      f"other one: {np.median(cosines.max(axis=1)):.2f}")  # fmt: skip
for word in ("cough", "monday"):
    print(
        f"  next to {word!r}: {', '.join(words[i] for i in np.argsort(-cosines[number[word]])[:4])}"
    )


# %% [markdown]
# ## Victim and update
#
# The client looks the words up and trains what comes behind: two fully connected layers, of 256
# and 1024 neurons, and a head. Short messages are padded with zero vectors. The library's arrays
# lie in [0, 1], so embeddings are moved there, and the normalization moves them back.

# %%
LARGEST = float(np.abs(table).max())


def embed(texts: list[list[str]]) -> np.ndarray:
    """Messages as arrays (N, L, 1, d) in [0, 1]."""
    vectors = np.zeros((len(texts), LENGTH, 1, DIMENSIONS))
    for row, text in zip(vectors, texts, strict=True):
        row[: len(text), 0] = table[[number[word] for word in text]]
    return ((vectors / LARGEST + 1) / 2).astype(np.float32)


victim = make_victim(
    "mlp",
    input_shape=(LENGTH, 1, DIMENSIONS),
    num_classes=len(CLASSES),
    widths=(256, 1024),
    normalization=Normalization(mean=(0.5,) * DIMENSIONS, std=(0.5 / LARGEST,) * DIMENSIONS),
)
options = AresOptions(first_layer="ignore", isolating_fraction=0.05)
params, plan = ares.craft(key_craft, victim, embed(public), options=options, num_examples=8)
observation = client_update(key_client, victim, params, embed(private), labels)


# %% [markdown]
# ## From vectors to words
#
# The word of a position is the row of the table with the largest cosine. A reconstruction counts
# by the words that are right and in their place. The baseline guesses, at every position, the
# commonest word there of the public notes.


# %%
def nearest_words(vectors: np.ndarray) -> list[list[str]]:
    """Vectors (N, L, d) to words; an empty one where the vector is zero."""
    norm = np.linalg.norm(vectors, axis=-1)
    best = np.argmax(vectors @ table.T, axis=-1)
    return [
        [words[i] if n > 0.1 else "" for i, n in zip(row, norms, strict=True)]
        for row, norms in zip(best, norm, strict=True)
    ]


def right(guess: list[str], text: list[str]) -> float:
    """Fraction of a message's words that are right and in their place."""
    return float(np.mean([g == w for g, w in zip(guess, text, strict=False)]))


def accuracy(guesses: list[list[str]]) -> np.ndarray:
    """For every private message, the fraction right in the best of the guesses."""
    return np.array([max([right(g, text) for g in guesses], default=0.0) for text in private])


columns = itertools.zip_longest(*public, fillvalue="")
commonest = [collections.Counter(column).most_common(1)[0][0] for column in columns]
print(f"baseline: {accuracy([commonest]).mean():.0%} of the words")

# %% [markdown]
# ## The first layer shows its gradient
#
# Then it is linear in the vectors, and the attack that images get solves for them exactly.

# %%
reconstruction = ares.attack(key_attack, observation, plan=plan)
vectors = (2 * reconstruction.images - 1)[:, :, 0] * LARGEST
exact = accuracy(nearest_words(vectors)).mean()
print(f"{exact:.0%} of the words")
assert exact > 0.9

# %% [markdown]
# ## It does not
#
# A frozen or personalized first layer shows no gradient. What leaks are its activations, about 128
# of them above zero for `12 * 32 = 384` unknowns.

# %%
candidates = ares.leak(observation, plan, first_layer=options.first_layer)
measured = candidates.activations.transpose(3, 1, 2, 0)
on = jnp.asarray(measured > candidates.noise)
y = jnp.asarray(measured - plan.bias[:, None, None, None], jnp.float32)
layer = DenseOperator(jnp.asarray(plan.kernel), (DIMENSIONS, LENGTH, 1))
print(f"{len(candidates)} candidates, {float(on.sum(axis=(0, 1, 2)).mean()):.0f} equations each")

# %% [markdown]
# **Vectors.** Least squares takes the smallest vectors that agree; sparse recovery of the vectors
# themselves, those with most zeros. Both are wrong about what an embedding looks like.

# %%
lasso = LassoOptions(lam_ratio=1e-3, iterations_per_stage=150)
smallest = masked_least_squares(layer, y, on).x
sparsest = masked_lasso(layer, y, on, basis=Identity(), options=lasso).x
results = {}
for name, planes in {"least squares": smallest, "sparse vectors": sparsest}.items():
    guesses = nearest_words(np.asarray(from_planes(planes))[:, :, 0])
    results[name] = accuracy(guesses).mean()
    print(f"  {name}: {results[name]:.0%} of the words")

# %% [markdown]
# **Words.** The unknown is the matrix of positions and words, and the map to the activations two
# linear steps: a look-up in the table, which for planes `(V, L, 1, batch)` is a convolution with a
# kernel of one pixel, and the layer. `Composition` makes one operator of them, with 12 000 unknowns
# per message, and never forms its matrix.

# %%
lookup = ConvOperator(jnp.asarray(table, jnp.float32)[None, None])
sentence_to_activations = Composition(layer, lookup)
coefficients = masked_lasso(sentence_to_activations, y, on, basis=Identity(), options=lasso).x
weights = np.asarray(from_planes(coefficients))[:, :, 0]
guesses = [[words[i] for i in row] for row in weights.argmax(axis=-1)]
results["sparse words"] = accuracy(guesses).mean()
print(f"  sparse words: {results['sparse words']:.0%} of the words")
for text in private[:3]:
    guess = max(guesses, key=lambda g, text=text: right(g, text))
    print(f"  {' '.join(text)}\n    -> {' '.join(guess[: len(text)])}")

# %% [markdown]
# Wrong words are mostly neighbors in the table, or fall on positions of small weight: a threshold
# on the weights says which ones to believe.

# %%
believed = weights.max(axis=-1) > 0.5
hits = [
    guess[i] == text[i]
    for text in private
    for j in [int(np.argmax([right(g, text) for g in guesses]))]
    for guess in [guesses[j]]
    for i in range(len(text))
    if believed[j, i]
]
print(f"of {len(hits)} words with a weight above 0.5, {np.mean(hits):.0%} are right")
assert results["sparse words"] > 0.55
assert results["sparse words"] > max(results["least squares"], results["sparse vectors"]) + 0.2

# %% [markdown]
# ## What to take along
#
# - The prior is the table, and the table is public: freezing it hides nothing. A word out of 1000
#   is ten bits, however many numbers its vector has, so fewer equations than unknowns suffice.
# - A bag of words is the same with one position: sum the vectors, and the coefficients are counts.
# - Words are told apart by how far their vectors are; here half of them have another one at a
#   cosine above 0.77, and most errors are such pairs. Try more neurons in the first layer.
# - `masked_lasso` takes any operator that has `apply` and `adjoint`. Position embeddings, which are
#   added to the vectors, are subtracted from the activations first, as the bias is above.
