import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.sparse import (
    AveragePool,
    Composition,
    ConvOperator,
    DenseOperator,
    MatrixOperator,
    Scaled,
    masked_least_squares,
)
from jgia.sparse.least_squares import CONVERGED
from jgia.sparse.preconditioners import preconditioner

J = 2


@functools.partial(jax.jit, static_argnames="max_iterations")
def _solve(operator, y, mask, **options):
    return masked_least_squares(operator, y, mask, **options)


def _draw(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _operators():
    """Operators with more equations than unknowns, and the shape of their domains."""
    conv = ConvOperator(_draw(1, 3, 3, 2, 12), 2, (4, 5))
    return {
        "matrix": (MatrixOperator(_draw(2, 40, 8)), (8,)),
        "dense": (DenseOperator(_draw(3, 2 * 3 * 2, 50), (2, 2, 3)), (2, 2, 3)),
        "strided": (conv, (2, 4, 5)),
        "composed": (
            Composition(DenseOperator(_draw(4, 72, 120), (12, 2, 3)), conv),
            (2, 4, 5),
        ),
        "scaled": (Scaled(conv, jnp.asarray(1e-4)), (2, 4, 5)),
        "pool": (AveragePool(2, 1, "SAME", (3, 4)), (1, 3, 4)),
    }


def _system(operator, shape, share, seed=0):
    """A batch with noise, its masks, and each sample's dense system."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size))
    matrix = np.asarray(jax.jit(operator.apply)(units))
    rng = np.random.default_rng(seed)
    y = np.tensordot(matrix, rng.standard_normal((size, J)), 1)
    y += 0.1 * np.abs(y).max() * rng.standard_normal(y.shape)
    mask = rng.random(y.shape) < share
    rows = matrix.reshape(-1, size)
    systems = [(rows[(m := mask[..., j].ravel())], y[..., j].ravel()[m]) for j in range(J)]
    return jnp.asarray(y), jnp.asarray(mask), systems


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(_operators()))
def test_every_operator_agrees_with_dense_least_squares(kind):
    operator, shape = _operators()[kind]
    y, mask, systems = _system(operator, shape, 1.0 if kind == "pool" else 0.8)
    result = _solve(operator, y, mask, max_iterations=2000)
    np.testing.assert_array_equal(result.status, CONVERGED)
    assert result.x.shape == (*shape, J)
    for j, (matrix, b) in enumerate(systems):
        expected, _, rank, values = np.linalg.lstsq(matrix, b, rcond=None)
        assert rank == matrix.shape[1]
        found = np.asarray(result.x)[..., j].ravel()
        # Wedin's bound on what rounding of the data does (Bjorck 1996, theorem 1.4.6).
        cond = values[0] / values[-1]
        misfit = np.linalg.norm(matrix @ expected - b)
        allowed = cond + cond**2 * misfit / (values[0] * np.linalg.norm(expected))
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 16 * np.finfo(float).eps * allowed
        wrong = np.linalg.lstsq(matrix[:-1], b[:-1], rcond=None)[0]
        assert np.linalg.norm(wrong - expected) > 1e3 * np.linalg.norm(found - expected)


def test_the_diagonal_saves_iterations_where_columns_differ_in_size():
    # The scale of the unknowns is what a diagonal preconditioner takes out.
    matrix = np.asarray(_draw(5, 200, 60)) * 10 ** np.linspace(0, -3, 60)
    y = jnp.asarray(matrix @ np.asarray(_draw(6, 60, J)))
    mask = jnp.ones(y.shape, bool)
    diagonal = _solve(MatrixOperator(jnp.asarray(matrix)), y, mask, max_iterations=2000)
    same = Composition(MatrixOperator(jnp.eye(200)), MatrixOperator(jnp.asarray(matrix)))
    plain = _solve(same, y, mask, max_iterations=2000)
    np.testing.assert_array_equal(diagonal.status, CONVERGED)
    assert int(diagonal.iterations.max()) < 60
    assert int(plain.iterations.min()) > 3 * int(diagonal.iterations.max())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scale"), [("composed", 1e-6), ("matrix", 1e6)])
def test_the_scale_of_the_operator_does_not_matter(kind, scale):
    operator, shape = _operators()[kind]
    y, mask, _ = _system(operator, shape, 0.8)
    expected = _solve(operator, y, mask, max_iterations=500)
    factor = jnp.asarray(scale)
    result = _solve(Composition(Scaled(operator, factor), _Same()), y, mask, max_iterations=500)
    np.testing.assert_array_equal(result.status, expected.status)
    tolerance = 1e-9 * float(jnp.abs(expected.x).max())
    np.testing.assert_allclose(result.x * scale, expected.x, rtol=0, atol=tolerance)


@jax.tree_util.register_static
class _Same:
    def apply(self, x):
        return x

    def adjoint(self, y):
        return y


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "scaled", "composed"])
def test_preconditioners_are_close_to_the_inverse_in_scale(kind):
    operator, shape = _operators()[kind]
    y, mask, systems = _system(operator, shape, 0.8)
    weight = mask.astype(y.dtype)

    @jax.jit
    def both(x):
        normal = operator.adjoint(weight * operator.apply(x))
        return normal, preconditioner(operator, weight)(normal)

    normal, ratio = both(_draw(7, *shape, J))
    for j, (matrix, _) in enumerate(systems):
        # The generalized Rayleigh quotient lies between the extreme eigenvalues.
        values = np.linalg.svd(matrix, compute_uv=False) ** 2
        quotient = float(jnp.sum(ratio[..., j] * normal[..., j]) / jnp.sum(normal[..., j] ** 2))
        assert 0.3 / values[0] < quotient < 3 / values[-1]


def test_an_unknown_without_equations_stays_zero():
    matrix = _draw(8, 6, 4).at[:, 2].set(0)
    y = matrix @ _draw(9, 4, J)
    result = _solve(MatrixOperator(matrix), y, jnp.ones(y.shape, bool), max_iterations=100)
    np.testing.assert_array_equal(result.status, CONVERGED)
    np.testing.assert_array_equal(result.x[2], 0)


def test_gradients_reach_the_matrix_and_the_data():
    matrix, y, v = _draw(10, 12, 4), _draw(11, 12, J), _draw(12, 4, J)
    mask = jnp.asarray(np.random.default_rng(13).random((12, J)) < 0.8)

    def loss(matrix, y):
        return jnp.sum(v * _solve(MatrixOperator(matrix), y, mask, max_iterations=100).x)

    def direct(matrix, y):
        total = 0.0
        for j in range(J):
            weighted = matrix * mask[:, j : j + 1].astype(y.dtype)
            x = jnp.linalg.solve(weighted.T @ matrix, weighted.T @ y[:, j])
            total = total + v[:, j] @ x
        return total

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(matrix, y)
    expected = jax.jit(jax.grad(direct, argnums=(0, 1)))(matrix, y)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * float(jnp.abs(b).max()))


def test_a_range_that_does_not_fit_is_refused():
    operator = AveragePool(2, size=(4, 4))
    y = jnp.ones((1, 3, 2, 1))
    with pytest.raises(ValueError, match=r"images of \(3, 2\) pixels, the operator maps \(4, 4\)"):
        masked_least_squares(operator, y, jnp.ones(y.shape, bool))
    matrix, y = MatrixOperator(_draw(14, 40, 8)), jnp.ones((5, 1))
    with pytest.raises(ValueError, match="y has 5 entries, the operator maps to 40"):
        masked_least_squares(matrix, y, jnp.ones(y.shape, bool))
