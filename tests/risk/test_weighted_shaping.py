"""The cheapest noise for a Gaussian prior, against SciPy and its stationarity condition."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jgia.risk.shaping import noise_energy, shaped_covariance
from jgia.risk.weighted_shaping import geometric_mean, optimal_noise

PRIOR = 0.3


def problem(seed: int, d: int = 4, rows: int = 9):
    """A Jacobian of a wide spectrum and a prior covariance that does not commute with it."""
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(rows, d)) * np.logspace(0, -1.5, d)
    half = rng.normal(size=(d, d))
    return jacobian, half @ half.T / d + 0.1 * np.eye(d)


def minimized(cost, error, target, start):
    """SciPy's constrained minimum of ``cost``."""
    found = minimize(
        cost,
        start,
        constraints={"type": "ineq", "fun": lambda v: error(v) - target},
        method="SLSQP",
        options={"maxiter": 3000, "ftol": 1e-14},
    )
    # Status 8 is a line search that cannot improve any more.
    assert found.success or found.status == 8, found.message
    assert error(found.x) > target * (1 - 1e-9)
    return found.fun


def slsqp_covariance(gram, prior, target, weight):
    """The least energy over all factors of a covariance, from three starts."""
    d = len(gram)
    index = np.tril_indices(d)

    def covariance(v):
        lower = np.zeros((d, d))
        lower[index] = v
        return lower @ lower.T

    def error(v):
        posterior = prior - prior @ np.linalg.solve(prior + covariance(v), prior)
        return np.trace(weight @ posterior)

    starts = (np.random.default_rng(s).normal(size=len(index[0])) for s in range(3))
    return min(minimized(lambda v: np.sum(gram * covariance(v)), error, target, v) for v in starts)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_optimal_noise_is_the_constrained_minimum_and_certified(weighted, share):
    jacobian, prior = problem(0, d=3)
    gram = jacobian.T @ jacobian
    weight = np.diag([1.0, 0.0, 1.0]) if weighted else np.eye(3)
    target = share * np.trace(weight @ prior)
    result = optimal_noise(
        jnp.asarray(gram), jnp.asarray(prior), target, weight=jnp.asarray(weight)
    )
    best = slsqp_covariance(gram, prior, target, weight)
    np.testing.assert_allclose(result.energy, best, rtol=2e-6)
    assert float(result.bound) <= best * (1 + 1e-9)
    np.testing.assert_allclose(result.bound, result.energy, rtol=1e-4)
    np.testing.assert_allclose(
        result.energy, noise_energy(jnp.asarray(gram), result.covariance), rtol=1e-9
    )


@pytest.mark.slow
def test_both_branches_occur_and_both_are_lemma_2_for_an_isotropic_prior():
    jacobian, _ = problem(7)
    gram = jnp.asarray(jacobian.T @ jacobian)
    seen = set()
    for share in (0.2, 0.9):
        target = share * 4 * PRIOR
        result = optimal_noise(gram, PRIOR, target)
        seen.add(bool(result.closed_form))
        scalar = shaped_covariance(gram, PRIOR, target)
        np.testing.assert_allclose(
            noise_energy(gram, result.covariance), noise_energy(gram, scalar), rtol=1e-5
        )
        scale = float(np.abs(scalar).max())
        slack = (1e-9 if bool(result.closed_form) else 1e-4) * scale
        np.testing.assert_allclose(result.covariance, scalar, rtol=0, atol=slack)
    assert seen == {True, False}


@pytest.mark.slow
def test_optimal_noise_solves_the_riccati_equation():
    jacobian, prior = problem(0)
    gram = jacobian.T @ jacobian
    result = optimal_noise(jnp.asarray(gram), jnp.asarray(prior), 0.97 * np.trace(prior))
    assert bool(result.closed_form)
    total = prior + np.asarray(result.covariance)
    ratio = total @ gram @ total / (prior @ prior)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-9)
    mean = geometric_mean(jnp.linalg.inv(jnp.asarray(gram)), jnp.asarray(prior @ prior))
    np.testing.assert_allclose(total, np.sqrt(ratio[0, 0]) * np.asarray(mean), rtol=1e-9)


def test_geometric_mean_has_its_defining_properties():
    rng = np.random.default_rng(1)
    a, b = (x @ x.T + 0.1 * np.eye(4) for x in rng.normal(size=(2, 4, 4)))
    change = rng.normal(size=(4, 4))
    mean = np.asarray(geometric_mean(jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(mean @ np.linalg.solve(a, mean), b, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(geometric_mean(jnp.asarray(b), jnp.asarray(a)), mean, rtol=1e-10)
    moved = geometric_mean(jnp.asarray(change @ a @ change.T), jnp.asarray(change @ b @ change.T))
    np.testing.assert_allclose(moved, change @ mean @ change.T, rtol=1e-9, atol=1e-9)
    assert not np.allclose(mean, (a + b) / 2, rtol=1e-3)
