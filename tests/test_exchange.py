"""Crafted parameters out, a client's update back in, without this library's client."""

import json

import jax
import numpy as np
import pytest

from jgia.config import AresOptions, AttackConfig, CraftConfig, DataConfig, ModelConfig
from jgia.data import load_dataset, split_client_public
from jgia.exchange import attack_update, write_crafted
from jgia.federated import UpdateError, from_torch_layout, load_arrays
from jgia.models import make_victim
from jgia.normalization import Normalization
from jgia.report import validate_result

DATA = DataConfig(num_public=64)
ARES = AresOptions(front_end="signed")
MODEL = ModelConfig(fc_width=64, widths=(6,))


def _craft(folder, **kwargs):
    config = CraftConfig(data=DATA, model=MODEL, ares=ARES, out=folder, **kwargs)
    return write_crafted(config)


@pytest.fixture(scope="module")
def private():
    client, _ = split_client_public(load_dataset("sample"), seed=0, num_client=4, num_public=16)
    return client.take(np.arange(4))


def _numpy_gradient(arrays, description, images, labels) -> dict[str, np.ndarray]:
    """A client in NumPy alone, in PyTorch's layout: two linear layers on one convolution.

    Only files are exchanged: names, shapes and normalization as they are written there.
    """
    stats = description["normalization"]
    x = (images - np.array(stats["mean"])) / np.array(stats["std"])
    x = np.transpose(x, (0, 3, 1, 2))
    n, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.stack(
        [padded[:, :, a : a + height, b : b + width] for a in range(3) for b in range(3)], axis=2
    )  # n, c, 9, h, w
    weight = arrays["conv1.weight"].astype(np.float64)
    kernel = weight.reshape(*weight.shape[:2], 9)
    z = np.einsum("fck,nckij->nfij", kernel, patches) + arrays["conv1.bias"][:, None, None]
    h = np.maximum(z, 0).reshape(n, -1)
    w1, w2 = arrays["fc.weight"].astype(np.float64), arrays["head.weight"].astype(np.float64)
    s = h @ w1.T + arrays["fc.bias"]
    a = np.maximum(s, 0)
    logits = a @ w2.T + arrays["head.bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    d_logits = (p - np.eye(p.shape[1])[labels]) / n
    d_s = (d_logits @ w2) * (s > 0)
    d_z = ((d_s @ w1) * (h > 0)).reshape(z.shape)
    return {
        "conv1.weight": np.einsum("nfij,nckij->fck", d_z, patches).reshape(weight.shape),
        "conv1.bias": d_z.sum(axis=(0, 2, 3)),
        "fc.weight": d_s.T @ h,
        "fc.bias": d_s.sum(axis=0),
        "head.weight": d_logits.T @ a,
        "head.bias": d_logits.sum(axis=0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_round_trip_with_a_client_in_numpy(layout, form, tmp_path, private, best_psnr):
    images, labels = private
    paths = _craft(tmp_path, layout=layout, format=form)
    assert [path.name for path in paths] == [f"params.{form}", "victim.json"]
    description = json.loads(paths[1].read_text())
    arrays = load_arrays(paths[0])
    victim = _victim(description)
    if layout == "flax":
        from jgia.federated import to_torch_layout

        assert set(arrays) >= {"conv1/kernel", "fc/bias"}
        arrays = to_torch_layout(arrays, victim)
    update = _numpy_gradient(arrays, description, images, labels)
    update = {name: value.astype(np.float32) for name, value in update.items()}
    if layout == "flax":
        update = from_torch_layout(update, victim)
    np.savez(tmp_path / "update.npz", allow_pickle=False, **update)
    np.savez(tmp_path / "truth.npz", x=images, y=labels)
    config = AttackConfig(
        crafted=tmp_path,
        update=tmp_path / "update.npz",
        layout=layout,
        truth=f"npz:{tmp_path / 'truth.npz'}",
        ares=ARES,
    )
    outcome = attack_update(config)
    validate_result(outcome.result)
    assert best_psnr(images, outcome.reconstruction.images).min() >= 100
    assert outcome.result["scores"]["num_recovered"] == 4
    assert outcome.result["threat_model"]["public_data"] == description["public_data"]


def _victim(description):
    stats = description["normalization"]
    return make_victim(
        description["model"],
        input_shape=tuple(description["input_shape"]),
        num_classes=description["num_classes"],
        normalization=Normalization(tuple(stats["mean"]), tuple(stats["std"])),
        widths=tuple(description["widths"]),
        fc_width=description["fc_width"],
    )


@pytest.fixture(scope="session")
def best_psnr():
    def psnr(a, b) -> float:
        return float(-10 * np.log10(max(np.mean((a - b) ** 2, dtype=np.float64), 1e-20)))

    return lambda images, found: np.array([max(psnr(a, b) for b in found) for a in images])


@pytest.fixture(scope="module")
def crafted(tmp_path_factory, private):
    """A folder with crafted parameters and a NumPy client's update in PyTorch's layout."""
    folder = tmp_path_factory.mktemp("crafted")
    _craft(folder, layout="torch")
    description = json.loads((folder / "victim.json").read_text())
    update = _numpy_gradient(load_arrays(folder / "params.npz"), description, *private)
    update = {name: value.astype(np.float32) for name, value in update.items()}
    np.savez(folder / "update.npz", allow_pickle=False, **update)
    return folder


def _attack(folder, **kwargs):
    settings = {"update": folder / "update.npz", "layout": "torch", **kwargs}
    return attack_update(AttackConfig(crafted=folder, **settings))


def test_without_truth_nothing_is_scored(crafted):
    outcome = _attack(crafted)
    assert outcome.result["scores"] is None
    assert outcome.truth is None
    validate_result(outcome.result)
    assert len(outcome.reconstruction.images) == 4


def test_same_seed_gives_the_same_files(tmp_path, crafted):
    _craft(tmp_path, layout="torch")
    for name in ("params.npz", "victim.json"):
        assert (tmp_path / name).read_bytes() == (crafted / name).read_bytes()


def test_public_part_never_holds_a_private_image(crafted):
    description = json.loads((crafted / "victim.json").read_text())
    dataset = load_dataset("sample")
    assert dataset.public is not None
    pixels, _ = dataset.take(np.flatnonzero(dataset.public))
    stats = Normalization.fit(pixels)
    assert description["num_public"] == 64
    # A subset of the public crops: near their statistics.
    np.testing.assert_allclose(description["normalization"]["mean"], stats.mean, atol=0.1)


def test_truth_of_another_shape_is_refused(crafted):
    with pytest.raises(ValueError, match=r"true images have shape \(64, 64, 3\)"):
        _attack(crafted, truth="sample:64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("widths"), "damaged"),
        (lambda d: d.update(fc_width="many"), "damaged"),
        (lambda d: d.update(fc_width=-1), "damaged"),
        (lambda d: d.update(input_shape=[32, 32]), "damaged"),
        (lambda d: d.update(model="resnet"), "damaged"),
        (lambda d: d.update(normalization={"mean": [0.5], "std": [0.0]}), "damaged"),
        (lambda d: d.update(normalization=None), "damaged"),
        (lambda d: d.update(layout="tensorflow"), "damaged"),
        (lambda d: d.update(params="../params.npz"), "beside victim.json"),
        (lambda d: d.update(params=7), "damaged"),
        (lambda d: d.update(format="other"), "is not a jgia-crafted-1 description"),
        (lambda d: d.update(fc_width=32), "must have shape"),
        (lambda d: d.update(params="none.npz"), "no such file"),
    ],
)
def test_damaged_description_is_refused(change, message, crafted, tmp_path):
    description = json.loads((crafted / "victim.json").read_text())
    change(description)
    (tmp_path / "victim.json").write_text(json.dumps(description))
    (tmp_path / "params.npz").write_bytes((crafted / "params.npz").read_bytes())
    with pytest.raises(UpdateError, match=message):
        _attack(tmp_path, update=crafted / "update.npz")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff\xfe", "NaN", "[" * 100_000])
def test_description_that_is_no_json_object_is_refused(text, crafted, tmp_path):
    (tmp_path / "victim.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UpdateError, match=r"victim\.json"):
        _attack(tmp_path, update=crafted / "update.npz")


def test_folder_without_description_is_refused(tmp_path):
    with pytest.raises(UpdateError, match="--crafted needs a folder from 'jgia craft'"):
        _attack(tmp_path)


def test_description_of_absurd_size_is_not_read(crafted, tmp_path):
    with (tmp_path / "victim.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UpdateError, match="too large"):
        _attack(tmp_path, update=crafted / "update.npz")


def test_plan_is_read_off_the_parameters(crafted):
    """The description tells nothing secret: without its bin masses the images still come."""
    description = json.loads((crafted / "victim.json").read_text())
    assert len(description["bin_masses"]) == 64
    assert {"kernel", "query", "thresholds"}.isdisjoint(description)
    victim = _victim(description)
    assert jax.tree.leaves(victim.param_shapes())
