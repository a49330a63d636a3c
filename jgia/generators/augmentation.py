"""Differentiable augmentation of what a discriminator sees.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training" (NeurIPS 2020, arXiv
2006.10738), section 4: the same transformations of real and generated images, which leave the
generator without the artifacts that augmenting real images alone would teach it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

SHIFT_FRACTION = 8
CUTOUT_FRACTION = 2


def augment(key: Array, images: Array, probability: Array | float = 1.0) -> Array:
    """Color, translation and cutout, each of an image with a probability of its own.

    Args:
      key: PRNG key.
      images: (B, H, W, C), about [-1, 1].
      probability: with which each of the three is applied to an image.

    Returns:
      Images of the same shape; differentiable in ``images``.
    """
    for function in (_color, _translate, _cut_out):
        key, key_on, key_function = jax.random.split(key, 3)
        drawn = jax.random.uniform(key_on, (len(images), 1, 1, 1), "float32")
        on = drawn < jnp.asarray(probability, drawn.dtype)
        images = jnp.where(on, function(key_function, images), images)
    return images


def _color(key: Array, x: Array) -> Array:
    """Brightness by up to 1/2, saturation by a factor of 0 to 2, contrast of 1/2 to 3/2."""
    shape = (len(x), 1, 1, 1)
    brightness, saturation, contrast = (
        jnp.asarray(jax.random.uniform(k, shape), x.dtype) for k in jax.random.split(key, 3)
    )
    x = x + (brightness - 0.5)
    gray = x.mean(axis=-1, keepdims=True)
    x = gray + (x - gray) * (2 * saturation)
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translate(key: Array, x: Array) -> Array:
    """Shifts by up to an eighth of each side, zeros moving in."""
    _, height, width, _ = x.shape
    down, right = height // SHIFT_FRACTION, width // SHIFT_FRACTION
    key_down, key_right = jax.random.split(key)
    rows = jax.random.randint(key_down, (len(x),), 0, 2 * down + 1)
    columns = jax.random.randint(key_right, (len(x),), 0, 2 * right + 1)
    padded = jnp.pad(x, ((0, 0), (down, down), (right, right), (0, 0)))

    def window(image: Array, row: Array, column: Array) -> Array:
        return jax.lax.dynamic_slice(image, (row, column, 0), x.shape[1:])

    return jax.vmap(window)(padded, rows, columns)


def _cut_out(key: Array, x: Array) -> Array:
    """A square of half the side, anywhere, set to zero."""
    _, height, width, _ = x.shape
    inside = []
    for k, size in zip(jax.random.split(key), (height, width), strict=True):
        center = jax.random.randint(k, (len(x), 1), 0, size + 1)
        half = size // CUTOUT_FRACTION // 2
        place = jnp.arange(size)[None, :]
        inside.append((place >= center - half) & (place < center + half))
    square = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(square, 0, x)
