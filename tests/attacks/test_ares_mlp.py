"""Type II: a multilayer perceptron, whose first layer measures and whose second separates."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.attacks.ares.candidates import (
    LARGEST_CONFLICT,
    LARGEST_EXCESS,
    KnownInputs,
    active_excess,
    measured_candidates,
    single_example,
)
from jgia.attacks.ares.first_layer import FirstLayerGradient, isolated_inputs
from jgia.attacks.ares.peel import explain_bins
from jgia.attacks.ares.plan import opposite_pairs
from jgia.config import AresOptions, ClientConfig
from jgia.federated import client_update
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization


@dataclasses.dataclass(frozen=True)
class Perceptron:
    victim: Victim
    params: dict
    plan: ares.Plan
    images: np.ndarray
    labels: np.ndarray

    def observe(self, count=None, *, rows=None, params=None, config=None):
        rows = slice(count) if rows is None else rows
        return client_update(
            jax.random.key(1),
            self.victim,
            self.params if params is None else params,
            self.images[rows],
            self.labels[rows],
            config or ClientConfig(),
        )

    def bins_of(self, rows):
        inputs = np.asarray(self.victim.normalization.normalize(self.images[rows]), np.float64)
        h = self.plan.activations(inputs)
        q = h @ self.plan.query.ravel().astype(np.float64)
        return np.searchsorted(self.plan.thresholds, q, side="left") - 1


def _perceptron(pools, options=None, *, widths=(256, 128), gray=True, side=12, batch=8):
    images, labels, public = pools
    images, public = images[:, :side, :side], public[:, :side, :side]
    if gray:
        images, public = images[..., :1], public[..., :1]
    victim = make_victim(
        "mlp",
        input_shape=images.shape[1:],
        num_classes=int(labels.max()) + 1,
        normalization=Normalization.fit(public),
        widths=widths,
    )
    params, plan = ares.craft(
        jax.random.key(0), victim, public, options=options, num_examples=batch
    )
    return Perceptron(victim, params, plan, images, labels)


@pytest.fixture(scope="module")
def mlp(pools):
    return _perceptron(pools)


def _singles(mlp, rows):
    bins = mlp.bins_of(rows)
    counts = collections.Counter(bins.tolist())
    return np.array([counts[b] == 1 for b in bins])


def test_second_layer_returns_the_activations_of_the_first(mlp):
    rows = np.arange(6)
    assert _singles(mlp, rows).all()
    candidates = ares.leak(mlp.observe(rows=rows), mlp.plan, first_layer="ignore")
    inputs = mlp.victim.normalization.normalize(mlp.images[rows])
    expected = mlp.plan.activations(np.asarray(inputs, np.float64))
    order = np.argsort(mlp.bins_of(rows))
    np.testing.assert_array_equal(candidates.bins, mlp.bins_of(rows)[order])
    flat = candidates.activations.reshape(len(rows), -1)
    np.testing.assert_allclose(flat, expected[order], atol=20 * candidates.noise.max())
    assert single_example(candidates).all()


def test_every_pair_has_exactly_one_side_on_for_one_example_and_both_for_mixtures(mlp):
    plan = mlp.plan
    assert len(plan.pairs) == 64  # half of 256 rows measure, in pairs
    np.testing.assert_array_equal(
        plan.kernel[:, plan.pairs[:, 0]], -plan.kernel[:, plan.pairs[:, 1]]
    )
    inputs = np.asarray(mlp.victim.normalization.normalize(mlp.images[:40]), np.float64)
    h = plan.activations(inputs)
    weights = np.random.default_rng(0).dirichlet([1, 1], 20)
    mixed = weights[:, :1] * h[:20] + weights[:, 1:] * h[20:]

    def tests(activations):
        return measured_candidates(
            plan,
            activations.reshape(-1, *plan.query.shape),
            bins=np.zeros(len(activations), int),
            signals=np.ones(len(activations)),
            noise=np.full(len(activations), 1e-9),
            scale_error=np.zeros(len(activations)),
            signal_floor=0.0,
        ).conflict

    assert np.all(tests(h) == 0)
    # Both sides are on where the hyperplane separates the two examples: angle / pi of all.
    expected = _angles(inputs[:20], inputs[20:]) / np.pi
    np.testing.assert_allclose(tests(mixed), expected, atol=5 * np.sqrt(0.25 / 64))
    assert np.abs(tests(mixed) - expected).mean() < np.abs(tests(mixed) - 0.5).mean()
    apart = expected > 0.1
    assert np.all(tests(mixed)[apart] > LARGEST_CONFLICT)


def _angles(a, b):
    a, b = (v.reshape(len(v), -1) for v in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.arccos(np.sum(a * b, axis=1) / norms)


def test_active_fraction_tells_mixtures_without_pairs(pools):
    mlp = _perceptron(pools, AresOptions(paired=False, isolating_fraction=0.0), widths=(512, 64))
    plan = mlp.plan
    assert len(plan.pairs) == 0
    inputs = np.asarray(mlp.victim.normalization.normalize(mlp.images[:40]), np.float64)
    h = plan.activations(inputs).reshape(40, 1, 1, -1)
    mixed = (h[:20] + h[20:]) / 2
    assert np.all(active_excess(h > 0, plan) < LARGEST_EXCESS)
    excess = active_excess(mixed > 0, plan)
    expected = np.sqrt(512) * _angles(inputs[:20], inputs[20:]) / np.pi
    np.testing.assert_allclose(excess, expected, atol=5)
    assert np.all(excess[expected > LARGEST_EXCESS + 5] > LARGEST_EXCESS)
    assert np.sum(expected > LARGEST_EXCESS + 5) > 3


def test_isolating_rows_are_on_for_two_examples_of_the_batch_on_average(mlp):
    inputs = np.asarray(mlp.victim.normalization.normalize(mlp.images), np.float64)
    isolating = np.setdiff1d(np.arange(256), mlp.plan.pairs)
    on = mlp.plan.activations(inputs)[:, isolating] > 0
    assert 1 < 8 * on.mean() < 4  # other images than those it was calibrated on


@pytest.mark.parametrize("batch", [1, 8])
def test_joint_read_out_is_exact_for_the_whole_batch(batch, mlp, best_psnr):
    result = ares.attack(jax.random.key(2), mlp.observe(batch), plan=mlp.plan)
    assert [str(s) for s in result.statuses] == ["exact"] * batch
    assert best_psnr(mlp.images[:batch], result.images).min() > 90
    assert result.stats["num_from_first_layer"] == batch


def test_each_way_to_read_the_first_layer_does_no_worse_than_the_next(mlp, best_psnr):
    observation = mlp.observe(12)
    found = []
    for first_layer in ("joint", "ratio", "ignore"):
        result = ares.attack(
            jax.random.key(2),
            observation,
            plan=mlp.plan,
            options=AresOptions(first_layer=first_layer),
        )
        found.append(int(np.sum(best_psnr(mlp.images[:12], result.images) > 60)))
    assert found[0] >= 11
    assert found[0] >= found[1] > found[2]


def test_examples_that_share_a_bin_are_taken_apart(pools, best_psnr):
    """One of them isolated by a row of the first layer leaves the other alone in the bin."""
    mlp = _perceptron(pools, widths=(256, 24), batch=12)
    rows = np.arange(12)
    assert not _singles(mlp, rows).all()
    result = ares.attack(jax.random.key(2), mlp.observe(rows=rows), plan=mlp.plan)
    psnr = best_psnr(mlp.images[rows], result.images)
    assert np.sum(psnr > 60) > _singles(mlp, rows).sum()
    # Nothing that was returned as exact is anything but an image of the client.
    wrong = [best_psnr(image[None], mlp.images[rows])[0] for image in result.images]
    assert min(wrong) > 60


def test_a_mixture_that_looks_like_an_image_explains_no_bin(mlp):
    observation = mlp.observe(8)
    candidates = ares.leak(observation, mlp.plan, first_layer="ignore")
    inputs = np.asarray(mlp.victim.normalization.normalize(mlp.images[:8]), np.float64)
    bins = mlp.bins_of(np.arange(8))
    signals = candidates.signals[[int(np.flatnonzero(candidates.bins == b)[0]) for b in bins]]
    honest = KnownInputs(inputs, bins, signals, np.full(8, np.inf))
    assert len(explain_bins(mlp.plan, candidates, honest).known.bins) == 8
    blended = honest._replace(inputs=0.5 * inputs + 0.5 * np.roll(inputs, 1, axis=0))
    assert len(explain_bins(mlp.plan, candidates, blended).known.bins) == 0


def test_every_row_that_isolated_an_example_suggests_it(mlp):
    observation = mlp.observe(8)
    gradient = FirstLayerGradient.of(observation, mlp.plan)
    assert gradient is not None
    suspects = isolated_inputs(gradient, observation).inputs.reshape(-1, 144)
    inputs = np.asarray(mlp.victim.normalization.normalize(mlp.images[:8]), np.float64)
    on = mlp.plan.activations(inputs) > 0
    alone = on[:, on.sum(axis=0) == 1].any(axis=1)
    assert alone.sum() >= 4
    for example in inputs.reshape(8, -1)[alone]:
        distance = np.linalg.norm(suspects - example, axis=1) / np.linalg.norm(example)
        assert distance.min() < 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_accepted_from_benign_parameters(seed, mlp):
    params = mlp.victim.init(jax.random.key(seed))
    result = ares.attack(jax.random.key(2), mlp.observe(8, params=params))
    assert len(result.images) == 0


def test_more_hidden_layers_pass_the_measurement_on(pools, best_psnr):
    mlp = _perceptron(pools, widths=(256, 200, 128))
    result = ares.attack(jax.random.key(2), mlp.observe(6), plan=mlp.plan)
    assert mlp.plan.kernel.shape[-1] == 200
    assert best_psnr(mlp.images[:6], result.images).min() > 80


def test_principal_measurement_is_better_than_random_when_only_activations_are_read(
    pools, best_psnr
):
    quality = {}
    for front_end in ("random", "principal"):
        options = AresOptions(front_end=front_end, first_layer="ignore", isolating_fraction=0.0)
        mlp = _perceptron(pools, options, widths=(128, 128))
        result = ares.attack(jax.random.key(2), mlp.observe(6), plan=mlp.plan, options=options)
        assert {str(s) for s in result.statuses} == {"regularised"}
        quality[front_end] = np.median(best_psnr(mlp.images[:6], result.images))
    assert quality["principal"] > quality["random"] + 2


def test_signed_front_end_is_exact_without_the_first_layer(pools, best_psnr):
    options = AresOptions(front_end="signed", first_layer="ignore")
    mlp = _perceptron(pools, options, widths=(300, 128))
    result = ares.attack(jax.random.key(2), mlp.observe(6), plan=mlp.plan, options=options)
    assert best_psnr(mlp.images[:6], result.images).min() > 90


def test_read_plan_recovers_the_crafted_one(mlp):
    plan = ares.read_plan(mlp.victim, mlp.params)
    np.testing.assert_array_equal(plan.kernel, mlp.plan.kernel)
    np.testing.assert_array_equal(plan.bias, mlp.plan.bias)
    np.testing.assert_array_equal(plan.pairs, mlp.plan.pairs)
    np.testing.assert_array_equal(plan.thresholds, mlp.plan.thresholds)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ((64,), AresOptions(), "two hidden layers"),
        ((64, 1), AresOptions(), "at least 2"),
        ((200, 64), AresOptions(front_end="signed"), "needs 288 neurons"),
        ((100, 64), AresOptions(front_end="direct"), "needs 144 neurons"),
    ],
)
def test_what_cannot_carry_the_attack_is_refused(widths, options, message, pools):
    with pytest.raises(ValueError, match=message):
        _perceptron(pools, options, widths=widths)


def test_update_without_the_imprint_layer_is_refused_and_without_the_first_is_not(mlp):
    observation = mlp.observe(4)
    update = dict(observation.update)
    hidden = dataclasses.replace(observation, update={"fc1": update["fc1"]})
    with pytest.raises(ValueError, match="does not show layer 'fc2'"):
        ares.leak(hidden, mlp.plan)
    update.pop("fc1")
    seen = ares.leak(dataclasses.replace(observation, update=update), mlp.plan)
    assert len(seen) == 4
    assert len(seen.known.bins) == 0


def test_one_local_step_leaks_the_activations(mlp):
    config = ClientConfig(protocol="fedavg", learning_rate=0.1)
    observation = mlp.observe(6, config=config)
    result = ares.attack(jax.random.key(2), observation, plan=mlp.plan)
    assert len(result.images) == 6


def test_pairs_need_opposite_rows_and_biases_that_exclude_each_other():
    columns = np.array([[1.0, -1.0, 2.0, 0.0, -2.0], [0.5, -0.5, 0.0, 0.0, 0.0]])
    pairs = opposite_pairs(columns, np.zeros(5))
    assert pairs.tolist() == [[0, 1], [2, 4]]
    assert opposite_pairs(columns, np.array([0, 0, 0.1, 0, 0.2])).tolist() == [[0, 1]]
