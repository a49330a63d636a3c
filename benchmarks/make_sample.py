"""Make the bundled sample (``jgia/data/_sample``) from scikit-image's public-domain photographs.

Deterministic: the same scikit-image files give the same crops. Run it only to change the sample::

    python benchmarks/make_sample.py [--out FOLDER]

Each photograph is cut by a line, with a gap of 16 pixels (two JPEG blocks), into a part for the
client and a part for the public pool. Square windows of random size and place are drawn inside
each part; a window is rejected if it is nearly constant (standard deviation below 0.06) or
overlaps an earlier one of its part by more than two fifths of their union. Windows are averaged
down by area (Pillow's box filter).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

GAP = 16
MIN_STD = 0.06
MAX_OVERLAP = 0.4
COLUMNS = 16
SEED = 20
PROVENANCE = (
    "Bundled sample: crops of seven public-domain photographs distributed with scikit-image; "
    "client and public crops share no pixel of a photograph."
)


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph, how it is divided, and how many crops come from it.

    Attributes:
      label: class name.
      file: file name in scikit-image's data folder.
      license: as scikit-image states it.
      axis: 0 to divide by a horizontal line, 1 by a vertical one.
      cut: pixels along ``axis`` that belong to the client.
      crops: {size: (client crops, public crops)}.
    """

    label: str
    file: str
    license: str
    axis: int
    cut: int
    crops: dict[int, tuple[int, int]]


PHOTOS = (
    Photo("astronaut", "astronaut.png", "public domain (NASA)", 0, 296,
          {32: (26, 22), 64: (7, 6)}),
    Photo("cat", "chelsea.png", "CC0 (Stefan van der Walt)", 1, 240,
          {32: (22, 18), 64: (5, 4)}),
    Photo("coffee", "coffee.png", "CC0 (Rachel Michetti)", 1, 328,
          {32: (22, 18), 64: (5, 4)}),
    Photo("galaxies", "hubble_deep_field.jpg", "public domain (NASA)", 1, 520,
          {32: (10, 6), 64: (3, 2)}),
    Photo("photographer", "camera.png", "CC0 (Lav Varshney)", 1, 280,
          {32: (20, 16), 64: (5, 4)}),
    Photo("retina", "retina.jpg", "CC0 1.0 (Mikael Häggström)", 1, 760,
          {32: (12, 8), 64: (3, 2)}),
    Photo("rocket", "rocket.jpg", "public domain (SpaceX)", 1, 352,
          {32: (16, 8), 64: (4, 2)}),
)  # fmt: skip


def draw_windows(
    rng: np.random.Generator, photo: Image.Image, region: tuple[int, int, int, int],
    size: int, count: int,
) -> list[tuple[tuple[int, int, int], np.ndarray]]:  # fmt: skip
    """Draw ``count`` windows ``(left, top, side)`` inside ``region`` with their crops."""
    left, top, right, bottom = region
    largest = min(right - left, bottom - top)
    smallest = min(largest, max(2 * size, 80, min(photo.size) // 6))
    kept: list[tuple[tuple[int, int, int], np.ndarray]] = []
    for _ in range(20_000):
        side = round(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(top, bottom - side + 1))
        crop = photo.resize((size, size), Image.Resampling.BOX, (x, y, x + side, y + side))
        pixels = np.asarray(crop)
        box = (x, y, side)
        if contrast(pixels) < MIN_STD or any(overlap(box, b) > MAX_OVERLAP for b, _ in kept):
            continue
        kept.append((box, pixels))
        if len(kept) == count:
            return kept
    raise SystemExit(f"only {len(kept)} of {count} windows found in {region}")


def contrast(pixels: np.ndarray) -> float:
    """Standard deviation over places, averaged over channels, of pixels scaled to [0, 1]."""
    return float(pixels.std(axis=(0, 1)).mean()) / 255


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Intersection over union of two square windows."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] ** 2 + b[2] ** 2 - shared)


def make(size: int, folder: Path, out: Path) -> None:
    crops, tiles = [], []
    for label, photo in enumerate(PHOTOS):
        image = Image.open(folder / photo.file).convert("RGB")
        width, height = image.size
        cut = photo.cut
        regions = {
            "client": (0, 0, cut, height) if photo.axis else (0, 0, width, cut),
            "public": (cut + GAP, 0, width, height)
            if photo.axis
            else (0, cut + GAP, width, height),
        }
        for (pool, region), count in zip(regions.items(), photo.crops[size], strict=True):
            rng = np.random.Generator(np.random.PCG64([SEED, size, label, pool == "public"]))
            for box, pixels in draw_windows(rng, image, region, size, count):
                crops.append({"label": label, "source": photo.file, "box": list(box), "pool": pool})
                tiles.append(pixels)
    order = np.random.Generator(np.random.PCG64([SEED, size])).permutation(len(crops))
    rows = -(-len(order) // COLUMNS)
    sheet = np.zeros((rows, size, COLUMNS, size, 3), np.uint8)
    for place, i in enumerate(order):
        sheet[place // COLUMNS, :, place % COLUMNS] = tiles[i]
    Image.fromarray(sheet.reshape(rows * size, COLUMNS * size, 3)).save(
        out / f"sample_{size}.png", optimize=True
    )
    facts = {
        "provenance": PROVENANCE,
        "class_names": [photo.label for photo in PHOTOS],
        "sources": {
            photo.file: {
                "license": photo.license,
                "sha256": hashlib.sha256((folder / photo.file).read_bytes()).hexdigest(),
            }
            for photo in PHOTOS
        },
        "crops": [],
    }
    head = json.dumps(facts, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(crops[i]) for i in order)
    text = head.replace('"crops": []', f'"crops": [\n{lines}\n ]')
    (out / f"sample_{size}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled sample again.")
    default = Path(__file__).resolve().parents[1] / "jgia" / "data" / "_sample"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    out.mkdir(parents=True, exist_ok=True)
    for size in (32, 64):
        make(size, folder, out)


if __name__ == "__main__":
    main()
