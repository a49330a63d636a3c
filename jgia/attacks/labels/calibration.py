"""What the model does to images that the attacker has or makes up: features and logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.labels.head import head_name
from jgia.models import Victim, flatten_params, unflatten_params
from jgia.normalization import Normalization

PyTree = Any

NUM_DUMMIES = 256
"""Images that are made up where none are public; a quarter of it for large ones."""
MOST_PUBLIC = 1024
"""Public images that are used; more are left out."""
_FEWEST_PUBLIC = 16
_CHUNK = 64
_NUM_LEAVES = 60


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Images, and what the model that was sent makes of them. Reusable for every client of a round.

    Attributes:
      pixels: (N, H, W, C) in [0, 1].
      features: (N, d) that enter the head.
      logits: (N, K).
    """

    pixels: np.ndarray
    features: np.ndarray
    logits: np.ndarray

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """(N, K)."""
        return softmax(self.logits)


def calibrate(
    key: Array, victim: Victim, params: PyTree, *, public: ArrayLike | None = None
) -> Calibration:
    """Run images that are not the client's through the model.

    Args:
      key: PRNG key of the made-up images; not used with public ones.
      victim: the model.
      params: what the server sent.
      public: (N, H, W, C) pixels in [0, 1], at least 16, the more like the client's the better;
        no labels. Images are made up when left out (:func:`dummy_images`).

    Raises:
      ValueError: the public images do not fit, or the model gives NaN for them.
    """
    if public is None:
        return evaluate(victim, params, dummy_images(key, victim))
    pixels = np.asarray(public)
    if pixels.ndim != 4 or pixels.shape[1:] != victim.input_shape or len(pixels) < _FEWEST_PUBLIC:
        raise ValueError(
            f"public must hold at least {_FEWEST_PUBLIC} images of shape "
            f"{victim.input_shape}, got {pixels.shape}; leave it out to use made-up images."
        )
    if not np.issubdtype(pixels.dtype, np.floating) or not np.all((pixels >= 0) & (pixels <= 1)):
        raise ValueError(
            f"public must be finite pixels in [0, 1], got {pixels.dtype}; divide bytes by 255."
        )
    return evaluate(victim, params, pixels[:MOST_PUBLIC])


def evaluate(victim: Victim, params: PyTree, pixels: np.ndarray) -> Calibration:
    """Features and logits of (N, H, W, C) pixels at the given parameters.

    Raises:
      ValueError: they are not finite.
    """
    features, logits = [], []
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK]
        padded = np.concatenate([part, np.repeat(part[-1:], _CHUNK - len(part), axis=0)])
        f, z = _features(victim, params, jnp.asarray(padded, jnp.float32))
        features.append(np.asarray(f, np.float64)[: len(part)])
        logits.append(np.asarray(z, np.float64)[: len(part)])
    found = Calibration(
        pixels=pixels, features=np.concatenate(features), logits=np.concatenate(logits)
    )
    if not (np.all(np.isfinite(found.features)) and np.all(np.isfinite(found.logits))):
        raise ValueError(
            "the model gives NaN or infinite outputs for images in [0, 1]; check the parameters."
        )
    return found


@functools.partial(jax.jit, static_argnums=0)
def _features(victim: Victim, params: PyTree, pixels: Array) -> tuple[Array, Array]:
    """(N, d) features and (N, K) logits, of any architecture with a linear head.

    The logits are linear in the head's kernel W: the gradient of ``sum_ik C_ik z_ik`` is ``F^T C``,
    so a C with one 1 per column picks K examples' features at once.
    """
    flat = flatten_params(params)
    name = f"{head_name(victim)}/kernel"
    kernel = flat[name]
    inputs = victim.normalization.normalize(pixels.astype(kernel.dtype))

    def logits(head: Array) -> Array:
        return victim.apply(unflatten_params({**flat, name: head}), inputs)

    z, pullback = jax.vjp(logits, kernel)
    num, classes = z.shape

    def group(start: Array) -> Array:
        rows, columns = jnp.arange(num)[:, None], jnp.arange(classes)[None, :]
        (gradient,) = pullback((rows == columns + start).astype(z.dtype))
        return gradient.T

    features = jax.lax.map(group, jnp.arange(0, num, classes))
    return features.reshape(-1, kernel.shape[0])[:num], z


def dummy_images(key: Array, victim: Victim, num: int | None = None) -> np.ndarray:
    """Made-up images with the statistics that all natural images share.

    ``0.8 leaves + 0.6 noise``: overlapping ellipses of one color each, whose radii fall off as
    ``r^-3`` (occlusion, edges), and noise with a 1/f spectrum. Mean and spread are those that the
    model's normalization undoes; 0.5 and 0.25 where it has none. No data are used.

    Args:
      key: PRNG key; it seeds a NumPy generator, so that nothing is compiled.
      victim: input shape and normalization.
      num: N; 256 when left out, 64 for images larger than 64 x 64.

    Returns:
      (N, H, W, C) float32 pixels in [0, 1].

    References:
      Lee, Mumford, Huang, "Occlusion models for natural images" (IJCV 2001). Baradad et al.,
      "Learning to See by Looking at Noise" (NeurIPS 2021, arXiv 2106.05963), section 3.
    """
    height, width, channels = victim.input_shape
    if num is None:
        num = NUM_DUMMIES if height * width <= 64**2 else NUM_DUMMIES // 4
    rng = generator(key)
    shape = (num, height, width, channels)
    values = 0.8 * _standardized(_leaves(rng, shape)) + 0.6 * _standardized(_pink(rng, shape))
    normalization = victim.normalization
    if normalization == Normalization.identity(channels):
        normalization = Normalization((0.5,) * channels, (0.25,) * channels)
    mean, std = (np.asarray(v, np.float32) for v in (normalization.mean, normalization.std))
    return np.clip(values * std + mean, 0.0, 1.0)


def generator(key: Array) -> np.random.Generator:
    """NumPy's generator of a JAX key: the same key gives the same numbers."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _leaves(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> np.ndarray:
    num, height, width, channels = shape
    side = max(height, width)
    smallest, largest = 0.05 * side, 0.6 * side
    rows = np.arange(height, dtype=np.float32)[None, :, None]
    columns = np.arange(width, dtype=np.float32)[None, None, :]
    image = np.broadcast_to(_colors(rng, num, channels), shape).copy()
    for _ in range(_NUM_LEAVES):
        draws = rng.random((5, num, 1, 1), np.float32)
        y, x, u = 1.2 * draws[0] - 0.1, 1.2 * draws[1] - 0.1, draws[2]
        squared = 1 / (u / smallest**2 + (1 - u) / largest**2)  # density r^-3
        stretch, angle = 0.5 + 1.5 * draws[3], np.float32(np.pi) * draws[4]
        dy, dx = rows - height * y, columns - width * x
        along = dx * np.cos(angle) + dy * np.sin(angle)
        across = dy * np.cos(angle) - dx * np.sin(angle)
        inside = along**2 / stretch + across**2 * stretch < squared
        np.copyto(image, _colors(rng, num, channels), where=inside[..., None])
    return image


def _pink(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> np.ndarray:
    num, height, width, channels = shape
    white = _colors(rng, num, channels, (height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))
    spectrum = np.fft.rfft2(white, axes=(1, 2)) * amplitude[None, :, :, None]
    return np.fft.irfft2(spectrum, (height, width), axes=(1, 2)).astype(np.float32)


def _colors(
    rng: np.random.Generator, num: int, channels: int, size: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """(N, h, w, C) normal colors, mostly gray, as natural ones are."""
    gray = rng.standard_normal((num, *size, 1), np.float32)
    return gray + np.float32(0.4) * rng.standard_normal((num, *size, channels), np.float32)


def _standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of (..., K) logits."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
