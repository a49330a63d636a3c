"""What the attacker reads off a defended update, and what it must not read off an honest one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gifd
from jgia.defenses import clip_update, keep_top_k, quantize_nearest, soteria
from jgia.models import flatten_params, make_victim
from jgia.observation import Observation, ThreatModel

LABELS = jnp.array([0, 2])


@functools.cache
def _observation(name="mlp", seed=0):
    """Images of 8 px on a network with rectifiers; a third of its units never become active."""
    common: Any = {"input_shape": (8, 8, 1), "num_classes": 4}
    if name == "resnet":
        victim = make_victim("resnet", **common, widths=(16,), head="pool", norm="none")
    else:
        victim = make_victim("mlp", **common, widths=(90, 80))
    params = jax.jit(victim.init)(jax.random.key(seed))
    dead = {"mlp": ("fc1", "fc2"), "resnet": ("conv1",)}[name]
    for layer in dead:
        bias = params[layer]["bias"]
        params[layer]["bias"] = bias.at[: len(bias) // 3].set(-100.0)
    images = jax.random.uniform(jax.random.key(seed + 1), (2, 8, 8, 1), "float32")
    update = jax.jit(jax.grad(victim.loss))(params, images, LABELS)
    threat = ThreatModel(server="honest_but_curious", num_examples=2)
    return Observation(update=update, params=params, victim=victim, threat_model=threat)


def _defended(defense, name="mlp"):
    observation = _observation(name)
    shared, _ = jax.jit(defense.update)(observation.update, defense.init(observation.update))
    return dataclasses.replace(observation, update=shared)


@pytest.mark.parametrize(
    ("name", "seed"), [("mlp", 0), pytest.param("resnet", 0, marks=pytest.mark.slow)]
)
def test_nothing_is_masked_in_an_honest_update_with_dead_units(name, seed):
    observation = _observation(name, seed)
    transform, record = gifd.estimate_transform(observation)
    assert max(record["zero_shares"].values()) > 0.2  # there is what could be mistaken
    assert dict(transform.masks) == {}
    assert transform.bound is None
    assert record["found"] == "nothing that can be replayed"


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("keep", [0.05, 0.15])
def test_the_support_of_a_sparsified_update_is_found(scope, keep):
    observation = _defended(keep_top_k(keep_fraction=keep, scope=scope))
    transform, record = gifd.estimate_transform(observation)
    assert "small entries were removed" in record["found"]
    for name, leaf in flatten_params(observation.update).items():
        mask = transform.masks.get(name, jnp.ones_like(leaf))
        np.testing.assert_array_equal(np.asarray(mask) != 0, np.asarray(leaf) != 0)
    replayed = transform.apply(_observation().update)  # the defense of the very same gradient
    for mine, theirs in zip(
        jax.tree.leaves(replayed), jax.tree.leaves(observation.update), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_few_levels_look_like_a_threshold():
    shared = _defended(quantize_nearest(num_bits=4))
    assert "small entries were removed" in gifd.estimate_transform(shared)[1]["found"]


def test_features_that_soteria_pruned_are_told_from_dead_ones():
    observation = _observation()
    features = observation.update["head"]["kernel"].shape[0]
    scores = jax.random.uniform(jax.random.key(5), (features,))
    shared, kept = soteria(observation.update, scores, keep_fraction=0.6)
    dead = np.all(np.asarray(observation.update["head"]["kernel"]) == 0, axis=1)
    assert np.any(dead & np.asarray(kept))
    transform, record = gifd.estimate_transform(dataclasses.replace(observation, update=shared))
    assert list(transform.masks) == ["head/kernel"]
    mask = np.asarray(transform.masks["head/kernel"])
    pruned = ~np.asarray(kept) & ~dead
    np.testing.assert_array_equal(mask == 0, np.broadcast_to(pruned[:, None], mask.shape))
    assert record["features_masked"] == pruned.sum()
    assert "or dead" not in record["found"]


def test_the_bound_is_the_updates_own_length():
    clip_norm = 0.05
    observation = _defended(clip_update(clip_norm=clip_norm))
    transform, record = gifd.estimate_transform(observation, bound=True)
    assert record["length"] == pytest.approx(clip_norm, rel=1e-5)
    assert transform.bound is not None
    assert float(transform.bound) == pytest.approx(clip_norm, rel=1e-5)
    long = transform.apply(jax.tree.map(lambda g: 7 * g, observation.update))
    short = jax.tree.map(lambda g: 0.5 * g, observation.update)
    for a, b in zip(jax.tree.leaves(long), jax.tree.leaves(observation.update), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(transform.apply(short)), jax.tree.leaves(short), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_nothing_is_taken_from_what_the_threat_model_declares():
    observation = _observation()
    told = dataclasses.replace(
        observation,
        threat_model=dataclasses.replace(observation.threat_model, defense="top_k 5 %"),
    )
    assert gifd.estimate_transform(told)[1] == gifd.estimate_transform(observation)[1]
