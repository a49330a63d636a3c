"""The analytic attack on several examples: all of them or a proven part, and no mixture."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import analytic
from jgia.attacks.analytic import rows
from jgia.attacks.analytic.directions import complete, direction, factor, search_batch
from jgia.attacks.imprint import qbi
from jgia.config import ClientConfig
from jgia.data import load_dataset
from jgia.federated import client_update
from jgia.models import MLP, Dense, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Status

CLASSES = 5
RNG = np.random.default_rng


class SmoothMlp(MLP):
    """Says that its first layer ends in a sigmoid."""

    def describe(self):
        first, *rest = super().describe()
        assert isinstance(first, Dense)
        return (dataclasses.replace(first, activation="sigmoid"), *rest)


@functools.cache
def pool():
    images, labels = load_dataset("sample").take(np.arange(32))
    return images[:, 8:24, 8:24], labels % CLASSES


@functools.cache
def victim(widths=(64,)):
    return make_victim(
        "mlp",
        input_shape=(16, 16, 3),
        num_classes=CLASSES,
        normalization=Normalization.fit(pool()[0]),
        widths=widths,
    )


def observe(count, *, widths=(64,), dtype="float32", config=None, seed=0, bias=None, rows=None):
    images, labels = pool()
    chosen = np.arange(count) if rows is None else np.asarray(rows)
    params = victim(widths).init(jax.random.key(seed))
    if bias is not None:
        params["fc1"]["bias"] = params["fc1"]["bias"] + jnp.float32(bias)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    seen = client_update(
        jax.random.key(1),
        victim(widths),
        params,
        images[chosen].astype(dtype),
        labels[chosen],
        config or ClientConfig(),
    )
    threat = dataclasses.replace(seen.threat_model, server="honest_but_curious")
    return dataclasses.replace(seen, threat_model=threat)


def attack(observation: Observation, **kwargs):
    return analytic.attack(jax.random.key(2), observation, **kwargs)


def psnrs(found, images) -> np.ndarray:
    """Of each found image with the nearest of the client's."""
    errors = np.mean((np.asarray(found, np.float64)[:, None] - images[None]) ** 2, axis=(2, 3, 4))
    return -10 * np.log10(np.maximum(errors.min(axis=1, initial=1), 1e-30))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        (6, {}),
        (6, {"dtype": "float64"}),
        (6, {"seed": 3}),
        (8, {"widths": (128, 64)}),
        (4, {"config": ClientConfig(protocol="fedavg", learning_rate=0.1)}),
    ],
)
def test_all_examples_of_an_honest_server(count, options):
    result = attack(observe(count, **options))
    images = pool()[0][:count]
    assert len(result.images) == count
    assert set(result.statuses) == {Status.EXACT}
    assert psnrs(result.images, images).min() > 90
    assert psnrs(images, np.asarray(result.images, np.float64)).min() > 90
    assert result.stats["rank"] == count
    assert np.all(np.diff(result.scores) <= 0)
    assert result.selected_by == rows.SELECTED_BY_BATCH
    json.dumps([dict(c) for c in result.candidates] + [dict(result.stats)], allow_nan=False)


def test_the_number_of_examples_need_not_be_known():
    observation = observe(3)
    threat = dataclasses.replace(observation.threat_model, num_examples=None)
    untold = dataclasses.replace(observation, threat_model=threat)
    np.testing.assert_array_equal(attack(observation).images, attack(untold).images)
    assert len(attack(untold).images) == 3


@pytest.mark.parametrize("count", [20, 28])
def test_rows_give_a_part_where_there_are_too_many(count):
    """Past rank 17 no batch is searched; biases that turn most neurons off isolate some."""
    result = attack(observe(count, widths=(128, 64), bias=-1.0))
    assert result.selected_by == rows.SELECTED_BY_ROWS
    assert 1 <= len(result.images) < count
    assert set(result.statuses) == {Status.EXACT}
    assert psnrs(result.images, pool()[0][:count]).min() > 80
    assert result.stats["proven_neurons"] >= 2 * len(result.images)
    assert sum(c["status"] == "mixture" for c in result.candidates) > 10


def test_mixtures_that_a_read_out_of_crafted_rows_returns_are_refused():
    observation = observe(20, widths=(128, 64), bias=-0.5)
    images = pool()[0][:20]
    threat = dataclasses.replace(observation.threat_model, server="malicious")
    trusting = qbi.attack(jax.random.key(2), dataclasses.replace(observation, threat_model=threat))
    assert np.median(psnrs(trusting.images, images)) < 40
    honest = attack(observation)
    assert len(honest.images) >= 1
    assert psnrs(honest.images, images).min() > 80


def test_only_examples_are_outside_of_what_the_neurons_they_turn_off_span():
    x, deltas, factors = synthetic(neurons=200)
    mixture = 0.9 * x[0] + 0.1 * x[1]
    off = np.concatenate([deltas == 0, (deltas[:1] == 0) & (RNG(2).uniform(size=200) < 0.9)])
    off[-1] |= (deltas[0] != 0) & (deltas[1] == 0) & (RNG(3).uniform(size=200) < 0.1)
    got = rows._proven(factors, np.stack([*x, mixture]), off)
    assert list(got) == [True] * 5 + [False]
    nothing_off = np.zeros((5, 200), bool)
    assert not rows._proven(factors, x, nothing_off).any()


@pytest.mark.parametrize("seed", range(3))
def test_few_neurons_prove_nothing_wrong(seed):
    result = attack(observe(10, widths=(16,), seed=seed))
    assert len(result.images) == 0 or psnrs(result.images, pool()[0][:10]).min() > 60


def test_noise_hides_what_sparsity_shows():
    observation = observe(4)
    size = float(np.abs(observation.update["fc1"]["kernel"]).max())
    noise = 1e-3 * size * RNG(0).standard_normal((768, 64)).astype("float32")
    layer = {**observation.update["fc1"], "kernel": observation.update["fc1"]["kernel"] + noise}
    noisy = dataclasses.replace(observation, update={**observation.update, "fc1": layer})
    result = attack(noisy)
    assert len(result.images) == 0
    assert {c["status"] for c in result.candidates} == {"mixture"}


def test_the_same_image_twice_is_one_direction():
    result = attack(observe(3, rows=[0, 1, 1]))
    assert result.stats["rank"] == 2
    assert len(result.images) == 2
    assert psnrs(result.images, pool()[0][:2]).min() > 90


def test_other_activations_mix_everything():
    observation = observe(2)
    smooth = dataclasses.replace(observation.victim, module=SmoothMlp((64,), CLASSES))
    changed = dataclasses.replace(observation, victim=smooth)
    with pytest.raises(ValueError, match="whose activation is 'sigmoid', mixes all 2 examples"):
        attack(changed)
    threat = dataclasses.replace(changed.threat_model, num_examples=None)
    result = attack(dataclasses.replace(changed, threat_model=threat))
    assert [c["status"] for c in result.candidates] == ["mixture"]


def synthetic(count=5, neurons=80, seed=0):
    """An update ``X^T delta`` with sparse delta, and its parts."""
    rng = RNG(seed)
    x = rng.normal(size=(count, 30))
    deltas = rng.normal(size=(count, neurons)) * (rng.uniform(size=(count, neurons)) < 0.5)
    return x, deltas, factor(x.T @ deltas, 1e-12, RNG(1))


def test_factors_are_the_update_and_its_rank():
    x, deltas, factors = synthetic()
    assert factors.rank == 5
    assert not factors.full
    np.testing.assert_allclose(factors.basis @ factors.columns, x.T @ deltas, atol=1e-10)
    np.testing.assert_allclose(factors.basis.T @ factors.basis, np.eye(5), atol=1e-12)
    loud = factor(RNG(0).normal(size=(30, 80)), 1e-12, RNG(1))
    assert loud.full
    assert search_batch(loud, np.ones(80), lambda batch: True, RNG(0)) is None
    assert factor(np.zeros((30, 80)), 1e-12, RNG(1)).rank == 0
    many = factor(RNG(2).normal(size=(90, 40)) @ RNG(3).normal(size=(40, 100)), 1e-12, RNG(1))
    assert many.rank == 40  # wider than the first sketch


def test_a_direction_is_the_dual_of_the_example_that_is_off():
    x, deltas, factors = synthetic()
    duals = np.linalg.inv(factors.basis.T @ x.T)
    for n in range(5):
        vector = direction(factors, deltas[n] == 0)
        assert vector is not None
        cosine = abs(vector @ duals[n]) / np.linalg.norm(duals[n])
        assert cosine == pytest.approx(1, abs=1e-10)
    both = (deltas[0] == 0) & (deltas[1] == 0)  # two directions are left
    assert direction(factors, both) is None
    mixture_off = (deltas[0] == 0) & (deltas[1] == 0) | (np.arange(80) < 60)
    assert direction(factors, mixture_off) is None  # none is


def test_a_batch_follows_from_its_directions():
    x, deltas, factors = synthetic()
    batch = search_batch(factors, deltas.sum(axis=0), lambda batch: True, RNG(0))
    assert batch is not None
    order = [int(np.argmin(np.linalg.norm(x - row, axis=1))) for row in batch.inputs]
    assert sorted(order) == list(range(5))
    np.testing.assert_allclose(batch.inputs, x[order], atol=1e-8)
    np.testing.assert_allclose(batch.deltas, deltas[order], atol=1e-8)
    assert search_batch(factors, deltas.sum(axis=0), lambda batch: False, RNG(0)) is None
    vectors = [direction(factors, row == 0) for row in deltas]
    assert all(vector is not None for vector in vectors)
    wrong = RNG(5).normal(size=80)  # no sum of the deltas
    assert complete(factors, [v for v in vectors if v is not None], wrong) is None
