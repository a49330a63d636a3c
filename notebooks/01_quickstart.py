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
# # An audit, step by step
#
# A malicious server sends crafted parameters, a client shares one gradient, and the server reads
# the client's images out of it. `jgia audit` does this in one command; here are its parts.
#
# Run it as a script (`python notebooks/01_quickstart.py`) or open it with jupytext. It takes
# about a minute on two CPU cores, and writes figures into a temporary folder only.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from jgia import (
    AresOptions,
    Normalization,
    Observation,
    client_update,
    load_dataset,
    make_victim,
    score,
)
from jgia.attacks import ares
from jgia.config import FrontEnd
from jgia.data import split_client_public

figures = tempfile.TemporaryDirectory()
key_craft, key_client, key_attack = jax.random.split(jax.random.key(0), 3)

# %% [markdown]
# ## Data
#
# The bundled sample holds crops of seven public-domain photographs. The client's crops and the
# server's public ones come from different parts of each photograph.

# %%
sample = load_dataset("sample")
client, public = split_client_public(sample, seed=0, num_client=64)
images, labels = client.take(range(len(client)))
public_images, _ = public.take(range(len(public)))
print(f"{len(client)} private images, {len(public)} public ones, of shape {images.shape[1:]}")

# %% [markdown]
# ## Victim
#
# Two convolutions, a fully connected layer of 1024 neurons and a head. The normalization belongs
# to the model and is fitted to public images only.

# %%
victim = make_victim(
    "cnn",
    input_shape=client.image_shape,
    num_classes=client.num_classes,
    normalization=Normalization.fit(public_images),
)
for layer in victim.layers():
    print(layer)

# %% [markdown]
# ## Craft
#
# The server chooses parameter values, never the architecture. All neurons of the fully connected
# layer measure the same scalar of an image, its *query feature*, and compare it with increasing
# thresholds.

# %%
params, plan = ares.craft(key_craft, victim, public_images)
columns = np.asarray(params["fc"]["kernel"])
print("identical columns:", bool(np.all(columns == columns[:, :1])))
print(f"{plan.num_bins} thresholds from {plan.thresholds[0]:.3f} to {plan.thresholds[-1]:.3f}")

# %% [markdown]
# ## The client computes one update
#
# It follows the protocol: the gradient of the mean loss over its batch, here of 8 images. The
# `Observation` is all that the attack will get.

# %%
observation: Observation = client_update(key_client, victim, params, images[:8], labels[:8])
print(observation.threat_model)

# %% [markdown]
# ## Leak
#
# Each image lies between two neighboring thresholds. Where it is alone there, the difference of
# these two neurons' gradients is a multiple of the activation of this one image.

# %%
candidates = ares.leak(observation, plan)
print(f"{len(candidates)} occupied bins: {candidates.bins.tolist()}")
print(f"read-out noise: at most {candidates.noise.max():.1e}")

# %% [markdown]
# ## Invert
#
# An activation is a rectified convolution of the image. Where it is positive it gives linear
# equations; with 12 filters there are about twice as many of them as pixels, and least squares
# solves for the image.

# %%
reconstruction = ares.invert(key_attack, candidates, plan, victim)
for candidate in reconstruction.candidates[:3]:
    print(
        f"bin {candidate['bin']}: {candidate['status']}, "
        f"{candidate['equations_per_unknown']:.1f} equations per unknown, "
        f"residual {candidate['residual']:.1e} after {candidate['iterations']} iterations"
    )

# %% [markdown]
# ## Score
#
# Only now do the private images appear again. PSNR beyond 60 dB measures rounding, so means are
# capped there; the baselines say what a guess without the update would reach.

# %%
scores = score(reconstruction.images, images[:8], pool=public_images)
print(f"recovered at 40 dB: {scores['success_rate']['40']['rate']:.0%} of {scores['num_true']}")
print(f"median PSNR {scores['psnr']['median']:.0f} dB, mean {scores['psnr']['mean_capped']:.0f} dB")
for name, baseline in scores["baselines"].items():
    print(f"  baseline {name}: median {baseline['median']:.1f} dB")


# %%
def show(name: str, reconstruction: np.ndarray, truth: np.ndarray, matching: list) -> None:
    """Originals above, what was recovered below; an empty place where nothing was."""
    figure, axes = plt.subplots(2, len(truth), figsize=(1.2 * len(truth), 2.6))
    for column, (original, index) in enumerate(zip(truth, matching, strict=True)):
        axes[0, column].imshow(original)
        if index is not None:
            axes[1, column].imshow(reconstruction[index])
    for axis in axes.ravel():
        axis.axis("off")
    path = Path(figures.name) / f"{name}.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size} bytes")


show("random", reconstruction.images, images[:8], scores["matching"])


# %% [markdown]
# ## Front ends
#
# `signed` passes a positive and a negative copy of each channel, so nothing is lost: an upper
# bound. `direct` is what earlier attacks did: normalized pixels are negative in places, the ReLU
# drops those, and what it fills in is a guess.


# %%
def audit(front_end: FrontEnd, num_images: int) -> dict:
    """Craft, one update, attack, score."""
    options = AresOptions(front_end=front_end)
    params, plan = ares.craft(key_craft, victim, public_images, options=options)
    batch = images[:num_images], labels[:num_images]
    observation = client_update(key_client, victim, params, *batch)
    reconstruction = ares.attack(key_attack, observation, plan=plan, options=options)
    scores = score(reconstruction.images, batch[0], pool=public_images)
    recovered = round(scores["success_rate"]["40"]["rate"] * num_images)
    assert plan.bin_masses is not None  # it was crafted here, on public images
    expected = ares.expected_singletons(plan.bin_masses, num_images)
    median = scores["psnr"]["median_all"]
    print(
        f"{front_end:>6}, {num_images:2} images: {recovered:2} recovered at 40 dB, "
        f"{expected:.1f} expected alone in a bin, median over all {median:.0f} dB"
    )
    show(f"{front_end}-{num_images}", reconstruction.images, batch[0][:8], scores["matching"][:8])
    return {"recovered": recovered, "expected": expected, "median": median}


front_ends: tuple[FrontEnd, ...] = ("random", "signed", "direct")
results = {front_end: audit(front_end, 8) for front_end in front_ends}
assert results["random"]["recovered"] >= 7
assert results["signed"]["recovered"] >= 7
assert results["direct"]["recovered"] <= 1

# %% [markdown]
# ## Batch size
#
# More images share the 1024 bins, so more of them meet in one. These are refused as mixtures, not
# returned as blends, and the count of those alone can be predicted from the public images.

# %%
large = audit("random", 64)
assert 45 <= large["recovered"] <= 64

# %% [markdown]
# ## A client that was sent ordinary parameters
#
# The same read-out on parameters that were not crafted finds nothing it accepts: this attack
# needs a server that chooses them. It does not follow that such an update leaks nothing.

# %%
benign = client_update(key_client, victim, victim.init(key_craft), images[:8], labels[:8])
refused = ares.attack(key_attack, benign)
print(f"{len(refused.candidates)} candidates, {len(refused.images)} accepted")
assert len(refused.images) == 0

# %%
figures.cleanup()
