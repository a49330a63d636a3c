"""Ratios and differences of gradients against sums that are written out, and the tests on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.attacks.imprint import ImprintOptions, read_bins, read_rows
from jgia.attacks.imprint.verdict import Candidates, judge
from jgia.models import make_victim
from jgia.observation import Observation, Status, ThreatModel

SHAPE = (2, 2, 1)
VICTIM = make_victim("mlp", input_shape=SHAPE, num_classes=2, widths=(5,))
X = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.9, 0.3]])


def observe(deltas: np.ndarray, *, bias: np.ndarray | None = None, **threat) -> Observation:
    """The layer's gradient for signals ``deltas`` (N, K) of the inputs X, in float64."""
    params = VICTIM.init(jax.random.key(0))
    if bias is not None:
        params["fc1"]["bias"] = jnp.asarray(bias, jnp.float32)
    layer = {"kernel": X[: len(deltas)].T @ deltas, "bias": deltas.sum(axis=0)}
    head = jax.tree.map(np.zeros_like, params["head"])
    return Observation(
        update={"fc1": layer, "head": head},
        params=params,
        victim=VICTIM,
        threat_model=ThreatModel(**threat),
    )


def test_a_row_of_one_example_is_the_example():
    deltas = np.array([[2.0, 0, 0, -0.5, 0], [0, 3.0, 0, 0, 0]])
    read = read_rows(observe(deltas), "fc1")
    assert list(read.neurons) == [0, 1, 3]
    np.testing.assert_allclose(read.inputs, X[[0, 1, 0]], rtol=1e-14)


def test_a_row_of_two_is_their_weighted_mean_and_not_an_example():
    deltas = np.array([[1.0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0]])
    read = read_rows(observe(deltas), "fc1")
    np.testing.assert_allclose(read.inputs[0], 0.25 * X[0] + 0.75 * X[1], rtol=1e-14)
    assert np.abs(read.inputs[0] - X[1]).max() > 0.1


def test_scale_and_sign_of_the_update_cancel():
    deltas = np.array([[1.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0]])
    for scale in (-0.1, 1e-6, 1e6):
        read = read_rows(observe(scale * deltas), "fc1")
        np.testing.assert_allclose(read.inputs, X[:2], rtol=1e-13)


def test_bins_are_differences_in_the_order_of_thresholds():
    """Neurons in shuffled order; example n is on for all thresholds below it."""
    order = np.array([3, 0, 4, 1, 2])  # neuron order[j] has the j-th threshold
    thresholds = np.zeros(5)
    thresholds[order] = np.arange(5) / 10
    q = np.array([0.05, 0.22, 0.45])  # bins 0, 2 and 4
    signals = np.array([1.5, -0.7, 0.3])
    deltas = signals[:, None] * (q[:, None] > thresholds[None, :])
    read = read_bins(observe(deltas, bias=-thresholds), "fc1")
    assert list(read.neurons) == [3, 4, 2]
    np.testing.assert_allclose(read.inputs, X, rtol=1e-12)


def test_two_in_one_bin_are_mixed():
    thresholds = np.arange(5) / 10
    deltas = (np.array([0.22, 0.24])[:, None] > thresholds[None, :]).astype(float)
    read = read_bins(observe(deltas, bias=-thresholds), "fc1")
    assert len(read.neurons) == 1
    np.testing.assert_allclose(read.inputs[0], X[:2].mean(axis=0), rtol=1e-12)


def test_nothing_is_read_from_nothing():
    for read in (read_rows, read_bins):
        assert read(observe(np.zeros((1, 5))), "fc1").inputs.shape == (0, 4)


def test_declared_noise_hides_small_signals():
    deltas = np.array([[1.0, 1e-3, 0, 0, 0]])
    assert list(read_rows(observe(deltas), "fc1", noise_std=1e-2).neurons) == [0]
    assert list(read_rows(observe(deltas), "fc1").neurons) == [0, 1]


def test_trained_parameters_round_and_a_gradient_does_not():
    deltas = np.array([[1.0, 1e-9, 0, 0, 0]])
    fedavg = observe(deltas, protocol="fedavg")
    assert list(read_rows(fedavg, "fc1").neurons) == [0]
    assert list(read_rows(observe(deltas), "fc1").neurons) == [0, 1]


@settings(derandomize=True, max_examples=20, deadline=None)
@given(noise=st.floats(1e-6, 1e-2), seed=st.integers(0, 2**31))
def test_estimated_noise_is_that_of_the_read_out(noise: float, seed: int):
    """Known noise on every entry, many rows of one example: the spread is the estimate."""
    rng = np.random.default_rng(seed)
    victim = make_victim("mlp", input_shape=SHAPE, num_classes=2, widths=(400,))
    params = victim.init(jax.random.key(0))
    layer = {
        "kernel": np.tile(X[0][:, None], (1, 400)) + noise * rng.normal(size=(4, 400)),
        "bias": 1 + noise * rng.normal(size=400),
    }
    observation = Observation(update={"fc1": layer}, params=params, victim=victim)
    read = read_rows(observation, "fc1", noise_std=noise)
    seen = np.sqrt(np.mean((read.inputs - X[0]) ** 2))
    # 1600 correlated squares: well within 20 % of the first-order value.
    assert seen == pytest.approx(read.noise.mean(), rel=0.2)


def test_a_layer_of_another_model_is_refused():
    observation = observe(np.zeros((1, 5)))
    wrong = {**observation.update, "fc1": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}
    with pytest.raises(ValueError, match="was it made with another model"):
        read_rows(dataclasses.replace(observation, update=wrong), "fc1")
    hidden = {"head": observation.update["head"]}
    with pytest.raises(ValueError, match="not visible"):
        read_bins(dataclasses.replace(observation, update=hidden), "fc1")


def candidates(pixels, *, noise=1e-6, consistent=True, determined=1.0) -> Candidates:
    count = len(pixels)
    return Candidates(
        pixels=np.asarray(pixels, float).reshape(count, *SHAPE),
        noise=np.full(count, noise),
        consistent=np.full(count, consistent),
        neurons=np.arange(count),
        determined=np.full(count, determined),
    )


def none_on(images: np.ndarray) -> np.ndarray:
    return np.zeros((len(images), 8), bool)


def statuses(result) -> list[str]:
    return [c["status"] for c in result.candidates]


def test_pixels_out_of_range_are_no_image():
    pixels = np.stack([X[0], X[1] + 0.5, X[2] - 0.5, X[2] * np.nan])
    result = judge(candidates(pixels), ImprintOptions(), method="test")
    assert statuses(result) == ["exact", "mixture", "mixture", "nonfinite"]
    np.testing.assert_allclose(result.images.reshape(1, 4), X[:1], rtol=1e-6)


def test_the_range_test_knows_the_noise():
    pixels = np.stack([X[0], X[0] + [0, 0, 0, 0.65]])  # 0.05 above one
    assert statuses(judge(candidates(pixels), ImprintOptions(), method="t"))[1] == "mixture"
    loud = judge(candidates(pixels, noise=0.01), ImprintOptions(), method="t")
    assert statuses(loud)[1] == "exact"


def test_contradictions_are_no_image():
    result = judge(candidates(X, consistent=False), ImprintOptions(), method="test")
    assert set(statuses(result)) == {"mixture"}
    assert len(result.images) == 0


def test_undetermined_pixels_are_said():
    result = judge(candidates(X, determined=0.6), ImprintOptions(), method="test")
    assert result.statuses == (Status.RANK_DEFICIENT,) * 3


def test_equal_images_are_returned_once_and_lead():
    pixels = np.stack([X[0], X[1], X[1] + 1e-5, X[2], X[1] - 1e-5])
    result = judge(candidates(pixels), ImprintOptions(), method="t", turned_on=none_on)
    assert sorted(statuses(result)) == ["duplicate"] * 2 + ["exact"] * 3
    assert list(result.scores) == [3, 1, 1]
    np.testing.assert_allclose(result.images[0].reshape(4), X[1], atol=1e-4)


def test_agreement_can_be_required():
    pixels = np.stack([X[0], X[1], X[1]])
    options = ImprintOptions(min_agreement=2)
    result = judge(candidates(pixels), options, method="t", turned_on=none_on)
    assert statuses(result) == ["mixture", "exact", "duplicate"]


def test_a_lone_image_from_a_neuron_that_an_agreed_one_turns_on_comes_last():
    """The half-half image is in range and on for its neuron; only the agreed one speaks up."""
    pixels = np.stack([X[0], X[0], (X[0] + X[1]) / 2, X[2]])

    def turned_on(images):
        on = none_on(images)
        on[:, [0, 1, 2]] = True  # X[0] turns on neuron 2, too
        return on

    result = judge(candidates(pixels), ImprintOptions(), method="t", turned_on=turned_on)
    assert list(result.scores) == [2, 1, 0.5]
    np.testing.assert_allclose(result.images[2].reshape(4), pixels[2], rtol=1e-6)
    trusting = judge(candidates(pixels), ImprintOptions(), method="t", turned_on=none_on)
    assert list(trusting.scores) == [2, 1, 1]


def test_a_trace_of_another_image_does_not_lead():
    """The most typical of equal images is returned, even if another claims more precision."""
    tainted = 0.999 * X[0] + 0.001 * X[1]
    four = candidates(np.stack([tainted, X[0], X[0], X[0]]))
    four.noise[0] = 1e-9
    result = judge(four, ImprintOptions(), method="t", turned_on=none_on)
    assert len(result.images) == 1
    np.testing.assert_allclose(result.images[0].reshape(4), X[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pixel_slack", -1.0), ("same_image", 0.0), ("min_agreement", 0), ("trap_scale", 0.0)],
)
def test_options_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ImprintOptions(**{field: value})
