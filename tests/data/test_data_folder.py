"""Image folders: order, modes, sizes, and files that are not what their names say."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jgia.data import DataError, load_dataset

RNG = np.random.Generator(np.random.PCG64(6))


def put(path: Path, pixels: np.ndarray, **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def color(height: int = 6, width: int = 5) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def refuse(folder: Path, message: str, **options) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(f"folder:{folder}", **options)
    assert "\n" not in str(caught.value)


def test_classes_and_files_come_in_order_of_names(tmp_path: Path) -> None:
    a2 = put(tmp_path / "ant" / "2.png", color())
    a1 = put(tmp_path / "ant" / "1.bmp", color())
    b1 = put(tmp_path / "bee" / "x.TIFF", color())
    b2 = put(tmp_path / "bee" / "y.webp", color(), lossless=True)
    put(tmp_path / "bee" / ".hidden.png", color())
    put(tmp_path / ".cache" / "z.png", color())
    put(tmp_path / "loose.png", color())
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "cow").mkdir()
    data = load_dataset(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.images, [a1, a2, b1, b2])
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.class_names == ("ant", "bee", "cow")
    assert data.name == tmp_path.name


def test_limit_takes_from_every_class_in_turn(tmp_path: Path) -> None:
    ants = [put(tmp_path / "ant" / f"{i}.png", color()) for i in range(5)]
    bees = [put(tmp_path / "bee" / f"{i}.png", color()) for i in range(2)]
    data = load_dataset(f"folder:{tmp_path}", limit=5)
    np.testing.assert_array_equal(data.images, [*ants[:3], *bees])
    assert data.class_names == ("ant", "bee")
    (tmp_path / "ant" / "4.png").write_bytes(b"broken")
    assert len(load_dataset(f"folder:{tmp_path}", limit=6)) == 6  # the last is not opened
    refuse(tmp_path, "4.png", limit=7)


def test_grey_files_stay_grey_and_mixed_ones_become_rgb(tmp_path: Path) -> None:
    grey = put(tmp_path / "a" / "1.png", color()[..., 0])
    assert load_dataset(f"folder:{tmp_path}").class_names == ("a", "-")
    np.testing.assert_array_equal(load_dataset(f"folder:{tmp_path}").images[0, ..., 0], grey)
    put(tmp_path / "a" / "2.png", (grey > 99).astype(np.uint8).astype(bool))
    binary = load_dataset(f"folder:{tmp_path}").images[1, ..., 0]
    np.testing.assert_array_equal(binary, 255 * (grey > 99))
    rgb = put(tmp_path / "b" / "3.png", color())
    mixed = load_dataset(f"folder:{tmp_path}").images
    assert mixed.shape == (3, 6, 5, 3)
    np.testing.assert_array_equal(mixed[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(mixed[2], rgb)


def test_transparency_is_laid_on_white_and_palettes_are_looked_up(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3] = 255
    put(tmp_path / "a" / "1.png", pixels)
    (tmp_path / "a" / "2.gif").parent.mkdir(exist_ok=True)
    Image.fromarray(pixels[..., :3]).quantize(4).save(tmp_path / "a" / "2.gif")
    data = load_dataset(f"folder:{tmp_path}").images
    assert (data[0, :2] == [200, 0, 0]).all()
    assert (data[0, 2:] == 255).all()
    assert (data[1] == [200, 0, 0]).all()


def test_sizes_that_differ_need_an_image_size(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png", np.full((8, 8, 3), 90, np.uint8))
    wide = np.full((4, 12, 3), 10, np.uint8)
    wide[:, 4:8] = 200
    put(tmp_path / "b" / "2.png", wide)
    refuse(tmp_path, "8x8, .*2.png is 12x4; give image_size")
    data = load_dataset(f"folder:{tmp_path}", image_size=4)
    assert (data.images[0] == 90).all()
    assert (data.images[1] == 200).all()  # the center square, nothing of the sides


def test_png_and_jpeg_agree_with_their_own_decoders(tmp_path: Path) -> None:
    smooth = np.tile(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], (1, 16, 3))
    put(tmp_path / "a" / "1.jpg", smooth, quality=95)
    error = np.abs(load_dataset(f"folder:{tmp_path}").images[0].astype(int) - smooth)
    assert error.max() <= 6


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(100)],
)
def test_files_that_are_no_images_are_named(tmp_path: Path, content: bytes) -> None:
    put(tmp_path / "a" / "1.png", color())
    (tmp_path / "a" / "bad.jpg").write_bytes(content)
    refuse(tmp_path, r"bad\.jpg .*repair or remove")


def test_truncated_and_deep_images_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a" / "cut.png", color(64, 64))
    content = (tmp_path / "a" / "cut.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(content[: len(content) // 2])
    refuse(tmp_path, r"cut\.png")
    (tmp_path / "a" / "cut.png").unlink()
    put(tmp_path / "a" / "deep.png", np.full((4, 4), 60000, np.uint16))
    refuse(tmp_path, r"deep\.png .*8 bits")


def test_decoders_of_other_formats_are_not_reached(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    (tmp_path / "a" / "1.png").write_bytes(script)
    refuse(tmp_path, r"1\.png")


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    for side in (12_000, 40_000):  # Pillow warns at the first and stops at the second
        ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        (tmp_path / "a").mkdir(exist_ok=True)
        body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / "a" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + ihdr + body)
        refuse(tmp_path, r"bomb\.png is too large")


def test_empty_places_say_what_is_missing(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "not a folder")
    refuse(tmp_path, "no sub-folders")
    (tmp_path / "a").mkdir()
    refuse(tmp_path, "no images")
    put(tmp_path / "1.png", color())
    refuse(tmp_path, "no images")


def test_memory_is_bounded(tmp_path: Path, monkeypatch) -> None:
    for i in range(4):
        put(tmp_path / "a" / f"{i}.png", color())
    monkeypatch.setattr("jgia.data.pixels.MAX_BYTES", 200)
    refuse(tmp_path, "limit")
    assert len(load_dataset(f"folder:{tmp_path}", limit=2)) == 2
