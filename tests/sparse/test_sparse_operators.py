import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.sparse import (
    AveragePool,
    Composition,
    ConvOperator,
    DenseOperator,
    LinearOperator,
    MatrixOperator,
    Scaled,
    from_planes,
    largest_eigenvalue,
    masked_least_squares,
    squared_norm_bound,
    to_planes,
)
from jgia.sparse.operators import gram_bound

DTYPES = [np.float32, np.float64]

_largest_eigenvalue = jax.jit(
    largest_eigenvalue, static_argnums=2, static_argnames="num_iterations"
)
_random_bound = jax.jit(
    squared_norm_bound, static_argnums=2, static_argnames=("num_iterations", "failure_probability")
)
_squared_norm_bound = jax.jit(ConvOperator.squared_norm_bound)


@jax.jit
def _apply(operator, x):
    return operator.apply(x)


def _draw(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _dense(operator, shape, dtype=np.float64):
    """The matrix of M, by applying it to every unit sample."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size), dtype)
    return np.asarray(_apply(operator, units), np.float64).reshape(-1, size)


def _operators():
    """One of each kind, with the shape of its domain."""
    kernel, matrix, layer, head = _draw(0, (3, 3, 2, 4), (5, 7), (2 * 3 * 2, 6), (4 * 2 * 2, 3))
    conv = ConvOperator(kernel, 2, (4, 3))
    pooled = Composition(AveragePool(2, size=(4, 4)), ConvOperator(kernel))
    return {
        "matrix": (MatrixOperator(matrix), (7,)),
        "dense": (DenseOperator(layer, (2, 2, 3)), (2, 2, 3)),
        "conv": (conv, (2, 4, 3)),
        "pool": (AveragePool((2, 3), 1, "SAME", (4, 3)), (2, 4, 3)),
        "two layers": (Composition(DenseOperator(head, (4, 2, 2)), conv), (2, 4, 3)),
        "pooled": (pooled, (2, 4, 4)),
        "scaled": (Scaled(conv, jnp.asarray(-3.0)), (2, 4, 3)),
    }


KINDS = list(_operators())


@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_the_transpose_of_apply(kind):
    operator, shape = _operators()[kind]
    assert isinstance(operator, LinearOperator)
    matrix = _dense(operator, shape)
    y_shape = jax.eval_shape(operator.apply, jnp.ones((*shape, 1))).shape[:-1]
    units = jnp.asarray(np.eye(len(matrix)).reshape(*y_shape, -1))
    adjoint = np.asarray(jax.jit(operator.adjoint)(units)).reshape(-1, len(matrix))
    np.testing.assert_allclose(adjoint, matrix.T, rtol=0, atol=1e-14 * np.abs(matrix).max())


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_above_the_norm_and_the_certain_one_needs_no_key(kind):
    operator, shape = _operators()[kind]
    exact = np.linalg.norm(_dense(operator, shape), 2) ** 2
    assert exact * (1 - 1e-12) <= float(operator.squared_norm_bound())
    bound = _random_bound(jax.random.key(0), operator, shape)
    assert exact <= float(bound) <= 1.1 * exact


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from(DTYPES))
def test_a_matrix_is_its_product(rows, columns, batch, dtype):
    matrix, x, y = _draw(rows, (rows, columns), (columns, batch), (rows, batch), dtype=dtype)
    operator = MatrixOperator(matrix)
    atol = 8 * (rows + columns) * np.finfo(dtype).eps
    wide = np.asarray(matrix, np.float64)
    for mine, expected in (
        (operator.apply(x), wide @ np.asarray(x, np.float64)),
        (operator.adjoint(y), wide.T @ np.asarray(y, np.float64)),
        (operator.normal_diagonal(y**2), (wide**2).T @ np.asarray(y, np.float64) ** 2),
    ):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine, expected, rtol=0, atol=8 * atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 5, 3), (1, 9, 1), (3, 2, 2)])
def test_a_dense_layer_is_flaxs_on_the_flattened_image(dtype, size):
    images, kernel = _draw(1, (2, *size), (int(np.prod(size)), 7), dtype=dtype)
    layer = nn.Dense(7, use_bias=False, dtype=dtype, param_dtype=dtype, precision="highest")

    def flax(x):
        return jnp.asarray(layer.apply({"params": {"kernel": kernel}}, x.reshape(len(x), -1)))

    operator = DenseOperator(kernel, (size[2], size[0], size[1]))
    mine = operator.apply(to_planes(images))
    assert mine.shape == (7, 1, 1, 2)
    assert mine.dtype == dtype
    theirs, pull = jax.vjp(flax, images)
    atol = 8 * kernel.shape[0] * np.finfo(dtype).eps
    np.testing.assert_allclose(from_planes(mine)[:, 0, 0], theirs, rtol=0, atol=atol)
    pulled = pull(theirs)[0]
    adjoint = from_planes(operator.adjoint(theirs.T[:, None, None]))
    np.testing.assert_allclose(adjoint, pulled, rtol=0, atol=8 * atol)


def test_channels_first_flattening_is_not_the_layer():
    images, kernel = _draw(2, (2, 4, 5, 3), (60, 7))
    mine = DenseOperator(kernel, (3, 4, 5)).apply(to_planes(images))
    wrong = np.asarray(to_planes(images)).reshape(60, 2).T @ np.asarray(kernel)
    assert np.abs(from_planes(mine)[:, 0, 0] - wrong).max() > 1


@pytest.mark.parametrize("kind", ["matrix", "dense"])
def test_the_normal_diagonal_is_that_of_the_dense_matrix(kind):
    operator, shape = _operators()[kind]
    matrix = _dense(operator, shape)
    y_shape = jax.eval_shape(operator.apply, jnp.ones((*shape, 2))).shape
    mask = np.random.default_rng(3).random(y_shape) < 0.5
    found = np.asarray(operator.normal_diagonal(jnp.asarray(mask, jnp.float64)))
    assert found.shape == (*shape, 2)
    for sample in range(2):
        kept = matrix[mask[..., sample].ravel()]
        expected = np.diag(kept.T @ kept)
        np.testing.assert_allclose(found[..., sample].ravel(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (40, 9), (9, 40), (30, 30)])
def test_the_gram_bound_is_above_the_norm_and_close(shape, dtype):
    (matrix,) = _draw(4, shape, dtype=dtype)
    exact = np.linalg.norm(np.asarray(matrix, np.float64), 2) ** 2
    bound = float(gram_bound(matrix))
    slack = 64 * np.finfo(dtype).eps
    assert exact * (1 - slack) <= bound <= exact * min(shape) ** (1 / 64) * (1 + slack)
    assert float(gram_bound(jnp.zeros_like(matrix))) == 0
    unit = float(gram_bound(matrix * np.asarray(1e-15, dtype)))
    np.testing.assert_allclose(unit, bound * 1e-30, rtol=1e-4)


def test_the_gram_bound_is_exact_for_rank_one_and_frobenius_without_squarings():
    u, v = _draw(5, (8, 1), (1, 5))
    exact = np.sum(np.square(u)) * np.sum(np.square(v))
    np.testing.assert_allclose(gram_bound(u @ v), exact, rtol=1e-12)
    (matrix,) = _draw(6, (8, 5))
    frobenius = np.sum(np.square(matrix))
    np.testing.assert_allclose(gram_bound(matrix, num_squarings=0), frobenius, rtol=1e-13)


def test_the_random_bound_holds_where_the_estimate_is_too_low():
    # Eigenvalues 0.99^k: after 12 iterations the estimate alone is still below the largest.
    operator = MatrixOperator(jnp.diag(jnp.asarray(0.99 ** (np.arange(200) / 2))))
    options = {"num_iterations": 12, "failure_probability": 1e-3}
    for seed in range(5):
        bound = _random_bound(jax.random.key(seed), operator, (200,), **options)
        estimate = _largest_eigenvalue(jax.random.key(seed), operator, (200,), num_iterations=12)
        assert float(estimate) < 1 <= float(bound)


def test_a_class_of_ones_own_is_an_operator():
    @jax.tree_util.register_static
    class Reverse:
        def apply(self, x):
            return 2 * x[::-1]

        def adjoint(self, y):
            return 2 * y[::-1]

    assert isinstance(Reverse(), LinearOperator)
    bound = squared_norm_bound(jax.random.key(0), Reverse(), (5,), dtype=np.float32)
    assert bound.dtype == np.float32
    assert 4 <= float(bound) <= 4.4
    with pytest.raises(ValueError, match="Reverse has no squared_norm_bound"):
        Composition(Reverse(), Reverse()).squared_norm_bound()
    x = jnp.arange(10.0).reshape(5, 2)
    y = Reverse().apply(x)
    result = masked_least_squares(Reverse(), y, jnp.ones(y.shape, bool))
    np.testing.assert_allclose(result.x, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "shape", "num_out"),
    [
        (np.float32, (3, 7, 9), 6),
        (np.float64, (3, 7, 9), 6),
        (np.float32, (1, 1, 1), 2),
        (np.float32, (3, 2, 3), 12),
    ],
)
def test_largest_eigenvalue_is_that_of_the_dense_matrix(dtype, shape, num_out):
    (kernel,) = _draw(6, (3, 3, shape[0], num_out), dtype=dtype)
    operator = ConvOperator(kernel)
    exact = np.linalg.norm(_dense(operator, shape, dtype), 2) ** 2
    for seed in range(5):
        ratio = float(_largest_eigenvalue(jax.random.key(seed), operator, shape)) / exact
        assert 0.99 <= ratio <= 1 + 32 * np.finfo(dtype).eps


def test_largest_eigenvalue_of_a_large_image():
    # A box of ones is a product of tridiagonal Toeplitz matrices with known eigenvalues, many
    # of them close to the largest: 30 power iterations end up to 3 % too low here.
    height, width = 64, 48
    exact = np.prod([1 + 2 * np.cos(np.pi / (n + 1)) for n in (height, width)]) ** 2
    operator = ConvOperator(jnp.ones((3, 3, 1, 1), jnp.float32))
    for seed in range(5):
        ratio = (
            float(_largest_eigenvalue(jax.random.key(seed), operator, (1, height, width))) / exact
        )
        assert 0.99 <= ratio <= 1 + 1e-5
    assert float(_squared_norm_bound(operator)) >= exact


def test_largest_eigenvalue_edge_cases():
    key = jax.random.key(0)
    zero = ConvOperator(jnp.zeros((3, 3, 2, 4)))
    assert float(_largest_eigenvalue(key, zero, (2, 4, 4))) == 0
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        largest_eigenvalue(key, zero, (2, 4, 4), num_iterations=0)


def test_planes_are_channels_first_and_batch_last():
    (images,) = _draw(7, (2, 4, 5, 3))
    planes = to_planes(images)
    assert planes.shape == (3, 4, 5, 2)
    assert planes[1, 2, 3, 0] == images[0, 2, 3, 1]
    np.testing.assert_array_equal(from_planes(planes), images)
    np.testing.assert_array_equal(to_planes(from_planes(planes)), planes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, x: MatrixOperator(k).apply(x), "x has 3 entries, the operator takes 6"),
        (lambda k, x: MatrixOperator(k).adjoint(x), "y has 3 entries, the operator maps to 12"),
        (lambda k, x: DenseOperator(k, (3, 2, 3)), "have 18 entries"),
        (lambda k, x: DenseOperator(k, (3, 2, 2)).apply(x[..., None, None]), "expected"),
        (lambda k, x: DenseOperator(k, (3, 2, 2)).adjoint(x[:, None, :, None]), "m, 1, 1, J"),
        (lambda k, x: DenseOperator(k, (3, 2, 2)).adjoint(x[:, :1, None, None]), "maps to 6"),
        (lambda k, x: gram_bound(k, num_squarings=-1), "num_squarings must be at least 0"),
        (
            lambda k, x: squared_norm_bound(
                jax.random.key(0), MatrixOperator(k), (6,), num_iterations=3
            ),
            "3 iterations cannot bound the norm .* use about 38",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    kernel, x = _draw(8, (12, 6), (3, 2))
    with pytest.raises(ValueError, match=message):
        call(kernel, x)


@pytest.mark.parametrize("kind", ["matrix", "two layers", "pool"])
def test_vmap_and_gradients_pass_through(kind):
    operator, shape = _operators()[kind]
    (x,) = _draw(9, (2, *shape, 3))
    mapped = jax.jit(jax.vmap(operator.apply))(x)
    for i in range(2):
        expected = _apply(operator, x[i])
        np.testing.assert_allclose(mapped[i], expected, rtol=0, atol=1e-13)
    # The gradient of |M x|^2 / 2 is M^T M x.
    found = jax.jit(jax.grad(lambda x: jnp.sum(operator.apply(x) ** 2) / 2))(x[0])
    expected = jax.jit(lambda x: operator.adjoint(operator.apply(x)))(x[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
