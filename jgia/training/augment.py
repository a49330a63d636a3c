"""Mirrored and shifted copies of training images, on the host."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

SHIFT_FRACTION = 8


def augmented(
    rng: np.random.Generator,
    images: Shaped[np.ndarray, "b h w c"],
    *,
    flip: bool,
    crop: bool,
) -> Shaped[np.ndarray, "b h w c"]:
    """Each image mirrored with probability 1/2 and shifted by up to an eighth of its sides.

    Args:
      rng: draws one mirroring and one shift per image, whether or not they are used.
      images: (B, H, W, C), of any dtype.
      flip: mirror left to right.
      crop: shift by whole pixels, uniformly in ``[-H // 8, H // 8]`` and ``[-W // 8, W // 8]``;
        zeros move in. The same as cropping from an image padded by an eighth.

    Returns:
      (B, H, W, C) of the same dtype; ``images`` itself where nothing is on.

    >>> row = np.arange(4).reshape(1, 1, 4, 1)
    >>> augmented(np.random.default_rng(3), row, flip=True, crop=False).ravel()
    array([3, 2, 1, 0])
    """
    batch, height, width, _ = images.shape
    down, right = height // SHIFT_FRACTION, width // SHIFT_FRACTION
    mirrored = rng.random(batch) < 0.5
    rows = rng.integers(0, 2 * down + 1, batch)[:, None] + np.arange(height)
    columns = rng.integers(0, 2 * right + 1, batch)[:, None] + np.arange(width)
    if flip:
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if crop and (down or right):
        padded = np.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))
        images = padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images
