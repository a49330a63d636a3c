"""Atomic writes, and the checks of arguments."""

import os
import stat

import numpy as np
import pytest

from jgia import _checks
from jgia._io import atomic_write, atomic_write_bytes, require_writable_folder


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.bin"
    atomic_write_bytes(path, b"first")
    atomic_write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            file.flush()
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_file_has_the_rights_that_open_would_give(tmp_path):
    atomic_write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes[0] == modes[1]


def test_folder_is_made_and_left_clean(tmp_path):
    folder = require_writable_folder(tmp_path / "x" / "y")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_folder_that_cannot_be_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to the output folder .*--out"):
        require_writable_folder(tmp_path / "file" / below)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (_checks.positive, [1e-300, 5.0], [0.0, -1.0, INF, NAN]),
        (_checks.non_negative, [0.0, 2.0], [-1e-9, INF, NAN]),
        (_checks.fraction, [1e-9, 0.999], [0.0, 1.0, -0.5, NAN]),
        (lambda **v: _checks.at_least(2, **v), [2, 9], [1, -3]),
        (lambda **v: _checks.one_of(("a", "b"), **v), ["a", "b"], ["c", ""]),
    ],
    ids=["positive", "non_negative", "fraction", "at_least", "one_of"],
)
def test_checks(check, good, bad):
    for value in good:
        check(some_name=value)
    for value in bad:
        with pytest.raises(ValueError, match="some_name") as error:
            check(some_name=value)
        assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match="second"):
        check(first=good[0], second=bad[0])


def test_choices_are_listed():
    with pytest.raises(ValueError, match=r"x must be one of 'p', 'q'; got 'r'"):
        _checks.one_of((c for c in "pq"), x="r")


def test_numpy_scalars_are_numbers():
    _checks.positive(x=np.float32(1).item())
