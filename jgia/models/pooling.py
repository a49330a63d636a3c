"""Pooling without padding, differentiable to any order and strict about dtypes."""

from __future__ import annotations

from typing import Literal

from jax import Array

WINDOW = 2


def pool(x: Array, kind: Literal["average", "max"]) -> Array:
    """Means or maxima of 2x2 windows of (B, H, W, C); an odd last row or column is dropped.

    Flax's ``avg_pool`` divides by an integer array, which strict dtype promotion refuses.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // WINDOW, width // WINDOW
    x = x[:, : WINDOW * rows, : WINDOW * columns]
    x = x.reshape(batch, rows, WINDOW, columns, WINDOW, channels)
    return x.mean(axis=(2, 4)) if kind == "average" else x.max(axis=(2, 4))
