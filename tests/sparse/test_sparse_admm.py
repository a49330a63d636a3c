"""Alternating directions: the l1 problem, and penalties on an analysis operator."""

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
    ConvOperator,
    DenseOperator,
    FiniteDifferences,
    FistaOptions,
    analysis_lasso,
    lasso,
)

J = 3


def _problem(rows, columns, seed=0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    a, y = rng.standard_normal((rows, columns)), rng.standard_normal((rows, J))
    mask, weights = rng.random((rows, J)) < 0.8, rng.uniform(0.5, 2, (columns, J))
    lam = np.array([0.3, 0.1, 0.05]) * np.abs(a.T @ (mask * y)).max(axis=0)
    return (*(jnp.asarray(v) for v in (a, y, lam)), jnp.asarray(mask), jnp.asarray(weights))


@functools.partial(jax.jit, static_argnames=("solver", "options"))
def _solve(operator, y, lam, mask, weights, init=None, *, solver, options):
    return lasso(
        operator,
        y,
        lam,
        mask=mask,
        weights=weights,
        init=init,
        one_sided=True,
        solver=solver,
        options=options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_agrees_with_proximal_gradient_by_either_factorization(shape):
    problem = _problem(*shape)
    other = _solve(*problem, solver="fista", options=FistaOptions(tolerance=1e-12))
    result = _solve(*problem, solver="admm", options=AdmmOptions(tolerance=1e-8))
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert np.all(result.duality_gap <= 1e-8 * result.objective)
    np.testing.assert_allclose(result.objective, other.objective, rtol=1e-8)
    np.testing.assert_array_equal(result.x != 0, other.x != 0)
    few = _solve(*problem, solver="admm", options=AdmmOptions(tolerance=1e-8, max_iterations=7))
    np.testing.assert_array_equal(few.status, MAX_ITERATIONS)
    np.testing.assert_array_equal(few.iterations, 7)
    assert np.all(few.duality_gap > 1e-6 * few.objective)
    assert np.all(few.duality_gap >= few.objective - other.objective)


@pytest.mark.slow
def test_an_operator_without_a_matrix_takes_conjugate_gradients():
    a, y, lam, mask, weights = _problem(10, 16, seed=1)
    matrix = _solve(a, y, lam, mask, weights, solver="admm", options=AdmmOptions())
    planes = _solve(
        DenseOperator(a.T, (1, 1, 16)),
        *(v[:, None, None] if v.ndim > 1 else v for v in (y, lam, mask)),
        weights[None, None],
        solver="admm",
        options=AdmmOptions(),
    )
    np.testing.assert_array_equal(planes.status, CONVERGED)
    np.testing.assert_allclose(planes.objective, matrix.objective, rtol=4e-6)


def test_bad_samples_are_blank():
    a, y, lam, mask, weights = _problem(10, 16, seed=2)
    bad = y.at[int(np.flatnonzero(mask[:, 0])[0]), 0].set(jnp.nan), lam.at[1].set(-1)
    result = _solve(a, *bad, mask, weights, solver="admm", options=AdmmOptions())
    np.testing.assert_array_equal(result.status, [NONFINITE, INVALID, CONVERGED])
    np.testing.assert_array_equal(result.x[:, :2], 0)
    assert np.any(result.x[:, 2] != 0)


def _total_variation(one_sided, lam=0.5, side=5):
    rng = np.random.default_rng(3)
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 3, 1, 2))))
    y, mask = rng.standard_normal((2, side, side, 2)), rng.random((2, side, side, 2)) < 0.7
    differences = FiniteDifferences()
    result = jax.jit(
        lambda y, mask: analysis_lasso(
            operator,
            y,
            lam,
            differences,
            mask=mask,
            one_sided=one_sided,
            options=AdmmOptions(tolerance=1e-7),
        )
    )(jnp.asarray(y), jnp.asarray(mask))
    units = jnp.eye(side**2).reshape(1, side, side, side**2)
    a = np.asarray(operator.apply(units)).reshape(-1, side**2)
    d = np.asarray(differences.apply(units)).reshape(-1, side**2)
    return result, a, d, y.reshape(-1, 2), mask.reshape(-1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("one_sided", [False, True])
def test_total_variation_agrees_with_cvxpy(one_sided):
    result, a, d, y, mask = _total_variation(one_sided)
    np.testing.assert_array_equal(result.status, CONVERGED)
    for j in range(2):
        x: Any = cp.Variable(a.shape[1])
        on = mask[:, j]
        fit = cp.sum_squares(a[on] @ x - y[on, j])
        if one_sided:
            fit += cp.sum_squares(cp.pos(a[~on] @ x))
        problem = cp.Problem(cp.Minimize(0.5 * fit + 0.5 * cp.norm1(d @ x)))
        best: Any = problem.solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(result.objective[j], best, rtol=1e-6)
        ours = np.asarray(result.x[..., j]).ravel()
        np.testing.assert_allclose(ours, x.value, rtol=0, atol=1e-4)
        x.value = 1.05 * ours
        moved: Any = problem.objective.value
        assert moved > best * (1 + 1e-5)


def test_options_that_do_not_fit_are_refused():
    a, y, lam, *_ = _problem(10, 16)
    with pytest.raises(ValueError, match="takes AdmmOptions, got FistaOptions"):
        lasso(a, y, lam, solver="admm", options=FistaOptions())
    out_of_range: list[dict[str, Any]] = [
        {"coupling": 0.0},
        {"num_inner": 0},
        {"max_iterations": 0},
        {"tolerance": -1.0},
    ]
    for fields in out_of_range:
        with pytest.raises(ValueError, match=next(iter(fields))):
            AdmmOptions(**fields)
