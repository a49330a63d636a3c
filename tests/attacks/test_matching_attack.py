"""Gradient matching as a user calls it."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jgia.attacks import gradient_matching as matching
from jgia.attacks.gradient_matching import drive
from jgia.config import ClientConfig, PerformanceFlags
from jgia.config.gradient_matching import MatchingOptions, RunOptions
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.normalization import Normalization
from jgia.observation import Status

VICTIM = make_victim(
    "lenet",
    input_shape=(8, 8, 1),
    num_classes=3,
    widths=(8,),
    normalization=Normalization((0.5,), (0.25,)),
)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(4, 8, 8, 1)).astype(np.float32)
PARAMS = VICTIM.init(jax.random.key(0))


def _observe(images=IMAGES[:1], labels=(1,), *, known=True, config=None):
    seen = client_update(
        jax.random.key(1), VICTIM, PARAMS, images, np.array(labels), config or ClientConfig()
    )
    threat = dataclasses.replace(
        seen.threat_model, server="honest_but_curious", labels=tuple(labels) if known else None
    )
    return dataclasses.replace(seen, threat_model=threat)


def _psnr(found, truth):
    return -10 * np.log10(np.mean((np.asarray(found, np.float64) - truth) ** 2))


def _quick(**fields):
    return matching.Settings(**{"num_steps": 30, "learning_rate": 0.05, **fields})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("inverting_gradients", MatchingOptions(total_variation=0.0, num_steps=600)),
        ("idlg", MatchingOptions(num_steps=200)),
        ("dlg", MatchingOptions(num_steps=200)),
    ],
)
def test_the_image_of_a_small_network_is_found(method, options):
    result = matching.attack(
        jax.random.key(3), _observe(known=method != "dlg"), method=method, options=options
    )
    assert result.statuses == (Status.MATCHED,)
    assert _psnr(result.images, IMAGES[:1]) > 30
    assert list(result.labels) == [1]
    assert result.stats["labels_by"] == ("joint" if method == "dlg" else "given")
    # Not the last of the curve: where only rounding is left, L-BFGS may leap away and stay there.
    # What is returned is the best point.
    losses = result.stats["curve_losses"]
    assert min(losses) < losses[0] / 10
    assert -result.scores[0] <= min(losses)


@pytest.mark.slow
def test_another_image_does_not_fit():
    """The distance tells right from wrong: it is no better elsewhere than where it was found."""
    observation = _observe()
    found = matching.attack(
        jax.random.key(3), observation, method="idlg", options=MatchingOptions(num_steps=200)
    )
    problem = matching.make_problem(observation, found.labels, matching.settings("idlg"))
    inputs = VICTIM.normalization.normalize(IMAGES[1:2])
    _, fit = matching.loss(problem, matching.Variables(inputs, None), inputs)
    assert float(fit) > 100 * -found.scores[0]


@pytest.mark.slow
def test_the_restart_with_the_smallest_distance_is_returned():
    result = matching.attack(jax.random.key(3), _observe(), options=_quick(restarts=3))
    distances = result.stats["restart_distances"]
    assert result.stats["restart"] == int(np.argmin(distances))
    assert -result.scores[0] == pytest.approx(min(distances))
    assert result.selected_by == "gradient distance"


@pytest.mark.slow
def test_microbatches_and_drivers_change_nothing():
    one, *others = (
        matching.attack(
            jax.random.key(3), _observe(), options=_quick(restarts=3), performance=flags
        )
        for flags in (
            PerformanceFlags(microbatch=1, driver="python"),
            PerformanceFlags(microbatch=2, driver="python"),
            PerformanceFlags(microbatch=3, driver="scan"),
        )
    )
    for other in others:
        np.testing.assert_allclose(other.images, one.images, atol=2e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "search.npz"
    whole = matching.attack(jax.random.key(3), _observe(), options=_quick(restarts=2))
    options = RunOptions(checkpoint=path, checkpoint_every=10, report_every=10, frames=3)

    class Killed(Exception):
        pass

    def kill(done, total, value):
        if done >= 20:
            raise Killed

    args = {"options": _quick(restarts=2), "run_options": options}
    with pytest.raises(Killed):
        matching.attack(jax.random.key(3), _observe(), progress=kill, **args)
    seen = []
    resumed = matching.attack(
        jax.random.key(3), _observe(), progress=lambda done, *_: seen.append(done), **args
    )
    assert seen == [30]
    np.testing.assert_array_equal(resumed.images, whole.images)
    assert resumed.stats["curve_losses"] == whole.stats["curve_losses"]
    assert resumed.history is not None
    assert resumed.history.frames.shape == (3, 1, 8, 8, 1)
    with pytest.raises(matching.CheckpointError, match="another search"):
        matching.attack(jax.random.key(4), _observe(), **args)
    path.write_bytes(b"no archive")
    with pytest.raises(matching.CheckpointError, match="no checkpoint"):
        matching.attack(jax.random.key(3), _observe(), **args)


@pytest.mark.slow
def test_a_flat_loss_ends_the_search_early():
    options = _quick(num_steps=200, patience=20, learning_rate=1e-9)
    result = matching.attack(
        jax.random.key(3), _observe(), options=options, run_options=RunOptions(report_every=10)
    )
    assert result.stats["stopped_early"]
    assert result.stats["steps"] == 30
    moving = dataclasses.replace(options, learning_rate=0.05, num_steps=60)
    result = matching.attack(
        jax.random.key(3), _observe(), options=moving, run_options=RunOptions(report_every=10)
    )
    assert result.stats["steps"] == 60


def test_pictures_are_dumped(tmp_path):
    options = RunOptions(dump=tmp_path / "on-the-way", dump_every=10, report_every=10)
    matching.attack(jax.random.key(3), _observe(), options=_quick(), run_options=options)
    names = sorted(path.name for path in (tmp_path / "on-the-way").iterdir())
    assert names == ["step-000010.png", "step-000020.png", "step-000030.png"]


def test_a_second_client_compiles_nothing():
    matching.attack(jax.random.key(3), _observe(), options=_quick())
    step: Any = drive._one_step
    before = step._cache_size()
    matching.attack(jax.random.key(4), _observe(IMAGES[1:2], (2,)), options=_quick())
    assert step._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 6])
def test_clients_together_are_clients_one_by_one(size):
    seen = [_observe(IMAGES[i : i + 1], (i % 3,)) for i in range(3)]
    options = _quick(restarts=2)
    together = matching.attack_clients(
        jax.random.key(3), seen, options=options, performance=PerformanceFlags(microbatch=size)
    )
    keys = jax.random.split(jax.random.key(3), 3)
    for key, observation, found in zip(keys, seen, together, strict=True):
        alone = matching.attack(key, observation, options=options)
        np.testing.assert_allclose(found.images, alone.images, atol=2e-3)
        assert found.stats["restart"] == alone.stats["restart"]
        assert found.history is not None
        assert alone.history is not None
        np.testing.assert_allclose(found.history.frames[-1], alone.history.frames[-1], atol=2e-3)


def test_clients_of_different_rounds_are_refused():
    other = dataclasses.replace(_observe(), params=jax.tree.map(lambda leaf: 2 * leaf, PARAMS))
    with pytest.raises(ValueError, match="share the model"):
        matching.attack_clients(jax.random.key(3), [_observe(), other], options=_quick())
    pair = _observe(IMAGES[:2], (0, 1))
    with pytest.raises(ValueError, match="share the model"):
        matching.attack_clients(jax.random.key(3), [_observe(), pair], options=_quick())
    options = _quick(group_prior=0.1, restarts=2)
    with pytest.raises(ValueError, match="mix clients"):
        matching.attack_clients(jax.random.key(3), [_observe()], options=options)
    with pytest.raises(ValueError, match="at least one"):
        matching.attack_clients(jax.random.key(3), [])


def test_fedavg_is_replayed():
    config = ClientConfig(protocol="fedavg", local_epochs=2, learning_rate=0.05)
    options = MatchingOptions(total_variation=0.0, num_steps=600)
    result = matching.attack(jax.random.key(3), _observe(config=config), options=options)
    assert _psnr(result.images, IMAGES[:1]) > 30


@pytest.mark.parametrize(
    ("threat", "arguments", "message"),
    [
        ({"num_examples": None}, {}, "give num_examples="),
        ({}, {"num_examples": 2}, "contradicts the threat model"),
        ({"labels": (7,)}, {}, "labels below 3"),
        ({}, {"start": np.zeros((1, 8, 8, 1))}, "start must have shape"),
        (
            {"protocol": "fedavg"},
            {"method": "idlg"},
            "compares lengths, which needs the client's local_steps",
        ),
        (
            {"protocol": "fedavg", "local_learning_rate": 0.1, "num_clients": 2},
            {},
            "sums up 2 clients",
        ),
    ],
)
def test_bad_arguments_are_refused(threat, arguments, message):
    observation = _observe()
    observation = dataclasses.replace(
        observation, threat_model=dataclasses.replace(observation.threat_model, **threat)
    )
    with pytest.raises(ValueError, match=message):
        matching.attack(jax.random.key(3), observation, **arguments)


def test_options_replace_what_the_paper_does():
    chosen = matching.settings("see_through", MatchingOptions(restarts=1, num_steps=7))
    assert (chosen.restarts, chosen.group_prior, chosen.num_steps) == (1, 0.0, 7)
    assert chosen.distance == "l2_norm"
    with pytest.raises(ValueError, match="needs at least 2"):
        matching.settings("see_through", MatchingOptions(restarts=1, group_prior=0.1))


def test_a_given_start_is_where_it_starts():
    start = IMAGES[None, :1]
    result = matching.attack(
        jax.random.key(3), _observe(), options=_quick(distance="l2", num_steps=1), start=start
    )
    np.testing.assert_allclose(result.images, IMAGES[:1], atol=1e-6)
    assert -result.scores[0] == pytest.approx(0, abs=1e-8)


def test_nothing_finite_is_nothing_returned():
    observation = _observe()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, observation.update)
    result = matching.attack(
        jax.random.key(3), dataclasses.replace(observation, update=broken), options=_quick()
    )
    assert len(result.images) == 0
    assert result.candidates[0]["status"] == "nonfinite"
    assert result.stats["undone_steps"] == 30


def test_the_step_is_a_pure_function():
    problem = matching.make_problem(_observe(), np.array([1]), _quick())
    state = matching.search.init(jax.random.key(1), problem)
    eager, _ = matching.search.step(state, problem)
    jitted, _ = jax.jit(matching.search.step)(state, problem)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-4, atol=1e-5)
