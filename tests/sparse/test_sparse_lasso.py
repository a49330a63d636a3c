"""The batched l1 solver against closed forms, scikit-learn, cvxpy and the optimality conditions."""

import functools
from typing import Any

import cvxpy as cp
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
    INVALID,
    MAX_ITERATIONS,
    NONFINITE,
    STALLED,
    BlockDCT,
    ConvOperator,
    DenseOperator,
    FistaOptions,
    lam_max,
    lasso,
)

M, N, J = 12, 20, 3
TIGHT = FistaOptions(tolerance=1e-13)


@functools.partial(jax.jit, static_argnames=("one_sided", "options"))
def _solve(a, y, lam, mask=None, weights=None, *, one_sided=False, options=TIGHT):
    return lasso(a, y, lam, mask=mask, weights=weights, one_sided=one_sided, options=options)


def _problem(seed=0, dtype: Any = np.float64, share=0.7) -> tuple[Any, ...]:
    """A matrix, right-hand sides, l1 weights, masks and weights of the coefficients."""
    rng = np.random.default_rng(seed)
    a, y = rng.standard_normal((M, N)), rng.standard_normal((M, J))
    mask, weights = rng.random((M, J)) < share, rng.uniform(0.5, 2, (N, J))
    lam = np.array([0.3, 0.1, 0.03]) * np.abs(a.T @ (mask * y)).max(axis=0)
    return (
        *(jnp.asarray(v, dtype) for v in (a, y, lam)),
        jnp.asarray(mask),
        jnp.asarray(weights, dtype),
    )


def _objective(c, a, y, lam, mask, weights, *, one_sided):
    """Referee: the objective of each sample in float64 NumPy."""
    c, a, y, lam, mask, weights = (np.asarray(v, np.float64) for v in (c, a, y, lam, mask, weights))
    u = a @ c
    outside = (1 - mask) * np.maximum(u, 0) if one_sided else 0
    fit = np.sum((mask * (u - y)) ** 2 + np.square(outside), axis=0) / 2
    return fit + lam * np.sum(weights * np.abs(c), axis=0)


def _cvxpy(a, y, lam, mask, weights, *, one_sided):
    a, y, lam, mask, weights = (np.asarray(v, np.float64) for v in (a, y, lam, mask, weights))
    columns = []
    for j in range(y.shape[1]):
        c, on = cp.Variable(a.shape[1]), mask[:, j] > 0
        fit = cp.sum_squares(a[on] @ c - y[on, j])
        if one_sided:
            fit += cp.sum_squares(cp.pos(a[~on] @ c))
        penalty = lam[j] * cp.norm1(cp.multiply(weights[:, j], c))
        cp.Problem(cp.Minimize(0.5 * fit + penalty)).solve(solver=cp.CLARABEL)
        columns.append(c.value)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("one_sided", [False, True])
def test_agrees_with_cvxpy_on_masks_weights_and_one_sided_constraints(one_sided):
    problem = _problem()
    result = _solve(*problem, one_sided=one_sided)
    np.testing.assert_array_equal(result.status, CONVERGED)
    theirs = _cvxpy(*problem, one_sided=one_sided)
    best = _objective(theirs, *problem, one_sided=one_sided)
    np.testing.assert_allclose(result.objective, best, rtol=1e-7)
    np.testing.assert_allclose(
        result.objective, _objective(result.x, *problem, one_sided=one_sided), 1e-13
    )
    np.testing.assert_allclose(result.x, theirs, rtol=0, atol=1e-4)
    reached = np.where(problem[3], 0, np.asarray(problem[0]) @ np.asarray(result.x)).max(axis=0)
    np.testing.assert_allclose(result.violation, np.maximum(reached, 0), rtol=0, atol=1e-13)
    assert np.any(np.asarray(result.violation) > 0)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_agrees_with_scikit_learn(dtype, rtol):
    a, y, lam, *_ = _problem(1, dtype)
    options = TIGHT if dtype == np.float64 else FistaOptions()
    result = _solve(a, y, lam, options=options)
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert all(
        field.dtype == dtype
        for field in (result.x, result.objective, result.duality_gap, result.lam)
    )
    for j in range(J):
        model = Lasso(float(lam[j]) / M, fit_intercept=False, tol=1e-14, max_iter=100_000)
        model.fit(np.asarray(a, np.float64), np.asarray(y[:, j], np.float64))
        theirs = _objective(model.coef_[:, None], a, y[:, j : j + 1], lam[j], 1, 1, one_sided=False)
        np.testing.assert_allclose(result.objective[j], theirs[0], rtol=rtol)
        if dtype == np.float64:
            np.testing.assert_array_equal(result.x[:, j] != 0, np.abs(model.coef_) > 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_identity_is_a_soft_threshold(dtype):
    y = jnp.asarray(np.random.default_rng(2).standard_normal((N, J)), dtype)
    weights = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, (N, J)), dtype)
    result = _solve(jnp.eye(N, dtype=dtype), y, 0.7, None, weights, options=FistaOptions())
    threshold = 0.7 * np.asarray(weights, np.float64)
    expected = np.sign(y) * np.maximum(np.abs(np.asarray(y, np.float64)) - threshold, 0)
    np.testing.assert_array_equal(result.status, CONVERGED)
    # The objective is 1-strongly convex.
    distance = np.sum((np.asarray(result.x) - expected) ** 2, axis=0)
    assert np.all(distance <= 2 * np.asarray(result.duality_gap) + np.finfo(dtype).eps)
    np.testing.assert_array_equal(np.asarray(result.x)[expected == 0], 0)


def test_every_gap_bounds_the_distance_to_the_minimum_and_rejects_a_wrong_answer():
    problem = _problem(4)
    best = np.asarray(_solve(*problem, one_sided=True).objective)
    for steps in (1, 12):
        options = FistaOptions(max_iterations=steps, tolerance=1e-13)
        result = _solve(*problem, one_sided=True, options=options)
        excess = np.asarray(result.objective) - best
        assert np.all(np.asarray(result.duality_gap) >= excess - 1e-13 * best)
        assert np.all(excess[np.asarray(result.duality_gap) > 0.1 * best] > 0)
    np.testing.assert_array_equal(result.iterations, 12)
    # A minimizer of another lam, or a scaled one, is told apart by the gap at that point.
    stay = FistaOptions(max_iterations=1, check_every=1, tolerance=1e3)
    solve = jax.jit(
        functools.partial(lasso, mask=problem[3], weights=problem[4], one_sided=True, options=stay)
    )
    right = _solve(*problem, one_sided=True)
    for wrong in (1.01 * right.x, _solve(problem[0], problem[1], 1.1 * problem[2]).x):
        result = solve(*problem[:3], init=wrong)
        np.testing.assert_array_equal(result.x, wrong)
        assert np.all(result.duality_gap > 1e-5 * best)
    result = solve(*problem[:3], init=right.x)
    assert np.all(result.duality_gap <= 1e-13 * best)


@settings(derandomize=True, deadline=None, max_examples=8)
@given(st.integers(0, 10**6), st.floats(0.02, 0.9), st.floats(0.1, 1.0), st.booleans())
def test_optimality_conditions(seed, ratio, share, one_sided):
    a, y, _, mask, weights = _problem(seed, share=share)
    lam = ratio * lam_max(a, y, mask=mask, weights=weights)
    result = _solve(a, y, lam, mask, weights, one_sided=one_sided)
    np.testing.assert_allclose(result.lam_max, lam / ratio, rtol=1e-13)
    x, on, u = np.asarray(result.x), np.asarray(mask), np.asarray(a @ result.x)
    residual = np.where(on, np.asarray(y) - u, -np.maximum(u, 0) if one_sided else 0)
    g, bound = np.asarray(a).T @ residual, np.asarray(lam) * np.asarray(weights)
    # The residual is within sqrt(2 gap) of the optimal one.
    slack = np.linalg.norm(a, 2) * np.sqrt(2 * np.asarray(result.duality_gap)) + 1e-12
    assert np.all(np.abs(g) <= bound + slack)
    assert np.all(np.abs(g - np.sign(x) * bound)[x != 0] <= np.broadcast_to(slack, x.shape)[x != 0])


def test_lam_from_lam_max_up_gives_exactly_zero():
    a, y, _, mask, weights = _problem(5)
    largest = lam_max(a, y, mask=mask, weights=weights)
    for factor in (1.0, 3.0):
        result = _solve(a, y, factor * largest, mask, weights)
        np.testing.assert_array_equal(result.x, 0)
        np.testing.assert_array_equal(result.iterations, 0)
        np.testing.assert_array_equal(result.status, CONVERGED)
    assert np.all(np.any(_solve(a, y, 0.999 * largest, mask, weights).x != 0, axis=0))


@pytest.mark.slow
def test_samples_do_not_know_of_each_other():
    problem = _problem(6)
    together = _solve(*problem, one_sided=True)
    a, batched = problem[0], [jnp.moveaxis(v[None], -1, 0) for v in problem[1:]]
    solve = jax.vmap(functools.partial(_solve, one_sided=True), in_axes=(None, 0, 0, 0, 0))
    y, lam, mask, weights = batched
    mapped = solve(
        a, y[:, 0, :, None], lam[:, 0, None], mask[:, 0, :, None], weights[:, 0, :, None]
    )
    np.testing.assert_allclose(mapped.x[..., 0].T, together.x, rtol=0, atol=1e-7)
    np.testing.assert_allclose(mapped.objective[:, 0], together.objective, rtol=1e-12)
    eager = lasso(*problem[:3], mask=problem[3], weights=problem[4], one_sided=True, options=TIGHT)
    np.testing.assert_allclose(eager.x, together.x, rtol=0, atol=1e-7)


def test_operators_bases_and_shapes():
    rng = np.random.default_rng(7)
    kernel = jnp.asarray(rng.standard_normal((27, 15)))
    operator, y = DenseOperator(kernel, (3, 3, 3)), jnp.asarray(rng.standard_normal((15, 1, 1, 2)))
    planes = jax.jit(functools.partial(lasso, basis=BlockDCT(3), options=TIGHT))(operator, y, 0.5)
    size = 27
    units = jnp.eye(size).reshape(3, 3, 3, size)
    psi = np.asarray(BlockDCT(3).synthesize(units))
    matrix = np.asarray(operator.apply(jnp.asarray(psi))).reshape(15, size)
    dense = _solve(jnp.asarray(matrix), y[:, 0, 0], 0.5)
    np.testing.assert_allclose(planes.coefficients.reshape(size, 2), dense.x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        planes.x.reshape(size, 2), psi.reshape(size, size) @ dense.x, rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(planes.objective, dense.objective, rtol=1e-12)


# ---- bad input: the rows of the table in the docstring


def test_a_zero_column_gets_a_zero_and_duplicates_the_same_objective():
    a, y, lam, mask, _ = _problem(8)
    best = _solve(a, y, lam, mask).objective
    wide = jnp.concatenate([a, jnp.zeros((M, 1)), a[:, :4]], axis=1)
    result = _solve(wide, y, lam, mask)
    np.testing.assert_array_equal(result.x[N], 0)
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_allclose(result.objective, best, rtol=1e-12)
    merged = result.x[:N] + jnp.pad(result.x[N + 1 :], ((0, N - 4), (0, 0)))
    np.testing.assert_allclose(
        _objective(merged, a, y, lam, mask, 1, one_sided=False), best, rtol=1e-12
    )


def test_lam_zero_is_least_squares():
    a, y, *_ = _problem(9)
    for matrix in (a, a.T):  # under- and overdetermined
        data = jnp.resize(y, (matrix.shape[0], J))
        result = _solve(matrix, data, 0.0, options=FistaOptions(tolerance=1e-10))
        expected = np.linalg.lstsq(np.asarray(matrix), np.asarray(data), rcond=None)[0]
        np.testing.assert_array_equal(result.status, CONVERGED)
        np.testing.assert_allclose(matrix @ result.x, matrix @ expected, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(result.duality_gap, result.objective)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_bad_lam_is_refused_or_blanks_its_sample(bad):
    a, y, lam, mask, weights = _problem(10)
    with pytest.raises(ValueError, match="lam must be zero or more"):
        lasso(a, y, bad)
    with pytest.raises(ValueError, match="weights must be positive"):
        lasso(a, y, 1.0, weights=weights.at[2, 0].set(bad))
    clean = _solve(a, y, lam, mask, weights)
    for result in (
        _solve(a, y, lam.at[0].set(bad), mask, weights),
        _solve(a, y, lam, mask, weights.at[2, 0].set(bad)),
    ):
        np.testing.assert_array_equal(result.status, [INVALID, CONVERGED, CONVERGED])
        np.testing.assert_array_equal(result.x[:, 0], 0)
        np.testing.assert_array_equal(result.x[:, 1:], clean.x[:, 1:])
        assert np.isinf(result.objective[0])
        assert not np.any(np.isnan(np.concatenate([np.ravel(field) for field in result])[-20:]))


def test_nonfinite_data_blank_their_own_sample_only():
    a, y, lam, mask, weights = _problem(11)
    clean = _solve(a, y, lam, mask, weights)
    inside = int(np.flatnonzero(mask[:, 1])[0])
    for bad in (np.nan, np.inf):
        result = _solve(a, y.at[inside, 1].set(bad), lam, mask, weights)
        np.testing.assert_array_equal(result.status, [CONVERGED, NONFINITE, CONVERGED])
        np.testing.assert_array_equal(result.finite, [True, False, True])
        np.testing.assert_array_equal(result.x[:, 1], 0)
        np.testing.assert_array_equal(result.x[:, ::2], clean.x[:, ::2])
    outside = _solve(a, jnp.where(mask, y, jnp.nan), lam, mask, weights)
    np.testing.assert_array_equal(outside.x, clean.x)
    broken = _solve(a.at[0, 0].set(jnp.nan), y, lam, mask, weights)
    np.testing.assert_array_equal(broken.status, NONFINITE)
    np.testing.assert_array_equal(broken.x, 0)


def test_samples_without_equations_or_data_are_zero():
    a, y, lam, mask, weights = _problem(12)
    clean = _solve(a, y, lam, mask, weights)
    for result in (
        _solve(a, y, lam, mask.at[:, 0].set(False), weights),
        _solve(a, y.at[:, 0].set(0), lam, mask, weights),
    ):
        np.testing.assert_array_equal(result.status, CONVERGED)
        np.testing.assert_array_equal(result.x[:, 0], 0)
        np.testing.assert_array_equal(result.x[:, 1:], clean.x[:, 1:])
        np.testing.assert_array_equal([result.objective[0], result.duality_gap[0]], 0)


def test_an_ill_conditioned_matrix_ends_with_an_honest_gap():
    rng = np.random.default_rng(13)
    q, _ = np.linalg.qr(rng.standard_normal((N, N)))
    a = (q * np.logspace(0, -8, N)) @ np.linalg.qr(rng.standard_normal((N, N)))[0]
    c = np.where(rng.random((N, J)) < 0.3, rng.standard_normal((N, J)), 0)
    a, y = jnp.asarray(a), jnp.asarray(a @ c)
    lam = 1e-6 * lam_max(a, y)
    early = _solve(a, y, lam, options=FistaOptions(tolerance=1e-9, max_iterations=60))
    np.testing.assert_array_equal(early.status, MAX_ITERATIONS)
    late = _solve(a, y, lam, options=FistaOptions(tolerance=1e-3, max_iterations=100_000))
    np.testing.assert_array_equal(late.status, CONVERGED)
    assert np.all(early.duality_gap >= early.objective - late.objective)


def test_single_precision_says_when_rounding_stops_it():
    a, y, lam, *_ = _problem(14, np.float32)
    result = _solve(a, y, 0.01 * lam, options=FistaOptions(tolerance=1e-12, max_iterations=20_000))
    np.testing.assert_array_equal(result.status, STALLED)
    assert np.all(result.duality_gap < 1e-2 * result.objective)
    exact = _solve(*(v.astype(jnp.float64) for v in (a, y, 0.01 * lam)))
    excess = _objective(result.x, a, y, 0.01 * lam, 1, 1, one_sided=False) - np.asarray(
        exact.objective
    )
    assert np.all(excess <= 1.1 * np.asarray(result.duality_gap, np.float64))


def test_shapes_that_do_not_fit_are_refused():
    a, y, lam, _, weights = _problem()
    with pytest.raises(ValueError, match=r"the matrix has shape \(12, 20\)"):
        lasso(a, y[1:], lam)
    with pytest.raises(ValueError, match="batch as its last axis"):
        lasso(a, y[:, 0], 1.0)
    with pytest.raises(ValueError, match=r"lam must be a number or have shape \(3,\)"):
        lasso(a, y, lam[:2])
    with pytest.raises(ValueError, match=r"weights must have shape \(20, 3\)"):
        lasso(a, y, lam, weights=weights[1:])
    with pytest.raises(ValueError, match="maps to"):
        lasso(ConvOperator(jnp.ones((3, 3, 1, 2))), jnp.ones((2, 4, 4, 1))[:1], 1.0)
    out_of_range: list[dict[str, Any]] = [
        {"tolerance": 0.0},
        {"max_iterations": 0},
        {"check_every": 0},
    ]
    for fields in out_of_range:
        with pytest.raises(ValueError, match=next(iter(fields))):
            FistaOptions(**fields)


# ---- derivatives


@pytest.mark.slow
def test_derivatives_are_those_of_the_minimizer():
    a, y, lam, mask, weights = _problem(15)

    @jax.jit
    def minimizer(a, y, lam, weights):
        options = FistaOptions(tolerance=1e-16)
        result = lasso(a, y, lam, mask=mask, weights=weights, one_sided=True, options=options)
        return result.x, result.objective

    inputs = (a, y, lam, weights)
    check_grads(minimizer, inputs, order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5, eps=1e-6)
    # The envelope: dP/dlam is the weighted l1 norm, and nothing moves where c is zero.
    slope = jax.grad(lambda lam: jnp.sum(minimizer(a, y, lam, weights)[1]))(lam)
    x = minimizer(*inputs)[0]
    np.testing.assert_allclose(slope, jnp.sum(weights * jnp.abs(x), axis=0), rtol=1e-12)
    moved = jax.jvp(lambda y: minimizer(a, y, lam, weights)[0], (y,), (jnp.ones_like(y),))[1]
    np.testing.assert_array_equal(moved[x == 0], 0)
    assert np.any(np.abs(moved) > 0.01)
