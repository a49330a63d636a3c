"""NumPy archives: what is accepted, and that hostile ones end in one sentence."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jgia.data import DataError, load_dataset

RNG = np.random.Generator(np.random.PCG64(5))
X = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
Y = np.array([0, 2, 1, 0, 2, 1])


def save(folder: Path, **arrays) -> str:
    np.savez_compressed(folder / "data.npz", **arrays)
    return f"npz:{folder / 'data.npz'}"


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def header(descr: str, shape: str, version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text


def archive(folder: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> str:
    with zipfile.ZipFile(folder / "raw.npz", "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return f"npz:{folder / 'raw.npz'}"


def refuse(spec: str, message: str = "") -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_unchanged(tmp_path: Path, keys: tuple[str, str], order) -> None:
    spec = save(tmp_path, **{keys[0]: np.asarray(X, order=order), keys[1]: Y})
    data = load_dataset(spec)
    np.testing.assert_array_equal(data.images, X)
    np.testing.assert_array_equal(data.labels, Y)
    assert data.labels.dtype == np.int32
    assert data.class_names == ("0", "1", "2")
    assert data.public is None
    part = load_dataset(spec, limit=2)
    np.testing.assert_array_equal(part.images, X[:2])
    np.testing.assert_array_equal(part.labels, Y[:2])
    assert part.class_names == data.class_names  # the limit does not change the model


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", "<i8", ">u2"])
def test_other_dtypes_become_uint8_or_float32(tmp_path: Path, dtype: str) -> None:
    images = X.astype(dtype) / 256 if "f" in dtype else X.astype(dtype)
    data = load_dataset(save(tmp_path, x=images.astype(dtype), y=Y.astype(np.uint8)))
    assert data.images.dtype == (np.float32 if "f" in dtype else np.uint8)
    np.testing.assert_array_equal(data.images, X / 256 if "f" in dtype else X)


def test_grey_images_and_column_labels_get_their_axes(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path, x=X[..., 0], y=Y[:, None]))
    np.testing.assert_array_equal(data.images, X[..., :1])
    np.testing.assert_array_equal(data.labels, Y)


def test_names_public_and_missing_labels(tmp_path: Path) -> None:
    public = Y == 1
    names = np.array(["cat", "dog", "eel", "fox"])
    data = load_dataset(save(tmp_path, x=X, y=Y, names=names, public=public))
    assert data.class_names == ("cat", "dog", "eel", "fox")
    np.testing.assert_array_equal(data.public, public)
    bare = load_dataset(save(tmp_path, x=X))
    assert bare.class_names == ("unlabeled", "-")
    assert not bare.labels.any()
    one = load_dataset(save(tmp_path, x=X, y=Y * 0))
    assert one.class_names == ("0", "-")


@pytest.mark.parametrize("template", ["{key}_{part}", "{part}_{word}"])
def test_parts_are_chosen_by_suffix(tmp_path: Path, template: str) -> None:
    def name(key: str, word: str, part: str) -> str:
        return template.format(key=key, word=word, part=part)

    spec = save(
        tmp_path,
        **{name("x", "images", "train"): X, name("y", "labels", "train"): Y},
        **{name("x", "images", "test"): X[:3], name("y", "labels", "test"): Y[:3]},
    )
    assert len(load_dataset(spec)) == 6
    test = load_dataset(f"{spec}:test")
    np.testing.assert_array_equal(test.images, X[:3])
    np.testing.assert_array_equal(test.labels, Y[:3])
    assert "test" in test.name
    refuse(f"{spec}:val", "PART of test, train")


def lanczos(plane: np.ndarray, size: int) -> np.ndarray:
    """Lanczos-3 in NumPy, with the kernel widened where the image shrinks."""
    scale = plane.shape[0] / size
    width = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    places = np.arange(plane.shape[0]) + 0.5
    t = (places[None] - centers[:, None]) / width
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ plane @ weights.T


@pytest.mark.parametrize("size", [3, 4, 9])
def test_resizing_is_lanczos_on_the_center_square(tmp_path: Path, size: int) -> None:
    smooth = (X / 255).astype(np.float32)
    data = load_dataset(save(tmp_path, x=smooth, y=Y), image_size=size)
    assert data.image_shape == (size, size, 3)
    center = smooth[:, 0:4].astype(np.float64)  # 5 x 4: the center square starts at row 0
    expected = np.stack(
        [np.stack([lanczos(image[..., c], size) for c in range(3)], axis=-1) for image in center]
    )
    np.testing.assert_allclose(data.images, np.clip(expected, 0, 1), atol=2e-6)
    shifted = np.clip(lanczos(smooth[0, 1:5, :, 0].astype(np.float64), size), 0, 1)
    assert np.abs(data.images[0, ..., 0] - shifted).max() > 0.01
    mild = X // 4 + 96  # nothing to clip: bytes and floats differ by two roundings only
    as_bytes = load_dataset(save(tmp_path, x=mild, y=Y), image_size=size)
    as_floats = load_dataset(save(tmp_path, x=mild / 255, y=Y), image_size=size)
    assert as_bytes.images.dtype == np.uint8
    assert np.abs(as_bytes.images / 255 - as_floats.images).max() <= 2 / 255


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X.astype(np.float16) / 256, "y": Y}, "float16"),
        ({"x": X.astype(np.float32), "y": Y}, "divide by 255"),
        ({"x": np.full(X.shape, np.nan), "y": Y}, "finite"),
        ({"x": np.full(X.shape, -0.1), "y": Y}, "finite and in"),
        ({"x": X.astype(np.int32) + 1, "y": Y}, "scale them"),
        ({"x": X.astype(np.int32) - 1, "y": Y}, "scale them"),
        ({"x": X > 3, "y": Y}, "bool"),
        ({"x": X.astype(complex), "y": Y}, "dtype"),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, "transpose"),
        ({"x": X.repeat(2, -1), "y": Y}, "channels"),
        ({"x": X[0, 0, 0], "y": Y}, "shape"),
        ({"x": X[0, 0], "y": Y}, "differ in number"),  # vectors, but not six
        ({"x": X[None], "y": Y}, "shape"),
        ({"x": X[:0], "y": Y[:0]}, "empty"),
        ({"x": np.uint8(3), "y": Y}, "shape"),
        ({"x": X, "y": Y[:5]}, "differ in number"),
        ({"x": X, "y": Y / 2}, "integers"),
        ({"x": X, "y": Y > 0}, "integers"),
        ({"x": X, "y": Y - 1}, "from 0"),
        ({"x": X, "y": Y + 10**9}, "from 0"),
        ({"x": X, "y": np.full(6, 2**63, np.uint64)}, "from 0"),
        ({"x": X, "y": np.eye(6, dtype=int)}, "argmax"),
        ({"x": X, "y": np.array(list("abcdef"))}, "integers"),
        ({"x": X, "y": Y, "names": np.array(["a", "b"])}, r"0\.\.1"),
        ({"x": X, "y": Y, "names": np.arange(3)}, "strings"),
        ({"x": X, "y": Y, "public": np.ones(5, bool)}, "public"),
        ({"x": X, "y": Y, "public": Y}, "public"),
        ({"pictures": X, "y": Y}, "numpy.savez"),
    ],
)
def test_arrays_that_cannot_be_meant_are_refused(
    tmp_path: Path, arrays: dict, message: str
) -> None:
    refuse(save(tmp_path, **arrays), message)


def test_a_limit_does_not_hide_a_missing_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="differ in number"):
        load_dataset(save(tmp_path, x=X, y=Y[:5]), limit=2)


class Bomb:
    """Leaves a trace if somebody unpickles it."""

    def __reduce__(self):
        return (Path.touch, (Bomb.trace,))

    trace = Path("unset")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    Bomb.trace = tmp_path / "trace"
    objects = np.array([Bomb()], dtype=object)
    payload = npy(objects, pickled=True)
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.trace.exists()  # the trap works
    Bomb.trace.unlink()
    refuse(archive(tmp_path, x=payload, y=npy(Y)), "never unpickled")
    refuse(archive(tmp_path, x=npy(X), y=payload), "never unpickled")
    refuse(archive(tmp_path, x=npy(X), y=npy(Y), names=payload), "never unpickled")
    assert not Bomb.trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("'|u1'", "(1000000, 1000, 1000, 3)") + bytes(64), "damaged"),
        (header("'|u1'", "(2, 3, 4, 3)") + bytes(71), "damaged"),
        (header("'|u1'", "(2, 3, 4, 3)") + bytes(73), "damaged"),
        (header("'|u1'", "(-2, 3, -4, 3)") + bytes(72), "unusable|damaged"),
        (header("'<U0'", "(99999999999, 9)"), "unusable"),
        (header("'|V8'", "(1,)") + bytes(8), "unusable"),
        (header("[('a', '<f4')]", "(1,)") + bytes(4), "unusable"),
        (header("'|u1'", "(True, 3, 4, 3)"), "damaged"),
        (header("'|u1'", "'abc'"), "damaged"),
        (header("__import__('os')", "(1,)"), "damaged"),
        (header("'|u1'", "(" * 3000), "damaged"),
        (header("'|u1'", "(1,)" + " " * 60000), "damaged"),
        (header("'|u1'", "(1L,)"), "damaged|unusable|shape"),
        (header("'|u1'", "(6, 5, 4, 3)", b"\x07\x00") + X.tobytes(), "damaged"),
        (b"", "damaged"),
        (b"\x93NUMPY\x01", "damaged"),
        (b"hello", "damaged"),
    ],
)
def test_hostile_headers_are_refused_without_allocating(
    tmp_path: Path, content: bytes, message: str
) -> None:
    spec = archive(tmp_path, x=content, y=npy(Y))
    tracemalloc.start()
    try:
        refuse(spec, message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30e6


def test_newer_header_versions_are_read(tmp_path: Path) -> None:
    for version in (b"\x02\x00", b"\x03\x00"):
        content = header("'|u1'", "(6, 5, 4, 3)", version) + X.tobytes()
        np.testing.assert_array_equal(load_dataset(archive(tmp_path, x=content)).images, X)


def test_a_size_that_the_zip_only_claims_is_refused(tmp_path: Path) -> None:
    claimed = 40 * 2**30
    content = header("'|u1'", f"({claimed // 12}, 2, 2, 3)") + bytes(64)
    spec = archive(tmp_path, x=content)
    path = Path(spec.removeprefix("npz:"))
    raw = path.read_bytes()
    place = raw.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    for size in (claimed % 2**32, 2**32 - 2):
        path.write_bytes(raw[:place] + struct.pack("<I", size) + raw[place + 4 :])
        refuse(spec, "damaged")


def test_memory_is_bounded_and_the_limit_helps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("jgia.data.pixels.MAX_BYTES", 200)
    spec = save(tmp_path, x=X, y=Y)
    refuse(spec, "limit")
    assert len(load_dataset(spec, limit=3)) == 3


def test_damage_to_the_bytes_is_noticed(tmp_path: Path) -> None:
    spec = archive(tmp_path, zipfile.ZIP_STORED, x=npy(X), y=npy(Y))
    path = Path(spec.removeprefix("npz:"))
    good = path.read_bytes()
    load_dataset(spec)
    place = good.index(X.tobytes()[:32])
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refuse(spec, "CRC")
    path.write_bytes(good[: len(good) // 2])
    refuse(spec, "not a NumPy archive")
    refuse(archive(tmp_path, zipfile.ZIP_LZMA, x=npy(X), y=npy(Y)), "compression")
    path.write_bytes(npy(X))
    refuse(spec, "numpy.savez")
    path.write_bytes(pickle.dumps(X))
    refuse(spec, "numpy.savez")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, x=X, y=Y)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_dataset("npz:~/data.npz")) == 6


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    refuse(f"npz:{tmp_path / 'absent.npz'}", "No such file")
    refuse(f"npz:{tmp_path}", "directory")
    refuse("npz:a\0b", "check the path")


FUZZ = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_mutated_archives_load_or_end_in_one_sentence(tmp_path: Path, data) -> None:
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    spec = archive(tmp_path, method, x=npy(X[:2, :3]), y=npy(Y[:2]), names=npy(np.array(["a"] * 3)))
    path = Path(spec.removeprefix("npz:"))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(st.binary(max_size=6))
        stop = start + data.draw(st.integers(0, 6))
        raw[start:stop] = piece
        raw = raw or bytearray(1)
    path.write_bytes(bytes(raw))
    with contextlib.suppress(DataError):
        loaded = load_dataset(spec, limit=data.draw(st.sampled_from([None, 1])))
        assert loaded.images.dtype in (np.uint8, np.float32)


@FUZZ
@given(
    text=st.one_of(
        st.binary(max_size=200),
        st.text(
            alphabet="{}()[],:'\"<|uifOVU0123456789 descrfotanhpe_ TrueFalse\n", max_size=120
        ).map(str.encode),
    ),
    body=st.binary(max_size=64),
)
def test_arbitrary_headers_end_in_one_sentence(tmp_path: Path, text: bytes, body: bytes) -> None:
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    with pytest.raises(DataError):
        load_dataset(archive(tmp_path, x=content, y=npy(Y)))


@FUZZ
@given(content=st.binary(max_size=300))
def test_arbitrary_files_end_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.npz"
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_dataset(f"npz:{path}")


@pytest.mark.parametrize(
    ("file", "shape", "classes"),
    [
        ("cifar10_test10k.npz", (32, 32, 3), 10),
        ("mnist_test10k.npz", (28, 28, 1), 10),
        ("kodak24_128.npz", (128, 128, 3), 2),
        ("pneumonia_mnist.npz", (28, 28, 1), 2),
        ("bccd_cells64.npz", (64, 64, 3), 3),
    ],
)
def test_benchmark_files(shared_data: Path, file: str, shape: tuple, classes: int) -> None:
    data = load_dataset(f"npz:{shared_data / file}", limit=20)
    assert data.image_shape == shape
    assert data.num_classes == classes
    with np.load(shared_data / file, allow_pickle=False) as raw:
        key = "x" if "x" in raw.files else "x_train"
        np.testing.assert_array_equal(data.images.reshape(20, -1), raw[key][:20].reshape(20, -1))


def test_vectors_are_images_one_pixel_high(tmp_path):
    rows = np.random.default_rng(0).random((6, 5)).astype(np.float32)
    np.savez(tmp_path / "table.npz", images=rows, labels=np.arange(6) % 2)
    dataset = load_dataset(f"npz:{tmp_path / 'table.npz'}")
    assert dataset.image_shape == (1, 5, 1)
    images, _ = dataset.take(np.arange(6))
    np.testing.assert_array_equal(images[:, 0, :, 0], rows)
