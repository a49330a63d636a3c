"""Read and write .safetensors; the header is checked before the library sees the file."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import safetensors

from jgia.federated._errors import UpdateError, shown
from jgia.federated._npz import check_total, half_precision

_MAX_HEADER = 1 << 24
_MAX_DIMENSIONS = 32
_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_NAMES = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}


def write_safetensors(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Stream float32/float64 arrays in the safetensors format, without a second copy of them."""
    header, offset = {}, 0
    for name, array in arrays.items():
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays.values():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        if little.size:
            file.write(little.data.cast("B"))


def read_safetensors(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Check the header against the file, then read through the safetensors library.

    Raises:
      UpdateError: the header is not what the file holds.
      Exception: what the library raises; the caller translates.
    """
    names = _check_header(path, max_bytes)
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in names}


def _check_header(path: Path, max_bytes: int) -> list[str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
            raise UpdateError(
                f"the header declares {length} bytes, the file has {size}; it is truncated or "
                "not a safetensors file."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UpdateError:
        raise
    except (ValueError, RecursionError) as error:
        raise UpdateError("the header is not valid JSON; the file is damaged.") from error
    if not isinstance(header, dict):
        raise UpdateError("the header is not a JSON object; the file is damaged.")
    header.pop("__metadata__", None)
    stored = size - 8 - length
    spans = sorted(_check_entry(shown([name]), entry, stored) for name, entry in header.items())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != stored:
        raise UpdateError(
            f"the arrays do not fill the {stored} bytes after the header without gaps and "
            "overlaps; the file is damaged or truncated."
        )
    check_total(stored, max_bytes)
    return list(header)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [name for name, count in counts.items() if count > 1]
        raise UpdateError(f"duplicate names in the header: {shown(twice)}.")
    return result


def _check_entry(name: str, entry: Any, stored: int) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise UpdateError(f"the header entry of {name} is not an object.")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        raise UpdateError(half_precision(name, ascii(dtype)[:40]))
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise UpdateError(f"{name} declares a shape that no array has.")
    if not _naturals(span) or len(span) != 2 or not span[0] <= span[1] <= stored:
        raise UpdateError(f"{name} declares bytes outside the file; it is damaged or truncated.")
    if math.prod(shape) * _ITEMSIZE[dtype] != span[1] - span[0]:
        raise UpdateError(
            f"{name} declares shape {tuple(shape)} of {dtype}, but {span[1] - span[0]} bytes are "
            "stored; the file is damaged."
        )
    return span[0], span[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )
