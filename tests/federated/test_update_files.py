import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jgia.federated import UpdateError, load_arrays, load_params, load_update, save_update
from jgia.models import flatten_params, make_victim, unflatten_params
from jgia.observation import ThreatModel

VICTIMS = {
    "cnn": make_victim("cnn", input_shape=(4, 5, 3), num_classes=3, widths=(2,), fc_width=4),
    "mlp": make_victim("mlp", input_shape=(2, 3, 2), num_classes=3, widths=(5,)),
    "lenet": make_victim("lenet", input_shape=(5, 7, 1), num_classes=2, widths=(2, 3)),
    "convnet": make_victim("convnet", input_shape=(5, 4, 2), num_classes=2, widths=(8,)),
}
MLP = VICTIMS["mlp"]
SUFFIXES = [".npz", ".safetensors"]


def _tree(victim, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), victim.param_shapes()
    )


def _flat(victim=MLP):
    return flatten_params(_tree(victim))


def _same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def _refused(path, match, load=load_arrays, **options):
    with pytest.raises(UpdateError, match=match) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layout", ["flax", "torch"])
@pytest.mark.parametrize("name", VICTIMS)
def test_round_trip(tmp_path, name, layout, suffix):
    victim, path = VICTIMS[name], tmp_path / f"new/folder/update{suffix}"
    tree, params = _tree(victim), _tree(victim, seed=1)
    save_update(path, tree, layout=layout, victim=victim)
    told = ThreatModel(num_examples=4)
    seen = load_update(path, victim, params, threat_model=told, layout=layout)
    _same(seen.update, tree)
    assert (seen.params, seen.victim, seen.threat_model) == (params, victim, told)
    _same(load_params(path, victim, layout=layout), tree)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_readers_agree(tmp_path, suffix, dtype):
    path, tree = tmp_path / f"u{suffix}", _tree(MLP, dtype)
    tree["fc1"]["kernel"] = np.asfortranarray(tree["fc1"]["kernel"])
    save_update(path, jax.tree.map(jnp.asarray, tree))
    theirs = dict(np.load(path)) if suffix == ".npz" else safetensors.numpy.load_file(path)
    _same(unflatten_params(theirs), tree)
    assert {"fc1/kernel", "head/bias"} < set(theirs)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_other_writers_are_read(tmp_path, suffix):
    path = tmp_path / f"u{suffix.upper()}"
    arrays = _flat() | {"scalar": np.float32(3), "empty": np.zeros((0, 2)), "i": np.arange(3)}
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    if suffix == ".npz":
        arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        arrays["big"] = np.arange(4, dtype=">f4")
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    else:
        safetensors.numpy.save_file(arrays, path, metadata={"a": "b"})
    read = load_arrays(path)
    assert set(read) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)
        assert read[name].shape == value.shape
        assert read[name].dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_trees_give_equal_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        save_update(tmp_path / f"{name}{suffix}", _tree(MLP))
    save_update(tmp_path / f"c{suffix}", _tree(MLP, seed=1))
    a, b, c = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_all_zero_compressed_update_is_not_a_bomb(tmp_path, suffix):
    victim = make_victim("mlp", input_shape=(32, 32, 1), num_classes=3, widths=(256,))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "float64"), victim.param_shapes())
    path = tmp_path / f"u{suffix}"
    save_update(path, tree)
    if suffix == ".npz":
        np.savez_compressed(path, **flatten_params(tree))  # pyright: ignore[reportArgumentType]
    _same(load_params(path, victim), tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head/bias": np.array([np.nan, 0, 0], np.float32)}, "head/bias has 1 NaN"),
        ({"head/bias": np.zeros(3, np.float16)}, "head/bias must be float32 or float64"),
        ({"head/bias": np.zeros(3, int)}, "head/bias must be float32 or float64"),
        ({"head/bias": np.zeros(4, np.float32)}, r"shape \(3,\), got \(4,\)"),
        ({"more": np.zeros(3, np.float32)}, "not in the model: 'more'"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_refuses_what_loading_would(tmp_path, change, message, suffix):
    path = tmp_path / f"u{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(UpdateError, match=message):
        save_update(path, unflatten_params(_flat() | change), victim=MLP)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_refuses_layouts_and_suffixes(tmp_path):
    with pytest.raises(ValueError, match="needs victim="):
        save_update(tmp_path / "u.npz", _tree(MLP), layout="torch")
    with pytest.raises(UpdateError, match=r"\.h5 file.*expected \.npz or \.safetensors"):
        save_update(tmp_path / "u.h5", _tree(MLP))
    with pytest.raises(UpdateError, match="has 1 NaN"):
        save_update(tmp_path / "u.npz", {"a": np.array([np.nan])})
    assert not list(tmp_path.iterdir())


def test_paths_that_are_not_files(tmp_path):
    _refused(tmp_path / "none.npz", "no such file")
    _refused(tmp_path, "a folder")
    (tmp_path / "folder.npz").mkdir()
    _refused(tmp_path / "folder.npz", "a folder")
    os.mkfifo(tmp_path / "pipe.npz")
    _refused(tmp_path / "pipe.npz", "not a regular one")
    _refused(tmp_path / "u\n\x1b.npz", r"u\\n\\x1b")
    _refused(tmp_path / "u.pt", "pickle, which runs code")
    _refused(tmp_path / "u", "no suffix")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_refused(tmp_path, suffix):
    path = tmp_path / f"u{suffix}"
    save_update(path, _tree(MLP))
    content = path.read_bytes()
    for length in [*range(40), *range(40, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:length])
        _refused(path, "truncated|damaged|not a")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_entry_of_a_zip_fails_its_checksum(tmp_path, suffix):
    path = tmp_path / f"u{suffix}"
    save_update(path, _tree(MLP))
    content = bytearray(path.read_bytes())
    data = _tree(MLP)["fc1"]["kernel"].tobytes()
    content[content.index(data)] ^= 1
    path.write_bytes(content)
    if suffix == ".npz":
        _refused(path, "CRC")
    else:  # safetensors has no checksum: the value changes
        assert not np.array_equal(load_arrays(path)["fc1/kernel"], _tree(MLP)["fc1"]["kernel"])


def _without(flat, name):
    return {key: value for key, value in flat.items() if key != name}


def test_a_compressed_entry_is_checked_against_its_checksum(tmp_path):
    path = tmp_path / "u.npz"
    np.savez_compressed(path, a=np.arange(5000.0), empty=np.zeros(0))
    content = path.read_bytes()
    for entry in (content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02")):
        damaged = bytearray(content)
        damaged[entry + 16] ^= 1  # the checksum in the central directory
        path.write_bytes(damaged)
        _refused(path, "CRC")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (_without(_flat(), "head/bias"), "missing head/bias"),
        (_flat() | {"x\n": np.zeros(1, "f4")}, r"not in the model: 'x\\n'"),
        (_flat() | {"fc1/kernel": _flat()["fc1/kernel"].T.copy()}, r"permuted.*layout torch"),
        (_flat() | {"head/bias": np.array([1, np.inf, 0], "f4")}, "head/bias has 1 NaN or inf"),
        (_flat() | {"head/bias": np.zeros(3, "f2")}, "got float16.*float32"),
        (_flat() | {"head/bias": np.zeros(3, "i4")}, "got int32"),
        (flatten_params(_tree(VICTIMS["convnet"])), "does not fit|do not fit|another model"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_do_not_fit_the_model(tmp_path, arrays, message, suffix):
    path = tmp_path / f"u{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    else:
        safetensors.numpy.save_file(arrays, path)
    _refused(path, message, load=lambda p: load_update(p, MLP, _tree(MLP)))
    _refused(path, message, load=lambda p: load_params(p, MLP))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_wrong_layout_is_named(tmp_path, suffix):
    path = tmp_path / f"u{suffix}"
    save_update(path, _tree(MLP), layout="torch", victim=MLP)
    _refused(path, "--layout torch", load=lambda p: load_params(p, MLP))
    save_update(path, _tree(MLP))
    _refused(path, "--layout flax", load=lambda p: load_params(p, MLP, layout="torch"))
    np.savez(tmp_path / "half.npz", **{"fc1.weight": np.zeros((5, 12), "f2")})  # pyright: ignore[reportArgumentType]
    _refused(tmp_path / "half.npz", "missing", load=lambda p: load_params(p, MLP, layout="torch"))


def test_parameters_that_do_not_fit_are_not_the_fault_of_the_file(tmp_path):
    path = tmp_path / "u.npz"
    save_update(path, _tree(MLP))
    with pytest.raises(ValueError, match="the parameters do not fit") as caught:
        load_update(path, MLP, {})
    assert not isinstance(caught.value, UpdateError)
