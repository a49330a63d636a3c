"""Label inference against gradients whose labels are known, and against hand-made ones."""

import dataclasses

import jax
import numpy as np
import pytest

from jgia.attacks.labels import infer_labels
from jgia.attacks.labels.counts import round_counts
from jgia.config import ClientConfig
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.observation import ThreatModel, restrict

METHODS = ("idlg", "yin", "wainakh", "analytic", "llg", "multi_step")
VICTIM = make_victim("mlp", input_shape=(6, 6, 1), num_classes=5, widths=(16,))
PARAMS = VICTIM.init(jax.random.key(0))
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(24, 6, 6, 1)).astype(np.float32)
LABELS = RNG.integers(0, 5, 24)


def _observe(count=24, *, labels=LABELS, params=PARAMS, config=None, order=None):
    rows = np.arange(count) if order is None else order
    return client_update(
        jax.random.key(1),
        VICTIM,
        params,
        IMAGES[rows],
        np.asarray(labels)[rows],
        config or ClientConfig(),
    )


def _true_counts(count=24, labels=LABELS):
    return np.bincount(np.asarray(labels)[:count], minlength=5)


def _overlap(found, true):
    return np.minimum(found, true).sum() / true.sum()


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_one_example_is_exact(method):
    for label in range(5):
        labels = np.full(24, label)
        found = infer_labels(jax.random.key(2), _observe(1, labels=labels), method=method)
        assert found.labels.tolist() == [label]
        assert found.counts.sum() == 1


@pytest.mark.parametrize("method", ["analytic", "llg", "auto"])
def test_an_untrained_model_with_a_zero_head_gives_its_counts_away(method):
    params = {**PARAMS, "head": jax.tree.map(lambda leaf: 0 * leaf, PARAMS["head"])}
    found = infer_labels(jax.random.key(2), _observe(params=params), method=method)
    assert found.counts.tolist() == _true_counts().tolist()
    assert found.method == ("llg" if method == "auto" else method)


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter_and_the_key_decides(method):
    one, again = (infer_labels(jax.random.key(2), _observe(), method=method) for _ in range(2))
    turned = infer_labels(jax.random.key(2), _observe(order=np.arange(24)[::-1]), method=method)
    assert one.counts.tolist() == again.counts.tolist() == turned.counts.tolist()
    assert one.counts.sum() == 24
    assert (np.diff(one.labels) >= 0).all()
    assert np.isfinite(one.scores).all()


def test_the_second_stage_of_wainakh_takes_several_classes():
    """Each example that it gives out changes that class's gradient, not the last one looked at."""
    labels = np.array([0] * 8 + [1] * 8 + [2] * 8)
    found = infer_labels(jax.random.key(2), _observe(labels=labels), method="wainakh")
    true = _true_counts(labels=labels)
    assert _overlap(found.counts, true) >= 0.8
    assert np.sum(found.counts >= 4) >= 3


def test_the_best_method_beats_those_that_count_signs():
    accuracy = dict.fromkeys(("idlg", "llg"), 0.0)
    for seed in range(6):
        params = VICTIM.init(jax.random.key(seed))
        labels = np.random.default_rng(seed).integers(0, 5, 24)
        observation = _observe(params=params, labels=labels)
        for method in accuracy:
            found = infer_labels(jax.random.key(2), observation, method=method)
            accuracy[method] += _overlap(found.counts, _true_counts(labels=labels)) / 6
    assert accuracy["llg"] >= 0.95
    assert accuracy["idlg"] < accuracy["llg"]


@pytest.mark.parametrize(
    "config",
    [
        ClientConfig(protocol="fedavg", learning_rate=0.05),
        ClientConfig(protocol="fedavg", local_epochs=3, local_batch_size=8, learning_rate=0.05),
        ClientConfig(protocol="fedavg", local_epochs=3, optimizer="momentum", learning_rate=0.02),
    ],
    ids=["one step", "epochs", "momentum"],
)
@pytest.mark.parametrize("method", ["llg", "multi_step"])
def test_local_training_is_averaged(config, method):
    found = infer_labels(jax.random.key(2), _observe(config=config), method=method)
    assert _overlap(found.counts, _true_counts()) >= 0.9


def test_an_unknown_learning_rate_leaves_the_direction():
    observation = _observe(config=ClientConfig(protocol="fedavg", learning_rate=0.05))
    threat = dataclasses.replace(observation.threat_model, local_learning_rate=None)
    blind = dataclasses.replace(observation, threat_model=threat)
    found = infer_labels(jax.random.key(2), blind, method="multi_step")
    assert _overlap(found.counts, _true_counts()) >= 0.7


def test_a_wrong_number_of_examples_shows_in_the_counts():
    observation = dataclasses.replace(_observe(), threat_model=ThreatModel())
    found = infer_labels(jax.random.key(2), observation, num_examples=12)
    assert found.counts.sum() == 12
    assert found.counts.tolist() != _true_counts().tolist()


def test_rounding_keeps_the_sum_and_the_bounds():
    estimate = np.array([1.6, 0.2, 2.3, -0.4, 1.3])
    assert round_counts(estimate, 5).sum() == 5
    bounds = np.array([0, 1, 0, 0, 0]), np.array([1, 5, 5, 5, 5])
    assert round_counts(estimate, 5, bounds).tolist() == [1, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("observation", "arguments", "message"),
    [
        (dataclasses.replace(_observe(), threat_model=ThreatModel()), {}, "give num_examples="),
        (_observe(), {"num_examples": 3}, "contradicts the threat model"),
        (restrict(_observe(), ["fc1"]), {}, "not visible"),
        (_observe(), {"public": np.zeros((2, 6, 6, 1)), "method": "llg"}, "at least 16"),
    ],
)
def test_bad_arguments_are_refused(observation, arguments, message):
    with pytest.raises(ValueError, match=message):
        infer_labels(jax.random.key(2), observation, **arguments)


@pytest.mark.parametrize(("factor", "message"), [(np.nan, "NaN or infinite"), (0.0, "is zero")])
def test_an_update_that_says_nothing_is_refused(factor, message):
    observation = _observe()
    update = jax.tree.map(lambda leaf: factor * leaf, observation.update)
    with pytest.raises(ValueError, match=message):
        infer_labels(jax.random.key(2), dataclasses.replace(observation, update=update))


def test_declared_noise_is_survived():
    observation = _observe()
    rng = np.random.default_rng(0)
    update = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 1e-3, leaf.shape).astype(leaf.dtype), observation.update
    )
    threat = dataclasses.replace(observation.threat_model, noise_std=1e-3, defense="noise")
    noisy = dataclasses.replace(observation, update=update, threat_model=threat)
    found = infer_labels(jax.random.key(2), noisy)
    assert _overlap(found.counts, _true_counts()) >= 0.9
