import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jgia.sparse import ConvOperator, from_planes, largest_eigenvalue, to_planes

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 6))
SIDES = st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]))
CHANNELS = st.sampled_from([1, 3, 4])
DTYPES = [np.float32, np.float64]


@jax.jit
def _apply(operator, x):
    return operator.apply(x)


@jax.jit
def _adjoint(operator, y):
    return operator.adjoint(y)


_largest_eigenvalue = jax.jit(largest_eigenvalue, static_argnums=2)
_squared_norm_bound = jax.jit(ConvOperator.squared_norm_bound)


def _draw(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _dense(operator, shape):
    """The matrix of M, by applying it to every unit image."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size), operator.kernel.dtype)
    return np.asarray(_apply(operator, units)).reshape(-1, size)


def _loop(kernel, x):
    """The definition, one output pixel at a time."""
    kh, kw, _, num_out = kernel.shape
    _, height, width, batch = x.shape
    padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    out = np.zeros((num_out, height, width, batch))
    for i in range(height):
        for j in range(width):
            window = padded[:, i : i + kh, j : j + kw]
            out[:, i, j] = np.einsum("abcf,cabn->fn", kernel, window)
    return out


@settings(derandomize=True, deadline=None, max_examples=6)
@given(SIZES, SIDES, CHANNELS, st.integers(1, 12), st.integers(1, 5))
def test_apply_is_the_definition_and_the_adjoint_its_transpose(size, sides, num_in, num_out, batch):
    kernel, x, y = _draw(
        sum(size) + num_out,
        (*sides, num_in, num_out),
        (num_in, *size, batch),
        (num_out, *size, batch),
    )
    operator = ConvOperator(kernel)
    image, back = jax.jit(lambda m, x, y: (m.apply(x), m.adjoint(y)))(operator, x, y)
    expected = _loop(np.asarray(kernel), np.asarray(x))
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-13 * np.abs(expected).max() + 1e-14)
    assert back.shape == x.shape
    forward, backward = np.multiply(image, y), np.multiply(x, back)
    assert abs(forward.sum() - backward.sum()) <= 1e-13 * np.abs(forward).sum() + 1e-14


def test_the_adjoint_identity_rejects_a_wrong_adjoint():
    kernel, x, y = _draw(0, (3, 3, 2, 4), (2, 6, 5, 1), (4, 6, 5, 1))
    left = jnp.sum(_apply(ConvOperator(kernel), x) * y)
    flipped = jnp.sum(x * _adjoint(ConvOperator(kernel[::-1, ::-1]), y))
    assert abs(float(left - flipped)) > 1e-3 * float(jnp.abs(left))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kh", "kw"), [(1, 1), (3, 3), (5, 3)])
def test_apply_is_the_convolution_of_lax_and_flax(dtype, kh, kw):
    kernel, images = _draw(1, (kh, kw, 3, 8), (2, 9, 7, 3), dtype=dtype)
    mine = from_planes(_apply(ConvOperator(kernel), to_planes(images)))
    theirs = lax.conv_general_dilated(
        images,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    layer = nn.Conv(8, (kh, kw), use_bias=False, dtype=dtype, param_dtype=dtype)
    flax = jax.jit(layer.apply)({"params": {"kernel": kernel}}, images)
    assert mine.dtype == dtype
    atol = 8 * np.finfo(dtype).eps * kh * kw * 3
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol)
    np.testing.assert_allclose(mine, flax, rtol=0, atol=atol)


def test_the_adjoint_is_the_derivative_of_apply():
    kernel, x, y = _draw(2, (3, 5, 3, 6), (3, 5, 8, 2), (6, 5, 8, 2))
    operator = ConvOperator(kernel)
    (pulled,) = jax.jit(lambda x, y: jax.vjp(operator.apply, x)[1](y))(x, y)
    np.testing.assert_allclose(_adjoint(operator, y), pulled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_shape", [(1, 1, 1, 1), (3, 3, 3, 6), (3, 5, 4, 2)])
def test_pixel_blocks_are_those_of_the_dense_normal_matrix(kernel_shape):
    num_in, num_out, height, width, batch = *kernel_shape[2:], 4, 3, 2
    (kernel,) = _draw(3, kernel_shape)
    mask = np.random.default_rng(4).random((num_out, height, width, batch)) < 0.6
    operator = ConvOperator(kernel)
    blocks = np.asarray(jax.jit(operator.pixel_blocks)(jnp.asarray(mask, jnp.float64)))
    assert blocks.shape == (num_in, num_in, height, width, batch)
    matrix = _dense(operator, (num_in, height, width))
    for sample in range(batch):
        normal = matrix.T @ (mask[..., sample].reshape(-1, 1) * matrix)
        normal = normal.reshape(num_in, height, width, num_in, height, width)
        expected = np.einsum("ahwbhw->abhw", normal)
        np.testing.assert_allclose(blocks[..., sample], expected, rtol=0, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=5)
@given(SIZES, SIDES, CHANNELS, st.integers(1, 12))
def test_squared_norm_bound_is_a_bound(size, sides, num_in, num_out):
    (kernel,) = _draw(sum(sides) + num_out, (*sides, num_in, num_out))
    operator = ConvOperator(kernel)
    exact = np.linalg.norm(_dense(operator, (num_in, *size)), 2) ** 2
    assert float(_squared_norm_bound(operator)) >= exact * (1 - 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_bound_is_tight_for_large_images(dtype):
    # The response of a separable kernel is a product: |1 + 2 cos v| |1 - 2 cos w| ||gains||.
    rows, columns, gains = [1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], np.array([[3.0, 4.0]])
    kernel = np.einsum("a,b,cf->abcf", rows, columns, gains)
    bound = float(_squared_norm_bound(ConvOperator(jnp.asarray(kernel, dtype))))
    supremum = (3 * 3 * 5) ** 2
    assert supremum * (1 - 1e-5) <= bound <= 1.05 * supremum
    skewed = np.zeros((3, 1, 1, 1))
    skewed[:, 0, 0, 0] = [1.0, 1.0, -1.0]  # |K(w)|^2 = 5 - 4 cos(w)^2: 5 at w = pi / 2
    bound = float(_squared_norm_bound(ConvOperator(jnp.asarray(skewed, dtype))))
    assert 5 * (1 - 1e-5) <= bound <= 1.03 * 5


def test_squared_norm_bound_is_exact_for_one_tap():
    (kernel,) = _draw(5, (1, 1, 3, 7))
    exact = np.linalg.norm(np.asarray(kernel)[0, 0], 2) ** 2
    np.testing.assert_allclose(ConvOperator(kernel).squared_norm_bound(), exact, rtol=1e-12)


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
    exact = np.linalg.norm(_dense(operator, shape).astype(float), 2) ** 2
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


@pytest.mark.parametrize("sides", [(2, 3), (3, 4), (2, 2)])
def test_even_kernels_are_refused(sides):
    kernel, x = _draw(8, (*sides, 2, 5), (2, 6, 6, 1))
    operator = ConvOperator(kernel)
    y = jnp.ones((5, 6, 6, 1))
    for call in (
        lambda: operator.apply(x),
        lambda: operator.adjoint(y),
        lambda: operator.pixel_blocks(y),
        operator.squared_norm_bound,
    ):
        with pytest.raises(ValueError, match="odd kh and kw"):
            call()


def test_an_even_kernel_padded_as_the_message_says_is_the_flax_layer():
    kernel, images = _draw(9, (2, 4, 3, 5), (2, 6, 7, 3))
    padded = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    mine = from_planes(_apply(ConvOperator(padded), to_planes(images)))
    layer = nn.Conv(5, (2, 4), use_bias=False, dtype=jnp.float64, param_dtype=jnp.float64)
    theirs = jax.jit(layer.apply)({"params": {"kernel": kernel}}, images)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13)


def test_jit_vmap_and_batching_agree():
    kernel, x = _draw(10, (3, 3, 3, 6), (2, 3, 5, 4, 3))
    operator = ConvOperator(kernel)
    mapped = jax.jit(jax.vmap(operator.apply))(x)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], _apply(operator, x[i]), rtol=0, atol=1e-13)
        for j in range(3):
            alone = _apply(operator, x[i, ..., j : j + 1])
            np.testing.assert_allclose(mapped[i, ..., j : j + 1], alone, rtol=0, atol=1e-13)
