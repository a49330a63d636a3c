"""Read and write .npz without trusting it: no pickle, no eval, no allocation before the checks."""

from __future__ import annotations

import collections
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

import numpy as np

from jgia.federated._errors import UpdateError, shown

_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER = 1 << 16
_MAX_DEFLATE_RATIO = 1032  # no deflate stream expands further than this
_CHUNK = 1 << 20
_MAX_DIMENSIONS = 32
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same arrays give the same bytes

# The header is a Python literal; this is the only form that NumPy writes for plain arrays.
_HEADER = re.compile(
    r"\{'descr': ?'([^']{1,16})', ?'fortran_order': ?(True|False), ?"
    r"'shape': ?\(([0-9, ]*)\),? ?\}[ \n]*"
)
_PLAIN = re.compile(r"[<>|=](?:f[248]|[iu][1248]|b1)")


def write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``name.npy`` members, uncompressed, streaming (no second copy of an array)."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


def read_npz(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Read every member; sizes are checked against the file before anything is allocated.

    Raises:
      UpdateError: the archive or a member is not what it declares.
      Exception: whatever :mod:`zipfile` and :mod:`zlib` raise on damaged bytes; the caller
        translates.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(members, path.stat().st_size, max_bytes)
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            with cast(zipfile.ZipExtFile, archive.open(member)) as stream:
                arrays[name] = _read_npy(stream, member.file_size, shown([name]))
        return arrays


def _check_members(members: list[zipfile.ZipInfo], size: int, max_bytes: int) -> None:
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        raise UpdateError(f"duplicate names in the archive: {shown(twice)}.")
    strange = [name for name in names if not name.endswith(".npy")]
    if strange:
        raise UpdateError(
            f"the archive holds members that are not .npy arrays: {shown(strange)}; "
            "write it with numpy.savez."
        )
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise UpdateError(
                f"{shown([member.filename])} is encrypted or compressed in a way that NumPy does "
                "not write; write the archive with numpy.savez."
            )
        ratio = 1 if member.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO
        if member.file_size > ratio * member.compress_size:
            raise UpdateError(
                f"{shown([member.filename])} declares {member.file_size} bytes from "
                f"{member.compress_size} stored ones, which is impossible; the file is damaged "
                "or made to exhaust memory."
            )
    if sum(member.compress_size for member in members) > size:
        raise UpdateError(
            f"the members declare more bytes than the {size} of the file; it is truncated or "
            "its members overlap."
        )
    check_total(sum(member.file_size for member in members) - 128 * len(members), max_bytes)


def check_total(declared: int, max_bytes: int) -> None:
    """Raise if the declared bytes of all arrays together exceed the limit."""
    if declared > max_bytes:
        raise UpdateError(
            f"the arrays declare {declared} bytes, more than the {max_bytes} allowed here; "
            "is it the update of another model?"
        )


def _read_npy(stream: zipfile.ZipExtFile, file_size: int, name: str) -> np.ndarray:
    dtype, fortran, shape, header_size = _read_header(stream, name)
    expected, stored = math.prod(shape) * dtype.itemsize, file_size - header_size
    if expected != stored:
        raise UpdateError(
            f"{name} declares shape {shape} of {dtype}, {expected} bytes, but {stored} bytes are "
            "stored; the file is damaged or truncated."
        )
    array = np.empty(math.prod(shape), dtype)
    if expected:
        target = array.data.cast("B")
        for start in range(0, expected, _CHUNK):
            piece = target[start : start + _CHUNK]
            if stream.readinto(piece) != len(piece):
                raise UpdateError(f"{name} ends early; the file is truncated.")
    # zipfile compared the checksum when the last byte was read.
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _read_header(
    stream: zipfile.ZipExtFile, name: str
) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    start = stream.read(8)
    if len(start) != 8 or not start.startswith(_MAGIC) or start[6] not in (1, 2, 3):
        raise UpdateError(f"{name} is not a .npy array of version 1, 2 or 3.")
    width, code = (2, "<H") if start[6] == 1 else (4, "<I")
    field = stream.read(width)
    length = struct.unpack(code, field)[0] if len(field) == width else 0
    if not 0 < length <= _MAX_NPY_HEADER:
        raise UpdateError(
            f"the array header of {name} declares {length} bytes; expected 1 to {_MAX_NPY_HEADER}."
        )
    text = stream.read(length)
    match = _HEADER.fullmatch(text.decode("latin-1"))
    if len(text) != length or match is None:
        raise UpdateError(
            f"the array header of {name} is damaged, or describes records instead of numbers."
        )
    descr, fortran, axes = match.groups()
    if "O" in descr:
        raise UpdateError(
            f"{name} holds pickled Python objects, which run code when they are read; refused. "
            "Export plain float32 arrays."
        )
    if "V" in descr:
        raise UpdateError(half_precision(name, f"raw bytes ({descr!a}), perhaps bfloat16"))
    if not _PLAIN.fullmatch(descr):
        raise UpdateError(f"{name} has dtype {descr!a}; expected float32 or float64.")
    sizes = [part.strip() for part in axes.split(",") if part.strip()]
    if len(sizes) > _MAX_DIMENSIONS or any(len(part) > 18 or " " in part for part in sizes):
        raise UpdateError(f"{name} declares a shape that no array has.")
    shape = tuple(int(part) for part in sizes)
    return np.dtype(descr), fortran == "True", shape, 8 + width + length


def half_precision(name: str, found: str) -> str:
    """The message for an array in a format that NumPy cannot hold."""
    return (
        f"{name} is stored as {found}; expected float32 or float64. Half precision cannot hold "
        "the differences that the read-out takes: export the update in float32."
    )
