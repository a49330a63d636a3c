import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.data import sample
from jgia.sparse import (
    Basis,
    BlockDCT,
    ColorRotation,
    GlobalDCT,
    Identity,
    energy_support,
    to_planes,
)
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


@settings(derandomize=True, deadline=None, max_examples=4)
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
    rotation = np.asarray(ColorRotation().analyze(jnp.eye(3).reshape(3, 1, 1, 3))).reshape(3, 3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), rtol=0, atol=1e-15)
    np.testing.assert_allclose(rotation[0], np.full(3, 3**-0.5), rtol=0, atol=1e-15)
    np.testing.assert_allclose(rotation[1:].sum(axis=1), 0, rtol=0, atol=1e-15)
    x = _planes(4, (3, 5, 4, 2))
    np.testing.assert_array_equal(BlockDCT(1).analyze(x), ColorRotation().analyze(x))
    back = ColorRotation().synthesize(ColorRotation().analyze(x))
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-15 * 4)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts_are_left_alone(channels):
    x = _planes(1, (channels, 5, 4, 2))
    np.testing.assert_array_equal(ColorRotation().analyze(x), x)
    np.testing.assert_array_equal(BlockDCT(1).analyze(x), x)


def test_three_entries_or_three_blocks_of_sound_are_no_colors():
    for shape in ((3, 2), (3, 7, 2)):
        x = _planes(1, shape)
        np.testing.assert_array_equal(ColorRotation().analyze(x), x)


@pytest.mark.parametrize("basis", [BlockDCT(4, color=False), GlobalDCT(color=False)])
def test_without_color_every_channel_is_alone(basis):
    x = _planes(2, (3, 5, 6, 2))
    alone = [_analyze(basis, x[c : c + 1]) for c in range(3)]
    np.testing.assert_allclose(_analyze(basis, x), np.concatenate(alone), rtol=0, atol=1e-14)


def test_a_block_larger_than_the_image_is_the_whole_images_dct():
    x = _planes(2, (1, 6, 5, 1))
    expected = np.asarray(scipy.fft.dctn(np.asarray(x)[0, :, :, 0], norm="ortho"))
    np.testing.assert_allclose(_analyze(BlockDCT(64), x)[0, :, :, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("block", [0, -8])
def test_a_block_without_pixels_is_refused(block):
    with pytest.raises(ValueError, match="block must be at least 1"):
        BlockDCT(block)


def _raster_runs(x):
    """kron(D, D) over runs of 64 pixels in raster order, as if each run were an 8 x 8 block."""
    channels, height, width, batch = x.shape
    matrix = np.kron(dct_matrix(8), dct_matrix(8))
    runs = x.reshape(channels, height * width // 64, 64, batch)
    return np.einsum("kp,crpn->crkn", matrix, runs).reshape(x.shape)


class _RasterRuns:
    def analyze(self, x):
        return jnp.asarray(_raster_runs(np.asarray(x)))

    def synthesize(self, coefficients):
        raise NotImplementedError


def test_natural_images_are_sparser_than_in_raster_runs():
    x = to_planes(jnp.asarray(sample.load().images[:64].astype(np.float64) / 255))
    runs = energy_support(_RasterRuns(), x, 0.999)
    plain = energy_support(BlockDCT(color=False), x, 0.999)
    blocks = energy_support(BlockDCT(), x, 0.999)
    assert float(jnp.mean(blocks < runs)) > 0.95
    assert float(blocks.mean()) < 0.6 * float(runs.mean())
    # The rotation earns its place, too: the same blocks of plain RGB need more.
    assert float(blocks.mean()) < 0.8 * float(plain.mean())


def test_energy_support_reaches_the_published_figures(shared_data):
    # Of 3072 coefficients, 99.9 % of the energy is in 2276 of raster runs, 1861 of blocks and
    # 1327 of blocks after the rotation. These were other crops, hence the tenth.
    with np.load(shared_data / "kodak24_128.npz") as archive:
        images = archive["x"].astype(np.float64) / 255
    crops = images.reshape(24, 4, 32, 4, 32, 3).swapaxes(2, 3).reshape(-1, 32, 32, 3)
    x = to_planes(jnp.asarray(crops - crops.mean(axis=(1, 2), keepdims=True)))
    published = {_RasterRuns(): 2276, BlockDCT(color=False): 1861, BlockDCT(): 1327}
    for basis, expected in published.items():
        counts = np.asarray(energy_support(basis, x, 0.999))
        assert np.median(counts) == pytest.approx(expected, rel=0.1)


def test_energy_support_counts_the_largest_first():
    x = jnp.array([[0.0, 1.0, 3.0], [0.0, 1.0, 4.0], [0.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
    basis = Identity()
    np.testing.assert_array_equal(energy_support(basis, x, 0.5), [0, 2, 1])
    np.testing.assert_array_equal(energy_support(basis, x, 0.7), [0, 3, 2])
    np.testing.assert_array_equal(energy_support(basis, x, 0.999), [0, 4, 2])
    with pytest.raises(ValueError, match="fraction must lie strictly between 0 and 1"):
        energy_support(basis, x, 1.0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1, 2), np.float64),
        ((3, 8, 7, 2), np.float32),
        ((1, 1, 50, 2), np.float64),
        ((2, 9, 2), np.float64),
        ((11, 3), np.float32),
    ],
)
def test_the_global_dct_is_scipys(shape, dtype):
    x = _planes(5, shape, dtype)
    axes = tuple(range(1, len(shape) - 1)) or (0,)
    rotated = np.asarray(ColorRotation().analyze(x), np.float64)
    expected = np.asarray(scipy.fft.dctn(rotated, norm="ortho", axes=axes))
    c = _analyze(GlobalDCT(), x)
    assert c.dtype == dtype
    atol = 4 * np.finfo(dtype).eps * np.prod(shape[:-1])
    np.testing.assert_allclose(c, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(GlobalDCT().synthesize(jnp.asarray(c)), x, rtol=0, atol=atol)


@pytest.mark.parametrize(("size", "dtype"), [(513, np.float64), (1024, np.float32)])
def test_a_long_recording_is_transformed_by_fft(size, dtype):
    x = _planes(6, (1, size, 1, 2), dtype)
    expected = np.asarray(scipy.fft.dct(np.asarray(x, np.float64), norm="ortho", axis=1))
    c = _analyze(GlobalDCT(), x)
    assert c.dtype == dtype
    atol = 32 * np.log2(size) * np.finfo(dtype).eps
    np.testing.assert_allclose(c, expected, rtol=0, atol=atol)
    back = np.asarray(GlobalDCT().synthesize(jnp.asarray(c)))
    np.testing.assert_allclose(back, x, rtol=0, atol=atol)
    np.testing.assert_allclose(np.sum(c**2), np.sum(np.square(x)), rtol=32 * np.finfo(dtype).eps)


def test_a_tone_has_few_coefficients_in_the_global_dct():
    t = (np.arange(512) + 0.5) / 512
    tone = jnp.asarray(np.cos(np.pi * 40 * t))[:, None]
    assert int(energy_support(GlobalDCT(), tone, 0.999)[0]) == 1
    assert int(energy_support(BlockDCT(8), tone, 0.999)[0]) > 50
    assert int(energy_support(Identity(), tone, 0.999)[0]) > 400


def test_a_vector_has_blocks_too():
    x = _planes(7, (11, 2))
    c = _analyze(BlockDCT(4), x)
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        expected = np.asarray(scipy.fft.dct(np.asarray(x)[start:stop], norm="ortho", axis=0))
        np.testing.assert_allclose(c[start:stop], expected, rtol=0, atol=1e-14)


def test_bases_are_static_and_compare_by_their_options():
    for basis in (Identity(), ColorRotation(), BlockDCT(), GlobalDCT()):
        assert isinstance(basis, Basis)
        assert jax.tree.leaves(basis) == []
        x = _planes(8, (3, 4, 5, 1))
        passed = jax.jit(lambda basis, x: basis.synthesize(basis.analyze(x)))(basis, x)
        np.testing.assert_allclose(passed, x, rtol=0, atol=1e-14)
    assert BlockDCT(8) == BlockDCT() != BlockDCT(4)
    assert len({BlockDCT(8), BlockDCT(), BlockDCT(8, color=False)}) == 2


def test_jit_and_vmap_agree():
    x = _planes(3, (2, 3, 9, 10, 1))
    mapped = jax.jit(jax.vmap(BlockDCT().analyze))(x)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], _analyze(BlockDCT(), x[i]), rtol=0, atol=1e-14)
