"""Crafted parameters are flagged, benign ones are not, and each check sees what it is for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from jgia.attacks import ares
from jgia.config import AresOptions
from jgia.defenses import THRESHOLDS, detect_crafted
from jgia.models import make_victim

SHAPE = (12, 12, 3)


def _pixels(seed: int, num: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    brightness = rng.uniform(0.1, 1.0, size=(num, 1, 1, 1))
    return (brightness * rng.uniform(size=(num, *SHAPE))).astype("float32")


def _cnn(num_classes=4):
    return make_victim(
        "cnn", input_shape=SHAPE, num_classes=num_classes, widths=(12, 12), fc_width=64
    )


@pytest.fixture(scope="module")
def crafted():
    """Front end to ARES parameters for one model."""

    def craft(front_end):
        options = AresOptions(front_end=front_end, front_end_trials=1)
        return ares.craft(jax.random.key(0), _cnn(), _pixels(0, 64), options=options)[0]

    return {name: craft(name) for name in ("random", "signed", "direct")}


def _trained(victim, optimizer, seed: int, num_steps: int = 25):
    rng = np.random.default_rng(seed)
    images = _pixels(seed, 64)
    labels = rng.integers(victim.num_classes, size=64)
    images[np.arange(64), labels] += 0.5  # something to learn
    params = jax.jit(victim.init)(jax.random.key(seed))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, images, labels):
        gradient = jax.grad(victim.loss)(params, images, labels)
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    for _ in range(num_steps):
        chosen = rng.integers(64, size=16)
        params, state = step(params, state, images[chosen], labels[chosen])
    return params


BENIGN = {
    "cnn": _cnn(),
    "two classes": _cnn(num_classes=2),
    "mlp": make_victim("mlp", input_shape=SHAPE, num_classes=10, widths=(48, 24)),
    "lenet": make_victim("lenet", input_shape=SHAPE, num_classes=10),
    "convnet": make_victim("convnet", input_shape=SHAPE, num_classes=3, widths=(8, 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENIGN)
def test_fresh_parameters_pass(name):
    init = jax.jit(BENIGN[name].init)
    for seed in range(4):
        report = detect_crafted(init(jax.random.key(seed)), BENIGN[name])
        assert not report.flagged
        assert report.reasons == ()
        assert report.suspicion < 0.35


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("cnn", optax.adamw(2e-3, weight_decay=1e-2)),
        ("two classes", optax.sgd(0.1)),
        ("mlp", optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.05, 0.9))),
        ("lenet", optax.adam(5e-3)),
    ],
    ids=["cnn-adamw", "cnn-sgd", "mlp-momentum", "lenet-adam"],
)
def test_trained_parameters_pass(name, optimizer):
    victim = BENIGN[name]
    params = _trained(victim, optimizer, seed=1)
    assert not np.array_equal(params["head"]["bias"], np.zeros(victim.num_classes))
    report = detect_crafted(params, victim, batch=(_pixels(2, 6), np.arange(6) % 2))
    assert not report.flagged
    assert report.suspicion < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["random", "signed", "direct"])
def test_ares_is_flagged_many_times_over(crafted, front_end):
    report = detect_crafted(crafted[front_end], _cnn())
    assert report.flagged
    assert len(report.reasons) >= 6
    assert report.suspicion == pytest.approx(1.0)
    assert report.layers["parallel_neurons"] == "fc"
    assert report.layers["parallel_readout"] == "head"
    for name in ("parallel_neurons", "parallel_readout", "duplicate_neurons", "delta_kernels"):
        assert report.scores[name] == pytest.approx(1.0)
    # Each of these alone would do.
    for name in ("parallel_neurons", "parallel_readout", "large_bias"):
        others = {other: 1.0 for other in THRESHOLDS if other != name}
        report = detect_crafted(crafted[front_end], thresholds=others)
        assert any(name in reason for reason in report.reasons)


def test_permuted_neurons_are_flagged_all_the_same(crafted):
    order = np.random.default_rng(0).permutation(64)
    params = jax.tree.map(np.asarray, crafted["random"])
    params["fc"] = {"kernel": params["fc"]["kernel"][:, order], "bias": params["fc"]["bias"][order]}
    params["head"] = {**params["head"], "kernel": params["head"]["kernel"][order]}
    plain, permuted = detect_crafted(crafted["random"]), detect_crafted(params)
    assert permuted.flagged
    assert permuted.scores["monotone_bias"] < THRESHOLDS["monotone_bias"]
    for name in set(plain.scores) - {"monotone_bias"}:
        assert permuted.scores[name] == pytest.approx(plain.scores[name], abs=1e-9)


def test_noise_on_dead_channels_hides_the_common_direction_only(crafted):
    """The signed front end leaves 6 of 12 channels at zero: their weights are free to hide in."""
    params = jax.tree.map(np.asarray, crafted["signed"])
    kernel = params["fc"]["kernel"]
    noise = (
        np.random.default_rng(1).normal(size=kernel.shape)
        * (np.arange(len(kernel)) % 12 >= 6)[:, None]
    )
    noise *= 20 * np.linalg.norm(kernel, axis=0) / np.linalg.norm(noise, axis=0)
    params["fc"] = {**params["fc"], "kernel": (kernel + noise).astype(np.float32)}
    x = jnp.asarray(_pixels(5, 3))
    np.testing.assert_allclose(
        _cnn().apply(params, x), _cnn().apply(crafted["signed"], x), atol=1e-5
    )  # the network computes what it did
    report = detect_crafted(params)
    for name in ("parallel_neurons", "large_bias"):
        assert report.scores[name] < THRESHOLDS[name]
    assert report.flagged
    assert any("parallel_readout" in reason for reason in report.reasons)
    assert any("delta_kernels" in reason for reason in report.reasons)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_noise_lowers_the_score_as_predicted(crafted, ratio):
    """Noise of ratio r times a neuron's norm leaves a mean resultant length 1/sqrt(1 + r^2)."""
    params = jax.tree.map(np.asarray, crafted["random"])
    kernel = params["fc"]["kernel"]
    noise = np.random.default_rng(1).normal(size=kernel.shape)
    noise *= ratio * np.linalg.norm(kernel, axis=0) / np.linalg.norm(noise, axis=0)
    params["fc"] = {**params["fc"], "kernel": kernel + noise}
    score = detect_crafted(params).scores["parallel_neurons"]
    assert score == pytest.approx(1 / math.sqrt(1 + ratio**2), abs=0.02)


def test_scores_do_not_depend_on_scale(crafted):
    def scaled(factor):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), crafted["random"])
        params["fc"] = jax.tree.map(lambda x: factor * x, params["fc"])
        return detect_crafted(params).scores

    for factor in (1e-200, 1e-3, 1e150):
        assert scaled(factor) == pytest.approx(scaled(1.0), rel=1e-6)


def _mlp(kernel, bias) -> dict:
    return {"fc1": {"kernel": kernel, "bias": bias}}


def test_quantile_biases_are_flagged():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(300, 50))
    bias = np.full(50, special.ndtri(1 / 32) * math.sqrt(300))
    report = detect_crafted(_mlp(kernel, bias))
    assert report.flagged
    assert "large_bias" in report.reasons[0]
    ratio = -float(special.ndtri(1 / 32))
    assert report.scores["large_bias"] == pytest.approx(ratio / (1 + ratio), rel=0.02)
    assert not detect_crafted(_mlp(kernel, bias / 20)).flagged


def test_trap_weights_are_flagged():
    rng = np.random.default_rng(0)
    magnitude = np.abs(rng.normal(0, 0.5, size=(150, 40)))
    kernel = np.concatenate([-magnitude, 0.95 * rng.permuted(magnitude, axis=0)])
    kernel = rng.permuted(kernel, axis=0)
    report = detect_crafted(_mlp(kernel, np.zeros(40)))
    assert "mirrored_weights" in report.reasons[0]
    honest = np.concatenate([-magnitude, np.abs(rng.normal(0, 0.5, size=(150, 40)))])
    honest = rng.permuted(honest, axis=0)
    assert not detect_crafted(_mlp(honest, np.zeros(40))).flagged


def test_neurons_in_opposite_pairs_are_flagged():
    half = np.random.default_rng(0).normal(size=(60, 20))
    paired = np.concatenate([half, -half], axis=1)
    report = detect_crafted(_mlp(paired, np.zeros(40)))
    assert report.scores["duplicate_neurons"] == 1.0
    assert report.flagged
    assert detect_crafted(_mlp(half, np.zeros(20))).scores["duplicate_neurons"] == 0.0


def test_a_few_duplicates_among_many_neurons_are_counted():
    kernel = np.random.default_rng(0).normal(size=(30, 40))
    kernel[:, 30:] = 3.0 * kernel[:, :10]
    assert detect_crafted(_mlp(kernel, np.zeros(40))).scores["duplicate_neurons"] == 0.5


def test_constant_loss_is_flagged():
    victim = _cnn()
    params = victim.init(jax.random.key(0))
    params["head"] = jax.tree.map(jnp.ones_like, params["head"])  # logits equal across classes
    batch = (_pixels(3, 4), np.arange(4))
    report = detect_crafted(params, victim, batch=batch)
    assert report.scores["constant_loss"] > 0.99
    fresh = detect_crafted(victim.init(jax.random.key(0)), victim, batch=batch)
    assert fresh.scores["constant_loss"] < 0.1
    assert "constant_loss" not in detect_crafted(params, victim).scores


def test_small_layers_and_odd_trees_are_left_alone():
    assert detect_crafted({}).suspicion == 0.0
    tiny = {"a": {"kernel": np.ones((2, 2)), "bias": np.zeros(2)}, "b": {"scale": np.ones(3)}}
    report = detect_crafted(tiny)
    assert set(report.scores) <= {"large_bias"}
    assert not report.flagged
    dead = {"fc": {"kernel": np.zeros((20, 20)), "bias": np.zeros(20)}}
    assert not detect_crafted(dead).flagged
    assert not detect_crafted({"fc": {"kernel": np.eye(20)}}).flagged  # no bias at all


def test_same_parameters_same_report(crafted):
    first, second = detect_crafted(crafted["random"]), detect_crafted(crafted["random"])
    assert first == second


def test_bad_arguments_are_refused(crafted):
    victim = _cnn()
    params = victim.init(jax.random.key(0))
    with pytest.raises(ValueError, match="do not fit the model 'mlp': conv1/bias"):
        detect_crafted(params, BENIGN["mlp"])
    with pytest.raises(ValueError, match="fc/bias has NaN or infinite"):
        detect_crafted({"fc": {"kernel": np.ones((9, 9)), "bias": np.full(9, np.nan)}})
    with pytest.raises(ValueError, match="batch needs victim="):
        detect_crafted(params, batch=(_pixels(0, 1), np.zeros(1, int)))
    with pytest.raises(ValueError, match="images of shape"):
        detect_crafted(params, victim, batch=(np.zeros((1, 2, 2, 3)), np.zeros(1, int)))
    with pytest.raises(ValueError, match=r"got no_such_check\."):
        detect_crafted(params, thresholds={"no_such_check": 0.5})
    with pytest.raises(ValueError, match="must lie in"):
        detect_crafted(params, thresholds={"large_bias": 0.0})
