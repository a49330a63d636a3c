import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.sparse import (
    FiniteDifferences,
    LinearOperator,
    largest_eigenvalue,
    total_variation,
)

BOTH = pytest.mark.parametrize("isotropic", [True, False])


def _draw(seed, shape, dtype: type[np.floating] = np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _dense(shape):
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size))
    return np.asarray(FiniteDifferences().apply(units)).reshape(-1, size)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 5), (1, 1, 6), (7,)])
def test_the_adjoint_is_the_transpose_and_the_bound_holds(shape):
    operator = FiniteDifferences()
    assert isinstance(operator, LinearOperator)
    matrix = _dense(shape)
    directions = 1 if len(shape) == 1 else 2
    units = jnp.asarray(np.eye(len(matrix)).reshape(directions, *shape, -1))
    adjoint = np.asarray(operator.adjoint(units)).reshape(-1, len(matrix))
    np.testing.assert_array_equal(adjoint, matrix.T)
    norm = np.linalg.norm(matrix, 2) ** 2
    assert norm <= float(operator.squared_norm_bound(directions))
    # Closed form: paths of n vertices have the Laplacian eigenvalues 4 sin(pi k / 2 n)^2.
    sides = shape if len(shape) == 1 else shape[1:]
    exact = sum(4 * np.cos(np.pi / (2 * n)) ** 2 for n in sides)
    np.testing.assert_allclose(norm, exact, rtol=0, atol=1e-13)


def test_differences_are_those_of_numpy_and_zero_at_the_end():
    x = _draw(0, (2, 5, 4, 3))
    down, right = FiniteDifferences().apply(x)
    np.testing.assert_array_equal(down[:, :-1], np.diff(x, axis=1))
    np.testing.assert_array_equal(right[:, :, :-1], np.diff(x, axis=2))
    assert not np.any(down[:, -1])
    assert not np.any(right[:, :, -1])


@BOTH
def test_total_variation_of_a_square_is_its_perimeter(isotropic):
    image = np.zeros((1, 9, 8, 1))
    image[0, 2:6, 3:6] = 2.0
    # Sides of 4 and 3 pixels, jumps of 2; isotropic: at one corner both differences meet.
    expected = 2 * 2 * (4 + 3) - (2 * (2 - np.sqrt(2)) if isotropic else 0)
    found = total_variation(jnp.asarray(image), isotropic=isotropic)
    np.testing.assert_allclose(found, [expected], rtol=1e-14)
    constant = total_variation(jnp.full((3, 4, 4, 2), 0.3), isotropic=isotropic)
    np.testing.assert_array_equal(constant, [0, 0])


@BOTH
def test_shrinking_minimizes_and_projection_is_its_dual(isotropic):
    operator = FiniteDifferences(isotropic)
    field = _draw(1, (2, 1, 4, 3, 2)).at[:, 0, 0, 0].set(0)
    threshold = 0.7
    shrunk = operator.shrink(field, threshold)
    # Moreau: the prox of the norm and the projection on the dual ball add up to the point.
    np.testing.assert_allclose(
        shrunk + operator.project(field, threshold), field, rtol=0, atol=1e-15
    )

    def objective(z):
        fit = jnp.sum((z - field) ** 2, axis=(0, 1, 2, 3)) / 2
        return fit + threshold * operator.norm(z)

    best = objective(shrunk)
    for seed in range(5):
        moved = objective(shrunk + 1e-3 * _draw(10 + seed, field.shape))
        assert bool(jnp.all(moved > best))
    wrong = FiniteDifferences(not isotropic).shrink(field, threshold)
    assert bool(jnp.all(objective(wrong) > best))
    np.testing.assert_array_equal(operator.shrink(field, 0.0), field)
    assert not np.any(operator.project(field, 0.0))


@BOTH
def test_the_norm_is_the_largest_product_with_the_dual_ball(isotropic):
    operator = FiniteDifferences(isotropic)
    field = _draw(2, (2, 1, 4, 3, 2))
    aligned = operator.project(1e9 * field, 1.0)
    product = jnp.sum(aligned * field, axis=(0, 1, 2, 3))
    np.testing.assert_allclose(product, operator.norm(field), rtol=1e-13)


@pytest.mark.slow
@BOTH
def test_gradients_are_finite_on_flat_images(isotropic):
    flat = jnp.full((1, 4, 4, 1), 0.5)
    gradient = jax.grad(lambda x: total_variation(x, isotropic=isotropic).sum())(flat)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_jit_vmap_and_dtype():
    dtype = np.float32
    x = _draw(3, (2, 3, 5, 4, 2), dtype)
    operator = FiniteDifferences()
    mapped = jax.jit(jax.vmap(operator.apply))(x)
    assert mapped.dtype == dtype
    np.testing.assert_array_equal(mapped[1], operator.apply(x[1]))
    estimate = largest_eigenvalue(jax.random.key(0), operator, (1, 5, 4), dtype=dtype)
    exact = sum(4 * np.cos(np.pi / (2 * n)) ** 2 for n in (5, 4))
    np.testing.assert_allclose(estimate, exact, rtol=1e-5)


def test_a_field_of_other_directions_is_refused():
    with pytest.raises(ValueError, match="y has 1 directions, samples of this shape 2"):
        FiniteDifferences().adjoint(jnp.ones((1, 3, 4, 4, 2)))
