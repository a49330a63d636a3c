"""Drawn faces: images of persons who do not exist, in any number, without a download.

Image ``i`` of seed ``s`` depends on ``(s, i)``, the size and the style alone, so that a smaller
set is a prefix of a larger one, and two seeds are two samples of one population.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8

from jgia.data import _face_drawing, _face_traits
from jgia.data.dataset import DataError, Dataset

STYLES = ("photo", "cartoon", "art")
"""``photo``: smooth shading; ``cartoon``: few colors, dark outlines; ``art``: blurred, in two
colors of its own. The last two are for tests out of distribution."""

CLASS_NAMES = _face_traits.CLASS_NAMES
"""Ten classes: five colors of hair, short or long."""

PUBLIC_SEED = 0
"""Stream of the public images; what may be learned from beforehand comes from it."""

CLIENT_SEEDS = {"photo": 1, "cartoon": 2, "art": 3}
"""Streams of the images that only a client holds: other persons for each style, so that no style
is calibration data that shows another style's client."""

SIZES = (16, 64)
"""Smallest and largest side in pixels."""

DEFAULT_SIZE = 32
DEFAULT_COUNT = 2000

_CHUNK = 32  # images drawn together; part of what a seed means
_OVERSAMPLE = 2  # drawn at twice the size, then averaged
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)[None, :, None, None]


def load(
    rest: str | None = None, *, image_size: int | None = None, limit: int | None = None
) -> Dataset:
    """Draw a data set; see :func:`jgia.data.load_dataset`.

    Rows alternate: the client's image 0, the public image 0, the client's image 1, … so that any
    first part is half public. The client's come from ``CLIENT_SEEDS``, the public ones from
    ``PUBLIC_SEED``: nothing fitted to public images has seen a client's.

    Args:
      rest: what follows ``faces:``: ``"STYLE"``, ``"NUMBER"`` or ``"STYLE:NUMBER"``; or ``None``.
      image_size: side in pixels, 16..64; 32 when left out. Drawn at that size, not resized.
      limit: at most this many images.

    Returns:
      The data set, with its ``public`` mask.

    Raises:
      DataError: an unknown style, a number below 1, or a size outside 16..64.
    """
    style, count = _parse(rest)
    size = DEFAULT_SIZE if image_size is None else image_size
    if limit is not None:
        count = min(count, limit)
    _check_size(size)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int32)
    public = np.arange(count) % 2 == 1
    for seed, rows in ((CLIENT_SEEDS[style], ~public), (PUBLIC_SEED, public)):
        if rows.any():
            images[rows], labels[rows] = render(seed, int(rows.sum()), size=size, style=style)
    return Dataset(
        images=images,
        labels=labels,
        class_names=CLASS_NAMES,
        name="faces" if style == "photo" else f"faces:{style}",
        provenance=(
            f"Drawn by jgia from random numbers (style {style}); no person is shown and no "
            "photograph was used; Apache-2.0."
        ),
        public=public,
    )


def render(
    seed: int, count: int, *, size: int = DEFAULT_SIZE, style: str = "photo", start: int = 0
) -> tuple[UInt8[np.ndarray, "n s s 3"], Int32[np.ndarray, " n"]]:
    """Draw images ``start`` to ``start + count - 1`` of a seed's endless stream.

    The persons of a stream do not depend on the size and the style.

    Args:
      seed: in 0..2**32 - 1.
      count: at least 1.
      size: side in pixels, 16..64.
      style: one of ``STYLES``.
      start: in 0..2**32 - 1.

    Returns:
      Images (count, size, size, 3) uint8 and labels (count,) int32 in 0..9.

    Raises:
      DataError: an argument lies outside its range.

    >>> images, labels = render(0, 3)
    >>> images.shape, labels.dtype
    ((3, 32, 32, 3), dtype('int32'))
    >>> bool((render(0, 2, start=1)[0] == images[1:]).all())
    True
    """
    if not 0 <= seed < 2**32 or not 0 <= start < 2**32:
        raise DataError(f"seed and start must lie in 0..2**32 - 1, got {seed} and {start}.")
    if count < 1:
        raise DataError(f"count must be at least 1, got {count}.")
    _check_style(style)
    _check_size(size)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int32)
    for chunk in range(start // _CHUNK, (start + count - 1) // _CHUNK + 1):
        first = chunk * _CHUNK
        low, high = max(first, start), min(first + _CHUNK, start + count)
        drawn, classes = _draw_chunk(seed, chunk, size, style)
        images[low - start : high - start] = drawn[low - first : high - first]
        labels[low - start : high - start] = classes[low - first : high - first]
    return images, labels


def _draw_chunk(seed: int, chunk: int, size: int, style: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a chunk, always whole: no image depends on which others were asked for."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, chunk])))
    traits = _face_traits.draw(rng, _CHUNK)
    canvas = _face_drawing.paint(traits, size * _OVERSAMPLE)
    if style == "cartoon":
        canvas = _cartoon(canvas)
    elif style == "art":
        canvas = _art(canvas, traits)
    mean = canvas.reshape(_CHUNK, 3, size, _OVERSAMPLE, size, _OVERSAMPLE).mean(axis=(3, 5))
    pixels = np.rint(np.clip(mean, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), traits.labels


def _cartoon(canvas: np.ndarray) -> np.ndarray:
    """Stronger colors in few steps, and dark lines where brightness jumps."""
    luma = (canvas * _LUMA).sum(axis=1, keepdims=True)
    padded = np.pad(luma, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    edge = np.clip(np.sqrt(across * across + down * down) * 4.5 - 1.0, 0.0, 1.0)
    steps = (np.floor(luma * 4.0) + 0.6) * 0.25  # brightness in four steps; the hue stays
    flat = np.clip(steps + 1.6 * (canvas - luma) * (steps / (luma + 0.05)), 0.0, 1.0)
    return flat * (1.0 - 0.9 * edge)


def _art(canvas: np.ndarray, traits: _face_traits.Traits) -> np.ndarray:
    """Blurred, then graded between two colors of the image's own."""
    for _ in range(2):
        for axis in (2, 3):
            canvas = (np.roll(canvas, 1, axis) + canvas + np.roll(canvas, -1, axis)) / 3.0
    luma = (canvas * _LUMA).sum(axis=1, keepdims=True)
    luma = np.clip(1.7 * luma - 0.25, 0.0, 1.0)
    dark, light = traits.grade_dark[:, :, None, None], traits.grade_light[:, :, None, None]
    return 0.25 * canvas + 0.75 * (dark + luma * (light - dark))


def _parse(rest: str | None) -> tuple[str, int]:
    """Style and number of ``"STYLE"``, ``"NUMBER"``, ``"STYLE:NUMBER"`` or ``None``."""
    if rest is None:
        return STYLES[0], DEFAULT_COUNT
    first, colon, last = rest.partition(":")
    style, number = (first, last) if colon else ("", first) if _is_number(first) else (first, None)
    if style or colon or number is None:
        _check_style(style)
    if number is None:
        return style, DEFAULT_COUNT
    if not _is_number(number) or int(number) < 1:
        raise DataError(
            f"the number of faces must be a whole number of at least 1, got {number!r}; "
            "use for example faces:500 or faces:cartoon:500."
        )
    return style or STYLES[0], int(number)


def _is_number(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise DataError(
            f"unknown style of faces {style!r}; use {', '.join(f'faces:{s}' for s in STYLES)}, "
            "or faces:NUMBER."
        )


def _check_size(size: int) -> None:
    if not SIZES[0] <= size <= SIZES[1]:
        raise DataError(
            f"faces are drawn {SIZES[0]} to {SIZES[1]} pixels wide, got image_size {size}; "
            "choose a size in that range."
        )
