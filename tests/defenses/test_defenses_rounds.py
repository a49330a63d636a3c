"""Adaptive noise over several rounds: the target is met by what they tell together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config import DefenseConfig
from jgia.config.defense import ADAPTIVE
from jgia.defenses import make_defense
from jgia.defenses._adaptive_gradient import input_noise_std, shaped_covariance_of
from jgia.models import make_victim
from jgia.risk import (
    Channel,
    Prior,
    add_round,
    fisher_information,
    no_information,
    remaining_error,
)

VICTIM = make_victim("mlp", input_shape=(3, 3, 1), num_classes=3, widths=(12,))
PARAMS = jax.tree.map(lambda leaf: leaf.astype("float64"), VICTIM.init(jax.random.key(1)))
PIXELS = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.8, (1, 3, 3, 1)))
LABELS = jnp.array([2])
D = 9
PRIOR = Prior.isotropic(D, variance=0.25**2, dtype="float64")
TARGET = 0.4


def gradient(pixels, params=PARAMS):
    return jax.grad(VICTIM.loss)(params, pixels, LABELS)


def jacobian(params=PARAMS):
    leaves = jax.tree.leaves(jax.jacfwd(lambda x: gradient(x, params))(PIXELS))
    return jnp.concatenate([leaf.reshape(-1, D) for leaf in leaves])


def options(name, rounds, floor=1.0):
    config = DefenseConfig(defense=(name,), target_error=TARGET, noise_rounds=rounds)
    return dataclasses.replace(config, noise_floor=floor) if name == "shaped" else config


def fisher(name, rounds, params=PARAMS, floor=1.0):
    """``J' C^-1 J`` of one round, of the covariance that the defense declares."""
    jac, config = jacobian(params), options(name, rounds, floor)
    zero = jnp.full(len(jac), 1e-14)
    if name == "adaptive_scale":
        defense = make_defense(config)
        assert defense is not None
        _, stats = defense.gradient(jax.random.key(0), VICTIM, params, PIXELS, LABELS)
        assert stats is not None
        return fisher_information(Channel(jac, zero + stats.noise_std**2))
    if name == "input_noise":
        return fisher_information(Channel(jac, zero, input_noise_std(config) * jac))
    factor, std = shaped_covariance_of(config, lambda x: gradient(x, params), PIXELS, len(jac))
    return fisher_information(Channel(jac, zero + std**2, jac @ factor))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_all_rounds_together_leave_the_target(name):
    rounds, floor = 5, 1e-9
    state = no_information(D, dtype="float64")
    one = fisher(name, rounds, floor=floor)
    for _ in range(rounds):
        state = add_round(state, one)
    error, aim = float(remaining_error(state, PRIOR)), TARGET * float(PRIOR.energy)
    np.testing.assert_allclose(error, aim, rtol=1e-4)
    alone = fisher(name, 1, floor=floor)
    once = add_round(no_information(D, dtype="float64"), alone)
    np.testing.assert_allclose(remaining_error(once, PRIOR), error, rtol=1e-4)
    several = add_round(no_information(D, dtype="float64"), rounds * alone)
    assert float(remaining_error(several, PRIOR)) < 0.8 * aim  # what noise for one round leaves


@pytest.mark.parametrize("name", ADAPTIVE)
def test_changing_parameters_tell_more_than_equal_rounds(name):
    """The limit of a fixed share: other parameters show other directions."""
    rounds = 4
    state = no_information(D, dtype="float64")
    for index in range(rounds):
        drawn = VICTIM.init(jax.random.key(index))
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), drawn)
        state = add_round(state, fisher(name, rounds, params, floor=1e-9))
    error, aim = float(remaining_error(state, PRIOR)), TARGET * float(PRIOR.energy)
    assert error <= aim * (1 + 1e-4)
    if name == "adaptive_scale":
        assert error < 0.99 * aim


def test_noise_is_that_much_larger():
    def noise(rounds):
        defense = make_defense(options("adaptive_scale", rounds))
        assert defense is not None
        made, stats = defense.gradient(jax.random.key(3), VICTIM, PARAMS, PIXELS, LABELS)
        assert stats is not None
        difference = jax.tree.map(jnp.subtract, made, gradient(PIXELS))
        leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(difference)]
        return np.concatenate(leaves), float(stats.noise_std)

    (one, std), (four, larger) = noise(1), noise(4)
    np.testing.assert_allclose(larger, 2 * std, rtol=1e-12)
    np.testing.assert_allclose(four, 2 * one, rtol=1e-6)


def test_bad_rounds_are_refused():
    with pytest.raises(ValueError, match="noise_rounds must be at least 1"):
        DefenseConfig(defense=("shaped",), noise_rounds=0)
    with pytest.raises(ValueError, match="no effect"):
        DefenseConfig(defense=("gaussian",), noise_rounds=2)
    assert DefenseConfig(defense=("shaped",), noise_rounds=3).words() == (
        "shaped(target_error=0.5, noise_rounds=3)"
    )
