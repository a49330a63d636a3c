"""The analytic attack on one example: exact where it says so, and it says where not."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from jgia.attacks import analytic
from jgia.config import ClientConfig
from jgia.data import load_dataset
from jgia.federated import client_update
from jgia.models import Conv, Dense, Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Status, ThreatModel, restrict

CLASSES = 7


class LeakyCnn(nn.Module):
    """Strided leaky ReLU convolutions, a tanh layer, a head: like the CNN6 of R-GAP."""

    slope: float = 0.2
    described: str = "leaky_relu(0.2)"

    @nn.compact
    def __call__(self, x):
        for i, (width, stride) in enumerate(((12, 1), (16, 2), (12, 1)), start=1):
            conv = nn.Conv(
                width, (3, 3), (stride, stride), padding=((1, 1), (1, 1)), name=f"conv{i}"
            )
            x = nn.leaky_relu(conv(x), self.slope)
        x = nn.tanh(nn.Dense(24, name="fc")(x.reshape((x.shape[0], -1))))
        return nn.Dense(CLASSES, name="head")(x)

    def describe(self):
        sizes = enumerate(((12, 1), (16, 2), (12, 1)), start=1)
        convs = (Conv(f"conv{i}", (3, 3), w, s, self.described) for i, (w, s) in sizes)
        return (*convs, Dense("fc", 24, "tanh"), Dense("head", CLASSES, "none"))


@functools.cache
def pool():
    dataset = load_dataset("sample")
    images, labels = dataset.take(np.arange(12))
    return images, labels % CLASSES


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a client's images for it."""

    victim: Victim
    images: np.ndarray
    labels: np.ndarray

    def observe(
        self, count=1, *, first=0, dtype="float32", config=None, seed=0, **threat
    ) -> Observation:
        params = jax.tree.map(lambda p: p.astype(dtype), self.victim.init(jax.random.key(seed)))
        rows = slice(first, first + count)
        seen = client_update(
            jax.random.key(1),
            self.victim,
            params,
            self.images[rows].astype(dtype),
            self.labels[rows],
            config or ClientConfig(),
        )
        known = dataclasses.replace(seen.threat_model, server="honest_but_curious", **threat)
        return dataclasses.replace(seen, threat_model=known)

    def inputs(self, count=1) -> np.ndarray:
        return np.asarray(self.victim.normalization.normalize(self.images[:count]))


@functools.cache
def case(model: str, size: int = 8, **options) -> Case:
    images, labels = pool()
    edge = (32 - size) // 2
    images = images[:, edge : edge + size, edge : edge + size]
    norm = Normalization.fit(images)
    if model == "leaky":
        victim = Victim(LeakyCnn(**options), images.shape[1:], CLASSES, norm, "leaky")
    else:
        victim = make_victim(
            model,  # pyright: ignore[reportArgumentType]
            input_shape=images.shape[1:],
            num_classes=CLASSES,
            normalization=norm,
            **options,
        )
    return Case(victim, images, labels)


MLP = functools.partial(case, "mlp", widths=(24, 12))
CNN = functools.partial(case, "cnn", widths=(12, 12), fc_width=32)


def attack(observation: Observation, **kwargs):
    return analytic.attack(jax.random.key(2), observation, **kwargs)


def psnr(image, other) -> float:
    error = np.mean((np.asarray(image, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float(-10 * np.log10(max(error, 1e-30)))


def with_noise(observation: Observation, relative: float, *, told: bool) -> Observation:
    rng = np.random.default_rng(0)
    leaves = jax.tree.leaves(observation.update)
    squares = sum(float(np.sum(np.square(leaf))) for leaf in leaves)
    std = relative * float(np.sqrt(squares / sum(leaf.size for leaf in leaves)))
    update = jax.tree.map(
        lambda leaf: np.asarray(leaf) + (std * rng.standard_normal(leaf.shape)).astype(leaf.dtype),
        observation.update,
    )
    threat = dataclasses.replace(observation.threat_model, noise_std=std if told else 0.0)
    return dataclasses.replace(observation, update=update, threat_model=threat)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float64", 1e-12)])
def test_a_fully_connected_first_layer_gives_the_image_to_rounding(dtype, error):
    setting = MLP()
    for first in range(3):
        result = attack(setting.observe(first=first, dtype=dtype))
        assert result.statuses == (Status.EXACT,)
        truth = setting.images[first].astype(dtype)
        np.testing.assert_allclose(result.images[0], truth, rtol=0, atol=error)
        assert list(result.labels) == [setting.labels[first]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "dtype", "decibels"),
    [
        ("lenet", 32, "float64", 150),
        ("lenet", 16, "float32", 80),
        ("leaky", 8, "float32", 80),
        ("leaky", 8, "float64", 200),
        ("cnn", 8, "float32", 100),
        ("cnn", 8, "float64", 200),
    ],
)
def test_chains_of_convolutions_give_the_image(model, size, dtype, decibels):
    setting = CNN() if model == "cnn" else case(model, size)
    result = attack(setting.observe(dtype=dtype))
    assert result.statuses == (Status.EXACT,)
    reached = psnr(result.images[0], setting.images[0].astype(dtype))
    assert reached > decibels
    candidate = result.candidates[0]
    assert candidate["determined"] == 1
    if dtype == "float32":  # it knows how good it is; float64 images are rounded off further
        assert abs(candidate["expected_psnr"] - reached) < 10
    assert list(result.labels) == [setting.labels[0]]
    for layer in result.stats["layers"]:
        assert layer["equations"] >= layer["unknowns"]
        assert layer["undetermined"] == 0
        assert layer["residual"] < (1e-4 if dtype == "float32" else 1e-9)
    assert [layer["layer"] for layer in result.stats["layers"]][-1] == "conv1"


def test_layers_that_cannot_be_solved_alone_are_solved_together():
    """16 x 16 x 12 unknowns behind ReLU with fewer equations; the image has fewer entries."""
    setting = CNN(16)
    result = attack(setting.observe())
    alone, together = result.stats["layers"][-2:]
    assert alone["equations"] < alone["unknowns"]
    assert together["layer"] == "conv1 to conv2"
    assert together["undetermined"] == 0
    assert result.statuses == (Status.EXACT,)
    assert psnr(result.images[0], setting.images[0]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("model", ["leaky", "cnn"])
def test_too_few_equations_are_said(model):
    """Fewer equations than pixels in all: no solution is the only one."""
    if model == "cnn":
        setting = case("cnn", 12, widths=(1, 2), fc_width=8)
        counts = analytic.count_equations(setting.victim)
        assert counts[0].gradient_equations + counts[0].weight_equations < counts[0].unknowns
    else:
        setting = case("cnn", 8, widths=(2,), fc_width=8, strides=(2,))
    result = attack(setting.observe())
    assert result.statuses == (Status.RANK_DEFICIENT,)
    assert result.candidates[0]["determined"] < 1
    assert result.candidates[0]["expected_psnr"] is None
    assert result.stats["layers"][-1]["undetermined"] > 0
    assert psnr(result.images[0], setting.images[0]) < 40


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("model", "relative"), [("mlp", 1e-3), ("leaky", 1e-4), ("cnn", 1e-4)])
def test_noise_is_not_called_exact_and_its_effect_is_known(model, relative, told):
    setting = (
        MLP()
        if model == "mlp"
        else CNN()
        if model == "cnn"
        else case(model, 16 if model == "lenet" else 8)
    )
    result = attack(with_noise(setting.observe(), relative, told=told))
    assert result.statuses == (Status.NOISY,)
    reached = psnr(result.images[0], setting.images[0])
    assert abs(result.candidates[0]["expected_psnr"] - reached) < 10
    assert 0.7 * relative < result.candidates[0]["residual"] < 5 * relative
    assert result.scores[0] == pytest.approx(-np.log10(result.candidates[0]["residual"]))
    assert reached < attack_psnr(setting)


def attack_psnr(setting: Case) -> float:
    return psnr(attack(setting.observe()).images[0], setting.images[0])


@pytest.mark.parametrize("model", ["mlp", "cnn", "lenet"])
def test_one_step_of_fedavg_needs_no_learning_rate(model):
    setting = (
        MLP()
        if model == "mlp"
        else CNN()
        if model == "cnn"
        else case(model, 16 if model == "lenet" else 8)
    )
    config = ClientConfig(protocol="fedavg", learning_rate=0.05)
    observation = setting.observe(config=config, local_learning_rate=None)
    result = attack(observation)
    assert result.statuses == (Status.EXACT,)
    assert psnr(result.images[0], setting.images[0]) > 60
    assert result.stats["scale"] == pytest.approx(-0.05, rel=1e-4)
    assert list(result.labels) == [setting.labels[0]]
    momentum = ClientConfig(protocol="fedavg", optimizer="momentum")
    assert attack(setting.observe(config=momentum)).statuses == (Status.EXACT,)


def test_a_clipped_update_is_as_good():
    setting = case("leaky")
    observation = setting.observe()
    update = jax.tree.map(lambda leaf: leaf * np.float32(0.03125), observation.update)
    plain = attack(observation)
    clipped = attack(dataclasses.replace(observation, update=update))
    np.testing.assert_allclose(clipped.images, plain.images, atol=1e-5)
    assert clipped.stats["scale"] == pytest.approx(0.03125, rel=1e-4)
    assert clipped.statuses == (Status.EXACT,)


def test_more_steps_are_refused():
    setting = CNN()
    several = ClientConfig(protocol="fedavg", local_epochs=3)
    with pytest.raises(ValueError, match="3 local steps"):
        attack(setting.observe(config=several))
    one = setting.observe(config=ClientConfig(protocol="fedavg"), local_steps=None)
    with pytest.raises(ValueError, match="an unknown number of local steps"):
        attack(one)
    adam = setting.observe(config=ClientConfig(protocol="fedavg", optimizer="adam"))
    with pytest.raises(ValueError, match="Adam divides every entry"):
        attack(adam)


@pytest.mark.parametrize("model", ["lenet", "cnn", "leaky"])
def test_two_examples_are_not_taken_for_one(model):
    setting = CNN() if model == "cnn" else case(model, 16 if model == "lenet" else 8)
    with pytest.raises(ValueError, match="mixes all 2 examples"):
        attack(setting.observe(2))
    result = attack(setting.observe(2, num_examples=None))
    assert len(result.images) == 0
    assert result.images.shape[1:] == setting.victim.input_shape
    assert [c["status"] for c in result.candidates] == ["mixture"]
    assert "not of one example" in result.stats["reason"]
    forced = attack(setting.observe(2, num_examples=None), num_examples=1)
    assert Status.EXACT not in forced.statuses


def test_one_example_needs_no_telling():
    setting = CNN()
    told, untold = setting.observe(), setting.observe(num_examples=None)
    np.testing.assert_array_equal(attack(told).images, attack(untold).images)
    noisy = with_noise(untold, 1e-3, told=False)  # may as well be a second example
    assert [c["status"] for c in attack(noisy).candidates] == ["mixture"]
    assert attack(noisy, num_examples=1).statuses == (Status.NOISY,)


@pytest.mark.parametrize("make", [MLP, CNN])
def test_a_wrong_label_is_rejected_and_a_right_one_is_not(make):
    setting = make()
    label = int(setting.labels[0])
    wrong = attack(setting.observe(labels=((label + 1) % CLASSES,)))
    assert len(wrong.images) == 0
    assert "given label" in wrong.candidates[0]["reason"]
    right = attack(setting.observe(labels=(label,)))
    assert right.statuses == (Status.EXACT,)
    assert right.stats["labels_by"] == "given"
    for labels in ((0, 1), (CLASSES,)):
        observation = setting.observe(labels=labels, num_examples=None)
        with pytest.raises(ValueError, match="must give one label"):
            attack(observation)


def test_the_first_layer_is_enough_and_the_label_is_what_fits():
    setting = MLP()
    result = attack(restrict(setting.observe(), ["fc1"]))
    assert result.statuses == (Status.EXACT,)
    assert result.stats["labels_by"] == "residual"
    assert list(result.labels) == [setting.labels[0]]


@pytest.mark.parametrize("hidden", ["conv1", "fc", "head"])
def test_a_hidden_layer_is_named(hidden):
    observation = CNN().observe()
    seen = restrict(observation, [name for name in observation.params if name != hidden])
    with pytest.raises(ValueError, match=f"layer '{hidden}' is not visible"):
        attack(seen)


@pytest.mark.parametrize("make", [MLP, CNN])
def test_nothing_comes_from_nothing(make):
    observation = make().observe()
    zero = dataclasses.replace(observation, update=jax.tree.map(np.zeros_like, observation.update))
    broken = jax.tree.map(np.array, observation.update)
    broken[next(iter(make().victim.layers())).name]["kernel"].flat[0] = np.nan
    for each in (zero, dataclasses.replace(observation, update=broken)):
        result = attack(each)
        assert len(result.images) == 0
        assert [c["status"] for c in result.candidates] == ["nonfinite"]


def test_a_model_that_is_not_what_it_says_is_not_exact():
    """The update is made again by the model itself, not by its description."""
    setting = case("leaky", slope=0.4)  # described with 0.2
    result = attack(setting.observe())
    assert Status.EXACT not in result.statuses
    assert result.candidates[0]["residual"] > 1e-3


def test_bad_numbers_of_examples_are_refused():
    observation = CNN().observe()
    with pytest.raises(ValueError, match="contradicts the threat model, which says 1"):
        attack(observation, num_examples=2)
    with pytest.raises(ValueError, match="at least 1"):
        attack(CNN().observe(num_examples=None), num_examples=0)
    pooled = dataclasses.replace(observation, victim=case("cnn", 8, pool="max").victim)
    with pytest.raises(ValueError, match="pooling"):
        attack(pooled)


def test_an_update_of_another_model_is_refused():
    observation = CNN().observe()
    conv = observation.update["conv1"]
    for wrong, part in (
        ({**conv, "kernel": conv["kernel"][:2]}, "kernel"),
        ({**conv, "bias": conv["bias"][:2]}, "bias update"),
    ):
        update = {**observation.update, "conv1": wrong}
        with pytest.raises(ValueError, match=f"the {part} of layer 'conv1' must have shape"):
            attack(dataclasses.replace(observation, update=update))


def test_same_key_same_bits_whatever_the_precision_of_the_session():
    observation = CNN(16).observe()
    first, second = attack(observation), attack(observation)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.candidates == second.candidates
    arrays = jax.tree.map(np.asarray, (observation.update, observation.params))
    with jax.enable_x64(False):
        plain = dataclasses.replace(observation, update=arrays[0], params=arrays[1])
        single = attack(plain)
    np.testing.assert_array_equal(first.images, single.images)
    assert first.candidates == single.candidates
    json.dumps([dict(c) for c in first.candidates] + [dict(first.stats)], allow_nan=False)


def test_any_server_may_do_it():
    observation = MLP().observe()
    for server in ("malicious", "honest_but_curious"):
        threat = ThreatModel(server=server)
        assert attack(dataclasses.replace(observation, threat_model=threat)).statuses == (
            Status.EXACT,
        )
