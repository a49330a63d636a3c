"""Images at the scorer's door: on the host, floating point, in [0, 1]."""

from __future__ import annotations

import numpy as np
from jax import Array


def checked_pixels(
    name: str, images: Array | np.ndarray, *, at_least: int, allow_nan: bool = False
) -> np.ndarray:
    """Images (N, H, W, C) as a NumPy array, or ``ValueError``.

    Args:
      name: of the argument, for the message.
      images: pixels in [0, 1], floating point.
      at_least: fewest images accepted.
      allow_nan: accept images that hold a NaN; their other pixels are not looked at.
    """
    array = np.asarray(images)
    if array.ndim != 4 or 0 in array.shape[1:]:
        raise ValueError(
            f"{name} must have shape (N, H, W, C) with at least one pixel, got {array.shape}; "
            "for no image at all use shape (0, H, W, C)."
        )
    if len(array) < at_least:
        raise ValueError(f"{name} must hold at least {at_least} image, got {len(array)}.")
    if array.dtype.kind in "biuc":
        raise ValueError(
            f"{name} must be floating point, got {array.dtype}; divide 8-bit pixels by 255."
        )
    for index, image in enumerate(array):
        low, high = image.min(), image.max()  # NaN if any pixel is
        if np.isnan(low) and allow_nan:
            continue
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} must lie in [0, 1], but image {index} spans {low:g} to {high:g}; "
                "denormalize it and clip it to [0, 1] first."
            )
    return array
