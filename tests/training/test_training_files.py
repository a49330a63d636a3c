import json

import jax
import numpy as np
import pytest

from jgia.config import ModelConfig
from jgia.federated import UpdateError, save_update
from jgia.models import make_victim, with_buffers
from jgia.training import Metrics, TrainedVictim, load_victim, save_victim


@pytest.fixture(scope="module")
def trained(models):
    """A residual network with buffers, as training leaves one."""
    config, victim = models("resnet")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("float32"), victim.param_shapes()
    )
    names = ("norm1", "block1/norm1", "block1/norm2")
    statistics = {name: (rng.normal(size=3), rng.uniform(0.5, 2, 3)) for name in names}
    metrics = Metrics(loss=0.5, accuracy=0.75)
    return config, TrainedVictim(
        victim=with_buffers(victim, statistics),
        params=params,
        history=(),
        train=metrics,
        test=None,
    )


@pytest.fixture
def folder(tmp_path, trained):
    config, victim = trained
    save_victim(tmp_path / "made", victim, model=config, record={"command": "jgia"})
    return tmp_path / "made"


def test_a_victim_comes_back_as_it_was(folder, trained):
    config, given = trained
    victim, params = load_victim(folder)
    assert victim == given.victim
    assert hash(victim) == hash(given.victim)
    for one, two in zip(*map(jax.tree.leaves, (params, given.params)), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    record = json.loads((folder / "training.json").read_text())
    assert record == {
        "command": "jgia",
        "history": [],
        "train": {"loss": 0.5, "accuracy": 0.75},
        "test": None,
    }
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"params.npz", "victim.json", "training.json"}
    save_victim(folder, given, model=config, record={"command": "jgia"})
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(model="resnet18", widths=(2, 2, 2, 2), stem="imagenet", batch_norm="train"),
        ModelConfig(model="vgg11", widths=(2,) * 8, norm="group"),
        ModelConfig(model="cnn", widths=(2, 2), strides=(2, 1), pool="max", fc_width=3),
        ModelConfig(model="imprint_mlp", widths=(2,), fc_width=3),
    ],
    ids=lambda config: config.model,
)
def test_every_model_can_be_kept(config, tmp_path):
    victim = make_victim(
        config.model, input_shape=(32, 32, 1), num_classes=2, **config.architecture()
    )
    params = jax.tree.map(lambda x: np.ones(x.shape, "float32"), victim.param_shapes())
    metrics = Metrics(loss=0.0, accuracy=1.0)
    given = TrainedVictim(victim=victim, params=params, history=(), train=metrics, test=metrics)
    save_victim(tmp_path, given, model=config)
    assert load_victim(tmp_path)[0] == victim


def test_options_of_another_model_are_refused(tmp_path, trained):
    config, given = trained
    for other in (
        ModelConfig(model="resnet", widths=(3,), fc_width=5),
        ModelConfig(model="resnet", widths=(3,), fc_width=4, batch_norm="train"),
    ):
        with pytest.raises(ValueError, match="do not make this victim"):
            save_victim(tmp_path, given, model=other)
    assert list(tmp_path.iterdir()) == []
    assert config.batch_norm is None


DAMAGE = {
    "no model": (lambda d: d.pop("model"), "damaged .KeyError: 'model'"),
    "other model": (lambda d: d.update(model="mlp"), "damaged"),
    "unknown model": (lambda d: d.update(model="gpt"), "damaged"),
    "model of a wrong kind": (lambda d: d.update(model=[1]), "damaged"),
    "no architecture": (lambda d: d.update(architecture=[]), "damaged"),
    "unknown option": (
        lambda d: d["architecture"].update(depth=3), "unknown options .'depth'."
    ),
    "size of a wrong kind": (
        lambda d: d["architecture"].update(widths=["3"]), "expected an integer from 1"
    ),
    "true for a size": (lambda d: d.update(num_classes=True), "expected an integer from 1"),
    "huge size": (lambda d: d.update(num_classes=10**30), "expected an integer from 1"),
    "huge depth": (lambda d: d["architecture"].update(blocks=10**6), "more than 256 blocks"),
    "many widths": (lambda d: d["architecture"].update(widths=[1] * 999), "has 999 entries"),
    "image of two axes": (lambda d: d.update(input_shape=[6, 4]), "damaged"),
    "other image": (lambda d: d.update(input_shape=[4, 4, 1]), r"params.npz.*must have shape"),
    "normalization": (lambda d: d["normalization"].update(std=[0.0]), "std must be positive"),
    "no normalization": (lambda d: d.update(normalization=None), "damaged .TypeError"),
    "buffers": (lambda d: d["buffers"]["norm1"].update(var=[-1.0] * 3), "variances finite and not"),
    "short buffers": (lambda d: d["buffers"]["norm1"].update(mean=[0.0]), "must have shape"),
    "buffers of words": (lambda d: d["buffers"]["norm1"].update(mean=["x"] * 3), "damaged"),
    "buffers of nobody": (lambda d: d["buffers"].update(norm9={}), "damaged"),
    "list of buffers": (lambda d: d.update(buffers=[1]), "damaged .AttributeError"),
    "no digest": (lambda d: d.pop("params_sha256"), "damaged .KeyError"),
    "other digest": (lambda d: d.update(params_sha256="0"), "is not the file that victim.json"),
    "format": (lambda d: d.update(format="jgia-crafted-1"), "is not a jgia-victim-1 description"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_descriptions_are_refused_in_one_line(name, folder):
    change, message = DAMAGE[name]
    path = folder / "victim.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(UpdateError, match=message) as caught:
        load_victim(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "is not a jgia-victim-1 description"),
        (b" " * (17 << 20), "is too large"),
    ],
    ids=["empty", "bytes", "deep", "list", "large"],
)
def test_what_is_no_description_is_refused(content, message, folder):
    (folder / "victim.json").write_bytes(content)
    with pytest.raises(UpdateError, match=message):
        load_victim(folder)


def test_missing_and_foreign_files(folder, trained):
    with pytest.raises(UpdateError, match="expected a folder from 'jgia train-victim'"):
        load_victim(folder / "elsewhere")
    given = trained[1]
    save_update(folder / "params.npz", jax.tree.map(lambda x: 2 * x, given.params))
    with pytest.raises(UpdateError, match=r"params.npz is not the file that victim.json"):
        load_victim(folder)
    (folder / "params.npz").unlink()
    with pytest.raises(UpdateError, match="no such file"):
        load_victim(folder)
