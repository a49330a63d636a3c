"""Proximal conjugate gradients: wide batches that narrow, against referees in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from sklearn.linear_model import Lasso

from jgia.sparse import (
    CONVERGED,
    MAX_ITERATIONS,
    NONFINITE,
    FistaOptions,
    lam_max,
    lasso,
)

M, N, J = 24, 40, 37  # wide enough to narrow twice, and odd
TIGHT = FistaOptions(tolerance=1e-13)


@functools.partial(jax.jit, static_argnames=("one_sided", "options", "solver"))
def _solve(a, y, lam, mask=None, weights=None, init=None, *, one_sided=False, options=TIGHT, **kw):
    return lasso(
        a, y, lam, mask=mask, weights=weights, init=init, one_sided=one_sided, options=options, **kw
    )


def _problem(seed=0, dtype: Any = np.float64, share=0.7) -> tuple[Any, ...]:
    """Right-hand sides whose l1 weights differ 300-fold, so that some need many more steps."""
    rng = np.random.default_rng(seed)
    a, y = rng.standard_normal((M, N)), rng.standard_normal((M, J))
    mask, weights = rng.random((M, J)) < share, rng.uniform(0.5, 2, (N, J))
    ratio = rng.permutation(np.geomspace(0.9, 0.003, J))
    lam = ratio * np.abs(a.T @ (mask * y) / weights).max(axis=0)
    arrays = [jnp.asarray(v, dtype) for v in (a, y, lam)]
    return *arrays, jnp.asarray(mask), jnp.asarray(weights, dtype)


def _referee(c, a, y, lam, mask: Any = 1, weights: Any = 1, *, one_sided=False):
    """Objective and duality gap of every sample, from their definitions."""
    c, a, y, lam, mask, weights = (np.asarray(v, np.float64) for v in (c, a, y, lam, mask, weights))
    u = a @ c
    residual = mask * (y - u) - (np.maximum(u, 0) * (1 - mask) if one_sided else 0)
    value = np.sum(residual**2, axis=0) / 2 + lam * np.sum(weights * np.abs(c), axis=0)
    reached = np.max(np.abs(a.T @ residual) / weights, axis=0)
    scaled = np.minimum(1, lam / np.where(reached > 0, reached, 1)) * residual
    dual = np.sum(mask * y * scaled, axis=0) - np.sum(scaled**2, axis=0) / 2
    return value, value - dual


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["conjugate", "fista"])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-9)])
def test_agrees_with_scikit_learn(solver, dtype, rtol):
    a, y, lam, mask, _ = _problem(1, dtype)
    options = FistaOptions(tolerance=rtol)
    result = _solve(a, y, lam, mask, options=options, solver=solver)
    np.testing.assert_array_equal(result.status, CONVERGED)
    value, gap = _referee(result.x, a, y, lam, mask)
    np.testing.assert_allclose(result.objective, value, rtol=64 * np.finfo(dtype).eps)
    # Rounding perturbs every correlation by about eps lam_max.
    largest = np.asarray(lam_max(a, y, mask=mask) / lam)
    assert np.all(gap <= (rtol + 8 * np.finfo(dtype).eps * largest) * value)
    for j in range(J):
        on = np.asarray(mask[:, j])
        rows, data = np.asarray(a, np.float64)[on], np.asarray(y, np.float64)[on, j]
        model = Lasso(float(lam[j]) / len(data), fit_intercept=False, tol=1e-13, max_iter=10**6)
        theirs = model.fit(rows, data).coef_[:, None]
        best = _referee(theirs, rows, data[:, None], lam[j])[0][0]
        assert best * (1 - 1e-9) <= value[j] <= best * (1 + rtol) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_wide_batch_is_what_its_samples_are_alone(one_sided):
    problem = _problem(2)
    together = _solve(*problem, one_sided=one_sided)
    np.testing.assert_array_equal(together.status, CONVERGED)
    steps = np.asarray(together.iterations)
    assert np.max(steps) > 3 * np.quantile(steps, 0.25)
    a, *columns = problem
    for j in range(J):
        alone = _solve(a, *(v[..., j : j + 1] for v in columns), one_sided=one_sided)
        np.testing.assert_allclose(alone.x[:, 0], together.x[:, j], rtol=0, atol=1e-6)
        np.testing.assert_allclose(alone.objective[0], together.objective[j], rtol=1e-12)
        if steps[j] < 30:  # rounding decides over the length of long searches
            assert abs(int(alone.iterations[0]) - steps[j]) <= 5
    reached = np.where(problem[3], 0, np.asarray(a) @ np.asarray(together.x)).max(axis=0)
    np.testing.assert_allclose(together.violation, np.maximum(reached, 0), rtol=0, atol=1e-12)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.floats(0.1, 1.0), st.booleans())
def test_optimality_conditions_and_an_honest_gap(seed, share, one_sided):
    problem = _problem(seed, share=share)
    a, y, lam, mask, weights = (np.asarray(v) for v in problem)
    for options in (TIGHT, FistaOptions(max_iterations=7)):
        result = _solve(*problem, one_sided=one_sided, options=options)
        x = np.asarray(result.x)
        value, gap = _referee(x, *problem, one_sided=one_sided)
        np.testing.assert_allclose(result.objective, value, rtol=1e-12)
        np.testing.assert_allclose(result.duality_gap, gap, rtol=1e-9, atol=1e-13 * value.max())
        u = a @ x
        residual = np.where(mask, y - u, -np.maximum(u, 0) if one_sided else 0)
        g, bound = a.T @ residual, lam * weights
        # The residual is within sqrt(2 gap) of the optimal one.
        slack = np.linalg.norm(a, 2) * np.sqrt(2 * np.maximum(gap, 0)) + 1e-12
        slack = np.broadcast_to(slack, x.shape)
        assert np.all(np.abs(g) <= bound + slack)
        if options is TIGHT:
            np.testing.assert_array_equal(result.status, CONVERGED)
            assert np.all(np.abs(g - np.sign(x) * bound)[x != 0] <= slack[x != 0])


@pytest.mark.slow
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_objective_never_rises(one_sided):
    a, *columns = _problem(3)
    problem = a, *(v[..., :12] for v in columns)
    rng = np.random.default_rng(3)
    init = jnp.asarray(np.where(rng.random((N, 12)) < 0.5, rng.standard_normal((N, 12)), 0))
    last = _referee(init, *problem, one_sided=one_sided)[0]
    for steps in (1, 2, 3, 5, 9):
        options = FistaOptions(max_iterations=steps, tolerance=1e-14)
        result = _solve(*problem, init=init, one_sided=one_sided, options=options)
        value = _referee(result.x, *problem, one_sided=one_sided)[0]
        assert np.all(value <= last * (1 + 1e-14))
        if steps < 3:
            assert np.mean(value < last) > 0.9
        last = value


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linearly_dependent_columns_are_harmless(dtype):
    a, y, lam, mask, _ = _problem(4, dtype)
    options = FistaOptions(tolerance=1e-4 if dtype == np.float32 else 1e-10)
    plain = _solve(a, y, lam, mask, options=options)
    # Every column three times, once with the other sign, and zero columns.
    wide = jnp.concatenate([a, a, -a, jnp.zeros((M, 5), dtype)], axis=1)
    result = _solve(wide, y, lam, mask, options=options)
    assert bool(jnp.all(jnp.isfinite(result.x)))
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_array_equal(result.x[3 * N :], 0)
    value = _referee(result.x, wide, y, lam, mask)[0]
    tolerance = 2 * (options.tolerance or 0)
    np.testing.assert_allclose(value, _referee(plain.x, a, y, lam, mask)[0], rtol=tolerance)
    # A matrix of rank one, and one of zeros.
    flat = _solve(jnp.outer(a[:, 0], jnp.ones(N, dtype)), y, 0.1, mask, options=options)
    np.testing.assert_array_equal(flat.status, CONVERGED)
    nothing = _solve(jnp.zeros_like(a), y, 0.1, mask, options=options)
    np.testing.assert_array_equal(nothing.x, 0)
    np.testing.assert_array_equal(nothing.status, CONVERGED)


@pytest.mark.slow
def test_a_bad_sample_leaves_a_wide_batch_alone():
    a, y, lam, mask, weights = _problem(5)
    clean = _solve(a, y, lam, mask, weights)
    inside = int(np.flatnonzero(mask[:, 7])[0])
    result = _solve(a, y.at[inside, 7].set(jnp.nan), lam, mask, weights)
    others = np.arange(J) != 7
    np.testing.assert_array_equal(result.status[others], CONVERGED)
    assert result.status[7] == NONFINITE
    np.testing.assert_allclose(result.x[:, others], clean.x[:, others], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.objective[others], clean.objective[others], rtol=1e-12)
    np.testing.assert_array_equal(result.x[:, 7], 0)


def _ill_conditioned():
    rng = np.random.default_rng(6)
    centers = np.linspace(0, N - 1, M)[:, None]
    a = np.exp(-(((np.arange(N)[None] - centers) / 2) ** 2) / 2)
    c = np.where(rng.random((N, J)) < 0.1, rng.standard_normal((N, J)), 0)
    y = a @ c + 1e-3 * rng.standard_normal((M, J))
    return jnp.asarray(a), jnp.asarray(y), 0.01 * lam_max(jnp.asarray(a), jnp.asarray(y))


@pytest.mark.slow
def test_hundreds_of_steps_keep_the_measurements():
    a, y, lam = _ill_conditioned()
    options = FistaOptions(tolerance=1e-9, max_iterations=20_000)
    result = _solve(a, y, lam, options=options)
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert np.max(result.iterations) > 200
    value, gap = _referee(result.x, a, y, lam)
    assert np.all(gap <= 1.001e-9 * value)
    slower = _solve(a, y, lam, options=options, solver="fista")
    assert np.sum(result.iterations) < np.sum(slower.iterations)
    short = _solve(a, y, lam, options=FistaOptions(tolerance=1e-9, max_iterations=130))
    late = np.asarray(short.status) == MAX_ITERATIONS
    assert np.any(late)
    np.testing.assert_array_equal(short.iterations[late], 130)
    value, gap = _referee(short.x, a, y, lam)
    assert np.all(np.abs(short.duality_gap - gap) <= 1e-12 * value)


@pytest.mark.slow
def test_a_start_at_the_solution_takes_no_step():
    problem = _problem(8)
    first = _solve(*problem)
    options = FistaOptions(tolerance=1e-9)
    again = _solve(*problem, init=first.x, options=options)
    np.testing.assert_array_equal(again.iterations, 0)
    np.testing.assert_array_equal(again.x, first.x)


@pytest.mark.slow
def test_vmap_and_derivatives_of_a_wide_batch():
    problems = [_problem(seed) for seed in (9, 10)]
    stacked = [jnp.stack(v) for v in zip(*problems, strict=True)]
    mapped = jax.vmap(_solve)(*stacked)
    for i, problem in enumerate(problems):
        alone = _solve(*problem)
        np.testing.assert_allclose(mapped.objective[i], alone.objective, rtol=1e-12)
        np.testing.assert_allclose(mapped.x[i], alone.x, rtol=0, atol=1e-6)
    a, y, lam, mask, weights = problems[0]

    def minimizer(y, lam):
        result = _solve(a, y, lam, mask, weights, options=FistaOptions(tolerance=1e-16))
        return result.x, result.objective

    lam = jnp.maximum(lam, 0.2 * lam_max(a, y, mask=mask, weights=weights))
    check_grads(minimizer, (y, lam), order=1, modes=["fwd", "rev"], atol=1e-4, rtol=1e-4, eps=1e-6)
