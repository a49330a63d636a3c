import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jgia.sparse import AveragePool, ConvOperator, from_planes, to_planes

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 8))
SIDES = st.tuples(st.integers(1, 4), st.integers(1, 3))
STRIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))
CHANNELS = st.sampled_from([1, 3, 4])
DTYPES = [np.float32, np.float64]


@jax.jit
def _apply(operator, x):
    return operator.apply(x)


@jax.jit
def _adjoint(operator, y):
    return operator.adjoint(y)


_squared_norm_bound = jax.jit(ConvOperator.squared_norm_bound)


def _draw(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _dense(operator, shape):
    """The matrix of M, by applying it to every unit image."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size))
    return np.asarray(_apply(operator, units)).reshape(-1, size)


def _loop(kernel, x, stride):
    """The definition, one output pixel at a time, padded as XLA says."""
    kh, kw, _, num_out = kernel.shape
    _, height, width, batch = x.shape
    pads = lax.padtype_to_pads((height, width), (kh, kw), stride, "SAME")
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    size = [-(-n // s) for n, s in zip((height, width), stride, strict=True)]
    out = np.zeros((num_out, *size, batch))
    for i, j in np.ndindex(*size):
        row, column = stride[0] * i, stride[1] * j
        window = padded[:, row : row + kh, column : column + kw]
        out[:, i, j] = np.einsum("abcf,cabn->fn", kernel, window)
    return out


@settings(derandomize=True, deadline=None, max_examples=5)
@given(SIZES, SIDES, STRIDES, CHANNELS, st.integers(1, 12), st.integers(1, 5))
def test_apply_is_the_definition_and_the_adjoint_its_transpose(
    size, sides, stride, num_in, num_out, batch
):
    kernel, x = _draw(sum(size) + num_out, (*sides, num_in, num_out), (num_in, *size, batch))
    expected = _loop(np.asarray(kernel), np.asarray(x), stride)
    (y,) = _draw(batch, expected.shape)
    operator = ConvOperator(kernel, stride, size)
    image, back = jax.jit(lambda m, x, y: (m.apply(x), m.adjoint(y)))(operator, x, y)
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-13 * np.abs(expected).max() + 1e-14)
    assert back.shape == x.shape
    forward, backward = np.multiply(image, y), np.multiply(x, back)
    assert abs(forward.sum() - backward.sum()) <= 1e-13 * np.abs(forward).sum() + 1e-14


def test_the_adjoint_identity_rejects_a_wrong_adjoint():
    kernel, x, y = _draw(0, (3, 3, 2, 4), (2, 6, 5, 1), (4, 6, 5, 1))
    left = jnp.sum(_apply(ConvOperator(kernel), x) * y)
    flipped = jnp.sum(x * _adjoint(ConvOperator(kernel[::-1, ::-1]), y))
    assert abs(float(left - flipped)) > 1e-3 * float(jnp.abs(left))


@pytest.mark.parametrize(
    ("sides", "stride", "size", "dtype"),
    [
        ((1, 1), 1, (9, 7), np.float64),
        ((5, 3), 1, (9, 7), np.float32),
        ((3, 3), 2, (8, 8), np.float32),  # one row of zeros behind, none in front
        ((3, 3), 2, (9, 7), np.float64),
        ((7, 7), 2, (9, 8), np.float64),
        ((1, 1), 2, (7, 8), np.float64),
        ((2, 4), 1, (6, 7), np.float64),
        ((4, 4), 4, (8, 10), np.float64),
        ((5, 5), 3, (11, 2), np.float64),
        ((1, 3), (1, 2), (1, 9), np.float64),  # sound: one row
    ],
)
def test_conv_and_its_adjoint_are_the_flax_layer_and_its_derivative(sides, stride, size, dtype):
    kernel, images = _draw(1, (*sides, 3, 8), (2, *size, 3), dtype=dtype)
    operator = ConvOperator(kernel, stride, size)
    mine = _apply(operator, to_planes(images))
    layer = nn.Conv(
        8,
        sides,
        strides=stride,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        precision="highest",
    )
    (y,) = _draw(2, from_planes(mine).shape, dtype=dtype)

    @jax.jit
    def flax(images, y):
        out, pull = jax.vjp(lambda x: layer.apply({"params": {"kernel": kernel}}, x), images)
        return out, pull(y)[0]

    theirs, pulled = flax(images, y)
    assert mine.dtype == dtype
    atol = 8 * np.finfo(dtype).eps * np.prod(sides) * 8
    np.testing.assert_allclose(from_planes(mine), theirs, rtol=0, atol=atol)
    adjoint = from_planes(_adjoint(operator, to_planes(y)))
    np.testing.assert_allclose(adjoint, pulled, rtol=0, atol=atol)


def test_padding_on_the_other_side_is_not_the_layer():
    kernel, images = _draw(1, (3, 3, 3, 8), (1, 8, 8, 3))
    layer = nn.Conv(8, (3, 3), 2, use_bias=False, dtype=jnp.float64, param_dtype=jnp.float64)
    theirs = jnp.asarray(layer.apply({"params": {"kernel": kernel}}, images))
    mine = from_planes(_apply(ConvOperator(kernel, 2), to_planes(images)))
    shifted = from_planes(_apply(ConvOperator(kernel), to_planes(images)))[:, ::2, ::2]
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13)
    assert float(jnp.abs(shifted - theirs).max()) > 0.1


@pytest.mark.parametrize(
    ("kernel_shape", "stride"),
    [((1, 1, 1, 1), 1), ((3, 3, 3, 6), 1), ((3, 5, 4, 2), (2, 1)), ((2, 3, 3, 4), 3)],
)
def test_pixel_blocks_are_those_of_the_dense_normal_matrix(kernel_shape, stride):
    num_in, height, width, batch = kernel_shape[2], 4, 5, 2
    (kernel,) = _draw(3, kernel_shape)
    operator = ConvOperator(kernel, stride, (height, width))
    range_shape = jax.eval_shape(operator.apply, jnp.ones((num_in, height, width, batch))).shape
    mask = np.random.default_rng(4).random(range_shape) < 0.6
    blocks = np.asarray(jax.jit(operator.pixel_blocks)(jnp.asarray(mask, jnp.float64)))
    assert blocks.shape == (num_in, num_in, height, width, batch)
    matrix = _dense(operator, (num_in, height, width))
    for sample in range(batch):
        normal = matrix.T @ (mask[..., sample].reshape(-1, 1) * matrix)
        normal = normal.reshape(num_in, height, width, num_in, height, width)
        expected = np.einsum("ahwbhw->abhw", normal)
        np.testing.assert_allclose(blocks[..., sample], expected, rtol=0, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=3)
@given(SIZES, SIDES, STRIDES, CHANNELS, st.integers(1, 12))
def test_squared_norm_bound_is_a_bound(size, sides, stride, num_in, num_out):
    (kernel,) = _draw(sum(sides) + num_out, (*sides, num_in, num_out))
    operator = ConvOperator(kernel, stride)
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


def test_jit_vmap_and_batching_agree():
    kernel, x = _draw(10, (3, 3, 3, 6), (2, 3, 5, 4, 3))
    operator = ConvOperator(kernel)
    mapped = jax.jit(jax.vmap(operator.apply))(x)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], _apply(operator, x[i]), rtol=0, atol=1e-13)
        for j in range(3):
            alone = _apply(operator, x[i, ..., j : j + 1])
            np.testing.assert_allclose(mapped[i, ..., j : j + 1], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((6, 4), (2, 2), (2, 2)), ((5, 6), (3, 2), (2, 1)), ((7, 4), (2, 3), (3, 3))],
)
def test_pooling_is_flax_and_its_adjoint_the_transpose(size, window, stride, padding):
    (images,) = _draw(sum(size), (2, *size, 2))
    operator = AveragePool(window, stride, padding, size)
    mine = _apply(operator, to_planes(images))
    with jax.numpy_dtype_promotion("standard"):
        theirs = nn.avg_pool(images, window, stride, padding)
    np.testing.assert_allclose(from_planes(mine), theirs, rtol=0, atol=1e-15 * np.prod(window) * 4)
    matrix = _dense(operator, (1, *size))
    units = np.eye(len(matrix)).reshape(1, *mine.shape[1:3], -1)
    transpose = np.asarray(_adjoint(operator, jnp.asarray(units))).reshape(-1, len(matrix))
    np.testing.assert_allclose(transpose, matrix.T, rtol=0, atol=1e-16)
    exact = np.linalg.norm(matrix, 2) ** 2
    assert exact * (1 - 1e-12) <= float(operator.squared_norm_bound()) <= 1


def test_the_bound_of_windows_that_do_not_overlap_is_exact():
    operator = AveragePool((2, 3), size=(6, 6))
    exact = np.linalg.norm(_dense(operator, (2, 6, 6)), 2) ** 2
    np.testing.assert_allclose(operator.squared_norm_bound(), exact, rtol=1e-12)
    assert exact == pytest.approx(1 / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, y: ConvOperator(k, 0), "stride must be at least 1"),
        (lambda k, y: ConvOperator(k, 2).adjoint(y), "give the operator size"),
        (lambda k, y: ConvOperator(k, 2, (6, 6)).adjoint(y), r"maps \(6, 6\) to \(3, 3\)"),
        (lambda k, y: ConvOperator(k, 2, (6, 6)).apply(y[:2]), r"the operator's size is \(6, 6\)"),
        (lambda k, y: ConvOperator(k).apply(y), "x has 5 channels, the operator takes 2"),
        (lambda k, y: ConvOperator(k).adjoint(y[1:]), "y has 4 channels, the operator maps to 5"),
        (lambda k, y: AveragePool(2).adjoint(y), "give the operator size"),
        (lambda k, y: AveragePool((2, 0)), "window must be at least 1"),
        (lambda k, y: AveragePool(5).apply(y), "a window of 5 does not fit into 4 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    kernel, y = _draw(8, (3, 3, 2, 5), (5, 4, 4, 1))
    with pytest.raises(ValueError, match=message):
        call(kernel, y)


def test_operators_are_pytrees_with_static_geometry():
    (kernel,) = _draw(9, (3, 3, 2, 4))
    operator = ConvOperator(kernel, 2, (5, 6))
    (leaf,), tree = jax.tree.flatten(operator)
    assert leaf is kernel
    again = jax.tree.unflatten(tree, [2 * kernel])
    assert (again.stride, again.size) == (2, (5, 6))
    assert jax.tree.leaves(AveragePool(2)) == []
    named = jax.tree_util.tree_flatten_with_path(operator)[0]
    assert jax.tree_util.keystr(named[0][0]) == ".kernel"


def test_a_batch_of_kernels_is_mapped_and_differentiated():
    kernels, x = _draw(10, (2, 3, 3, 2, 4), (2, 5, 6, 3))
    operator = ConvOperator(kernels[0], 2, (5, 6))
    many = jax.tree.map(lambda _: kernels, operator)
    mapped = jax.jit(jax.vmap(lambda m: m.apply(x)))(many)
    for i in range(2):
        np.testing.assert_allclose(
            mapped[i], _apply(ConvOperator(kernels[i], 2), x), rtol=0, atol=1e-13
        )
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(m.apply(x) ** 2) / 2))(operator)
    assert (gradient.stride, gradient.size) == (2, (5, 6))
    # The map is linear in its kernel: <gradient, kernel> = <M x, M x>.
    left = float(jnp.sum(gradient.kernel * operator.kernel))
    np.testing.assert_allclose(left, float(jnp.sum(_apply(operator, x) ** 2)), rtol=1e-12)
