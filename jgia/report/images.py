"""Pixels to PNG: checks, quantization to 8 bits, and encoding within a size budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w c"]


def to_bytes(image: Float[np.ndarray, "h w c"]) -> Pixels:
    """Quantize pixels in [0, 1] to 0..255, rounding to nearest.

    A pixel that came from 8 bits as ``value / 255`` comes back unchanged. Values outside of
    [0, 1] are clipped and non-finite ones become 0, so that a failed image can still be drawn.
    """
    finite = np.nan_to_num(np.asarray(image, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return np.rint(np.clip(finite, 0.0, 1.0) * 255.0).astype(np.uint8)


def check_images(name: str, images: object) -> Float[np.ndarray, "n h w c"]:
    """Return images as a float array (N, H, W, C).

    Raises:
      ValueError: not a floating NHWC array with 1 or 3 channels and at least one pixel.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        raise ValueError(
            f"{name} must have shape (N, H, W, C) with C 1 (grey) or 3 (RGB), got {array.shape}."
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be floating point in [0, 1], got {array.dtype}; divide 8-bit pixels "
            "by 255."
        )
    return array


def check_aligned(
    reconstructions: Sequence[object], originals: Float[np.ndarray, "n h w c"] | None
) -> list[Float[np.ndarray, "h w c"] | None]:
    """Return one reconstruction or ``None`` per row, as arrays of the originals' shape.

    Raises:
      ValueError: the number of reconstructions or a shape differs from the originals.
    """
    if originals is not None and len(reconstructions) != len(originals):
        raise ValueError(
            f"reconstructions must be aligned with the {len(originals)} originals (None where "
            f"unmatched), got {len(reconstructions)}."
        )
    aligned: list[np.ndarray | None] = []
    shape = None if originals is None else originals.shape[1:]
    for index, image in enumerate(reconstructions):
        if image is None:
            aligned.append(None)
            continue
        array = check_images(f"reconstructions[{index}]", np.asarray(image)[None])[0]
        shape = shape or array.shape
        if array.shape != shape:
            raise ValueError(
                f"reconstructions[{index}] must have shape {shape}, got {array.shape}."
            )
        aligned.append(array)
    return aligned


def png(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Encode 8-bit pixels (H, W, 1 or 3) losslessly; the same pixels give the same bytes."""
    grey = pixels.shape[2] == 1
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """PNG bytes as a ``data:`` address for an ``img`` element."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def shrink(
    pixels: UInt8[np.ndarray, "h w c"], factor: int
) -> UInt8[np.ndarray, "small_h small_w c"]:
    """Average ``factor`` x ``factor`` blocks; a ragged edge is repeated to fill its blocks."""
    if factor == 1:
        return pixels
    pad = [(0, -size % factor) for size in pixels.shape[:2]]
    padded = np.pad(pixels, [*pad, (0, 0)], mode="edge").astype(np.float64)
    height, width, channels = padded.shape
    blocks = padded.reshape(height // factor, factor, width // factor, factor, channels)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def encode_within(
    images: Sequence[Float[np.ndarray, "h w c"] | None], *, budget: int
) -> tuple[list[str | None], int]:
    """Encode images as ``data:`` addresses whose total length stays within ``budget``.

    Images are kept pixel for pixel when they fit; else all are averaged down by the same power
    of two, as often as is needed.

    Args:
      images: (H, W, C) in [0, 1] each, or ``None``.
      budget: largest total length in characters.

    Returns:
      The addresses (``None`` where there is no image) and the factor of averaging, 1 if none.
    """
    pixels = [None if image is None else to_bytes(image) for image in images]
    largest = max((max(p.shape[:2]) for p in pixels if p is not None), default=1)
    factor = 1
    while True:
        addresses = [None if p is None else data_uri(png(shrink(p, factor))) for p in pixels]
        size = sum(len(address) for address in addresses if address is not None)
        if size <= budget or factor >= largest:
            return addresses, factor
        factor *= 2
