"""NumPy archives from strangers: nothing is unpickled, no header is believed unchecked."""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.lib import format as npy_format

from jgia.data import pixels
from jgia.data.dataset import DataError, Dataset

_IMAGES = ("x", "images")
_LABELS = ("y", "labels")
_NAMES = ("names", "class_names")
_CHUNK = 1 << 20
_MAX_DEFLATE_RATIO = 1040  # the format itself cannot exceed 1032 : 1
_READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def load(path: str, *, image_size: int | None = None, limit: int | None = None) -> Dataset:
    """Load ``PATH`` or ``PATH:SPLIT``; see :func:`jgia.data.load_dataset`.

    Raises:
      DataError: no such file, not a NumPy archive, missing arrays, or malformed ones.
    """
    location, split = _split_suffix(os.path.expanduser(path))
    name = location.stem if split is None else f"{location.stem}:{split}"
    try:
        with zipfile.ZipFile(location) as archive:
            return _Archive(archive, location).dataset(name, split, image_size, limit)
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{location} is not a NumPy archive ({error}); write it with numpy.savez."
        ) from error
    except (*_READ_ERRORS, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read {location} ({reason}); check the path, or write it again with "
            "numpy.savez."
        ) from error


def _split_suffix(path: str) -> tuple[Path, str | None]:
    head, colon, tail = path.rpartition(":")
    if colon and re.fullmatch(r"[A-Za-z0-9]\w*", tail) and not Path(path).exists():
        return Path(head), tail
    return Path(path), None


class _Archive:
    def __init__(self, archive: zipfile.ZipFile, location: Path) -> None:
        self.archive = archive
        self.location = location
        self.bytes_on_disk = location.stat().st_size
        self.keys = {
            name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")
        }

    def dataset(
        self, name: str, split: str | None, image_size: int | None, limit: int | None
    ) -> Dataset:
        x_key, y_key, part = self._image_and_label_keys(split)
        where = f"in {self.location}"
        images, count = self.read(x_key, limit)
        images = pixels.resize(pixels.as_images(images, f"{x_key} {where}"), image_size)
        names = self._class_names()
        if y_key is None:
            labels, names = np.zeros(len(images), np.int32), ("unlabeled", "-")
        else:
            # All labels, so that the number of classes does not depend on the limit.
            labels, _ = self.read(y_key, None)
            labels, names = pixels.as_labels(labels, names, count, f"{y_key} {where}")
            labels = labels[:limit]
        public = None
        if part is None and "public" in self.keys:
            public, _ = self.read("public", None)
            if public.dtype != np.bool_ or public.shape != (count,):
                raise DataError(
                    f"public {where} must be bool with one entry per image, "
                    f"got {public.dtype} {public.shape}."
                )
            public = public[:limit]
        of_part = f", part {part!r}" if part else ""
        return Dataset(
            images=images,
            labels=labels,
            class_names=names,
            name=name,
            provenance=f"NumPy archive {self.location.name}{of_part}.",
            public=public,
        )

    def _image_and_label_keys(self, split: str | None) -> tuple[str, str | None, str | None]:
        if split is None and (whole := _first(_IMAGES, self.keys)) is not None:
            return whole, _first(_LABELS, self.keys), None
        splits = {
            match["a"] or match["b"]
            for key in self.keys
            if (match := re.fullmatch(r"x_(?P<a>\w+)|(?P<b>\w+)_images", key))
        }
        if not splits:
            listed = ", ".join(sorted(self.keys)[:8]) or "none"
            raise DataError(
                f"{self.location} has no images under x or images (its arrays: {listed}); "
                "save them with numpy.savez(path, x=images, y=labels)."
            )
        part = split or "train"
        if part not in splits:
            raise DataError(
                f"{self.location} has no part {part!r}; use npz:PATH:PART with PART of "
                f"{', '.join(sorted(splits))}."
            )
        x_key = _first((f"x_{part}", f"{part}_images"), self.keys)
        return x_key or part, _first((f"y_{part}", f"{part}_labels"), self.keys), part

    def _class_names(self) -> Sequence[str] | None:
        key = _first(_NAMES, self.keys)
        if key is None:
            return None
        names, _ = self.read(key, None)
        if names.ndim != 1 or names.dtype.kind != "U" or names.size == 0:
            raise DataError(
                f"{key} in {self.location} must be a list of strings, got {names.dtype} "
                f"{names.shape}; save it with numpy.array([...])."
            )
        return [str(name) for name in names]

    def read(self, key: str, limit: int | None) -> tuple[np.ndarray, int]:
        """Read one array, or its first ``limit`` rows, once its header fits its size.

        Returns:
          The array, and how many rows are stored.
        """
        info = self.archive.getinfo(f"{key}.npy")
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
            raise self._bad(key, "an unusual compression")
        ratio = 1 if stored else _MAX_DEFLATE_RATIO
        if info.compress_size > self.bytes_on_disk:
            raise self._bad(key, "more bytes declared than the file has")
        if info.file_size > ratio * info.compress_size + _CHUNK:
            raise self._bad(key, "an impossible size")
        with cast(zipfile.ZipExtFile, self.archive.open(info)) as member:
            shape, fortran, dtype = self._header(key, member)
            declared = math.prod(shape) * dtype.itemsize
            if declared != info.file_size - member.tell():
                raise self._bad(
                    key, f"a header of {declared} bytes over {info.file_size - member.tell()}"
                )
            rows = shape[0] if shape else 1
            if limit is not None and shape and not fortran:
                shape = (min(limit, shape[0]), *shape[1:])
            num_bytes = math.prod(shape) * dtype.itemsize
            pixels.require_memory(num_bytes, f"{key} in {self.location}")
            buffer = bytearray()
            while len(buffer) < num_bytes:
                chunk = member.read(min(_CHUNK, num_bytes - len(buffer)))
                if not chunk:
                    raise self._bad(key, "fewer bytes than declared")
                buffer += chunk
            if num_bytes == declared and member.read(1):  # reaching the end checks the CRC
                raise self._bad(key, "more bytes than declared")
        array = np.frombuffer(buffer, dtype).reshape(shape, order="F" if fortran else "C")
        if limit is not None and shape:
            array = array[:limit]
        # numpy.ascontiguousarray would turn a scalar into a vector.
        return np.asarray(array, dtype.newbyteorder("="), order="C"), rows

    def _header(
        self, key: str, member: zipfile.ZipExtFile
    ) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # headers written by Python 2 only read slower
                version = npy_format.read_magic(member)
                if version == (1, 0):
                    shape, fortran, dtype = npy_format.read_array_header_1_0(member)
                elif version in ((2, 0), (3, 0)):  # 3.0 differs only in names of fields
                    shape, fortran, dtype = npy_format.read_array_header_2_0(member)
                else:
                    raise ValueError(f"format version {version}")
        except Exception as error:  # whatever a parser says of hostile bytes, they are malformed
            raise self._bad(key, f"no readable header: {str(error)[:80]}") from error
        if dtype.hasobject:
            raise DataError(
                f"{key} in {self.location} holds Python objects, which are never unpickled; "
                "save plain arrays (uint8 images, integer labels)."
            )
        if dtype.kind not in "biufU" or dtype.itemsize == 0 or min(shape, default=0) < 0:
            raise DataError(
                f"{key} in {self.location} has unusable dtype {dtype} or shape {shape}; save "
                "uint8 images and integer labels."
            )
        return shape, fortran, dtype

    def _bad(self, key: str, reason: str) -> DataError:
        return DataError(
            f"{key} in {self.location} is damaged ({reason}); write the archive again with "
            "numpy.savez."
        )


def _first(candidates: Sequence[str], keys: set[str]) -> str | None:
    return next((key for key in candidates if key in keys), None)
