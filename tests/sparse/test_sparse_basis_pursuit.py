"""Basis pursuit against linear and conic programs."""

import functools
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.sparse import (
    CONVERGED,
    INVALID,
    MAX_ITERATIONS,
    NONFINITE,
    AdmmOptions,
    basis_pursuit,
)

M, N, J = 10, 18, 2


def _problem(seed=0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((M, N))
    c = np.where(rng.random((N, J)) < 0.2, rng.standard_normal((N, J)), 0)
    y = a @ c
    return jnp.asarray(a), jnp.asarray(y), jnp.asarray(y > -0.5), jnp.asarray(c)


@functools.partial(jax.jit, static_argnames=("one_sided", "options"))
def _solve(a, y, mask, noise, weights=None, *, one_sided=False, options=None):
    return basis_pursuit(
        a, y, mask=mask, weights=weights, one_sided=one_sided, noise=noise, options=options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("one_sided", "noise"), [(False, 0.0), (False, 0.3), (True, 0.2)])
def test_agrees_with_cvxpy(one_sided, noise):
    a, y, mask, _ = _problem()
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (N, J)))
    result = _solve(a, y, mask, noise, weights, one_sided=one_sided)
    np.testing.assert_array_equal(result.status, CONVERGED)
    for j in range(J):
        c: Any = cp.Variable(N)
        on = np.asarray(mask[:, j])
        away = np.asarray(a)[on] @ c - np.asarray(y)[on, j]
        constraints = [cp.norm2(away) <= noise] if noise else [away == 0]
        if one_sided:
            constraints.append(np.asarray(a)[~on] @ c <= 0)
        norm = cp.norm1(cp.multiply(np.asarray(weights[:, j]), c))
        best: Any = cp.Problem(cp.Minimize(norm), constraints).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(result.objective[j], best, rtol=1e-5)
        assert result.lower_bound[j] <= best * (1 + 1e-6)
        assert result.lower_bound[j] >= best * (1 - 1e-5)
    size = np.linalg.norm(np.where(mask, y, 0), axis=0)
    assert np.all(result.residual <= noise + 1e-6 * size)
    if one_sided:
        assert np.all(result.violation <= 1e-6 * size)


@pytest.mark.slow
def test_sparse_vectors_come_back():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((24, 40))
    c = np.zeros((40, J))
    for j in range(J):
        c[rng.choice(40, 4, replace=False), j] = rng.choice([-1.0, 1.0], 4)
    result = _solve(jnp.asarray(a), jnp.asarray(a @ c), jnp.ones((24, J), bool), 0.0)
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_allclose(result.x, c, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_contradicting_equations_do_not_converge():
    a, y, mask, _ = _problem(3)
    twice = jnp.concatenate([a, a]), jnp.concatenate([y, y + 1]), jnp.concatenate([mask, mask])
    options = AdmmOptions(max_iterations=300, check_every=50)
    result = _solve(*twice, 0.0, options=options)
    np.testing.assert_array_equal(result.status, MAX_ITERATIONS)
    assert np.all(result.residual > 0.1)
    assert np.all(np.isfinite(result.x))


@pytest.mark.slow
def test_bad_input():
    a, y, mask, _ = _problem(4)
    with pytest.raises(ValueError, match="noise must be zero or more"):
        basis_pursuit(a, y, noise=-1.0)
    with pytest.raises(ValueError, match=r"noise must be a number or have shape \(2,\)"):
        basis_pursuit(a, y, noise=jnp.ones(3))
    result = _solve(a, y.at[0, 0].set(jnp.inf), mask.at[0].set(True), jnp.array([0.1, -1.0]))
    np.testing.assert_array_equal(result.status, [NONFINITE, INVALID])
    np.testing.assert_array_equal(result.x, 0)
    empty = _solve(a, y, jnp.zeros_like(mask), jnp.zeros(J))
    np.testing.assert_array_equal(empty.x, 0)
    np.testing.assert_array_equal(empty.status, CONVERGED)
