"""From a client's update to images, through the public path."""

import ast
import collections
import dataclasses
import functools
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgia.attacks
from jgia.attacks import ares
from jgia.attacks.ares.candidates import concatenate
from jgia.attacks.ares.recovery import least_squares
from jgia.config import AresOptions, ClientConfig, PerformanceFlags
from jgia.observation import Observation, Status, ThreatModel
from jgia.sparse import ConvOperator, from_planes, to_planes

SMALL = PerformanceFlags(microbatch=16)
SPARSE = PerformanceFlags(microbatch=4)  # a thousand iterations: do not pad


def _statuses(reconstruction) -> list[str]:
    return [candidate["status"] for candidate in reconstruction.candidates]


def _check_exact_ones(reconstruction, truths, best_psnr) -> None:
    """An image that is called exact must be one of the true ones."""
    for image, status in zip(reconstruction.images, reconstruction.statuses, strict=True):
        if status is Status.EXACT:
            assert best_psnr([image], truths)[0] >= 60


@pytest.mark.parametrize("front_end", ["random", "signed"])
@pytest.mark.parametrize("batch", [1, 8])
def test_lone_images_are_recovered_to_the_last_digits(front_end, batch, make_setting, best_psnr):
    s = make_setting(options=AresOptions(front_end=front_end, front_end_trials=4))
    images = s.images[:batch]
    assert len(set(s.bins_of(images))) == batch  # else this is another test
    result = s.attack(images)
    psnr = best_psnr(images, result.images)
    assert np.median(psnr) >= 120
    if front_end == "signed":
        assert psnr.min() >= 120
    assert _statuses(result) == ["exact"] * batch
    assert result.images.dtype == np.float32
    assert np.all(np.diff(result.scores) <= 0)


def test_gray_images(make_setting, best_psnr):
    s = make_setting(gray=True)
    result = s.attack(s.images[:4])
    assert np.median(best_psnr(s.images[:4], result.images)) >= 120


def test_identity_front_end_fails_on_normalized_inputs_only(make_setting, best_psnr):
    options = AresOptions(front_end="direct", front_end_trials=4)
    normalized, plain = (
        make_setting(options=options),
        make_setting(options=options, normalize=False),
    )
    images = plain.images[:4]
    poor = best_psnr(images, normalized.attack(images, performance=SPARSE).images)
    exact = best_psnr(images, plain.attack(images).images)
    assert np.median(poor) < 30
    assert exact.min() >= 120


@pytest.mark.parametrize("front_end", ["random", "signed"])
def test_shared_bins_are_called_mixtures_and_lone_ones_are_returned(
    front_end, make_setting, best_psnr
):
    s = make_setting(fc_width=16, options=AresOptions(front_end=front_end, front_end_trials=4))
    images = s.images[:20]
    bins = s.bins_of(images)
    occupancy = collections.Counter(int(b) for b in bins if b >= 0)
    result = s.attack(images)
    got = {candidate["bin"]: candidate["status"] for candidate in result.candidates}
    assert got.keys() == occupancy.keys()
    assert sorted(set(occupancy.values()))[:2] == [1, 2]
    for j, count in occupancy.items():
        assert (got[j] == "exact") == (count == 1), (j, count, got[j])
    lone = [i for i, b in enumerate(bins) if occupancy[int(b)] == 1]
    assert len(result.images) == len(lone)
    assert best_psnr(images[lone], result.images).min() >= 100


def test_copies_of_one_image_come_back_once(setting, best_psnr):
    copies = np.repeat(setting.images[:1], 6, axis=0)
    result = setting.attack(copies, setting.labels[:6])
    assert len(result.images) == 1
    assert best_psnr(copies[:1], result.images)[0] >= 100


def test_two_copies_among_others_come_back_once(setting, best_psnr):
    images = np.concatenate([setting.images[:4], setting.images[:1]])
    result = setting.attack(images, setting.labels[[0, 1, 2, 3, 5]])
    assert len(result.images) == 4
    assert best_psnr(images, result.images).min() >= 100


def test_equal_candidates_are_marked_as_duplicates(setting, observation):
    one = ares.leak(observation, setting.plan)
    twice = concatenate([one, one])
    result = ares.invert(jax.random.key(2), twice, setting.plan, setting.victim, performance=SMALL)
    assert collections.Counter(_statuses(result)) == {"exact": len(one), "duplicate": len(one)}
    assert len(result.images) == len(one)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("front_end", ["random", "signed"])
def test_one_colour_images(front_end, normalize, make_setting, best_psnr):
    options = AresOptions(front_end=front_end, front_end_trials=4)
    s = make_setting(options=options, normalize=normalize)
    colors = np.array([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [0.9, 0.1, 0.2]], np.float32)
    images = np.broadcast_to(colors[:, None, None, :], (4, 16, 16, 3))
    for batch in (images, images[:1], images[2:3]):
        result = s.attack(batch)
        _check_exact_ones(result, batch, best_psnr)


def test_all_black_batch(setting, make_setting, best_psnr):
    black = np.zeros((4, 16, 16, 3), np.float32)
    result = setting.attack(black)
    assert len(result.images) <= 1
    _check_exact_ones(result, black, best_psnr)
    # Without normalization black images light no neuron: nothing is seen, nothing is made up.
    assert len(make_setting(normalize=False).attack(black).candidates) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_candidate_that_is_not_finite_leaves_the_others_alone(
    value, setting, observation, reconstruction
):
    candidates = ares.leak(observation, setting.plan)
    activations = candidates.activations.copy()
    activations[2, 5, 5, 3] = value
    damaged = dataclasses.replace(candidates, activations=activations)
    result = ares.invert(
        jax.random.key(2), damaged, setting.plan, setting.victim, performance=SPARSE
    )
    assert _statuses(result) == ["exact", "exact", "nonfinite", *["exact"] * 5]
    assert np.all(np.isfinite(result.images))
    assert len(result.images) == 7
    json.dumps(result.candidates, allow_nan=False)
    for image in result.images:
        assert np.abs(reconstruction.images - image[None]).max(axis=(1, 2, 3)).min() < 1e-4


@pytest.mark.slow
def test_too_few_equations_are_filled_in_better_than_by_least_squares(make_setting, best_psnr):
    s = make_setting(widths=(4, 4))
    images = s.images[:4]
    observation = s.observe(images)
    result = ares.attack(jax.random.key(2), observation, performance=SPARSE)
    assert len(result.images) >= 3
    assert set(_statuses(result)) <= {"regularised", "rank_deficient"}
    candidates = ares.leak(observation, s.plan)
    active = candidates.activations > 1e-6 * candidates.activations.max()
    y = to_planes(jnp.asarray(candidates.activations, jnp.float32))
    mask = to_planes(jnp.asarray(active, jnp.float32)) > 0
    probe = jnp.ones((3, 16, 16, 1), jnp.float32)
    plain = least_squares(ConvOperator(jnp.asarray(s.plan.kernel)), y, mask, probe).x
    pixels = np.clip(s.victim.normalization.denormalize(from_planes(plain)), 0, 1)
    better = best_psnr(images, result.images) - best_psnr(images, pixels)
    assert np.median(better) > 1.0
    assert all(c["equations_per_unknown"] < 1 for c in result.candidates)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatch_changes_no_answer(microbatch, setting, reconstruction):
    result = setting.attack(performance=PerformanceFlags(microbatch=microbatch))
    assert _statuses(result) == _statuses(reconstruction)
    mine, theirs = _in_bin_order(result), _in_bin_order(reconstruction)
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


def _in_bin_order(result) -> np.ndarray:
    """Images sorted by their mean, which does not depend on last digits of residuals."""
    return result.images[np.argsort(result.images.mean(axis=(1, 2, 3)))]


def test_float64_agrees_with_float32_and_fits_better(setting, reconstruction):
    performance = PerformanceFlags(microbatch=16, dtype="float64")
    result = setting.attack(performance=performance)
    assert _statuses(result) == _statuses(reconstruction)
    np.testing.assert_allclose(_in_bin_order(result), _in_bin_order(reconstruction), atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _init(victim, key):
    return victim.init(key)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_accepted_from_a_model_that_was_not_crafted(seed, setting):
    params = _init(setting.victim, jax.random.key(seed))
    observation = setting.observe(params=params)
    result = ares.attack(jax.random.key(2), observation, performance=SMALL)
    assert len(result.images) == 0
    assert set(_statuses(result)) == {"mixture"}


def test_nothing_is_accepted_with_the_plan_of_other_parameters(setting, make_setting):
    other = make_setting(seed=5).plan
    result = setting.attack(plan=other)
    assert len(result.candidates) > 0
    assert len(result.images) == 0


def test_plan_read_off_the_parameters_does_as_well(setting, reconstruction):
    result = setting.attack(plan=setting.plan)
    np.testing.assert_array_equal(result.images, reconstruction.images)


def test_zero_update_holds_nothing(setting, observation):
    zero = dataclasses.replace(observation, update=jax.tree.map(jnp.zeros_like, observation.update))
    result = ares.attack(jax.random.key(2), zero, performance=SMALL)
    assert result.images.shape == (0, 16, 16, 3)
    assert result.scores.shape == (0,)
    assert result.candidates == ()


@pytest.mark.parametrize("learning_rate", [0.1, 0.01])
def test_one_local_step_leaks_as_a_gradient_does(learning_rate, setting, best_psnr):
    """Up to the rounding of the parameters to float32, which is what limits the precision."""
    config = ClientConfig(protocol="fedavg", learning_rate=learning_rate)
    result = setting.attack(config=config)
    assert _statuses(result) == ["exact"] * 8
    psnr = best_psnr(setting.images[:8], result.images)
    assert np.median(psnr) >= 50
    assert psnr.min() >= 40


def test_several_small_local_steps_leak(setting, best_psnr):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), setting.params)
    config = ClientConfig(protocol="fedavg", local_epochs=3, learning_rate=1e-7)
    observation = setting.observe(params=params, config=config)
    assert observation.threat_model.local_steps == 3
    result = ares.attack(jax.random.key(2), observation, performance=SMALL)
    psnr = best_psnr(setting.images[:8], result.images)
    assert np.sum(psnr >= 60) >= 7


def test_adam_hides_the_images(setting, best_psnr):
    config = ClientConfig(protocol="fedavg", optimizer="adam", learning_rate=1e-3)
    result = setting.attack(config=config)
    assert len(result.images) == 0


def test_noise_that_is_declared_is_lived_with(setting, observation, best_psnr):
    """Noise far below the signal costs precision, not images."""
    std = 1e-9
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf + std * rng.normal(size=leaf.shape), np.float32),
        jax.tree.map(np.asarray, observation.update),
    )
    seen = dataclasses.replace(observation, update=noisy)
    result = ares.attack(jax.random.key(2), seen, noise_std=std, performance=SMALL)
    psnr = best_psnr(setting.images[:8], result.images)
    assert psnr.min() > 40
    assert psnr.max() < 140


def test_candidates_are_json(reconstruction):
    records = json.loads(json.dumps(reconstruction.candidates, allow_nan=False))
    assert records == [dict(record) for record in reconstruction.candidates]
    assert {record["status"] for record in records} <= {str(status) for status in Status}
    json.dumps(dict(reconstruction.stats), allow_nan=False)


def test_progress_counts_every_candidate(setting, observation):
    candidates = ares.leak(observation, setting.plan)
    seen = []
    ares.invert(
        jax.random.key(2), candidates, setting.plan, setting.victim,
        performance=PerformanceFlags(microbatch=3), progress=seen.append,
    )  # fmt: skip
    assert seen == [3, 6, 8]


def test_same_key_same_bits(setting, reconstruction):
    again = setting.attack()
    np.testing.assert_array_equal(again.images, reconstruction.images)
    np.testing.assert_array_equal(again.scores, reconstruction.scores)


def test_honest_but_curious_server_is_refused(setting, observation):
    threat = ThreatModel(server="honest_but_curious")
    curious = dataclasses.replace(observation, threat_model=threat)
    with pytest.raises(ValueError, match="chooses the parameters"):
        ares.attack(jax.random.key(2), curious)


def test_models_that_cannot_carry_the_attack_are_refused_before_the_update_is_read(setting):
    from jgia.models import make_victim

    victim = make_victim("mlp", input_shape=(16, 16, 3), num_classes=7)
    observation = Observation(update={}, params={}, victim=victim)
    with pytest.raises(ValueError, match="two hidden layers"):
        ares.attack(jax.random.key(2), observation)


def _imports(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


_FORBIDDEN = ("jgia.metrics", "jgia.data", "jgia.federated", "jgia.audit", "jgia.observation.Truth")


def _sees_the_truth(source: str) -> set[str]:
    return {name for name in _imports(source) if name.startswith(_FORBIDDEN)}


def test_no_attack_can_see_the_truth():
    folder = Path(next(iter(jgia.attacks.__path__)))
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 5
    assert {str(f): _sees_the_truth(f.read_text()) for f in files} == {str(f): set() for f in files}
    assert _sees_the_truth("from jgia.observation import Status, Truth") != set()
    for function in (ares.attack, ares.leak, ares.invert):
        names = set(inspect.signature(function).parameters)
        assert not names & {"truth", "images", "labels", "originals"}
