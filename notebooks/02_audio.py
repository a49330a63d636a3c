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
# # Sound
#
# Keyword spotting and speaker recognition are trained on phones, with raw samples or frames of
# them as input. Nothing in the attack knows what an image is: a recording of T samples is an
# array of shape `(T, 1, 1)`, one pixel wide and with one channel. Three things change: how a
# recording becomes numbers in [0, 1], which basis it is sparse in, and how likeness is measured.
#
# Run it as a script (`python notebooks/02_audio.py`) or open it with jupytext. It takes half a
# minute on two CPU cores, downloads nothing, and writes figures into a temporary folder only.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jgia import AresOptions, Normalization, client_update, make_victim
from jgia.attacks import ares
from jgia.sparse import (
    Basis,
    BlockDCT,
    DenseOperator,
    GlobalDCT,
    Identity,
    LassoOptions,
    Wavelet,
    energy_support,
    from_planes,
    masked_lasso,
    to_planes,
)

figures = tempfile.TemporaryDirectory()
key_craft, key_client, key_attack = jax.random.split(jax.random.key(0), 3)
SAMPLE_RATE, NUM_SAMPLES = 8000, 512

# %% [markdown]
# ## Recordings
#
# Made here, so that nothing needs a license: spoken vowels by the source-filter model. A glottal
# source (a pitch between 90 and 240 Hz, harmonics falling by 12 dB per octave) passes three
# formant resonances, whose frequencies say which vowel it is; pitch, formants, loudness and
# breath noise differ between speakers. A client holds frames of 64 ms.

# %%
FORMANTS = {  # Hz, of adult speakers
    "a": (750, 1250, 2550),
    "e": (480, 1950, 2600),
    "i": (300, 2250, 2950),
    "o": (480, 900, 2450),
    "u": (320, 800, 2300),
}
VOWELS = tuple(FORMANTS)


def vowel(rng: np.random.Generator, name: str) -> np.ndarray:
    """One frame of a vowel, (T,), in [-1, 1]."""
    time = np.arange(NUM_SAMPLES) / SAMPLE_RATE
    pitch = rng.uniform(90, 240)
    glide = 1 + 0.03 * rng.standard_normal() * time / time[-1]  # intonation
    formants = np.array(FORMANTS[name]) * rng.normal(1, 0.06)  # length of the vocal tract
    widths = np.array([80, 100, 140])
    harmonics = np.arange(1, int(0.45 * SAMPLE_RATE / pitch) + 1)
    f = harmonics * pitch
    resonance = 1 / np.abs(
        1 - (f[:, None] / formants) ** 2 + 1j * f[:, None] * widths / formants**2
    )
    amplitude = resonance.prod(axis=1) / harmonics**2
    phase = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.3, len(harmonics))
    wave = np.cos(2 * np.pi * f[:, None] * time * glide + phase[:, None]).T @ amplitude
    fade = np.minimum(1, np.arange(NUM_SAMPLES) / 64)
    wave *= fade if rng.random() < 0.3 else 1  # some frames catch the onset
    wave /= np.abs(wave).max()
    return rng.uniform(0.3, 0.95) * (wave + 1e-3 * rng.standard_normal(NUM_SAMPLES))


def recordings(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (N, T, 1, 1) and their labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(VOWELS), size=number)
    waves = np.stack([vowel(rng, VOWELS[label]) for label in labels])
    return waves[:, :, None, None].astype(np.float32), labels.astype(np.int32)


waves, labels = recordings(seed=1, number=16)
public_waves, _ = recordings(seed=2, number=400)
print(f"{len(waves)} private frames of {NUM_SAMPLES / SAMPLE_RATE * 1e3:.0f} ms, "
      f"{len(public_waves)} public ones of other speakers")  # fmt: skip

# %% [markdown]
# Samples lie in [-1, 1], the library's arrays in [0, 1]: half of the range is silence. The
# normalization undoes it, as the data loader of an audio model does.


# %%
def to_unit(waves: np.ndarray) -> np.ndarray:
    """[-1, 1] to [0, 1]."""
    return (waves + 1) / 2


def from_unit(arrays: np.ndarray) -> np.ndarray:
    """[0, 1] to [-1, 1]."""
    return 2 * arrays - 1


frames, public = to_unit(waves), to_unit(public_waves)

# %% [markdown]
# ## In which basis is speech sparse?
#
# Sparse recovery needs about as many equations as there are coefficients that matter, times the
# logarithm of what they are out of. A vowel is a few dozen harmonics: few coefficients in one
# cosine transform of the whole frame, many in short blocks, which are made for edges.

# %%
bases: dict[str, Basis] = {
    "samples": Identity(),
    "DCT of 8 samples": BlockDCT(8),
    "wavelet db4": Wavelet("db4"),
    "DCT of the frame": GlobalDCT(),
}
planes = to_planes(jnp.asarray(public_waves))
print(f"coefficients of {NUM_SAMPLES} that hold 99 % and 99.9 % of the energy (median frame)")
for name, basis in bases.items():
    counts = [float(jnp.median(energy_support(basis, planes, share))) for share in (0.99, 0.999)]
    print(f"  {name:17} {counts[0]:4.0f} {counts[1]:4.0f}")

# %% [markdown]
# ## One update of a multilayer perceptron
#
# Two hidden layers on raw samples. The first measures a frame with 512 neurons, about half of
# which are switched on; the second holds the bins that tell frames apart.

# %%
victim = make_victim(
    "mlp",
    input_shape=(NUM_SAMPLES, 1, 1),
    num_classes=len(VOWELS),
    widths=(512, 1024),
    normalization=Normalization(mean=(0.5,), std=(0.5,)),
)
batch = slice(0, 8)
params, plan = ares.craft(key_craft, victim, public, num_examples=8)
observation = client_update(key_client, victim, params, frames[batch], labels[batch])


# %% [markdown]
# ## How alike do two recordings sound?
#
# The field reports the scale-invariant signal-to-distortion ratio, SI-SDR: energy of the part of
# the estimate along the original, over the energy of the rest, in dB. Speech at 10 dB is easy to
# follow, at 30 dB nobody hears a difference. (PSNR would count loudness, which carries nothing.)


# %%
def si_sdr(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, at most 100."""
    estimate, truth = (a.ravel().astype(np.float64) - a.mean() for a in (estimate, truth))
    along = (estimate @ truth) / (truth @ truth) * truth
    distortion = np.sum((estimate - along) ** 2)
    return float(10 * np.log10(np.sum(along**2) / max(distortion, 1e-10 * np.sum(along**2))))


def best_matches(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SI-SDR of the best reconstruction of every frame, dB; -inf where there is none."""
    return np.array([max([si_sdr(f, t) for f in found], default=-np.inf) for t in truth])


# %% [markdown]
# ## The whole attack
#
# `ares.attack` is what images get. It also reads the gradient of the first layer, which is linear
# in the frames: once the bins have told which neurons were on for which frame, least squares
# solves for all of them, and no basis is needed.

# %%
reconstruction = ares.attack(key_attack, observation, plan=plan)
exact = best_matches(from_unit(reconstruction.images), waves[batch])
print(f"{np.sum(exact > 30)} of 8 frames beyond 30 dB SI-SDR, median {np.median(exact):.0f} dB")
silence = best_matches(public_waves.mean(axis=0, keepdims=True), waves[batch])
nearest = best_matches(public_waves, waves[batch])
print(f"baselines: public mean {np.median(silence):.0f} dB, "
      f"most alike public frame {np.median(nearest):.0f} dB")  # fmt: skip

assert np.sum(exact > 30) >= 7
assert np.median(nearest) < 10

# %% [markdown]
# ## Where the first layer is hidden
#
# Frozen, personalized or noised first layers do not show their gradient. What is left are the
# activations behind them: fewer equations than samples, and the basis decides. With no gradient
# to read there, almost all its neurons may measure, in pairs `w, -w` of which one is on.

# %%
options = AresOptions(first_layer="ignore", isolating_fraction=0.05)
params, plan = ares.craft(key_craft, victim, public, options=options, num_examples=8)
observation = client_update(key_client, victim, params, frames[batch], labels[batch])
candidates = ares.leak(observation, plan, first_layer=options.first_layer)

# %% [markdown]
# `ares.leak` returns what the neurons put out for each occupied bin, `max(W x + b, 0)`. Planes
# put the batch last, `(channels, T, 1, batch)`, and a frame of measurements is `(neurons, 1, 1,
# batch)`. `masked_lasso` looks for the sparsest frame that meets the equations of the neurons
# that were on and keeps the others at or below zero. `DenseOperator` is the layer as a linear map
# of planes, with its adjoint.

# %%
measured = candidates.activations.transpose(3, 1, 2, 0)
on = jnp.asarray(measured > candidates.noise)
y = jnp.asarray(measured - plan.bias[:, None, None, None], jnp.float32)
operator = DenseOperator(jnp.asarray(plan.kernel), (1, NUM_SAMPLES, 1))
equations = float(on.sum(axis=(0, 1, 2)).mean())
print(f"{len(candidates)} candidates, {equations:.0f} equations each for {NUM_SAMPLES} unknowns")

lasso = LassoOptions(lam_ratio=1e-3, iterations_per_stage=150)
found: dict[str, np.ndarray] = {}
quality: dict[str, np.ndarray] = {}
for name, basis in bases.items():
    result = masked_lasso(operator, y, on, basis=basis, options=lasso)
    found[name] = np.asarray(from_planes(result.x))
    quality[name] = best_matches(found[name], waves[batch])
    print(
        f"  {name:17} SI-SDR median {np.median(quality[name]):5.1f} dB, "
        f"worst {quality[name].min():5.1f} dB, best {quality[name].max():5.1f} dB"
    )

# %% [markdown]
# The order is that of the table above. The same activations that are noise in a basis of samples
# are intelligible speech in the right one: a defense that was tested with the wrong prior was not
# tested.

# %%
assert np.median(quality["DCT of the frame"]) > 20
assert np.median(quality["DCT of the frame"]) > np.median(quality["DCT of 8 samples"]) + 10
assert np.median(quality["samples"]) < 0


# %%
def show(index: int) -> None:
    """One frame and its reconstructions, in time and frequency."""
    truth = waves[batch][index].ravel()
    curves = {"original": truth}
    for name in ("DCT of 8 samples", "DCT of the frame"):
        best = max(found[name], key=lambda f: si_sdr(f, truth))
        curves[name] = best.ravel()
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5))
    time = 1e3 * np.arange(NUM_SAMPLES) / SAMPLE_RATE
    frequency = np.fft.rfftfreq(NUM_SAMPLES, 1 / SAMPLE_RATE)
    window = np.hanning(NUM_SAMPLES)
    for name, wave in curves.items():
        axes[0].plot(time, wave, label=name, linewidth=1)
        spectrum = np.abs(np.fft.rfft(window * wave)) / window.sum()
        axes[1].plot(frequency, 20 * np.log10(spectrum + 1e-6), linewidth=1)
    axes[0].set(xlabel="time in ms", ylabel="amplitude", title=f'"{VOWELS[labels[index]]}"')
    axes[1].set(xlabel="frequency in Hz", ylabel="level in dB")
    axes[0].legend(loc="upper right")
    figure.tight_layout()
    path = Path(figures.name) / f"frame-{index}.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size} bytes")


show(int(np.argmax(quality["DCT of the frame"])))

# %% [markdown]
# ## What to take along
#
# - Recordings longer than the 64 ms here want more neurons, in proportion to their coefficients,
#   not to their samples.
# - Log-mel frames are images of one channel, `(time, mel bands, 1)`: use them as in
#   `01_quickstart.py`, with `BlockDCT` or `Wavelet`, and invert the filter bank afterwards.
# - A basis of your own is any object with `analyze` and `synthesize` that are each other's inverse
#   and adjoint, such as a lapped transform or an orthonormal dictionary learned on public speech.

# %%
figures.cleanup()
