import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jgia.federated import UpdateError, load_arrays, load_params, load_update
from jgia.models import flatten_params, make_victim

MLP = make_victim("mlp", input_shape=(2, 3, 2), num_classes=3, widths=(5,))
SUFFIXES = [".npz", ".safetensors"]


def _tree(victim):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype("float32"), victim.param_shapes()
    )


def _flat():
    return flatten_params(_tree(MLP))


def _refused(path, match, load=load_arrays, **options):
    with pytest.raises(UpdateError, match=match) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, (self.target,))

    def __init__(self, target):
        self.target = target


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pickles_never_run(tmp_path, suffix, monkeypatch):
    target = tmp_path / "exploded"
    bomb = np.array([_Bomb(str(target))], dtype=object)
    objects, raw = tmp_path / "objects.npz", tmp_path / f"raw{suffix}"
    np.savez(objects, **{"fc1/kernel": bomb})  # pyright: ignore[reportArgumentType]
    raw.write_bytes(pickle.dumps(_Bomb(str(target))))
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    _refused(objects, "pickled Python objects")
    _refused(objects, "pickled Python objects", load=lambda p: load_update(p, MLP, _tree(MLP)))
    _refused(raw, "truncated|damaged")
    assert not target.exists()
    monkeypatch.undo()
    np.load(objects, allow_pickle=True)["fc1/kernel"]  # the bomb is real
    assert target.exists()


def _npy(header, body=b"", version=(1, 0), length=None):
    code = "<H" if version[0] == 1 else "<I"
    size = struct.pack(code, len(header) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + header + body


def _header(descr="<f4", shape="(2,)", order="False"):
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def _zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .npy array"),
        (b"hello world", "not a .npy array"),
        (_npy(_header(), bytes(8), (9, 0)), "version 1, 2 or 3"),
        (_npy(_header(), bytes(8), (2, 0), 2**32 - 1), "declares 4294967295 bytes"),
        (_npy(_header(), bytes(8), (1, 0), 0), "declares 0 bytes"),
        (_npy(_header()[:30], length=60), "header .* is damaged"),
        (_npy(b"__import__('os').abort()"), "header .* is damaged"),
        (_npy(b"(" * 20000), "header .* is damaged"),
        (_npy(_header(shape=f"({2**50},)"), bytes(8)), "4503599627370496 bytes, but 8"),
        (_npy(_header(shape="(3,)"), bytes(8)), "12 bytes, but 8 bytes are stored"),
        (_npy(_header(shape="(1,)"), bytes(8)), "4 bytes, but 8 bytes are stored"),
        (_npy(_header(shape=f"({'9' * 5000},)"), bytes(8)), "shape that no array has"),
        (_npy(_header(shape=f"({'1,' * 40})"), bytes(4)), "shape that no array has"),
        (_npy(_header(shape="(1 1,)"), bytes(4)), "shape that no array has"),
        (_npy(_header(shape="(-1,)"), bytes(8)), "header .* is damaged"),
        (_npy(_header("|O"), b"\x80\x04."), "pickled Python objects"),
        (_npy(_header("<V2"), bytes(4)), "bfloat16.*in float32"),
        (_npy(_header("<U4"), bytes(32)), "dtype '<U4'"),
        (_npy(_header("<c8"), bytes(16)), "dtype '<c8'"),
        (_npy(_header("<f3"), bytes(6)), "dtype '<f3'"),
        (_npy(_header("<f16"), bytes(32)), "dtype '<f16'"),
    ],
)
def test_bad_npy_members(tmp_path, content, message):
    _refused(_zip(tmp_path / "u.npz", [("fc1/kernel.npy", content)]), message)


def _raw(value=0.0):
    return _npy(_header(), np.full(2, value, "<f4").tobytes())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_archives(tmp_path):
    path = tmp_path / "u.npz"
    _refused(_zip(path, [("a.npy", _raw()), ("a.npy", _raw(1.0))]), "duplicate names.*'a.npy'")
    _refused(_zip(path, [("a.npy", _raw()), ("setup\n.py", b"")]), r"not .npy arrays: 'setup\\n")
    _refused(_zip(path, [("a.npy", _raw())], zipfile.ZIP_BZIP2), "compressed in a way")
    content = bytearray(_zip(path, [("a.npy", _raw())]).read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    path.write_bytes(content)
    _refused(path, "encrypted")


def test_archives_that_declare_too_much(tmp_path):
    path = tmp_path / "bomb.npz"
    zeros = _npy(_header(shape="(1048576,)"), bytes(4 << 20))
    _zip(path, [("a.npy", zeros)], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 5000
    _refused(path, "more than the 4000000 allowed", max_bytes=4_000_000)
    _refused(path, "another model", load=lambda p: load_params(p, MLP))
    assert load_arrays(path)["a"].shape == (1 << 20,)  # a high ratio alone is no crime
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # more than deflate can expand to
    path.write_bytes(content)
    _refused(path, "impossible")
    # Many entries that share the same bytes.
    body = _zip(path, [("a.npy", _raw())]).read_bytes()
    start, end = body.index(b"PK\x01\x02"), body.index(b"PK\x05\x06")
    entries = b"".join(body[start:end].replace(b"a.npy", b"%c.npy" % c) for c in b"abcdefgh")
    tail = bytearray(body[end:])
    tail[8:12] = struct.pack("<HH", 8, 8)
    tail[12:16] = struct.pack("<I", len(entries))
    path.write_bytes(body[:start] + entries + tail)
    _refused(path, "declare more bytes than")


def _safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(dtype: object = "F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "declares 0 bytes, the file has 0"),
        (_safetensors({}, length=2**63), "declares 9223372036854775808 bytes"),
        (_safetensors({}, length=3), "declares 3 bytes"),
        (_safetensors(b"{nonsense"), "not valid JSON"),
        (_safetensors(b"[" * 100_000), "not valid JSON"),
        (_safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (_safetensors(b"\xff\xfe"), "not valid JSON"),
        (_safetensors([]), "not a JSON object"),
        (_safetensors(b'{"a": 1, "a": 2}'), "duplicate names.*'a'"),
        (_safetensors({"a": 3}), "not an object"),
        (_safetensors({"a": _entry("BF16", (4,))}, bytes(8)), "'BF16'.*in float32"),
        (_safetensors({"a": _entry("F8_E4M3", (8,))}, bytes(8)), "'F8_E4M3'"),
        (_safetensors({"a": _entry(["F32"])}, bytes(8)), "expected float32"),
        (_safetensors({"a": _entry(shape=(-2,))}, bytes(8)), "shape that no array has"),
        (_safetensors({"a": _entry(shape=(2.0,))}, bytes(8)), "shape that no array has"),
        (_safetensors({"a": _entry(shape=(True, 2))}, bytes(8)), "shape that no array has"),
        (_safetensors({"a": _entry(shape=(2,) + (1,) * 40)}, bytes(8)), "shape that no array"),
        (_safetensors({"a": _entry(shape=(2**62, 2**62))}, bytes(8)), "8 bytes are stored"),
        (_safetensors({"a": _entry(span=(0, 9))}, bytes(8)), "bytes outside the file"),
        (_safetensors({"a": _entry(span=(8, 0))}, bytes(8)), "bytes outside the file"),
        (_safetensors({"a": _entry(span=(0,))}, bytes(8)), "bytes outside the file"),
        (_safetensors({"a": _entry()}, bytes(9)), "without gaps"),
        (_safetensors({"a": _entry(), "b": _entry()}, bytes(8)), "without gaps"),
        (_safetensors({"a": _entry(span=(4, 12))}, bytes(12)), "without gaps"),
    ],
)
def test_bad_safetensors(tmp_path, content, message):
    path = tmp_path / "u.safetensors"
    path.write_bytes(content)
    _refused(path, message)


def test_safetensors_larger_than_allowed(tmp_path):
    path = tmp_path / "u.safetensors"
    path.write_bytes(_safetensors({"a": _entry()}, bytes(8)))
    assert load_arrays(path, max_bytes=8)["a"].tolist() == [0, 0]
    _refused(path, "declare 8 bytes, more than the 7 allowed", max_bytes=7)


def _valid(suffix):
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **_flat())  # pyright: ignore[reportArgumentType]
        return buffer.getvalue()
    return safetensors.numpy.save(_flat())


VALID = {suffix: _valid(suffix) for suffix in SUFFIXES}
QUIET = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _only_update_errors(path: Path, content: bytes):
    path.write_bytes(content)
    messages, sizes = [], []
    for load in (lambda: load_arrays(path, max_bytes=1 << 20), lambda: load_params(path, MLP)):
        try:
            sizes += [leaf.nbytes for leaf in jax.tree.leaves(load())]
        except UpdateError as error:  # anything else fails the test
            messages.append(str(error))
    assert all(re.fullmatch(r"[ -~]{1,1000}", message) for message in messages)
    assert sum(sizes) <= 2 << 20


@pytest.mark.parametrize("suffix", SUFFIXES)
@QUIET
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    cut=st.sampled_from([None, 1, 7, 64]),
)
def test_mutated_files_give_only_update_errors(tmp_path, suffix, edits, cut):
    content = bytearray(VALID[suffix])
    for where, value in edits:
        content[int(where * len(content))] = value
    _only_update_errors(tmp_path / f"u{suffix}", bytes(content[: None if cut is None else -cut]))


@QUIET
@given(edits=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_central_directory_gives_only_update_errors(tmp_path, edits):
    content = bytearray(VALID[".npz"])
    start = content.index(b"PK\x01\x02")
    for where, value in edits:
        content[start + where] = value
    _only_update_errors(tmp_path / "u.npz", bytes(content))


@QUIET
@given(
    old=st.sampled_from([b'"F32"', b"data_offsets", b"[", b"]", b",", b"0", b"5", b"12", b"{"]),
    new=st.sampled_from([b"", b"-1", b"1e400", b"null", b'"F64"', b"{", b"99999999999999999999"]),
    count=st.integers(1, 3),
)
def test_edited_safetensors_headers_give_only_update_errors(tmp_path, old, new, count):
    content = VALID[".safetensors"]
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].replace(old, new, count)
    whole = struct.pack("<Q", len(header)) + header + content[8 + length :]
    _only_update_errors(tmp_path / "u.safetensors", whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
@QUIET
@given(
    content=st.binary(max_size=200),
    prefix=st.sampled_from([b"", b"PK\x03\x04", b"\x10" + bytes(7)]),
)
def test_random_bytes_give_only_update_errors(tmp_path, suffix, content, prefix):
    _only_update_errors(tmp_path / f"u{suffix}", prefix + content)
