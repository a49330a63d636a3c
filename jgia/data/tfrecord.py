r"""TFRecord files without TensorFlow.

A file is a sequence of records, each ``length (8 bytes, little endian), masked CRC-32C of the
length (4), data, masked CRC-32C of the data (4)``, with

$$ \operatorname{mask}(c) = ((c \gg 15) \mid (c \ll 17)) + \mathtt{0xa282ead8} \pmod{2^{32}}. $$

References:
  The format is described in TensorFlow's guide "TFRecord and tf.train.Example"; CRC-32C in
  RFC 3720 (2004), appendix B.4.
"""

from __future__ import annotations

import functools
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jgia.data.dataset import DataError

_POLYNOMIAL = np.uint32(0x82F63B78)  # Castagnoli, bit-reversed
_BLOCK = 1024


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of a byte string.

    The checksum is linear over GF(2), so the contributions of up to 1024 bytes are looked up by
    value and position and combined by exclusive or in one pass.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table = _tables()
    array = np.frombuffer(data, np.uint8)
    state = 0xFFFFFFFF
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK].copy()
        head = min(4, len(block))
        block[:head] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)[:head]
        # Byte i is followed by len - 1 - i others: row k of the table serves a byte before k.
        terms = table[np.arange(len(block) - 1, -1, -1), block]
        state = (state >> (8 * head)) ^ int(np.bitwise_xor.reduce(terms))
    return state ^ 0xFFFFFFFF


@functools.cache
def _tables() -> np.ndarray:
    """Row k, column b: the checksum register after byte b and k zero bytes, from zero."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), _POLYNOMIAL, np.uint32(0))
    rows = [table]
    for _ in range(_BLOCK - 1):
        rows.append((rows[-1] >> np.uint32(8)) ^ table[rows[-1] & np.uint32(0xFF)])
    return np.stack(rows)


def masked_crc32c(data: bytes) -> int:
    """The masked checksum that TFRecord files store beside lengths and data."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(
    path: str | os.PathLike[str], *, skip: int = 0, take: int | None = None
) -> Iterator[bytes]:
    """Read the records of one file in order.

    Args:
      path: the file, uncompressed.
      skip: records to pass over first; of these only the lengths are checked.
      take: records to yield, or ``None`` for all that follow.

    Yields:
      The data of each record.

    Raises:
      DataError: a checksum does not match, or the file ends early; the file is named.
    """
    location = Path(path)
    try:
        with location.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            index = 0
            while take is None or index < skip + take:
                if file.tell() == size and take is None:
                    return
                length = _read_length(file, location, index, size)
                if index < skip:
                    file.seek(length + 4, os.SEEK_CUR)
                else:
                    data = file.read(length)
                    _compare(data, file.read(4), location, index)
                    yield data
                index += 1
    except OSError as error:
        raise DataError(
            f"cannot read {location} ({error.strerror}); prepare the data set again."
        ) from error


def _read_length(file: io.BufferedIOBase, location: Path, index: int, size: int) -> int:
    header = file.read(12)
    if len(header) == 12:
        _compare(header[:8], header[8:], location, index)
        length = int.from_bytes(header[:8], "little")
        if length <= size - file.tell() - 4:
            return length
    raise DataError(f"{location} ends inside record {index}; prepare the data set again.")


def _compare(data: bytes, stored: bytes, location: Path, index: int) -> None:
    if stored != struct.pack("<I", masked_crc32c(data)):
        raise DataError(
            f"{location} is damaged: record {index} does not match its checksum; prepare the "
            "data set again."
        )
