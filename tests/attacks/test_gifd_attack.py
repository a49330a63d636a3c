"""GIFD as a user calls it, on an untrained generator of 8 px and a small victim."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gifd
from jgia.attacks import gradient_matching as general
from jgia.attacks.gifd import drive
from jgia.config import PerformanceFlags
from jgia.config.gifd import GifdOptions
from jgia.config.gradient_matching import RunOptions
from jgia.models import make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Status, ThreatModel


def _load(name) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny_generator")
PRIOR = tiny.make_prior()
VICTIM = make_victim(
    "mlp",
    input_shape=(8, 8, 3),
    num_classes=3,
    widths=(12,),
    normalization=Normalization((0.5,) * 3, (0.25,) * 3),
)
PARAMS = jax.jit(VICTIM.init)(jax.random.key(0))
QUICK = GifdOptions(gifd_steps=12, gifd_restarts=2, last_stage=1)
SMALL = GifdOptions(gifd_steps=6, gifd_restarts=1, last_stage=0)


@functools.cache
def _images(seed, count=1):
    """Images that the prior can make."""
    generator, params = PRIOR.generator, PRIOR.params

    @jax.jit
    def make(key):
        side = generator.draw(params, key, count)
        return (generator.image(params, side, generator.run(params, side, None)) + 1) / 2

    return np.asarray(make(jax.random.key(seed)))


def _observe(seed=9, labels=(1,), *, victim=VICTIM, params=PARAMS, images=None, known=False):
    images = _images(seed, len(labels)) if images is None else images
    update = _gradient(victim, params, images, jnp.asarray(labels))
    threat = ThreatModel(
        server="honest_but_curious",
        num_examples=len(labels),
        labels=tuple(labels) if known else None,
    )
    return Observation(update=update, params=params, victim=victim, threat_model=threat)


_gradient = jax.jit(
    lambda victim, params, images, labels: jax.grad(victim.loss)(params, images, labels),
    static_argnums=0,
)


def _attack(observation=None, options=QUICK, *, seed=3, prior=PRIOR, **kwargs):
    seen = _observe() if observation is None else observation
    return gifd.attack(jax.random.key(seed), seen, prior, options=options, **kwargs)


@pytest.fixture(scope="module")
def found():
    return _attack()


def _distance(observation, images, labels):
    update = _gradient(
        observation.victim, observation.params, np.asarray(images), jnp.asarray(labels)
    )
    return float(general.distance("cosine", update, observation.update))


def test_the_image_of_the_smallest_distance_is_returned(found):
    table = np.array(found.stats["stage_distances"])
    assert table.shape == (2, 2)
    stage, restart = np.unravel_index(np.argmin(table), table.shape)
    assert (found.stats["stage"], found.stats["restart"]) == (stage, restart)
    assert -found.scores[0] == pytest.approx(table.min())
    assert found.statuses == (Status.MATCHED,)
    assert found.selected_by == "gradient distance"
    assert list(found.labels) == [1]
    assert found.stats["labels_by"] == "idlg"
    assert f"stage {stage} " in found.stats["why"]
    # Recomputed from the pixels that were returned, and no other image would do.
    observation = _observe()
    assert _distance(observation, found.images, [1]) == pytest.approx(table.min(), abs=1e-6)
    assert _distance(observation, _images(77), [1]) > table.min()
    np.testing.assert_array_equal(found.history.frames[stage], found.images)


def test_every_stage_is_told(found):
    assert found.stats["stage_names"] == ["latent codes", "features 4x4x6"]
    assert found.stats["stage_steps"] == [12, 12]
    assert found.history.frames.shape == (2, 1, 8, 8, 3)
    assert list(found.history.frame_steps) == [12, 24]
    assert len(found.history.losses) == 24
    table = np.array(found.stats["stage_distances"])
    assert np.all(table[1] < table[0])  # features fit better than latent codes, here
    for curve in found.stats["stage_curves"]:
        losses = np.array(curve["losses"])
        assert losses.shape == (2, 12)
        assert np.all(losses[:, -1] < losses[:, 0])


def test_the_last_stage_can_be_asked_for(found):
    last = _attack(options=dataclasses.replace(QUICK, gifd_selection="last"))
    assert last.stats["stage"] == 1
    assert last.stats["restart"] == int(np.argmin(last.stats["stage_distances"][1]))
    assert last.stats["stage_distances"] == found.stats["stage_distances"]  # same key, same bits


def test_latent_codes_alone_are_stage_0(found):
    alone = _attack(options=dataclasses.replace(QUICK, last_stage=0))
    assert alone.stats["stage_distances"] == found.stats["stage_distances"][:1]


@pytest.mark.slow
def test_groups_change_nothing(found):
    other = _attack(performance=PerformanceFlags(microbatch=1))
    np.testing.assert_allclose(
        other.stats["stage_distances"], found.stats["stage_distances"], atol=1e-5
    )
    np.testing.assert_allclose(other.images, found.images, atol=1e-3)


@pytest.mark.slow
def test_drivers_change_nothing(found):
    other = _attack(
        options=dataclasses.replace(QUICK, last_stage=0),
        performance=PerformanceFlags(driver="scan"),
    )
    np.testing.assert_allclose(
        other.stats["stage_distances"], found.stats["stage_distances"][:1], atol=1e-5
    )


@pytest.mark.slow
def test_a_restart_has_noise_and_variables_of_its_own(found):
    """Each restart alone finds what it finds beside others: none sees another's variables."""
    generator, params = PRIOR.generator, PRIOR.params
    _, key = jax.random.split(jax.random.key(3))
    draw = jax.jit(lambda key: generator.draw(params, key, 1))
    sides = [draw(each) for each in jax.random.split(key, 2)]
    noise = [side["noise"]["b1"] for side in sides]
    assert not np.any(noise[0] == noise[1])
    for restart, side in enumerate(sides):
        alone = _attack(
            options=dataclasses.replace(QUICK, gifd_restarts=1),
            start_side=jax.tree.map(lambda leaf: leaf[None], side),
        )
        np.testing.assert_allclose(
            np.array(alone.stats["stage_distances"])[:, 0],
            np.array(found.stats["stage_distances"])[:, restart],
            atol=1e-5,
        )


@pytest.mark.slow
def test_many_clients_get_what_each_would_get_alone():
    clients = [_observe(9, (1,)), _observe(10, (2,)), _observe(11, (0,))]
    together = gifd.attack_clients(
        jax.random.key(3),
        clients,
        PRIOR,
        options=QUICK,
        performance=PerformanceFlags(microbatch=2),
    )
    for k, one in enumerate(clients):
        alone = gifd.attack(jax.random.split(jax.random.key(3), 3)[k], one, PRIOR, options=QUICK)
        assert list(together[k].labels) == list(alone.labels)
        np.testing.assert_allclose(
            together[k].stats["stage_distances"], alone.stats["stage_distances"], atol=1e-5
        )
        np.testing.assert_allclose(together[k].images, alone.images, atol=1e-3)


def test_a_second_client_compiles_nothing(found):
    del found
    counted: tuple[Any, ...] = (
        drive._render,
        drive._image_loss,
        drive._move,
        drive.begin,
        drive.leave,
    )
    before = [fn._cache_size() for fn in counted]
    _attack(_observe(12, (0,)), seed=4)
    assert [fn._cache_size() for fn in counted] == before


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [8, 12, 20], ids="step{}".format)
def test_a_killed_run_goes_on_from_its_checkpoint(found, tmp_path, at):
    path = tmp_path / "search.npz"
    options = RunOptions(checkpoint=path, checkpoint_every=4, report_every=4)

    def kill(done, total, least):
        assert total == 24
        assert np.isfinite(least)
        if done > at:
            raise _Killed

    with pytest.raises(_Killed):
        _attack(run_options=options, progress=kill)
    told = []
    again = _attack(run_options=options, progress=lambda done, *_: told.append(done))
    assert told[0] >= at + 4  # it did not start anew
    assert again.stats["stage_distances"] == found.stats["stage_distances"]
    assert again.stats["stage_curves"] == found.stats["stage_curves"]
    np.testing.assert_array_equal(again.images, found.images)
    with pytest.raises(general.CheckpointError, match="another search"):
        _attack(run_options=options, seed=5)
    path.write_bytes(b"cut off")
    with pytest.raises(general.CheckpointError, match="no checkpoint"):
        _attack(run_options=options)


def test_pictures_on_the_way(tmp_path):
    _attack(run_options=RunOptions(dump=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-0.png", "stage-1.png"]


def test_budgets_end_a_run():
    steps = _attack(options=dataclasses.replace(QUICK, budget_steps=5))
    assert steps.stats["stage_steps"] == [3, 2]
    seconds = _attack(options=dataclasses.replace(QUICK, gifd_steps=10**6, budget_seconds=0.2))
    assert all(count < 10**5 for count in seconds.stats["stage_steps"])
    assert sum(seconds.stats["stage_seconds"]) < 20
    assert seconds.stats["stopped_early"]
    assert seconds.statuses == (Status.MATCHED,)


def test_a_restart_that_leaves_the_numbers_stops_and_is_told(found):
    generator, params = PRIOR.generator, PRIOR.params
    sides = jax.jit(jax.vmap(lambda key: generator.draw(params, key, 1)))(
        jax.random.split(jax.random.key(1), 2)
    )
    broken = {**sides, "styles": sides["styles"].at[0].set(jnp.nan)}
    half = _attack(start_side=broken)
    assert half.stats["nonfinite_restarts"] == [0]
    assert half.stats["restart"] == 1
    assert half.stats["stage_distances"][0][0] is None
    assert half.statuses == (Status.MATCHED,)
    assert np.isfinite(half.images).all()
    nothing = _attack(start_side=jax.tree.map(lambda leaf: leaf * jnp.nan, sides))
    assert nothing.statuses == ()
    assert nothing.images.shape == (0, 8, 8, 3)
    assert nothing.candidates[0]["status"] == str(Status.NONFINITE)
    assert nothing.stats["why"] == "no search has a finite gradient distance"
    assert found.stats["nonfinite_restarts"] == []


@pytest.mark.slow
def test_batches_and_smaller_victims():
    victim = make_victim("mlp", input_shape=(4, 4, 3), num_classes=3, widths=(6,))
    small = _images(9, 2).reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    params = jax.jit(victim.init)(jax.random.key(2))
    observation = _observe(labels=(0, 2), victim=victim, params=params, images=small, known=True)
    result = _attack(observation, SMALL)
    assert result.images.shape == (2, 4, 4, 3)
    assert list(result.labels) == [0, 2]
    assert result.stats["labels_by"] == "given"


@pytest.mark.slow
def test_a_conditional_generator_keeps_its_labels_apart():
    prior = tiny.make_prior(num_classes=7)
    mapped = _attack(options=SMALL, prior=prior, generator_labels=np.array([6]))
    assert list(mapped.labels) == [1]  # the victim's: it has no class 6
    assert mapped.stats["generator_labels"] == [6]
    unmapped = _attack(options=SMALL, prior=prior)
    assert unmapped.stats["generator_labels"] == [1]
    assert mapped.stats["stage_distances"] != unmapped.stats["stage_distances"]
    with pytest.raises(ValueError, match=r"classes 0 to 6, got \[7\] in generator_labels"):
        _attack(prior=prior, generator_labels=np.array([7]))
    with pytest.raises(ValueError, match="generator_labels must be"):
        _attack(prior=prior, generator_labels=np.array([1, 2]))
    with pytest.raises(ValueError, match="not among its classes"):
        _attack(_observe(labels=(2,)), prior=tiny.make_prior(num_classes=2))


def _with_nan():
    observation = _observe()
    update = jax.tree.map(jnp.copy, observation.update)
    update["head"]["bias"] = update["head"]["bias"].at[1].set(jnp.nan)
    return dataclasses.replace(observation, update=update)


def _of_shape(*shape):
    victim = make_victim("mlp", input_shape=shape, num_classes=3, widths=(4,))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), victim.param_shapes())
    threat = ThreatModel(server="honest_but_curious", num_examples=1)
    return Observation(update=params, params=params, victim=victim, threat_model=threat)


def _unknown_count():
    observation = _observe()
    threat = dataclasses.replace(observation.threat_model, num_examples=None)
    return dataclasses.replace(observation, threat_model=threat)


@pytest.mark.parametrize(
    ("observation", "kwargs", "message"),
    [
        (_with_nan, {}, "head/bias has 1 NaN"),
        (functools.partial(_of_shape, 8, 8, 1), {}, "3 channels, the victim takes 1"),
        (
            functools.partial(_of_shape, 6, 6, 3),
            {},
            "averaged down by a whole number; the victim takes 6 x 6",
        ),
        (_unknown_count, {}, "give num_examples="),
        (_observe, {"num_examples": 2}, "contradicts the threat model"),
        (_observe, {"generator_labels": np.array([0])}, "the prior is not conditional"),
        (_observe, {"options": GifdOptions(last_stage=3)}, "the largest is 2"),
        (_observe, {"options": gifd.Settings(last_stage=3)}, "the largest is 2"),
        (_observe, {"start_side": {"styles": np.zeros((2, 1, 3, 5))}}, "start_side must have"),
    ],
)
def test_bad_input_is_refused(observation, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _attack(observation(), **kwargs)


def test_clients_that_differ_are_refused():
    other = _observe(params=jax.tree.map(lambda leaf: leaf + 1, PARAMS))
    for clients, message in (([], "at least one"), ([_observe(), other], "must share")):
        with pytest.raises(ValueError, match=message):
            gifd.attack_clients(jax.random.key(0), clients, PRIOR, options=QUICK)
    with pytest.raises(ValueError, match="one entry for each of 1"):
        gifd.attack_clients(jax.random.key(0), [_observe()], PRIOR, generator_labels=[])
