import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.linear_model import Lasso

from jgia.sparse import (
    CONVERGED,
    MAX_ITERATIONS,
    BlockDCT,
    ConvOperator,
    LassoOptions,
    masked_lasso,
    masked_least_squares,
)

C, H, W, F, J = 3, 6, 5, 4, 2
BASIS = BlockDCT(4)
TWO_SIDED = LassoOptions(lam_ratio=0.05, num_stages=3, iterations_per_stage=700, one_sided=False)


@functools.partial(jax.jit, static_argnames=("basis", "options"))
def _solve(operator, y, mask, *, basis=BASIS, options=TWO_SIDED):
    return masked_lasso(operator, y, mask, basis=basis, options=options)


@jax.jit
def _measure(operator, c):
    """Images and measurements of coefficients."""
    images = BASIS.synthesize(c)
    return images, operator.apply(images)


def _dense(operator):
    """The matrices of Psi and of M Psi, by applying them to every unit image."""
    size = C * H * W
    units = jnp.asarray(np.eye(size).reshape(C, H, W, size), operator.kernel.dtype)
    return (np.asarray(a, np.float64).reshape(-1, size) for a in _measure(operator, units))


def _problem(dtype=np.float64, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 3, C, F)), dtype))
    y = jnp.asarray(rng.standard_normal((F, H, W, J)), dtype)
    return operator, y, jnp.asarray(rng.random((F, H, W, J)) < share)


class Sample:
    """One sample's problem and a point of it, dense and in float64."""

    def __init__(self, problem, result, sample, one_sided):
        operator, y, mask = problem
        synthesis, self.matrix = _dense(operator)
        self.y = np.asarray(y, np.float64)[..., sample].ravel()
        self.mask = np.asarray(mask)[..., sample].ravel()
        self.lam, self.one_sided = float(result.lam[sample]), one_sided
        self.c = synthesis.T @ np.asarray(result.x, np.float64)[..., sample].ravel()

    def residual(self, c):
        u = self.matrix @ c
        outside = np.maximum(u, 0) if self.one_sided else np.zeros_like(u)
        return np.where(self.mask, u - self.y, outside)

    def objective(self, c):
        return np.sum(self.residual(c) ** 2) / 2 + self.lam * np.abs(c).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-6)])
def test_agrees_with_scikit_learn(dtype, rtol):
    problem = _problem(dtype)
    result = _solve(*problem)
    assert result.x.dtype == result.objective.dtype == dtype
    assert bool(jnp.all(result.finite))
    for j in range(J):
        sample = Sample(problem, result, j, one_sided=False)
        rows, data = sample.matrix[sample.mask], sample.y[sample.mask]
        lam = TWO_SIDED.lam_ratio * np.abs(rows.T @ data).max()
        np.testing.assert_allclose(sample.lam, lam, rtol=8 * np.finfo(dtype).eps)
        lasso = Lasso(lam / len(rows), fit_intercept=False, tol=1e-12, max_iter=200_000)
        theirs = sample.objective(lasso.fit(rows, data).coef_)
        np.testing.assert_allclose(sample.objective(sample.c), theirs, rtol=rtol)
        np.testing.assert_allclose(result.objective[j], theirs, rtol=rtol)
        assert sample.objective(1.01 * sample.c) > theirs * (1 + 2 * rtol)
        assert np.sum(np.abs(lasso.coef_) > 1e-9) < len(sample.c)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_identity_is_a_soft_threshold_in_the_basis(dtype):
    rng = np.random.default_rng(1)
    operator = ConvOperator(jnp.eye(3, dtype=dtype)[None, None])
    y = jnp.asarray(rng.standard_normal((3, 9, 7, 2)), dtype)
    options = LassoOptions(
        lam_ratio=0.3,
        num_stages=1,
        iterations_per_stage=200,
        tolerance=8 * float(jnp.finfo(dtype).eps),
    )
    basis = BlockDCT()
    result = _solve(operator, y, jnp.ones(y.shape, bool), basis=basis, options=options)
    c = np.asarray(basis.analyze(y), np.float64)
    lam = 0.3 * np.abs(c).max(axis=(0, 1, 2))
    shrunk = np.sign(c) * np.maximum(np.abs(c) - lam, 0)
    assert 0 < np.count_nonzero(shrunk) < 0.7 * c.size
    # The rounding floor of the gap is about 4 eps (1 + lam_max ||c||_1 / P).
    rtol = 64 * np.finfo(dtype).eps
    np.testing.assert_allclose(result.lam, lam, rtol=rtol)
    expected = np.sum((shrunk - c) ** 2, axis=(0, 1, 2)) / 2 + lam * np.abs(shrunk).sum((0, 1, 2))
    np.testing.assert_allclose(result.objective, expected, rtol=rtol)
    np.testing.assert_allclose(np.asarray(result.duality_gap) / expected, 0, rtol=0, atol=rtol)
    # The objective is 1-strongly convex.
    distance = np.sum((np.asarray(result.coefficients) - shrunk) ** 2, axis=(0, 1, 2))
    assert np.all(distance <= 2 * rtol * expected)


@pytest.mark.parametrize("one_sided", [False, True])
def test_optimality_conditions_hold_within_the_gap(one_sided):
    problem = _problem(seed=2)
    options = LassoOptions(
        lam_ratio=0.05, num_stages=3, iterations_per_stage=100, one_sided=one_sided
    )
    result = _solve(*problem, options=options)
    for j in range(J):
        sample = Sample(problem, result, j, one_sided)
        np.testing.assert_allclose(sample.objective(sample.c), result.objective[j], rtol=1e-12)
        gap = float(result.duality_gap[j])
        assert 0 < gap < 1e-2 * float(result.objective[j])
        residual = sample.residual(sample.c)
        correlation = sample.matrix.T @ residual
        # f is 1-strongly convex in the equations that count, so the residual is within
        # sqrt(2 gap) of the optimal one, whose correlations are at most lam.
        slack = np.linalg.norm(sample.matrix, 2) * np.sqrt(2 * gap)
        assert np.abs(correlation).max() <= sample.lam + slack
        # Fenchel-Young: what is missing in complementarity is part of the gap.
        feasible = min(1, sample.lam / np.abs(correlation).max()) * correlation
        missing = sample.lam * np.abs(sample.c).sum() + sample.c @ feasible
        assert -1e-12 <= missing <= gap * (1 + 1e-9)
        # Not so at another point.
        elsewhere = sample.matrix.T @ sample.residual(0.5 * sample.c)
        assert np.abs(elsewhere).max() > sample.lam + slack


@pytest.mark.slow
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_gap_bounds_the_suboptimality_and_decreases(one_sided):
    problem = _problem(seed=3)

    def solve(iterations):
        return _solve(
            *problem,
            options=LassoOptions(
                lam_ratio=0.05,
                num_stages=2,
                iterations_per_stage=iterations,
                one_sided=one_sided,
                tolerance=1e-13,
            ),
        )

    optimum = solve(2000)
    np.testing.assert_array_equal(optimum.status, CONVERGED)
    assert float((optimum.duality_gap / optimum.objective).max()) <= 1e-13
    previous = np.full(J, np.inf)
    for iterations in (3, 100):
        result = solve(iterations)
        np.testing.assert_array_equal(result.iterations, 2 * iterations)
        np.testing.assert_array_equal(result.status, MAX_ITERATIONS)
        np.testing.assert_allclose(result.lam, optimum.lam, rtol=1e-14)
        gap = np.asarray(result.duality_gap)
        excess = np.asarray(result.objective - optimum.objective)
        assert np.all(excess >= -1e-12 * np.asarray(optimum.objective))
        assert np.all(gap >= excess)
        assert np.all(gap < 0.5 * previous)
        previous = gap
    # The bound is not an empty one.
    assert np.all(previous < 1e-2 * np.asarray(optimum.objective))


@pytest.mark.slow
def test_one_sided_equations_lower_the_violation():
    # A convolution with ReLU, far fewer active measurements than unknowns.
    rng = np.random.default_rng(4)
    operator, _, _ = _problem(seed=4)
    c = np.where(rng.random((C, H, W, J)) < 0.1, rng.standard_normal((C, H, W, J)), 0)
    y = _measure(operator, jnp.asarray(c))[1] - 1
    mask = y > 0
    options = {"lam_ratio": 1e-3, "num_stages": 4, "iterations_per_stage": 150}
    free = _solve(operator, y, mask, options=LassoOptions(**options, one_sided=False))
    bound = _solve(operator, y, mask, options=LassoOptions(**options))
    for result in (free, bound):
        reached = np.where(mask, 0, operator.apply(result.x)).max(axis=(0, 1, 2))
        np.testing.assert_allclose(result.violation, np.maximum(reached, 0), rtol=0, atol=1e-12)
    assert float(free.violation.min()) > 0
    assert bool(jnp.all(bound.violation < 0.5 * free.violation))


@pytest.mark.slow
def test_sparse_images_come_back_from_fewer_equations_than_unknowns():
    rng = np.random.default_rng(5)
    basis = BlockDCT()
    shape = (1, 16, 16, 2)
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 3, 1, 2))))
    c = np.where(rng.random(shape) < 0.06, rng.choice([-1.0, 1.0], shape), 0)
    image = basis.synthesize(jnp.asarray(c))
    y = operator.apply(image)
    mask = jnp.asarray(rng.random(y.shape) < 0.3)
    assert int(mask.sum(axis=(0, 1, 2)).max()) < 0.7 * 256
    options = LassoOptions(one_sided=False)
    sparse = _solve(operator, y, mask, basis=basis, options=options)
    least = masked_least_squares(operator, y, mask)
    assert float(least.relative_residual.max()) < 1e-10

    def decibels(x):
        return -10 * np.log10(np.mean((np.asarray(x) - np.asarray(image)) ** 2, axis=(0, 1, 2)))

    assert np.all(decibels(sparse.x) > decibels(least.x) + 10)
    assert np.all(decibels(sparse.x) > 40)


def test_bad_data_and_empty_data_blank_their_own_sample_only():
    operator, y, mask = _problem(seed=6)
    clean = _solve(operator, y, mask)
    spot = tuple(np.argwhere(np.asarray(mask[..., 0]))[3])
    for bad in (np.nan, np.inf):
        result = _solve(operator, y.at[(*spot, 0)].set(bad), mask)
        np.testing.assert_array_equal(result.finite, [False, True])
        np.testing.assert_array_equal(result.x[..., 0], 0)
        assert np.isinf(result.objective[0])
        assert np.isinf(result.duality_gap[0])
        np.testing.assert_array_equal(result.x[..., 1], clean.x[..., 1])
    outside = _solve(operator, jnp.where(mask, y, jnp.nan), mask)
    np.testing.assert_array_equal(outside.x, clean.x)
    for y_empty, mask_empty in ((y.at[..., 0].set(0), mask), (y, mask.at[..., 0].set(False))):
        result = _solve(operator, y_empty, mask_empty)
        assert bool(jnp.all(result.finite))
        for field in (result.x[..., 0], result.lam[0], result.objective[0], result.duality_gap[0]):
            np.testing.assert_array_equal(field, 0)
    broken = ConvOperator(operator.kernel.at[0, 0, 0, 0].set(jnp.nan))
    result = _solve(broken, y, mask)
    assert not bool(jnp.any(result.finite))
    np.testing.assert_array_equal(result.x, 0)


@pytest.mark.slow
def test_a_step_bound_changes_nothing():
    operator, y, mask = _problem(seed=7)
    options = LassoOptions(lam_ratio=0.02, num_stages=2, iterations_per_stage=30, one_sided=False)
    solve = jax.jit(functools.partial(masked_lasso, basis=BASIS, options=options))
    bound = solve(operator, y, mask, step_bound=operator.squared_norm_bound())
    np.testing.assert_array_equal(bound.x, solve(operator, y, mask).x)


@pytest.mark.slow
def test_vmap_over_single_samples_agrees():
    operator, y, mask = _problem(seed=8)
    options = LassoOptions(lam_ratio=0.1, num_stages=2, iterations_per_stage=20)
    solve = functools.partial(masked_lasso, basis=BASIS, options=options)
    together = jax.jit(solve)(operator, y, mask)
    one_each = jnp.moveaxis(y, -1, 0)[..., None], jnp.moveaxis(mask, -1, 0)[..., None]
    mapped = jax.jit(jax.vmap(solve, in_axes=(None, 0, 0)))(operator, *one_each)
    for name in together._fields:
        expected = np.asarray(getattr(together, name))
        folded = np.asarray(getattr(mapped, name))[..., 0]
        folded = np.moveaxis(folded, 0, -1) if name in ("x", "coefficients") else folded
        np.testing.assert_allclose(folded, expected, rtol=1e-11, atol=1e-12)


def test_a_second_call_does_not_retrace():
    operator, y, mask = _problem(seed=9)
    traces = []

    @functools.partial(jax.jit, static_argnames="options")
    def counted(operator, y, mask, options):
        traces.append(None)
        return masked_lasso(operator, y, mask, options=options).x

    for scale in (1, 2):
        counted(operator, scale * y, mask, LassoOptions(num_stages=1, iterations_per_stage=2))
    assert len(traces) == 1


@pytest.mark.slow
def test_derivatives_are_those_of_the_minimizer():
    rng = np.random.default_rng(10)
    kernel, y = (jnp.asarray(rng.standard_normal(s)) for s in ((3, 3, 1, 2), (2, 3, 3, 1)))
    mask = jnp.asarray(rng.random(y.shape) < 0.8)
    options = LassoOptions(
        lam_ratio=0.2, num_stages=1, iterations_per_stage=5000, tolerance=1e-15, one_sided=True
    )

    @jax.jit
    def image(kernel, y):
        return masked_lasso(ConvOperator(kernel), y, mask, options=options).x

    assert float(jnp.abs(image(kernel, y)).max()) > 0.01
    check_grads(image, (kernel, y), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam_ratio": 0.0}, "lam_ratio must lie strictly between 0 and 1"),
        ({"lam_ratio": 1.0}, "lam_ratio must lie strictly between 0 and 1"),
        ({"lam_ratio": float("nan")}, "lam_ratio must lie strictly between 0 and 1"),
        ({"num_stages": 0}, "num_stages must be at least 1"),
        ({"iterations_per_stage": 0}, "iterations_per_stage must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LassoOptions(**fields)


def test_shapes_that_do_not_fit_are_refused():
    operator, y, mask = _problem()
    with pytest.raises(ValueError, match="operator"):
        masked_lasso(operator, y[1:], mask[1:])
