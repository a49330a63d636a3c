"""Information of several rounds, and the noise that the next one needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.risk import (
    BudgetStatus,
    Prior,
    add_round,
    invloss,
    next_round,
    no_information,
    remaining_error,
    spent_share,
)

D = 4


def grams(seed, count):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(a.T @ a) for a in rng.normal(size=(count, 7, D)) * rng.uniform(0.1, 3, D)]


def full_prior(seed=0):
    root = np.random.default_rng(seed).normal(size=(D, D))
    return Prior.gaussian(root @ root.T + 0.2 * np.eye(D))


def dense_error(prior, fishers):
    factor = np.asarray(prior.factor)
    total = np.linalg.inv(factor.T @ factor) + sum(np.asarray(f) for f in fishers)
    return np.trace(np.linalg.inv(total))


def accumulated(fishers, dtype="float64"):
    state = no_information(D, dtype=dtype)
    for fisher in fishers:
        state = add_round(state, fisher)
    return state


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_equal_rounds_are_one_with_noise_over_the_root_of_their_number(rounds):
    (gram,) = grams(0, 1)
    prior = Prior.isotropic(D, variance=0.3, dtype="float64")
    sigma = jnp.sqrt(jnp.linalg.eigvalsh(gram))
    state = accumulated([gram / 0.5**2] * rounds)
    assert int(state.num_rounds) == rounds
    closed = invloss(sigma, noise_std=0.5 / rounds**0.5, prior_variance=0.3, num_inputs=D)
    np.testing.assert_allclose(remaining_error(state, prior), closed, rtol=1e-10)
    if rounds > 1:
        wrong = invloss(sigma, noise_std=0.5 / rounds, prior_variance=0.3, num_inputs=D)
        assert not np.isclose(wrong, closed, rtol=1e-2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations(range(5)))
def test_the_order_of_rounds_does_not_matter(order):
    fishers = grams(1, 5)
    prior = full_prior()
    expected = dense_error(prior, fishers)
    found = remaining_error(accumulated([fishers[i] for i in order]), prior)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_posterior_of_several_rounds_has_that_error():
    """Monte Carlo: T observations of the same input, each with noise of its own."""
    rng, rounds, count = np.random.default_rng(2), 3, 20_000
    prior = full_prior()
    rows = rng.normal(size=(rounds, 6, D))
    stds = np.array([0.5, 1.0, 2.0])
    x = prior.mean[None] + rng.normal(size=(count, D)) @ np.asarray(prior.factor)
    total = np.linalg.inv(np.asarray(prior.factor).T @ np.asarray(prior.factor))
    pull, state = np.zeros((count, D)), no_information(D, dtype="float64")
    for row, std in zip(rows, stds, strict=True):
        seen = np.asarray(x - prior.mean[None]) @ row.T + std * rng.normal(size=(count, 6))
        pull = pull + seen @ row / std**2
        total = total + row.T @ row / std**2
        state = add_round(state, jnp.asarray(row.T @ row) / std**2)
    guess = np.asarray(prior.mean)[None] + np.linalg.solve(total, pull.T).T
    error = np.mean(np.sum((guess - np.asarray(x)) ** 2, axis=1))
    np.testing.assert_allclose(error, remaining_error(state, prior), rtol=0.02)
    fewer = dense_error(prior, [jnp.asarray(rows[0].T @ rows[0]) / stds[0] ** 2])
    assert not np.isclose(error, fewer, rtol=0.1)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_target_is_met_after_the_last_round(rounds, isotropic):
    (gram,) = grams(3, 1)
    prior = Prior.isotropic(D, variance=0.4, dtype="float64") if isotropic else full_prior(1)
    target = 0.3 * float(prior.energy)
    plan = next_round(no_information(D, dtype="float64"), gram, prior, target, rounds_left=rounds)
    assert int(plan.status) == BudgetStatus.NOISE
    one = accumulated([gram / plan.scale**2])
    np.testing.assert_allclose(remaining_error(one, prior), plan.error, rtol=1e-9)
    whole = accumulated([gram / plan.scale**2] * rounds)
    np.testing.assert_allclose(remaining_error(whole, prior), target, rtol=1e-8)
    np.testing.assert_allclose(spent_share(whole, prior, target), 1, rtol=1e-7)


def test_changing_rounds_spend_the_budget_and_then_it_is_exhausted():
    prior, target = full_prior(2), 2.0
    fishers = grams(4, 5)
    state, scales = no_information(D, dtype="float64"), []
    for done, gram in enumerate(fishers):
        plan = next_round(state, gram, prior, target, rounds_left=len(fishers) - done)
        assert int(plan.status) == BudgetStatus.NOISE
        state = add_round(state, gram / plan.scale**2)
        np.testing.assert_allclose(remaining_error(state, prior), plan.error, rtol=1e-8)
        assert float(plan.error) >= target * (1 - 1e-8)
        scales.append(float(plan.scale))
    np.testing.assert_allclose(remaining_error(state, prior), target, rtol=1e-8)
    assert len(set(scales)) == len(scales)
    over = next_round(state, fishers[0], prior, target)
    assert int(over.status) == BudgetStatus.EXHAUSTED
    assert np.isinf(over.scale)
    np.testing.assert_allclose(over.error, target, rtol=1e-7)


def test_a_release_that_tells_nothing_is_free():
    prior = full_prior(3)
    plan = next_round(no_information(D, dtype="float64"), jnp.zeros((D, D)), prior, 1.0)
    assert int(plan.status) == BudgetStatus.FREE
    assert float(plan.scale) == 0
    np.testing.assert_allclose(plan.error, prior.energy, rtol=1e-12)


def test_nan_is_exhausted_and_not_a_scale():
    state = add_round(no_information(D, dtype="float64"), jnp.full((D, D), jnp.nan))
    plan = next_round(state, jnp.eye(D), full_prior(), 1.0)
    assert int(plan.status) == BudgetStatus.EXHAUSTED
    assert np.isinf(plan.scale)
    assert np.isnan(plan.error)


def test_more_told_before_asks_for_more_noise():
    gram, earlier = grams(5, 2)
    prior = full_prior(4)
    target = 0.4 * float(prior.energy)
    fresh = next_round(no_information(D, dtype="float64"), gram, prior, target)
    later = next_round(accumulated([0.01 * earlier]), gram, prior, target)
    assert float(later.scale) > float(fresh.scale)


def test_it_compiles_and_exhaustion_is_a_status_there_too():
    (gram,) = grams(6, 1)
    prior = full_prior(5)
    planned = jax.jit(lambda state, target: next_round(state, gram, prior, target))
    state = no_information(D, dtype="float64")
    eager = next_round(state, gram, prior, 1.0)
    np.testing.assert_allclose(planned(state, 1.0).scale, eager.scale, rtol=1e-9)
    spent = accumulated([1e6 * gram])
    assert int(planned(spent, 1.0).status) == BudgetStatus.EXHAUSTED


def test_low_rank_prior_counts_its_rest():
    images = np.random.default_rng(7).normal(size=(40, D))
    prior = Prior.low_rank(images, rank=2)
    (gram,) = grams(8, 1)
    target = float(prior.tail_energy) + 0.2 * float(prior.energy - prior.tail_energy)
    plan = next_round(no_information(D, dtype="float64"), gram, prior, target)
    state = accumulated([gram / plan.scale**2])
    np.testing.assert_allclose(remaining_error(state, prior), target, rtol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, p: add_round(s, jnp.eye(D + 1)), "one row per pixel"),
        (lambda s, p: next_round(s, jnp.eye(D), p, 1e9), "target"),
        (lambda s, p: next_round(s, jnp.eye(D), p, 1.0, rounds_left=0), "rounds_left"),
        (lambda s, p: remaining_error(s, Prior.isotropic(2, variance=1.0)), "prior describes 2"),
        (lambda s, p: spent_share(s, p, 0.0), "target"),
        (lambda s, p: no_information(0), "num_inputs"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(no_information(D, dtype="float64"), full_prior())
