"""GIAS and GGL on an 8 px generator, against what a plain computation says."""

import dataclasses
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gifd
from jgia.attacks.gifd import attack_ggl, attack_gias
from jgia.attacks.gifd.ggl import _settings as ggl_settings
from jgia.attacks.gifd.ggl_space import Basis, Space, evaluate
from jgia.attacks.gifd.gias import Reweighted, step_rates
from jgia.attacks.gifd.stages import make_stage
from jgia.attacks.gradient_matching import CheckpointError
from jgia.config import ClientConfig, RunOptions
from jgia.config.gifd_baselines import GglOptions, GiasOptions
from jgia.federated import client_update
from jgia.generators.stylegan2 import StyleGAN2
from jgia.models import make_victim
from jgia.observation import Status


def _tiny():
    name = "jgia_tiny_generator_baselines"
    path = Path(__file__).with_name("tiny_generator.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PRIOR = _tiny().make_prior()
GENERATOR = PRIOR.generator
VICTIM = make_victim("mlp", input_shape=(8, 8, 3), num_classes=3, widths=(16,))
PARAMS = VICTIM.init(jax.random.key(0))
GIAS = GiasOptions(gias_latent_steps=40, gias_weight_steps=60, gias_restarts=1)
GGL = GglOptions(ggl_population=20, ggl_rounds=60, ggl_tanh=False)


def _side(seed, num_images=1):
    return GENERATOR.draw(PRIOR.params, jax.random.key(seed), num_images)


@jax.jit
def _rendered(params, side):
    return (GENERATOR.image(params, side, GENERATOR.run(params, side, None)) + 1) / 2


def _images(side, params=PRIOR.params):
    return np.asarray(_rendered(params, side))


def _update(images, labels, config=None):
    return client_update(
        jax.random.key(1), VICTIM, PARAMS, images, np.array(labels), config or ClientConfig()
    )


def _observe(images, labels=(1,)):
    seen = _update(images, labels)
    threat = dataclasses.replace(
        seen.threat_model, server="honest_but_curious", labels=tuple(labels)
    )
    return dataclasses.replace(seen, threat_model=threat)


@pytest.fixture(scope="module")
def two():
    """An update of two images of the generator's."""
    return _observe(_images(_side(5, 2)), (1, 2))


@pytest.fixture(scope="module")
def gias(two):
    return attack_gias(jax.random.key(3), two, PRIOR, options=GIAS)


def test_weights_come_closer_than_latent_codes(gias):
    (latent,), (weights,) = gias.stats["stage_distances"]
    assert weights < 0.8 * latent
    assert gias.stats["stage_names"] == ["latent codes", "generator weights"]
    assert gias.stats["stage"] == 1
    assert gias.stats["stage_steps"] == [40, 60]
    assert not gias.stats["stopped_early"]
    assert gias.statuses == (Status.MATCHED,) * 2
    assert list(gias.labels) == [1, 2]
    np.testing.assert_allclose(-gias.scores, weights)
    np.testing.assert_array_equal(gias.history.frames[-1], gias.images)
    assert gias.history.frame_steps.tolist() == [40, 100]


def test_the_distance_reported_is_that_of_the_images_returned(gias, two):
    own, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(seen.update)])
        for seen in (_update(gias.images, (1, 2)), two)
    )
    cosine = own @ wanted / np.linalg.norm(own) / np.linalg.norm(wanted)
    np.testing.assert_allclose(-gias.scores[0], 1 - cosine, rtol=1e-4)


def test_gias_starts_where_gifd_does(gias, two):
    settings = gifd.Settings(
        last_stage=0, num_steps=1, restarts=1, search="features_styles", radius_mode="none",
        image_l2=0.0,
    )  # fmt: skip
    other = gifd.attack(jax.random.key(3), two, PRIOR, options=settings)
    first = [found.stats["stage_curves"][0]["losses"][0][0] for found in (gias, other)]
    assert first[0] == first[1]


def test_the_same_key_gives_the_same_bits_and_the_prior_stays(gias, two):
    before = jax.tree.map(np.array, PRIOR.params)
    again = attack_gias(jax.random.key(3), two, PRIOR, options=GIAS)
    np.testing.assert_array_equal(gias.images, again.images)
    jax.tree.map(np.testing.assert_array_equal, before, PRIOR.params)


class _Killed(Exception):
    pass


def _resumed(attack, path, at):
    """Kill a run with a checkpoint after so many steps, then let it go on: what it then tells."""
    run_options = RunOptions(checkpoint=path, checkpoint_every=4, report_every=4)

    def kill(done, total, least):
        assert np.isfinite(least)
        if done > at:
            raise _Killed

    with pytest.raises(_Killed):
        attack(run_options=run_options, progress=kill)
    told = []
    found = attack(run_options=run_options, progress=lambda done, *_: told.append(done))
    return found, told


@pytest.mark.parametrize("at", [24, 52], ids=["latent", "weights"])
def test_a_killed_search_of_weights_goes_on_from_its_checkpoint(gias, two, tmp_path, at):
    path = tmp_path / "search.npz"

    def attack(options=GIAS, **rest):
        return attack_gias(jax.random.key(3), two, PRIOR, options=options, **rest)

    again, told = _resumed(attack, path, at)
    assert at < told[0] <= at + 8  # it did not start anew
    assert told[-1] == 100
    assert again.stats["stage_distances"] == gias.stats["stage_distances"]
    assert again.stats["stage_curves"] == gias.stats["stage_curves"]
    np.testing.assert_array_equal(again.images, gias.images)
    other = dataclasses.replace(GIAS, gias_weight_rate=0.1)
    with pytest.raises(CheckpointError, match="another search"):
        attack(run_options=RunOptions(checkpoint=path), options=other)


def test_time_ends_both_phases(two):
    told = []
    options = dataclasses.replace(GIAS, gias_budget_seconds=1e-6)
    found = attack_gias(
        jax.random.key(3), two, PRIOR, options=options, progress=lambda *args: told.append(args)
    )
    assert found.stats["stopped_early"]
    assert found.stats["stage_steps"] == [5, 5]
    assert [(done, total) for done, total, _ in told] == [(5, 100), (45, 100)]


def test_numbers_that_are_not_finite_end_one_restart_only(two):
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), _side(1, 2), _side(2, 2))
    start["styles"] = start["styles"].at[0].set(np.nan)
    options = dataclasses.replace(GIAS, gias_latent_steps=3, gias_weight_steps=3, gias_restarts=2)
    found = attack_gias(jax.random.key(3), two, PRIOR, options=options, start_side=start)
    assert found.stats["nonfinite_restarts"] == [0]
    assert found.stats["restart"] == 1
    assert np.isfinite(found.images).all()


@pytest.mark.slow
def test_images_with_generators_of_their_own(two):
    options = dataclasses.replace(
        GIAS, gias_copies="image", gias_latent_steps=2, gias_weight_steps=20
    )
    found = attack_gias(jax.random.key(3), two, PRIOR, options=options)
    (latent,), (weights,) = found.stats["stage_distances"]
    assert weights < latent


def test_weights_as_side_inputs_make_the_same_images():
    side, other = _side(4, 2), GENERATOR.init(jax.random.key(8))
    wrapped = Reweighted(GENERATOR)

    @jax.jit
    def images(weights):
        given = {"weights": weights, "latents": side}
        return wrapped.image((), given, wrapped.run((), given, None))

    shared = images(jax.tree.map(lambda leaf: leaf[None], PRIOR.params))
    np.testing.assert_allclose((shared + 1) / 2, _images(side), atol=1e-6)
    own = images(jax.tree.map(lambda *leaves: jnp.stack(leaves), PRIOR.params, other))
    np.testing.assert_allclose((own[0] + 1) / 2, _images(side)[0], atol=1e-6)
    np.testing.assert_allclose((own[1] + 1) / 2, _images(side, other)[1], atol=1e-6)
    with pytest.raises(ValueError, match="entered at 0"):
        wrapped.run((), {}, None, start=1)


def test_rates_fall_three_times():
    rates = step_rates(np.arange(8) / 8, 0.03)
    np.testing.assert_allclose(rates, 0.03 * np.array([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Prior:
    generator: Any
    params: Any
    name: str = "small"


class _RandomSearch:
    """As many candidates as CMA-ES draws, all from the first distribution."""

    def __init__(self, mean, sigma, population_size, seed):
        del population_size
        self.rng, self.mean, self.sigma = np.random.default_rng(seed), mean, sigma

    def ask(self):
        return self.mean + self.sigma * self.rng.normal(size=self.mean.shape)

    def tell(self, solutions):
        assert all(math.isfinite(value) for _, value in solutions)

    def should_stop(self):
        return False


@pytest.fixture(scope="module")
def planted():
    """An image of the generator's, and the noise maps that made it."""
    side = _side(11)
    return _observe(_images(side)), jax.tree.map(lambda leaf: leaf[None], side), _images(side)


def test_ggl_finds_a_planted_image_where_random_search_does_not(planted, monkeypatch):
    observation, start, truth = planted
    found = attack_ggl(jax.random.key(3), observation, PRIOR, options=GGL, start_side=start)
    again = attack_ggl(jax.random.key(3), observation, PRIOR, options=GGL, start_side=start)
    monkeypatch.setitem(sys.modules, "cmaes", types.SimpleNamespace(CMA=_RandomSearch))
    random = attack_ggl(jax.random.key(3), observation, PRIOR, options=GGL, start_side=start)
    np.testing.assert_array_equal(found.images, again.images)
    assert found.stats["evaluations"] == random.stats["evaluations"] == 1200
    assert found.stats["space"] == "side"
    assert found.scores[0] > 0.2 * random.scores[0]
    errors = [np.mean((result.images - truth) ** 2) for result in (found, random)]
    assert errors[0] < 0.3 * errors[1]
    # What is reported is a plain sum of squares.
    own, wanted = (seen.update for seen in (_update(found.images, (1,)), observation))
    squares = jax.tree.map(lambda a, b: np.sum((np.asarray(a) - b) ** 2), own, wanted)
    np.testing.assert_allclose(-found.scores[0], sum(jax.tree.leaves(squares)), rtol=1e-3)
    assert found.history is not None
    assert found.history.frame_steps[-1] == 60
    np.testing.assert_array_equal(found.history.frames[-1], found.images)
    assert found.stats["cosine_distance"] < random.stats["cosine_distance"]


@pytest.mark.parametrize("at", [6, 17], ids=["first", "second"])
def test_a_killed_search_without_derivatives_goes_on(planted, tmp_path, at):
    short = dataclasses.replace(GGL, ggl_rounds=12, ggl_restarts=2, ggl_population=10)
    path, pictures = tmp_path / "search.npz", tmp_path / "pictures"

    def attack(options=short, **rest):
        return attack_ggl(jax.random.key(3), planted[0], PRIOR, options=options, **rest)

    whole = attack(run_options=RunOptions(dump=pictures))
    assert [file.name for file in pictures.iterdir()] == ["stage-0.png"]
    again, told = _resumed(attack, path, at)
    assert told == list(range(at - at % 4 + 1, 25))  # it did not start anew
    for name in ("stage_distances", "stage_curves", "evaluations", "begun_anew", "restart"):
        assert again.stats[name] == whole.stats[name]
    np.testing.assert_array_equal(again.images, whole.images)
    assert again.history is not None
    assert whole.history is not None
    np.testing.assert_array_equal(again.history.frames, whole.history.frames)
    np.testing.assert_array_equal(again.history.frame_steps, whole.history.frame_steps)
    once_more = attack(run_options=RunOptions(checkpoint=path), progress=_never)
    np.testing.assert_array_equal(once_more.images, whole.images)
    with pytest.raises(CheckpointError, match="another search"):
        attack(options=GGL, run_options=RunOptions(checkpoint=path))
    path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        attack(run_options=RunOptions(checkpoint=path))


def _never(*words):
    pytest.fail(f"a finished search went on: {words}")


def test_ggl_reads_what_was_removed_off_the_update(planted):
    observation, start, _ = planted
    kept = jax.tree.map(
        lambda leaf: np.where(abs(leaf) > np.quantile(abs(leaf), 0.8), leaf, 0), observation.update
    )
    options = dataclasses.replace(GGL, ggl_rounds=1, ggl_replay="all")
    observation = dataclasses.replace(observation, update=kept)
    found = attack_ggl(jax.random.key(3), observation, PRIOR, options=options, start_side=start)
    assert "zero and masked" in found.stats["transform"]["found"]
    assert "lengths are bounded" in found.stats["transform"]["found"]


def test_time_ends_ggl(planted):
    options = dataclasses.replace(GGL, ggl_budget_seconds=1e-6, ggl_restarts=2)
    found = attack_ggl(jax.random.key(3), planted[0], PRIOR, options=options)
    assert found.stats["stopped_early"]
    assert found.stats["stage_steps"] == [1]
    assert found.stats["evaluations"] == 40


@pytest.mark.slow
def test_ggl_searches_the_vector_before_a_mapping_network():
    """Pixels and loss of a population against the generator and NumPy, candidate by candidate."""
    generator = StyleGAN2(
        resolution=8, base=32, max_features=4, latent_dim=6, style_dim=5, mapping_layers=1
    )
    params = jax.jit(generator.init)(jax.random.key(0))
    side = jax.jit(lambda key: generator.draw(params, key, 2))(jax.random.key(1))
    options = GglOptions(ggl_distance="cosine", ggl_kld=0.1, ggl_population=4, ggl_rounds=2)
    stage = make_stage(generator, 0, side, ggl_settings(options), 1)
    space = Space(stage, True, ((2, 6),), True, 0.1, 1)
    vectors = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    observation = _observe(_images(_side(5, 2)), (1, 2))
    matching = gifd.make_matching(observation, np.array([1, 2]))
    basis = Basis(jax.tree.leaves(side), None, [], [])
    losses, fits, pixels = evaluate(space, params, matching, basis, jnp.asarray(vectors))

    @jax.jit
    def image(latents):
        styles = generator.broadcast(generator.map(params, latents))
        seen = {**side, "styles": styles}
        return generator.image(params, seen, generator.run(params, seen, None))

    latents = np.tanh(vectors).reshape(4, 2, 6)
    expected = np.stack([np.clip((image(jnp.asarray(z)) + 1) / 2, 0, 1) for z in latents])
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    mean, variance = latents.mean(axis=2), latents.var(axis=2)
    divergence = -0.5 * (1 + np.log(variance) - mean**2 - variance)
    np.testing.assert_allclose(losses - fits, 0.1 * divergence.mean(axis=1), rtol=1e-3)

    prior = _Prior(generator, params)
    found = attack_ggl(jax.random.key(3), observation, prior, options=options)
    assert found.stats["space"] == "latent"
    assert found.images.shape == (2, 8, 8, 3)


def test_a_missing_package_is_named(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"pip install \"jgia\[ggl\]\""):
        attack_ggl(jax.random.key(3), planted[0], PRIOR, options=GGL)


def test_what_does_not_fit_is_refused(planted):
    options = dataclasses.replace(GGL, ggl_space="latent")
    with pytest.raises(ValueError, match="mapping network"):
        attack_ggl(jax.random.key(3), planted[0], PRIOR, options=options)
    for attack in (attack_gias, attack_ggl):
        with pytest.raises(ValueError, match="not conditional"):
            attack(jax.random.key(3), planted[0], PRIOR, generator_labels=np.array([0]))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GiasOptions, {"gias_weight_steps": 0}),
        (GiasOptions, {"gias_weight_rate": -1.0}),
        (GiasOptions, {"gias_budget_seconds": 0.0}),
        (GglOptions, {"ggl_population": 3}),
        (GglOptions, {"ggl_sigma": 0.0}),
        (GglOptions, {"ggl_kld": -0.1}),
    ],
)
def test_bad_options_are_refused(kind, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        kind(**fields)
