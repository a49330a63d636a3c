"""Arrays from strangers to the images and labels of a :class:`jgia.data.Dataset`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from jgia.data.dataset import DataError

MAX_BYTES = 8 * 2**30
"""Most bytes of pixels that one data set may take in memory."""

_MAX_CLASSES = 100_000


def require_memory(num_bytes: int, what: str) -> None:
    """Raise :class:`DataError` if ``num_bytes`` of pixels are more than fit in one data set."""
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{what} would take {num_bytes / 2**30:.1f} GiB of memory "
            f"(at most {MAX_BYTES / 2**30:.0f}); load fewer images with limit, or a smaller split."
        )


def as_images(array: np.ndarray, what: str) -> np.ndarray:
    """Check pixels and bring them to (N, H, W, C) uint8, or float32 in [0, 1].

    Args:
      array: (N, H, W) grey, (N, H, W, C) with C of 1 or 3, or (N, D) vectors, which become
        images (N, 1, D, 1); uint8, another integer dtype with
        values in 0..255, or float32 / float64 in [0, 1].
      what: what the array is, to begin an error message.

    Returns:
      The images; the input itself where nothing had to change.

    Raises:
      DataError: any other shape, dtype or value.
    """
    if array.ndim == 2:  # vectors, tabular rows: images one pixel high
        array = array[:, None, :]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise DataError(
            f"{what} must have shape (N, H, W), (N, H, W, C), or (N, D) for vectors, without "
            f"empty axes, got {array.shape}."
        )
    if array.shape[-1] not in (1, 3):
        hint = "keep one grey or three RGB channels."
        if array.shape[1] in (1, 3):
            hint = "the channels look first: transpose with x.transpose(0, 2, 3, 1)."
        raise DataError(f"{what} must have 1 or 3 channels last, got {array.shape}; {hint}")
    if array.dtype == np.uint8:
        return array
    kind_ok = array.dtype.kind in "iu" or array.dtype in (np.float32, np.float64)
    if not kind_ok:
        raise DataError(
            f"{what} must be uint8, or float32 or float64 in [0, 1], got {array.dtype}; "
            "save them as uint8."
        )
    low, high = array.min(), array.max()
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise DataError(f"{what} hold integers {low}..{high}; scale them to 0..255 as uint8.")
        return array.astype(np.uint8)
    if not (low >= 0 and high <= 1):  # NaN fails both comparisons
        raise DataError(
            f"{what} are {array.dtype} from {low:g} to {high:g}, but floats must be finite and "
            "in [0, 1]; divide by 255, or save them as uint8."
        )
    return array.astype(np.float32)


def as_labels(
    array: np.ndarray, names: Sequence[str] | None, count: int, what: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Check labels and name the classes.

    Args:
      array: (N,) or (N, 1) integers from 0.
      names: class names, or ``None`` to number the classes up to the largest label.
      count: N, the number of images.
      what: what the array is, to begin an error message.

    Returns:
      (N,) int32 labels, and at least two class names.

    Raises:
      DataError: another shape, dtype, or a label without a name.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(
            f"{what} must be one integer per image, got shape {array.shape}; "
            "one-hot labels need argmax(axis=1) first."
        )
    if array.dtype.kind not in "iu":
        raise DataError(f"{what} must be integers from 0, got {array.dtype}; convert them.")
    if array.shape[0] != count:
        raise DataError(
            f"{what} and images differ in number: {array.shape[0]} and {count}; "
            "save one label per image."
        )
    low, high = int(array.min()), int(array.max())
    limit = len(names) if names is not None else _MAX_CLASSES
    if low < 0 or high >= limit:
        raise DataError(
            f"{what} lie in {low}..{high}, but must lie in 0..{limit - 1}; number the classes "
            "from 0 and give each a name."
        )
    chosen = tuple(names) if names is not None else tuple(map(str, range(high + 1)))
    return array.astype(np.int32), at_least_two(chosen)


def at_least_two(names: tuple[str, ...]) -> tuple[str, ...]:
    """Fill up class names with ``"-"`` to two: a classifier needs two outputs.

    >>> at_least_two(("cat",))
    ('cat', '-')
    """
    return names + ("-",) * (2 - len(names))


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut the centre square out of an image and resize it with Lanczos filtering."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if (side, side) != image.size:
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def resize(images: np.ndarray, size: int | None) -> np.ndarray:
    """Bring (N, H, W, C) images to ``size`` squared; ``None`` leaves them as they are.

    The centre square is cut out and resized with Pillow's Lanczos filter, channel by channel for
    float images, whose overshoot is clipped to [0, 1].
    """
    if size is None or images.shape[1:3] == (size, size):
        return images
    out = np.empty((len(images), size, size, images.shape[-1]), images.dtype)
    for i, image in enumerate(images):
        for channel in range(images.shape[-1]):
            plane = square(Image.fromarray(np.ascontiguousarray(image[..., channel])), size)
            out[i, ..., channel] = np.asarray(plane)
    return np.clip(out, 0, 1) if out.dtype == np.float32 else out
