import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.data import sample
from jgia.sparse import BlockDCT, to_planes
from jgia.sparse.bases import dct_matrix

SIZES = [(1, 1), (1, 7), (7, 8), (8, 8), (9, 9), (20, 13)]


def _analyze(basis, x):
    return np.asarray(jax.jit(basis.analyze)(x))


def _planes(seed, shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_dct_matrix_is_scipys(size):
    expected = np.asarray(scipy.fft.dct(np.eye(size), norm="ortho", axis=0))
    np.testing.assert_allclose(dct_matrix(size), expected, rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_dense_basis_is_orthonormal_and_analysis_its_transpose(height, width, channels):
    size = channels * height * width
    units = jnp.asarray(np.eye(size).reshape(channels, height, width, size))
    synthesis = np.asarray(jax.jit(BlockDCT().synthesize)(units)).reshape(size, size)
    analysis = _analyze(BlockDCT(), units).reshape(size, size)
    np.testing.assert_allclose(synthesis.T @ synthesis, np.eye(size), rtol=0, atol=1e-13)
    np.testing.assert_allclose(analysis, synthesis.T, rtol=0, atol=1e-14)


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(1, 21), st.integers(1, 21), st.sampled_from([1, 2, 3, 4]), st.integers(1, 10))
def test_inverse_adjoint_and_norm(height, width, channels, block):
    basis = BlockDCT(block)
    x, c = (_planes(seed, (channels, height, width, 2)) for seed in (height, 100 + width))
    analyze, synthesize = jax.jit(basis.analyze), jax.jit(basis.synthesize)
    x_coefficients, c_image = np.asarray(analyze(x)), np.asarray(synthesize(c))
    np.testing.assert_allclose(synthesize(jnp.asarray(x_coefficients)), x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(analyze(jnp.asarray(c_image)), c, rtol=0, atol=1e-13)
    left, right = np.sum(c_image * x), np.sum(c * x_coefficients)
    assert abs(left - right) <= 1e-12 * np.sum(np.abs(c * x_coefficients))
    np.testing.assert_allclose(np.sum(x_coefficients**2), np.sum(np.square(x)), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_block_is_scipys_two_dimensional_dct(dtype):
    # 20 x 13: two blocks and one of height 4, one block and one of width 5.
    x = _planes(0, (1, 20, 13, 2), dtype)
    c = _analyze(BlockDCT(), x)
    assert c.dtype == dtype
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
        for columns in (slice(0, 8), slice(8, 13)):
            block = np.asarray(x, np.float64)[0, rows, columns]
            expected = np.asarray(scipy.fft.dctn(block, norm="ortho", axes=(0, 1)))
            atol = 32 * np.finfo(dtype).eps
            np.testing.assert_allclose(c[0, rows, columns], expected, rtol=0, atol=atol)


def test_a_constant_gray_image_has_one_coefficient_per_block():
    c = _analyze(BlockDCT(), jnp.full((3, 20, 13, 1), 0.7))[..., 0]
    assert np.count_nonzero(np.abs(c) > 1e-12) == 3 * 2
    rows, columns = [0, 8, 16], [0, 8]
    for i, height in zip(rows, (8, 8, 4), strict=True):
        for j, width in zip(columns, (8, 5), strict=True):
            assert c[0, i, j] == pytest.approx(0.7 * np.sqrt(3 * height * width), rel=1e-12)


def test_the_color_rotation_is_orthonormal_with_luma_first():
    rotation = np.asarray(BlockDCT(1).analyze(jnp.eye(3).reshape(3, 1, 1, 3))).reshape(3, 3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), rtol=0, atol=1e-15)
    np.testing.assert_allclose(rotation[0], np.full(3, 3**-0.5), rtol=0, atol=1e-15)
    np.testing.assert_allclose(rotation[1:].sum(axis=1), 0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts_are_left_alone(channels):
    x = _planes(1, (channels, 5, 4, 2))
    np.testing.assert_array_equal(BlockDCT(1).analyze(x), x)


def test_a_block_larger_than_the_image_is_the_whole_images_dct():
    x = _planes(2, (1, 6, 5, 1))
    expected = np.asarray(scipy.fft.dctn(np.asarray(x)[0, :, :, 0], norm="ortho"))
    np.testing.assert_allclose(_analyze(BlockDCT(64), x)[0, :, :, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("block", [0, -8])
def test_a_block_without_pixels_is_refused(block):
    with pytest.raises(ValueError, match="block must be at least 1"):
        BlockDCT(block).analyze(jnp.ones((1, 4, 4, 1)))


def _count_for_energy(coefficients, share):
    """How many coefficients of each image (a column) hold a share of its energy."""
    energy = np.sort(coefficients.reshape(-1, coefficients.shape[-1]) ** 2, axis=0)[::-1]
    return 1 + np.sum(np.cumsum(energy, axis=0) < share * energy.sum(axis=0), axis=0)


def _raster_runs(x):
    """kron(D, D) over runs of 64 pixels in raster order, as if each run were an 8 x 8 block."""
    channels, height, width, batch = x.shape
    matrix = np.kron(dct_matrix(8), dct_matrix(8))
    runs = x.reshape(channels, height * width // 64, 64, batch)
    return np.einsum("kp,crpn->crkn", matrix, runs).reshape(x.shape)


def test_natural_images_are_sparser_than_in_raster_runs():
    images = sample.load().images[:64].astype(np.float64) / 255
    x = to_planes(jnp.asarray(images))
    blocks = _count_for_energy(np.asarray(BlockDCT().analyze(x)), 0.999)
    runs = _count_for_energy(_raster_runs(np.asarray(x)), 0.999)
    assert np.mean(blocks < runs) > 0.95
    assert blocks.mean() < 0.6 * runs.mean()
    # The rotation earns its place, too: the same blocks of plain RGB need more.
    plain = np.concatenate([BlockDCT().analyze(x[c : c + 1]) for c in range(3)])
    assert blocks.mean() < 0.8 * _count_for_energy(plain, 0.999).mean()


def test_jit_and_vmap_agree():
    x = _planes(3, (2, 3, 9, 10, 1))
    mapped = jax.jit(jax.vmap(BlockDCT().analyze))(x)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], _analyze(BlockDCT(), x[i]), rtol=0, atol=1e-14)
