"""Paths of l1 weights, refitting on a support, and the generic proximal gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import lasso_path as sklearn_path

from jgia.sparse import (
    CONVERGED,
    NONFINITE,
    FistaOptions,
    debias,
    lasso,
    lasso_path,
    proximal_gradient,
)

M, N, J = 12, 20, 2
OPTIONS = FistaOptions(tolerance=1e-12)


def _problem(seed=0):
    rng = np.random.default_rng(seed)
    a, y = rng.standard_normal((M, N)), rng.standard_normal((M, J))
    return jnp.asarray(a), jnp.asarray(y), jnp.asarray(rng.random((M, J)) < 0.8)


@pytest.mark.slow
def test_the_path_agrees_with_scikit_learn():
    a, y, _ = _problem()
    ratios = (0.7, 0.3, 0.1)
    result = jax.jit(functools.partial(lasso_path, lam_ratios=ratios, options=OPTIONS))(a, y)
    assert result.x.shape == (3, N, J)
    np.testing.assert_array_equal(result.status, CONVERGED)
    for j in range(J):
        lam = np.asarray(result.lam[:, j])
        np.testing.assert_allclose(lam, np.array(ratios) * np.abs(a.T @ y[:, j]).max(), rtol=1e-13)
        data = np.asarray(a), np.asarray(y[:, j])
        alphas: Any = lam / M
        theirs = sklearn_path(*data, alphas=alphas, tol=1e-14, max_iter=100_000)[1]
        np.testing.assert_allclose(result.x[:, :, j].T, theirs, rtol=0, atol=1e-5)


def test_bad_ratios_are_refused():
    a, y, _ = _problem()
    for ratios in ((0.5, -0.1), (float("nan"),)):
        with pytest.raises(ValueError, match="lam_ratios must be zero or more"):
            lasso_path(a, y, ratios)
    with pytest.raises(ValueError, match=r"shape \(L,\) with L >= 1"):
        lasso_path(a, y, ())


@pytest.mark.slow
def test_refitting_is_least_squares_on_the_support():
    a, y, mask = _problem(1)
    sparse = jax.jit(lambda y: lasso(a, y, 2.0, mask=mask).x)(y)
    solve = jax.jit(lambda y, c: debias(a, y, c, mask=mask))
    result = solve(y, sparse)
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_array_equal(result.x[sparse == 0], 0)
    for j in range(J):
        on, support = np.asarray(mask[:, j]), np.flatnonzero(sparse[:, j])
        rows, data = np.asarray(a)[on][:, support], np.asarray(y)[on, j]
        expected, *_ = np.linalg.lstsq(rows, data, rcond=None)
        np.testing.assert_allclose(result.x[support, j], expected, rtol=1e-9)
        left = np.linalg.norm(rows @ expected - data) / np.linalg.norm(data)
        np.testing.assert_allclose(result.relative_residual[j], left, rtol=1e-9)
    bad = solve(y.at[int(np.flatnonzero(mask[:, 0])[0]), 0].set(jnp.nan), sparse)
    np.testing.assert_array_equal(bad.status, [NONFINITE, CONVERGED])
    np.testing.assert_array_equal(bad.x[:, 0], 0)
    none = solve(y, jnp.zeros_like(sparse))
    np.testing.assert_array_equal(none.x, 0)
    np.testing.assert_array_equal(none.status, CONVERGED)


@pytest.mark.slow
def test_the_front_door_reaches_jaxopt():
    a, y, mask = _problem(2)
    ours = jax.jit(lambda y: lasso(a, y, 1.0, mask=mask, options=OPTIONS))(y)
    options = FistaOptions(tolerance=1e-7, max_iterations=3000)
    theirs = jax.jit(lambda y: lasso(a, y, 1.0, mask=mask, solver="jaxopt", options=options))(y)
    np.testing.assert_array_equal(theirs.status, CONVERGED)
    np.testing.assert_allclose(theirs.objective, ours.objective, rtol=1e-7)


def test_any_proximal_map():
    y = jnp.array([3.0, -2.0, 0.5])

    def prox_non_negative(x, hyperparams, scaling=1.0):
        del hyperparams, scaling
        return jnp.maximum(x, 0)

    result = proximal_gradient(
        lambda x: jnp.sum((x - y) ** 2), prox_non_negative, jnp.zeros(3), tolerance=1e-9
    )
    np.testing.assert_allclose(result.x, [3, 0, 0.5], rtol=0, atol=1e-8)
    assert float(result.error) <= 1e-9
    with pytest.raises(ValueError, match="tolerance must be positive"):
        proximal_gradient(jnp.sum, prox_non_negative, y, tolerance=0.0)
