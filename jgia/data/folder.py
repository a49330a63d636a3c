"""Image files in one sub-folder per class."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from jgia.data import pixels
from jgia.data.dataset import DataError, Dataset

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
"""File names with other endings are passed over."""

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
_GREY = frozenset({"1", "L", "LA"})
_COLOR = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_ALPHA = frozenset({"LA", "PA", "RGBA"})


def load(path: str, *, image_size: int | None = None, limit: int | None = None) -> Dataset:
    """Load ``PATH/CLASS/*.png`` and the like; see :func:`jgia.data.load_dataset`.

    Classes and files come in the order of their names. Only the first frame of a moving image is
    read; transparency is laid on white. If every file is grey the images have one channel,
    otherwise all become RGB.

    Args:
      path: a folder with one sub-folder per class; hidden names and other files are ignored.
      image_size: cut out the centre square and resize it; needed where sizes differ.
      limit: at most this many images, the first of each class in turn.

    Returns:
      The data set; class names are the sub-folders' names.

    Raises:
      DataError: no such folder, no sub-folders, no images, a file that is no image (it is
        named), or sizes that differ while ``image_size`` is not given.
    """
    root = Path(os.path.expanduser(path))
    names, files = _list_files(root)
    chosen = _first_of_each(files, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no reason to stop
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = (_open(file, image_size) for _, file in chosen)
        images = _stack(opened, chosen, root)
    labels = np.array([label for label, _ in chosen], np.int32)
    return Dataset(
        images=images,
        labels=labels,
        class_names=pixels.at_least_two(names),
        name=root.resolve().name,
        provenance=f"Image folder {root.resolve().name}.",
    )


def _list_files(root: Path) -> tuple[tuple[str, ...], list[list[Path]]]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give folder:PATH one sub-folder per class.")
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [
            sorted(
                p
                for p in sub.iterdir()
                if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
            )
            for sub in folders
        ]
    except OSError as error:
        raise DataError(f"cannot list {root} ({error.strerror}); check its rights.") from error
    if not folders:
        raise DataError(f"{root} has no sub-folders; put the images of each class into one.")
    if not any(files):
        raise DataError(
            f"{root} has no images in its sub-folders; supported endings are "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    return tuple(p.name for p in folders), files


def _first_of_each(files: list[list[Path]], limit: int | None) -> list[tuple[int, Path]]:
    labeled = [[(label, file) for file in group] for label, group in enumerate(files)]
    turns = (pair for turn in itertools.zip_longest(*labeled) for pair in turn if pair)
    return sorted(itertools.islice(turns, limit))


def _open(file: Path, image_size: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.mode not in _GREY | _COLOR:
                raise DataError(f"{file} has {image.mode} pixels; convert it to 8 bits.")
            grey = image.mode in _GREY
            if image.mode in _ALPHA or "transparency" in image.info:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            image = image.convert("L" if grey else "RGB")
            return image if image_size is None else pixels.square(image, image_size)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file} is too large to be decoded; scale it down first.") from error
    except Exception as error:  # decoders raise many kinds; each means a file to remove
        reason = type(error).__name__ if isinstance(error, OSError) else error
        raise DataError(f"cannot decode {file} ({reason}); repair or remove it.") from error


def _stack(opened, chosen: list[tuple[int, Path]], root: Path) -> np.ndarray:
    arrays: list[np.ndarray] = []
    for image, (_, file) in zip(opened, chosen, strict=True):
        array = np.asarray(image)
        if not arrays:
            pixels.require_memory(len(chosen) * array.size, str(root))
        elif array.shape[:2] != arrays[0].shape[:2]:
            height, width = array.shape[:2]
            first = f"{arrays[0].shape[1]}x{arrays[0].shape[0]}"
            raise DataError(
                f"image sizes differ: {chosen[0][1]} is {first}, {file} is {width}x{height}; "
                "give image_size (--image-size) to resize all."
            )
        arrays.append(array)
    if any(array.ndim == 3 for array in arrays):
        arrays = [np.repeat(a[..., None], 3, -1) if a.ndim == 2 else a for a in arrays]
        return np.stack(arrays)
    return np.stack(arrays)[..., None]
