"""Activations out of gradients that are made by hand from known activations and signals."""

import importlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.attacks import ares
from jgia.attacks.ares.plan import Plan, attackable_layers
from jgia.config import ClientConfig
from jgia.models import make_victim
from jgia.observation import Observation

leak_module = importlib.import_module("jgia.attacks.ares.leak")  # the name is also a function

SIDE, CHANNELS, BINS = 4, 2, 16
VICTIM = make_victim(
    "cnn", input_shape=(SIDE, SIDE, 1), num_classes=3, widths=(3, CHANNELS), fc_width=BINS
)
SHAPE = (SIDE, SIDE, CHANNELS)


def _plan(order=None) -> Plan:
    rng = np.random.default_rng(0)
    query = rng.uniform(0.5, 1.5, SHAPE)
    return Plan(
        front_end="random",
        kernel=np.zeros((3, 3, 1, CHANNELS), np.float32),
        bias=np.zeros(CHANNELS, np.float32),
        channels=np.arange(CHANNELS),
        query=query / query.sum(),
        thresholds=np.linspace(0.1, 1.6, BINS),
        order=np.arange(BINS) if order is None else order,
        fc_name="fc",
    )


PLAN = _plan()


def _activations(bins, seed=1) -> np.ndarray:
    """One non-negative activation per entry, scaled into the middle of that bin."""
    h = np.random.default_rng(seed).uniform(0.05, 1.0, (len(bins), *SHAPE))
    edges = np.append(PLAN.thresholds, 1.8)
    goal = (edges[np.add(bins, 0)] + edges[np.add(bins, 1)]) / 2
    return h * (goal / np.einsum("nijc,ijc->n", h, PLAN.query))[:, None, None, None]


def _observe(h, delta, plan=PLAN, *, noise=0.0, seed=5, dtype: type = np.float64) -> Observation:
    """The gradient of the imprint layer, from its definition, neuron by neuron."""
    q = np.einsum("nijc,ijc->n", h, plan.query)
    kernel = np.zeros((h[0].size, BINS))
    bias = np.zeros(BINS)
    for j, neuron in enumerate(plan.order):
        on = q > plan.thresholds[j]
        kernel[:, neuron] = np.tensordot(delta[on], h[on].reshape(on.sum(), h[0].size), 1)
        bias[neuron] = delta[on].sum()
    rng = np.random.default_rng(seed)
    kernel += noise * rng.normal(size=kernel.shape)
    bias += noise * rng.normal(size=bias.shape)
    layer = {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}
    return Observation(update={"fc": layer}, params=None, victim=VICTIM)


DELTA = np.array([0.3, -0.2, 0.5, 0.4])


def test_lone_examples_are_exact():
    h = _activations([2, 5, 6, 11])
    candidates = ares.leak(_observe(h, DELTA), PLAN)
    np.testing.assert_array_equal(candidates.bins, [2, 5, 6, 11])
    np.testing.assert_allclose(candidates.signals, DELTA, rtol=1e-12)
    np.testing.assert_allclose(candidates.activations, h, rtol=1e-12)
    assert candidates.in_bracket.all()
    assert candidates.non_negative.all()
    assert len(candidates) == 4


def test_shared_bin_gives_the_weighted_mixture():
    h = _activations([4, 4, 9, 4])
    candidates = ares.leak(_observe(h, DELTA), PLAN)
    np.testing.assert_array_equal(candidates.bins, [4, 9])
    share = [0, 1, 3]
    mixture = np.tensordot(DELTA[share], h[share], 1) / DELTA[share].sum()
    np.testing.assert_allclose(candidates.activations[0], mixture, rtol=1e-12)
    np.testing.assert_allclose(candidates.activations[1], h[2], rtol=1e-12)


def test_signed_mixture_leaves_the_bracket_or_turns_negative():
    h = _activations([4, 4])
    candidates = ares.leak(_observe(h, np.array([0.5, -0.45])), PLAN)
    assert len(candidates) == 1
    assert not (candidates.in_bracket[0] and candidates.non_negative[0])


def test_top_bin_is_isolated_and_has_no_upper_edge():
    h = _activations([3, 8, 12, BINS - 1])
    h[3] *= 40
    candidates = ares.leak(_observe(h, DELTA), PLAN)
    assert candidates.bins[-1] == BINS - 1
    np.testing.assert_allclose(candidates.activations[-1], h[3], rtol=1e-12)
    assert candidates.in_bracket[-1]


def test_below_the_first_threshold_nothing_is_seen():
    h = _activations([3, 8, 12, 5])
    h[0] *= 0.05 / np.sum(h[0] * PLAN.query)
    candidates = ares.leak(_observe(h, DELTA), PLAN)
    np.testing.assert_array_equal(candidates.bins, [5, 8, 12])


def test_nothing_at_all_gives_no_candidates():
    zero = _observe(_activations([3]), np.zeros(1))
    candidates = ares.leak(zero, PLAN)
    assert len(candidates) == 0
    assert candidates.activations.shape == (0, *SHAPE)
    assert candidates.signal_floor == 0


@given(scale=st.floats(1e-12, 1e12), sign=st.sampled_from([-1.0, 1.0]))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_scale_cancels(scale, sign):
    h = _activations([2, 5, 6, 11])
    seen = _observe(h, DELTA)
    scaled = Observation(
        update=jax.tree.map(lambda leaf: sign * scale * leaf, seen.update),
        params=None,
        victim=VICTIM,
    )
    candidates = ares.leak(scaled, PLAN)
    np.testing.assert_array_equal(candidates.bins, [2, 5, 6, 11])
    np.testing.assert_allclose(candidates.activations, h, rtol=1e-11)
    assert candidates.in_bracket.all()


def test_shuffled_neurons_are_put_in_order(setting, observation):
    order = np.random.default_rng(0).permutation(setting.plan.num_bins)

    def shuffled(tree):
        head, fc = tree["head"], tree["fc"]
        return {
            **tree,
            "fc": {"kernel": fc["kernel"][:, order], "bias": fc["bias"][order]},
            "head": {**head, "kernel": head["kernel"][order]},
        }

    plan = ares.read_plan(setting.victim, shuffled(setting.params))
    assert not np.array_equal(plan.order, np.arange(plan.num_bins))
    moved = Observation(
        update=shuffled(observation.update), params=shuffled(setting.params), victim=setting.victim
    )
    straight, again = ares.leak(observation, setting.plan), ares.leak(moved, plan)
    np.testing.assert_array_equal(again.bins, straight.bins)
    np.testing.assert_array_equal(again.activations, straight.activations)
    # Taken for ordered, the same update gives something else.
    wrong = ares.leak(moved, setting.plan)
    assert not np.array_equal(wrong.bins, straight.bins)


def test_float32_read_out_is_as_noisy_as_it_says(setting, observation):
    candidates = ares.leak(observation, setting.plan)
    first = attackable_layers(setting.victim).first
    assert first.features == candidates.activations.shape[-1]
    planes = np.moveaxis(
        np.asarray(setting.victim.normalization.normalize(setting.images[:8])), 3, 1
    )
    kernel = np.asarray(setting.plan.kernel, np.float64)
    padded = np.pad(planes.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    truth = np.zeros((8, 16, 16, kernel.shape[-1]))
    for a in range(3):
        for b in range(3):
            window = padded[:, :, a : a + 16, b : b + 16]
            truth += np.einsum("ncij,cf->nijf", window, kernel[a, b])
    truth = np.maximum(truth, 0)
    by_bin = dict(zip(setting.bins_of(setting.images[:8]), truth, strict=True))
    assert len(by_bin) == len(candidates) == 8
    for i, j in enumerate(candidates.bins):
        error = np.sqrt(np.mean((candidates.activations[i] - by_bin[j]) ** 2))
        assert error < 4 * candidates.noise[i] + 1e-6


NOISE = 1e-3


def test_declared_noise_keeps_empty_bins_out():
    h = _activations([2, 5, 6, 11])
    false, found = 0, 0
    for seed in range(40):
        seen = _observe(h, DELTA, noise=NOISE, seed=seed)
        candidates = ares.leak(seen, PLAN, noise_std=NOISE)
        assert candidates.signal_floor >= 4 * np.sqrt(2) * NOISE
        false += len(set(candidates.bins) - {2, 5, 6, 11})
        found += len(set(candidates.bins) & {2, 5, 6, 11})
    assert found == 160
    assert false <= 2  # four standard deviations: 480 empty bins give 0.03


def test_undeclared_noise_is_seen_in_the_empty_bins():
    h = _activations([2, 5, 6, 11])
    floors, false = [], 0
    for seed in range(40):
        candidates = ares.leak(_observe(h, DELTA, noise=NOISE, seed=seed), PLAN)
        floors.append(candidates.signal_floor)
        false += len(set(candidates.bins) - {2, 5, 6, 11})
    assert np.median(floors) == pytest.approx(4 * np.sqrt(2) * NOISE, rel=0.5)
    assert false <= 40  # the median of 16 differences is itself uncertain by a third


def test_noise_taken_for_none_would_keep_every_empty_bin(monkeypatch):
    monkeypatch.setattr(leak_module, "_gradient_noise", lambda *_: 0.0)
    seen = _observe(_activations([2, 5, 6, 11]), DELTA, noise=NOISE, seed=1)
    assert len(ares.leak(seen, PLAN)) == BINS


def test_error_under_noise_is_what_the_candidates_say():
    h = _activations([2, 5, 6, 11])
    ratios = []
    for seed in range(20):
        candidates = ares.leak(_observe(h, DELTA, noise=NOISE, seed=seed), PLAN, noise_std=NOISE)
        kept = np.isin(candidates.bins, [2, 5, 6, 11])
        error = candidates.activations[kept] - h
        ratios.append(np.sqrt(np.mean(error**2, axis=(1, 2, 3))) / candidates.noise[kept])
    assert 0.6 < np.mean(ratios) < 1.2


def test_full_bins_are_not_taken_for_noise():
    bins = np.arange(BINS - 1)
    delta = np.random.default_rng(3).uniform(0.5, 1.0, len(bins))
    candidates = ares.leak(_observe(_activations(bins), delta), PLAN)
    np.testing.assert_array_equal(candidates.bins, bins)


def test_more_noise_is_believed_than_is_seen():
    seen = _observe(_activations([2, 5]), np.array([0.3, 1e-4]))
    assert len(ares.leak(seen, PLAN)) == 2
    candidates = ares.leak(seen, PLAN, noise_std=NOISE)
    np.testing.assert_array_equal(candidates.bins, [2])


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_chunks_change_nothing(rows, monkeypatch):
    seen = _observe(_activations([2, 5, 6, 11]), DELTA, dtype=np.float32)
    expected = ares.leak(seen, PLAN)
    monkeypatch.setattr(leak_module, "_ROWS_PER_CHUNK", rows)
    got = ares.leak(seen, PLAN)
    np.testing.assert_array_equal(got.activations, expected.activations)
    np.testing.assert_array_equal(got.noise, expected.noise)


def test_update_of_another_width_is_refused():
    seen = _observe(_activations([2]), np.ones(1))
    layer = seen.update["fc"]
    for wrong in (
        {"kernel": layer["kernel"][:, :-1], "bias": layer["bias"]},
        {"kernel": layer["kernel"], "bias": layer["bias"][:-1]},
        {"kernel": layer["kernel"].T, "bias": layer["bias"]},
    ):
        other = Observation(update={"fc": wrong}, params=None, victim=VICTIM)
        with pytest.raises(ValueError, match="was it made with another model"):
            ares.leak(other, PLAN)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_that_is_none_is_refused(noise):
    with pytest.raises(ValueError, match="noise_std"):
        ares.leak(_observe(_activations([2]), np.ones(1)), PLAN, noise_std=noise)


def test_a_step_of_training_reads_like_a_gradient(setting):
    seen = setting.observe(config=ClientConfig(protocol="fedavg", learning_rate=0.1))
    bins = setting.bins_of(setting.images[:8])
    candidates = ares.leak(seen, setting.plan)
    assert set(candidates.bins) == set(bins)
    assert candidates.in_bracket.all()
