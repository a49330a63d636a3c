"""How far generated images are from real ones, without downloaded weights."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Shaped

_WIDTHS = (32, 64, 128)
_SEED = 20_181
_SUBSETS, _SUBSET = 50, 100
_BATCH = 250


def features(images: Shaped[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """What a small fixed network sees in images: means and deviations of its maps, by layer.

    Three 3x3 convolutions with fixed random weights, rectified, each followed by 2x2 averages.
    Random features tell distributions apart (a kernel distance in them is one between
    distributions), but do not weigh differences as people do: compare values of this network with
    each other only, never with published ones of Inception.

    Args:
      images: (N, H, W, C) bytes, or floats in [0, 1]; sides of at least 8.

    Returns:
      (N, D) float32.
    """
    scale = 127.5 if images.dtype == np.uint8 else 0.5
    parts = [
        _network(jnp.asarray(images[i : i + _BATCH], "float32") / scale - 1)
        for i in range(0, len(images), _BATCH)
    ]
    return np.concatenate(jax.device_get(parts))


@jax.jit
def _network(x: Array) -> Array:
    found = [x.mean(axis=(1, 2)), x.std(axis=(1, 2))]
    for i, width in enumerate(_WIDTHS):
        key = jax.random.fold_in(jax.random.key(_SEED), i)
        shape = (3, 3, x.shape[-1], width)
        kernel = jax.random.normal(key, shape, x.dtype) * math.sqrt(2 / math.prod(shape[:3]))
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        found += [x.mean(axis=(1, 2)), x.std(axis=(1, 2))]
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return jnp.concatenate(found, axis=-1)


def kernel_distance(
    generated: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], *, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance between two sets of features: squared maximum mean discrepancy.

    The unbiased estimate with the kernel ``(x'y / d + 1)^3`` on features standardized by the real
    ones, averaged over 50 subsets of 100 each (of fewer where there are not as many).

    Args:
      generated: (N, D) features, at least 2.
      real: (M, D) features, at least 2.
      seed: draws the subsets.

    Returns:
      (mean, standard error over subsets); about 0, also negative, for equal distributions.

    References:
      Binkowski et al., "Demystifying MMD GANs" (ICLR 2018, arXiv 1801.01401), eq. 4.
    """
    if min(len(generated), len(real)) < 2:
        raise ValueError(f"need at least 2 of each, got {len(generated)} and {len(real)} features.")
    mean, deviation = real.mean(axis=0), np.maximum(real.std(axis=0), 1e-6)
    x, y = ((part - mean) / deviation for part in (generated, real))
    rng, size = np.random.default_rng(seed), min(_SUBSET, len(x), len(y))
    estimates = [
        _discrepancy(x[rng.choice(len(x), size, False)], y[rng.choice(len(y), size, False)])
        for _ in range(_SUBSETS)
    ]
    return float(np.mean(estimates)), float(np.std(estimates) / np.sqrt(_SUBSETS))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    kernel = functools.partial(_kernel, dim=x.shape[1])
    n, m = len(x), len(y)
    own = [
        (k.sum() - np.trace(k)) / (s * (s - 1)) for k, s in ((kernel(x, x), n), (kernel(y, y), m))
    ]
    return float(own[0] + own[1] - 2 * kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray, *, dim: int) -> np.ndarray:
    return (np.asarray(x @ y.T, np.float64) / dim + 1) ** 3
