from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jgia.report import grid_png
from jgia.report.figures import layout


def decode(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def tile(picture: np.ndarray, plan, index: int, row: int) -> np.ndarray:
    x, y = plan.corner(index, row)
    return picture[y : y + plan.tile_h, x : x + plan.tile_w]


def enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    """Nearest-neighbor enlargement by index arithmetic, and grey as three equal channels."""
    height, width, channels = image.shape
    rows, columns = np.arange(height * scale) // scale, np.arange(width * scale) // scale
    eight_bit = np.rint(image * 255).astype(int)[rows][:, columns]
    return np.concatenate([eight_bit] * 3, axis=2) if channels == 1 else eight_bit


@pytest.mark.parametrize(
    ("num_true", "shape"),
    [(1, (8, 8, 3)), (5, (28, 28, 1)), (9, (32, 24, 3)), (70, (8, 8, 1)), (2, (224, 224, 3))],
)
def test_every_tile_is_its_image_pixel_for_pixel(make_case, num_true, shape):
    case = make_case(num_true, shape, unmatched=0)
    psnr = case.result["scores"]["psnr"]["per_image"]
    picture = decode(grid_png(case.originals, case.aligned, psnr))
    plan = layout(num_true, shape)
    for index in range(num_true):
        for row, images in enumerate((case.originals, case.aligned)):
            want = enlarged(images[index], plan.scale)
            np.testing.assert_array_equal(tile(picture, plan, index, row), want)


def test_changing_one_pixel_changes_one_square(case):
    psnr = case.result["scores"]["psnr"]["per_image"]
    changed = case.originals.copy()
    changed[1, 3, 5, 0] = 1 - np.round(changed[1, 3, 5, 0])
    one = decode(grid_png(case.originals, case.aligned, psnr))
    other = decode(grid_png(changed, case.aligned, psnr))
    plan = layout(4, (8, 8, 3))
    x, y = plan.corner(1, 0)
    rows, columns, channels = np.nonzero(one != other)
    square = range(plan.scale)
    assert set(rows) == {y + 3 * plan.scale + k for k in square}
    assert set(columns) == {x + 5 * plan.scale + k for k in square}
    assert set(channels) == {0}


def test_unmatched_tiles_are_hatched_gray(case):
    psnr = case.result["scores"]["psnr"]["per_image"]
    picture = decode(grid_png(case.originals, case.aligned, psnr))
    empty = tile(picture, layout(4, (8, 8, 3)), 3, 1)
    colors, counts = np.unique(empty.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colors) == 2
    assert np.ptp(colors, axis=1).max() < 16  # grays
    assert counts.min() > 0.1 * counts.sum()  # lines, not dust


def label(picture: np.ndarray, plan, index: int) -> np.ndarray:
    x, y = plan.corner(index, plan.rows - 1)
    return picture[y + plan.tile_h : y + plan.tile_h + 22, x : x + plan.tile_w]


def test_labels_follow_the_values(case):
    plan = layout(4, (8, 8, 3))
    one = decode(grid_png(case.originals, case.aligned, [10.0, 20.0, 30.0, None]))
    other = decode(grid_png(case.originals, case.aligned, [10.0, 21.0, 30.0, None]))
    assert all(label(one, plan, index).min() < 140 for index in range(4))
    changed = [not np.array_equal(label(one, plan, i), label(other, plan, i)) for i in range(4)]
    assert changed == [False, True, False, False]


@pytest.mark.parametrize("num_pairs", [1, 4, 32, 64, 65, 256])
@pytest.mark.parametrize("size", [8, 28, 32, 64, 128, 224])
def test_layout_stays_readable_and_finite(num_pairs, size):
    plan = layout(num_pairs, (size, size, 3))
    assert 48 <= plan.tile_w <= 256
    assert plan.step_x >= max(plan.tile_w, 58)  # labels do not touch
    assert plan.step_y >= 2 * plan.tile_h + 20
    blocks = -(-num_pairs // plan.columns)
    assert plan.columns * plan.step_x * blocks * plan.step_y < 2.4e7  # pixels


def test_many_large_images_are_averaged_down():
    originals = np.zeros((65, 160, 160, 1), np.float32)
    originals[3, 1::2, 1::2] = 1.0
    picture = decode(grid_png(originals, originals, [200.0] * 65))
    plan = layout(65, (160, 160, 1))
    assert (plan.reduction, plan.tile_w) == (2, 80)
    assert np.all(tile(picture, plan, 3, 0) == 64)  # a quarter of each block is white
    assert np.all(tile(picture, plan, 4, 0) == 0)


def test_without_originals_only_reconstructions_are_drawn(case):
    picture = decode(grid_png(None, case.reconstructions, [None] * 3))
    plan = layout(3, (8, 8, 3), rows=1)
    want = enlarged(case.reconstructions[2], plan.scale)
    np.testing.assert_array_equal(tile(picture, plan, 2, 0), want)
    assert decode(grid_png(None, [], [])).shape[2] == 3


def test_lengths_and_shapes_are_checked(case):
    with pytest.raises(ValueError, match="psnr must have one entry"):
        grid_png(case.originals, case.aligned, [1.0])
    with pytest.raises(ValueError, match="aligned with the 4 originals"):
        grid_png(case.originals, case.aligned[:2], [1.0, 2.0])
    with pytest.raises(ValueError, match="C 1"):
        grid_png(np.zeros((1, 4, 4, 2), np.float32), [None], [None])
