import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jgia.sparse import ConvOperator, masked_least_squares
from jgia.sparse.preconditioners import block_preconditioner

C, H, W, F, J = 3, 6, 5, 8, 3


@jax.jit
def _measure(kernel, x):
    return ConvOperator(kernel).apply(x)


def _problem(share, seed=3):
    rng = np.random.default_rng(seed)
    kernel, x = (jnp.asarray(rng.standard_normal(s)) for s in ((3, 3, C, F), (C, H, W, J)))
    return kernel, x, jnp.asarray(rng.random((F, H, W, J)) < share)


def _image_of(kernel, y, mask):
    return masked_least_squares(ConvOperator(kernel), y, mask).x


def _dense_image_of(kernel, y, mask):
    size = C * H * W
    units = jnp.eye(size).reshape(C, H, W, size)
    matrix = ConvOperator(kernel).apply(units).reshape(-1, size)

    def one(y, mask):
        rows = jnp.where(mask.reshape(-1, 1), matrix, 0)
        return jnp.linalg.solve(rows.T @ rows, rows.T @ y.ravel())

    return jax.vmap(one, in_axes=-1, out_axes=-1)(y, mask).reshape(C, H, W, -1)


@pytest.mark.slow
def test_gradients_agree_with_dense_least_squares():
    kernel, x, mask = _problem(share=0.6)
    noise = np.random.default_rng(9).standard_normal((F, H, W, J)) * np.array([0, 1, 100])
    y = _measure(kernel, x) + jnp.asarray(noise)
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((C, H, W, J)))

    def gradients(image_of):
        def loss(kernel, y):
            return jnp.sum(weights * image_of(kernel, y, mask))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, y)

    for mine, theirs in zip(gradients(_image_of), gradients(_dense_image_of), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10 * scale)


@pytest.mark.slow
def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(6)
    kernel, y = (jnp.asarray(rng.standard_normal(s)) for s in ((3, 1, 2, 5), (5, 3, 3, 1)))
    mask = jnp.asarray(rng.random((5, 3, 3, 1)) < 0.9)
    check_grads(
        jax.jit(lambda kernel, y: _image_of(kernel, y, mask)),
        (kernel, y),
        order=1,
        modes=["rev"],
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.slow
def test_gradients_stay_finite_where_x_is_open_or_data_are_bad():
    # Conjugate gradients for the backward system diverge on the part no equation reaches.
    kernel, x, mask = _problem(share=0.2)
    mask = mask.at[..., 1].set(True)
    y = _measure(kernel, x).at[..., 2].set(jnp.nan)
    weights = jnp.asarray(np.random.default_rng(7).standard_normal((C, H, W, J)))

    def loss(kernel, y):
        return jnp.sum(weights * _image_of(kernel, y, mask))

    to_kernel, to_data = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, y)
    assert bool(jnp.all(jnp.isfinite(to_kernel)))
    np.testing.assert_array_equal(to_data[..., 2], 0)
    # Sample 0 is open: x = R S^+ y with P = R R^T and S the masked matrix times R.
    keep = np.asarray(mask)[..., 0].ravel()
    size = C * H * W
    units = jnp.asarray(np.eye(size).reshape(C, H, W, size))
    matrix = np.asarray(_measure(kernel, units)).reshape(-1, size)[keep]
    assert len(matrix) < size
    blocks = block_preconditioner(ConvOperator(kernel), mask.astype(jnp.float64)).inverse
    metric = np.zeros((C, H, W, C, H, W))
    for i, j in np.ndindex(H, W):
        metric[:, i, j, :, i, j] = np.asarray(blocks)[:, :, i, j, 0]
    root = np.linalg.cholesky(metric.reshape(size, size))
    w = np.asarray(weights)[..., 0].ravel()
    expected = np.linalg.pinv(matrix @ root, rcond=1e-12).T @ (root.T @ w)
    found = np.asarray(to_data)[..., 0].ravel()[keep]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
