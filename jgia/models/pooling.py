"""Pooling, differentiable to any order and strict about dtypes."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
from jax import Array

WINDOW = 2
STEM_WINDOW, STEM_STRIDE, STEM_PADDING = 3, 2, 1


def pool(x: Array, kind: Literal["average", "max"]) -> Array:
    """Means or maxima of 2x2 windows of (B, H, W, C); an odd last row or column is dropped.

    Flax's ``avg_pool`` divides by an integer array, which strict dtype promotion refuses.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // WINDOW, width // WINDOW
    x = x[:, : WINDOW * rows, : WINDOW * columns]
    x = x.reshape(batch, rows, WINDOW, columns, WINDOW, channels)
    return x.mean(axis=(2, 4)) if kind == "average" else x.max(axis=(2, 4))


def stem_pool(x: Array) -> Array:
    """Maxima of 3x3 windows at stride 2, one row of padding around: as in ImageNet's ResNets.

    (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C). The padding is never the maximum.
    """
    pad = (STEM_PADDING, STEM_PADDING)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        size = (x.shape[axis] - STEM_WINDOW) // STEM_STRIDE + 1
        last = STEM_STRIDE * (size - 1) + 1
        parts = [
            x[(slice(None),) * axis + (slice(i, i + last, STEM_STRIDE),)]
            for i in range(STEM_WINDOW)
        ]
        x = functools.reduce(jnp.maximum, parts)
    return x
