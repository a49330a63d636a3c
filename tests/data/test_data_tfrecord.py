"""TFRecord framing against a bitwise CRC-32C, and damage that must be noticed."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.data import DataError
from jgia.data.tfrecord import crc32c, masked_crc32c, read_records


def bitwise_crc32c(data: bytes, polynomial: int = 0x82F63B78) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (polynomial if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def frame(data: bytes, checksum=bitwise_crc32c) -> bytes:
    def masked(content: bytes) -> bytes:
        crc = checksum(content)
        rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
        return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_published_checksums(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert bitwise_crc32c(data) == expected
    if data:
        assert bitwise_crc32c(data, 0xEDB88320) != expected  # the polynomial of zip


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.binary(max_size=40), repeats=st.integers(1, 90))
def test_checksum_agrees_with_the_bitwise_one(data: bytes, repeats: int) -> None:
    assert crc32c(data * repeats) == bitwise_crc32c(data * repeats)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 1023, 1024, 1025, 1027, 2048, 3001])
def test_checksum_at_the_ends_of_blocks(length: int) -> None:
    data = np.random.Generator(np.random.PCG64(length)).bytes(length)
    assert crc32c(data) == bitwise_crc32c(data)


def test_frames_of_another_writer(tmp_path: Path) -> None:
    # What TensorBoard 2.21's RecordWriter writes for b"abc", and the last checksum for a long one.
    foreign = bytes.fromhex("0300000000000000b099490e6162636e57f121")
    path = tmp_path / "a.tfrecord"
    path.write_bytes(foreign)
    assert list(read_records(path)) == [b"abc"]
    assert frame(b"abc") == foreign
    assert masked_crc32c(bytes(range(256)) * 5) == 0xFBB33244


@pytest.fixture
def records(tmp_path: Path) -> tuple[Path, list[bytes]]:
    contents = [b"first", b"", b"x" * 1500, b"last"]
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(map(frame, contents)))
    return path, contents


def test_records_come_back(records) -> None:
    path, contents = records
    assert list(read_records(path)) == contents
    assert list(read_records(path, skip=1, take=2)) == contents[1:3]
    assert list(read_records(path, skip=3)) == contents[3:]
    assert list(read_records(path, take=0)) == []


def test_each_flipped_byte_is_noticed(records) -> None:
    path, _ = records
    good = path.read_bytes()
    for place in [*range(60), 300, len(good) - 5, len(good) - 1]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"a\.tfrecord"):
            list(read_records(path))


def test_each_truncation_is_noticed(records) -> None:
    path, contents = records
    good = path.read_bytes()
    ends = np.cumsum([len(content) + 16 for content in contents])
    for size in [*range(1, 60), 400, len(good) - 1]:
        path.write_bytes(good[:size])
        if size in ends:
            assert list(read_records(path)) == contents[: list(ends).index(size) + 1]
        else:
            with pytest.raises(DataError, match="ends inside"):
                list(read_records(path))
        with pytest.raises(DataError, match="ends inside"):
            list(read_records(path, take=4))


def test_absurd_length_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    length = struct.pack("<Q", 2**62)
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + bytes(64))
    with pytest.raises(DataError, match="ends inside"):
        list(read_records(path))
    with pytest.raises(DataError, match="cannot read"):
        list(read_records(tmp_path / "absent"))
    with pytest.raises(DataError, match="cannot read"):
        list(read_records(tmp_path))
