import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from jgia.sparse import ConvOperator, masked_least_squares
from jgia.sparse.least_squares import CONVERGED, MAX_ITERATIONS, NONFINITE
from jgia.sparse.preconditioners import block_preconditioner

_TRACES = []
DTYPES = [np.float32, np.float64]
C, H, W, F, J = 3, 6, 5, 8, 4


@functools.partial(
    jax.jit,
    static_argnames=("tolerance", "max_iterations", "num_refinements", "abandon_residual"),
)
def _solve(operator, y, mask, **options):
    _TRACES.append(None)
    return masked_least_squares(operator, y, mask, **options)


@jax.jit
def _apply(operator, x):
    return operator.apply(x)


@jax.jit
def _inverse_blocks(operator, mask):
    return block_preconditioner(operator, mask.astype(operator.kernel.dtype)).inverse


@dataclasses.dataclass
class Problem:
    """An over-determined batch: samples 0, 1 consistent, 2 with noise, 3 nothing but noise."""

    operator: ConvOperator
    y: jax.Array
    mask: jax.Array
    x: jax.Array

    @property
    def arrays(self):
        return self.operator, self.y, self.mask

    def system(self, sample):
        """The masked dense system in float64."""
        keep = np.asarray(self.mask)[..., sample].ravel()
        matrix = _dense(self.operator, (C, H, W)).astype(np.float64)[keep]
        return matrix, np.asarray(self.y, np.float64)[..., sample].ravel()[keep]


def _dense(operator, shape):
    """The matrix of M, by applying it to every unit image."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size), operator.kernel.dtype)
    return np.asarray(_apply(operator, units)).reshape(-1, size)


def _dense_preconditioner(operator, mask, sample):
    blocks = np.asarray(_inverse_blocks(operator, mask))
    num, _, height, width, _ = blocks.shape
    dense = np.zeros((num, height, width, num, height, width))
    for i in range(height):
        for j in range(width):
            dense[:, i, j, :, i, j] = blocks[:, :, i, j, sample]
    return dense.reshape(num * height * width, -1)


def _problem(dtype: type[np.floating] = np.float64, seed=0, share=0.6):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((3, 3, C, F))
    operator = ConvOperator(jnp.asarray(kernel, dtype))
    x = jnp.asarray(rng.standard_normal((C, H, W, J)), dtype)
    mask = jnp.asarray(rng.random((F, H, W, J)) < share)
    noise = rng.standard_normal((F, H, W, J)) * np.array([0, 0, 1, 100])
    y = np.asarray(_apply(operator, x)) + noise
    return Problem(operator, jnp.asarray(y, dtype), mask, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_dense_least_squares(dtype):
    problem = _problem(dtype)
    result = _solve(*problem.arrays)
    assert result.x.dtype == result.relative_residual.dtype == dtype
    np.testing.assert_array_equal(result.status, CONVERGED)
    for sample in range(J):
        matrix, b = problem.system(sample)
        expected, _, rank, values = np.linalg.lstsq(matrix, b, rcond=None)
        assert rank == C * H * W
        found = np.asarray(result.x, np.float64)[..., sample].ravel()
        # Wedin's bound on what rounding of the data does (Bjorck 1996, theorem 1.4.6).
        cond = values[0] / values[-1]
        misfit = np.linalg.norm(matrix @ expected - b)
        allowed = cond + cond**2 * misfit / (values[0] * np.linalg.norm(expected))
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 16 * np.finfo(dtype).eps * allowed
        if dtype == np.float64:
            assert error < 1e-8
        relative = misfit / np.linalg.norm(b)
        atol = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(
            np.asarray(result.relative_residual)[sample], relative, rtol=0, atol=atol
        )


def test_agrees_with_lsqr():
    problem = _problem()
    result = _solve(*problem.arrays)
    for sample in range(J):
        matrix, b = problem.system(sample)
        expected = scipy.sparse.linalg.lsqr(matrix, b, atol=0, btol=0, iter_lim=2000)[0]
        found = np.asarray(result.x)[..., sample].ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [2, 5])
def test_every_channel_count_is_solved(channels):
    # Up to four channels have a full block preconditioner, more a diagonal one.
    rng = np.random.default_rng(channels)
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 1, channels, 2 * channels + 2))))
    x = jnp.asarray(rng.standard_normal((channels, 4, 3, 2)))
    y = _apply(operator, x)
    result = _solve(operator, y, jnp.ones(y.shape, bool))
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_allclose(result.x, x, rtol=0, atol=1e-11)


def test_the_preconditioner_inverts_the_blocks_up_to_its_ridge():
    problem = _problem()
    weight = jnp.asarray(problem.mask, jnp.float64)
    blocks = np.asarray(jax.jit(problem.operator.pixel_blocks)(weight))
    inverse = np.asarray(_inverse_blocks(problem.operator, problem.mask))
    trace = np.einsum("cchwj->hwj", blocks)
    ridge = 1e-3 * trace / C + 1e-6 * trace.max(axis=(0, 1))
    ridged = blocks + np.eye(C)[:, :, None, None, None] * ridge
    product = np.einsum("abhwj,bchwj->achwj", inverse, ridged)
    expected = np.broadcast_to(np.eye(C)[:, :, None, None, None], product.shape)
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-9)


def test_samples_do_not_see_each_other():
    problem = _problem()
    together = _solve(*problem.arrays)
    order = np.array([2, 0, 3, 1])
    permuted = _solve(problem.operator, problem.y[..., order], problem.mask[..., order])
    np.testing.assert_allclose(permuted.x, together.x[..., order], rtol=0, atol=1e-11)
    np.testing.assert_array_equal(permuted.status, together.status[order])
    for sample in range(J):
        one = slice(sample, sample + 1)
        alone = _solve(problem.operator, problem.y[..., one], problem.mask[..., one])
        scale = float(jnp.abs(alone.x).max())
        np.testing.assert_allclose(together.x[..., one], alone.x, rtol=0, atol=1e-12 * scale)
        assert abs(int(together.iterations[sample] - alone.iterations[0])) <= 4


def test_a_finished_sample_rests_while_others_go_on():
    dtype = np.float32
    # With the center tap alone every pixel is a system of its own: a handful of iterations.
    rng = np.random.default_rng(1)
    kernel = np.zeros((3, 3, 1, 4))
    kernel[1, 1] = 1
    kernel[..., 2:] = rng.standard_normal((3, 3, 1, 2))
    easy = np.zeros((4, 8, 8, 1), bool)
    easy[:2] = True
    hard = np.zeros((4, 8, 8, 1), bool)
    hard[2:] = rng.random((2, 8, 8, 1)) < 0.8
    operator = ConvOperator(jnp.asarray(kernel, dtype))
    y = _apply(operator, jnp.asarray(rng.standard_normal((1, 8, 8, 2)), dtype))
    both = _solve(operator, y, jnp.asarray(np.concatenate([easy, hard], axis=-1)))
    calm = _solve(operator, y, jnp.asarray(np.concatenate([easy, easy], axis=-1)))
    assert int(both.iterations[0]) == int(calm.iterations[0]) <= 6
    assert int(both.iterations[1]) > 10 * int(both.iterations[0])
    atol = 4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(both.x[..., 0], calm.x[..., 0], rtol=0, atol=atol)


def test_inconsistent_systems_stop_at_the_rounding_floor():
    # Asked for more than the dtype holds, the recursion once went on dividing noise by noise.
    rng = np.random.default_rng(2)
    dtype = np.float32
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 3, C, F)), dtype))
    y = jnp.asarray(rng.standard_normal((F, H, W, J)), dtype)
    mask = jnp.asarray(rng.random((F, H, W, J)) < 0.5)
    ask = {"tolerance": float(np.finfo(dtype).eps) / 64, "max_iterations": 3000}
    result = _solve(operator, y, mask, num_refinements=3, **ask)
    problem = Problem(operator, y, mask, y)
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert int(result.iterations.max()) < 3000
    for sample in range(J):
        matrix, b = problem.system(sample)
        expected = np.linalg.lstsq(matrix, b, rcond=None)[0]
        relative = np.linalg.norm(matrix @ expected - b) / np.linalg.norm(b)
        assert relative > 0.1
        np.testing.assert_allclose(
            np.asarray(result.relative_residual)[sample], relative, rtol=1e-5
        )
        found = np.asarray(result.x)[..., sample].ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_the_certificate_is_that_of_the_returned_point_and_rejects_others():
    problem = _problem()
    # Stopped early: a gradient well above rounding.
    result = _solve(*problem.arrays, max_iterations=3, num_refinements=1)
    for sample in range(J):
        matrix, b = problem.system(sample)
        metric = _dense_preconditioner(problem.operator, problem.mask, sample)

        def kkt(x, matrix=matrix, b=b, metric=metric):
            gradient, start = matrix.T @ (b - matrix @ x), matrix.T @ b
            return np.sqrt((gradient @ metric @ gradient) / (start @ metric @ start))

        x = np.asarray(result.x)[..., sample].ravel()
        np.testing.assert_allclose(np.asarray(result.gradient)[sample], kkt(x), rtol=1e-8)
        relative = np.linalg.norm(matrix @ x - b) / np.linalg.norm(b)
        np.testing.assert_allclose(
            np.asarray(result.relative_residual)[sample], relative, rtol=1e-10
        )
        solved = np.linalg.lstsq(matrix, b, rcond=None)[0]
        assert kkt(solved) < 1e-12
        perturbed = solved.copy()
        perturbed[7] *= 1 + 1e-6
        assert kkt(perturbed) > 1e-10


def test_the_iteration_limit_is_reported():
    problem = _problem()
    result = _solve(*problem.arrays, max_iterations=3, num_refinements=1)
    np.testing.assert_array_equal(result.status, MAX_ITERATIONS)
    np.testing.assert_array_equal(result.iterations, 6)
    assert float(result.gradient.min()) > 1e-6
    assert bool(jnp.all(jnp.isfinite(result.x)))


def test_abandoned_samples_keep_their_first_pass():
    problem = _problem()
    once = _solve(*problem.arrays, max_iterations=20, num_refinements=0)
    assert float(once.relative_residual[3]) > 0.3 > 0.1 > float(once.relative_residual[0])
    result = _solve(*problem.arrays, max_iterations=20, abandon_residual=0.3)
    np.testing.assert_allclose(result.x[..., 3], once.x[..., 3], rtol=1e-12)
    assert int(result.iterations[3]) == int(once.iterations[3]) == 20
    assert int(result.iterations[0]) == 40
    assert float(result.gradient[0]) < 0.1 * float(once.gradient[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_data_blank_their_own_sample_only(bad):
    problem = _problem()
    spot = tuple(np.argwhere(np.asarray(problem.mask[..., 1]))[5])
    result = _solve(problem.operator, problem.y.at[(*spot, 1)].set(bad), problem.mask)
    assert int(result.status[1]) == NONFINITE
    np.testing.assert_array_equal(result.x[..., 1], 0)
    assert np.isinf(result.relative_residual[1])
    assert np.isinf(result.gradient[1])
    clean = _solve(*problem.arrays)
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(result.status[others], CONVERGED)
    np.testing.assert_array_equal(result.x[..., others], clean.x[..., others])


def test_data_outside_the_mask_do_not_matter():
    problem = _problem()
    poisoned = jnp.where(problem.mask, problem.y, jnp.nan)
    np.testing.assert_array_equal(
        _solve(problem.operator, poisoned, problem.mask).x, _solve(*problem.arrays).x
    )


def test_a_nonfinite_kernel_is_reported():
    problem = _problem()
    broken = ConvOperator(problem.operator.kernel.at[0, 0, 0, 0].set(jnp.nan))
    result = _solve(broken, problem.y, problem.mask)
    np.testing.assert_array_equal(result.status, NONFINITE)
    np.testing.assert_array_equal(result.x, 0)


def test_nothing_to_solve_is_solved_by_zero():
    problem = _problem()
    y = problem.y.at[..., 0].set(0)
    mask = problem.mask.at[..., 1].set(False)
    result = _solve(problem.operator, y, mask)
    np.testing.assert_array_equal(result.x[..., :2], 0)
    for field in (result.relative_residual, result.gradient, result.iterations, result.status):
        np.testing.assert_array_equal(field[:2], 0)
    np.testing.assert_allclose(result.x[..., 2:], _solve(*problem.arrays).x[..., 2:], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_the_scale_of_the_data_does_not_matter(scale):
    # Squares of these leave the range of float32; a zero image would look converged.
    problem = _problem(np.float32)
    expected = _solve(*problem.arrays)
    result = _solve(problem.operator, problem.y * np.float32(scale), problem.mask)
    np.testing.assert_array_equal(result.status, expected.status)
    size = float(jnp.abs(expected.x).max())
    np.testing.assert_allclose(result.x / np.float32(scale), expected.x, rtol=0, atol=2e-5 * size)
    np.testing.assert_allclose(
        result.relative_residual, expected.relative_residual, rtol=1e-4, atol=1e-5
    )


def test_too_few_equations_give_the_solution_of_least_norm():
    problem = _problem(seed=3, share=0.2)
    y = _apply(problem.operator, problem.x)
    result = _solve(problem.operator, y, problem.mask)
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert float(result.relative_residual.max()) < 1e-13
    for sample in range(J):
        matrix, _ = problem.system(sample)
        assert len(matrix) < matrix.shape[1]
        root = np.linalg.cholesky(_dense_preconditioner(problem.operator, problem.mask, sample))
        b = np.asarray(y)[..., sample].ravel()[np.asarray(problem.mask)[..., sample].ravel()]
        expected = root @ np.linalg.lstsq(matrix @ root, b, rcond=1e-12)[0]
        found = np.asarray(result.x)[..., sample].ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_vmap_is_a_loop_and_a_second_call_does_not_retrace():
    problem = _problem()
    y = jnp.stack([problem.y, 2 * problem.y[..., ::-1]])
    mask = jnp.stack([problem.mask, problem.mask[..., ::-1]])
    mapped = jax.jit(jax.vmap(masked_least_squares, in_axes=(None, 0, 0)))(
        problem.operator, y, mask
    )
    for i in range(2):
        expected = _solve(problem.operator, y[i], mask[i])
        scale = float(jnp.abs(expected.x).max())
        np.testing.assert_allclose(mapped.x[i], expected.x, rtol=0, atol=1e-11 * scale)
        np.testing.assert_array_equal(mapped.status[i], expected.status)
    traces = len(_TRACES)
    _solve(problem.operator, 3 * problem.y, ~problem.mask)
    assert len(_TRACES) == traces > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"num_refinements": -1}, "num_refinements must be at least 0"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"tolerance": float("nan")}, "tolerance must be positive"),
        ({"abandon_residual": float("nan")}, "abandon_residual must be positive"),
        ({"abandon_residual": -1.0}, "abandon_residual must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masked_least_squares(*_problem().arrays, **options)


def test_shapes_that_do_not_fit_are_refused():
    problem = _problem()
    with pytest.raises(ValueError, match=f"y has {F - 1} channels, the operator maps to {F}"):
        masked_least_squares(problem.operator, problem.y[1:], problem.mask[1:])
