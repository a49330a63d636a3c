"""Picture of originals over reconstructions, drawn pixel for pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from jgia.report import images as pixels_of
from jgia.report import words
from jgia.report.records import Number

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 36, 42), (112, 118, 126)
_EMPTY, _HATCH = (232, 234, 237), (196, 200, 206)
_TARGET = 96  # shown size in pixels that an integer scale aims at
_LARGEST = 128  # with more than 64 pairs, larger images are averaged down to this
_FONT_SIZE = 13


class Layout(NamedTuple):
    """Where everything goes, in pixels; follows from the number and size of the images.

    Attributes:
      columns: pairs side by side in one block.
      scale: integer factor of nearest-neighbor enlargement.
      reduction: integer factor of averaging before it; above 1 only for many large images.
      left: x of the first tile.
      top: y of the first tile.
      step_x: distance between columns.
      step_y: distance between blocks.
      tile_h: height of a shown tile.
      tile_w: width of a shown tile.
      gap: between a tile and the one below it.
      rows: tiles per pair, 2 with originals and 1 without.
    """

    columns: int
    scale: int
    reduction: int
    left: int
    top: int
    step_x: int
    step_y: int
    tile_h: int
    tile_w: int
    gap: int
    rows: int

    def corner(self, index: int, row: int) -> tuple[int, int]:
        """Upper left corner (x, y) of tile ``row`` (0 original, 1 reconstruction) of a pair."""
        block, column = divmod(index, self.columns)
        x = self.left + column * self.step_x
        return x, self.top + block * self.step_y + row * (self.tile_h + self.gap)


def layout(num_pairs: int, image_shape: Sequence[int], *, rows: int = 2) -> Layout:
    """Choose columns and an integer scale so that 1 to 256 images of 8 to 224 px stay readable."""
    reduction = 1 if num_pairs <= 64 else math.ceil(max(image_shape[:2]) / _LARGEST)
    height, width = (math.ceil(size / reduction) for size in image_shape[:2])
    target = 2 * _TARGET if num_pairs <= 4 else _TARGET if num_pairs <= 64 else 0.7 * _TARGET
    scale = max(1, round(target / max(height, width)))
    tile_h, tile_w = scale * height, scale * width
    gap, label_h, margin = 4, _FONT_SIZE + 14, 18
    label_w = 104 if rows == 2 else 0
    cell = max(tile_w, 58)  # room for "100.0 dB"
    wanted = 8 if num_pairs <= 64 else 16
    columns = max(1, min(num_pairs, wanted))
    return Layout(
        columns=columns,
        scale=scale,
        reduction=reduction,
        left=margin + label_w + (cell - tile_w) // 2,
        top=margin,
        step_x=cell + 8,
        step_y=rows * tile_h + (rows - 1) * gap + label_h,
        tile_h=tile_h,
        tile_w=tile_w,
        gap=gap,
        rows=rows,
    )


def grid_png(
    originals: Float[np.ndarray, "n h w c"] | None,
    reconstructions: Sequence[Float[np.ndarray, "h w c"] | None] | Float[np.ndarray, "n h w c"],
    psnr: Sequence[Number | None],
) -> bytes:
    """Draw originals over their reconstructions, with the PSNR under each pair.

    Every image is enlarged by one whole factor without interpolation, so that a pixel of the
    data is a square of the picture. (More than 64 pairs of more than 128 px are averaged down
    first.) Originals without a reconstruction get a hatched gray tile.

    Args:
      originals: (N, H, W, C) pixels in [0, 1], C 1 or 3; ``None`` draws reconstructions alone.
      reconstructions: N images (H, W, C) in the order of the originals, ``None`` if unmatched.
      psnr: N values in dB, ``None`` where undefined.

    Returns:
      The bytes of a PNG file.

    Raises:
      ValueError: shapes or lengths do not agree.
    """
    if originals is not None:
        originals = pixels_of.check_images("originals", originals)
    aligned = pixels_of.check_aligned(list(reconstructions), originals)
    if len(psnr) != len(aligned):
        raise ValueError(f"psnr must have one entry per image, {len(aligned)}, got {len(psnr)}.")
    if not aligned:
        return _empty_png()
    shape = next((image.shape for image in aligned if image is not None), (32, 32, 3))
    if originals is not None:
        shape = originals.shape[1:]
    plan = layout(len(aligned), shape, rows=1 if originals is None else 2)
    canvas, draw = _canvas(plan, len(aligned))
    for index, image in enumerate(aligned):
        if originals is not None:
            _paste(canvas, plan, index, 0, pixels_of.to_bytes(originals[index]))
        if image is None:
            _hatch(canvas, plan, index)
        else:
            _paste(canvas, plan, index, plan.rows - 1, pixels_of.to_bytes(image))
        if originals is not None:
            _label(draw, plan, index, psnr[index], matched=image is not None)
    return pixels_of.png(np.asarray(canvas))


def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _empty_png() -> bytes:
    canvas = Image.new("RGB", (420, 60), _PAPER)
    ImageDraw.Draw(canvas).text(
        (210, 30), "No image was reconstructed.", _FAINT, _font(), anchor="mm"
    )
    return pixels_of.png(np.asarray(canvas))


def _canvas(plan: Layout, count: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    blocks = math.ceil(count / plan.columns)
    size = (plan.left + plan.columns * plan.step_x + 10, plan.top + blocks * plan.step_y + 4)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    if plan.rows == 2:
        for block in range(blocks):
            for row, name in enumerate(("original", "reconstruction")):
                _, y = plan.corner(block * plan.columns, row)
                middle = (18, y + plan.tile_h // 2)
                draw.text(middle, name, _FAINT, _font(), anchor="lm")
    return canvas, draw


def _paste(
    canvas: Image.Image, plan: Layout, index: int, row: int, tile: UInt8[np.ndarray, "h w c"]
) -> None:
    small = pixels_of.shrink(tile, plan.reduction)
    large = small.repeat(plan.scale, axis=0).repeat(plan.scale, axis=1)
    rgb = np.broadcast_to(large, (*large.shape[:2], 3))
    canvas.paste(Image.fromarray(np.ascontiguousarray(rgb)), plan.corner(index, row))


def _hatch(canvas: Image.Image, plan: Layout, index: int) -> None:
    tile = Image.new("RGB", (plan.tile_w, plan.tile_h), _EMPTY)
    draw = ImageDraw.Draw(tile)
    for offset in range(-plan.tile_h, plan.tile_w, 10):
        draw.line(((offset, plan.tile_h), (offset + plan.tile_h, 0)), _HATCH, width=2)
    canvas.paste(tile, plan.corner(index, plan.rows - 1))


def _label(
    draw: ImageDraw.ImageDraw, plan: Layout, index: int, value: Number | None, *, matched: bool
) -> None:
    x, y = plan.corner(index, plan.rows - 1)
    text = words.decibel(value) if matched else "none"
    where = (x + plan.tile_w // 2, y + plan.tile_h + 12)
    draw.text(where, text, _INK if matched else _FAINT, _font(), anchor="mm")
