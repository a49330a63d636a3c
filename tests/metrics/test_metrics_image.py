import functools

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from jgia.metrics import PSNR_CAP_DB, capped_mean_psnr, mse, psnr, psnr_of_mean_mse, ssim


def pair(shape, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    x = rng.random(shape)
    return x, np.clip(x + noise * rng.standard_normal(shape), 0, 1)


def skimage_ssim(x, y, **options):
    options = {"data_range": 1.0, **options}
    return np.array(
        [
            structural_similarity(
                a.astype(np.float64),
                b.astype(np.float64),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                channel_axis=-1,
                **options,
            )
            for a, b in zip(x, y, strict=True)
        ]
    )


def dm_pix_ssim(x, y):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return np.asarray(dm_pix.ssim(jnp.asarray(x), jnp.asarray(y)))


def float32_ssim_from_raw_moments(x, y):
    """The textbook formula without centering: what the library must not do."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    g = (g / g.sum()).astype(np.float32)

    def blur(z):
        z = functools.reduce(np.add, [g[k] * z[:, k : k + z.shape[1] - 10] for k in range(11)])
        shifts = [g[k] * z[:, :, k : k + z.shape[2] - 10] for k in range(11)]
        return functools.reduce(np.add, shifts)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = np.float32(1e-4), np.float32(9e-4)
    ratio = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return ratio.mean((1, 2, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mse_and_psnr_agree_with_scikit_image(dtype):
    x, y = (v.astype(dtype) for v in pair((4, 7, 5, 3)))
    rtol = 100 * np.finfo(dtype).eps
    expected = [mean_squared_error(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(mse(x, y), expected, rtol=rtol)
    expected = [peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(psnr(x, y, data_range=2.0), expected, rtol=rtol)
    assert mse(x, y).dtype == psnr(x, y).dtype == dtype


@pytest.mark.parametrize("delta", [0.5, 1e-2, 1e-7, 1e-12])
def test_psnr_of_a_constant_error_is_minus_twenty_log10(delta):
    zeros = np.zeros((1, 3, 4, 1))
    np.testing.assert_allclose(psnr(zeros + delta, zeros), [-20 * np.log10(delta)], rtol=1e-12)


def test_half_precision_is_computed_in_float32():
    x, y = pair((2, 12, 12, 1))
    half = jnp.asarray(x, jnp.bfloat16)
    for metric in (mse, psnr, ssim):
        assert metric(half, jnp.asarray(y, jnp.float32)).dtype == jnp.float32


def test_mixed_widths_take_the_wider():
    x, y = pair((2, 12, 12, 1))
    assert mse(x.astype(np.float32), y).dtype == jnp.float64


def test_everything_works_without_float64():
    x, y = pair((2, 12, 13, 3))
    with jax.enable_x64(False):
        for metric in (mse, psnr, ssim):
            out = metric(x, y)  # NumPy float64, as users bring it
            assert out.dtype == jnp.float32
            np.testing.assert_allclose(out, np.asarray(metric(x, y)), rtol=1e-5)
    np.testing.assert_allclose(ssim(x, y), skimage_ssim(x, y), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "noise"), [((3, 11, 11, 1), 0.5), ((2, 29, 12, 3), 0.01)])
def test_ssim_agrees_with_scikit_image_and_dm_pix_on_noise(dtype, shape, noise):
    x, y = (v.astype(dtype) for v in pair(shape, noise=noise))
    values = np.asarray(ssim(x, y))
    np.testing.assert_allclose(values, skimage_ssim(x, y), atol=1e-6)
    np.testing.assert_allclose(values, dm_pix_ssim(x, y), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ssim_agrees_with_scikit_image_and_dm_pix_on_photographs(photographs, dtype):
    x = photographs.astype(dtype)
    shifted, dim = np.roll(x, 1, axis=2), (0.3 * x).astype(dtype)
    noisy = np.clip(x + 0.1 * np.random.default_rng(0).standard_normal(x.shape), 0, 1)
    for y in (shifted, dim, noisy.astype(dtype), x[::-1], 1 - x):
        values = np.asarray(ssim(x, y))
        np.testing.assert_allclose(values, skimage_ssim(x, y), atol=1e-6)
        np.testing.assert_allclose(values, dm_pix_ssim(x, y), atol=1e-5)


def test_ssim_agrees_with_scikit_image_on_benchmark_images(shared_data):
    with np.load(shared_data / "cifar10_test10k.npz", allow_pickle=False) as arrays:
        x = arrays["x"][:16].astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(ssim(x, x[::-1]), skimage_ssim(x, x[::-1]), atol=1e-6)


def test_ssim_options_agree_with_scikit_image():
    x, y = (5 * v for v in pair((2, 20, 20, 3)))
    values = ssim(x, y, data_range=5.0, k1=0.02, k2=0.05)
    np.testing.assert_allclose(
        values, skimage_ssim(x, y, data_range=5.0, K1=0.02, K2=0.05), atol=1e-12
    )


@pytest.mark.parametrize(("level", "amplitude"), [(0.95, 1e-3), (0.99, 1e-4), (0.5, 1e-3)])
def test_ssim_of_flat_images_keeps_its_digits_in_float32(level, amplitude):
    rng = np.random.default_rng(0)
    x = (level + amplitude * rng.random((3, 24, 31, 3))).astype(np.float32)
    y = (x + 0.3 * amplitude * rng.standard_normal(x.shape)).astype(np.float32)
    truth = skimage_ssim(x, y)
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(ssim(x, y), truth, atol=2 * eps)
    assert np.max(np.abs(float32_ssim_from_raw_moments(x, y) - truth)) > 10 * eps  # can fail


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b, c1 = 0.2, 0.7, 1e-4
    x, y = np.full((1, 12, 12, 1), a), np.full((1, 12, 12, 1), b)
    np.testing.assert_allclose(ssim(x, y), [(2 * a * b + c1) / (a * a + b * b + c1)], rtol=1e-12)


def test_ssim_is_symmetric_at_most_one_and_one_only_for_equals():
    x, y = pair((4, 16, 16, 3))
    np.testing.assert_allclose(ssim(x, y), ssim(y, x), rtol=1e-14)
    assert np.all(ssim(x, y) < 1)
    np.testing.assert_array_equal(ssim(x, x), np.ones(4))
    assert float(ssim(x, 1 - x).max()) < 0  # an inverted texture correlates negatively


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_metrics_under_jit_and_vmap_equal_eager(metric):
    x, y = (jnp.asarray(v) for v in pair((2, 3, 12, 11, 1)))
    eager = jnp.stack([metric(a, b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(jax.vmap(metric)(x, y), eager, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(metric)(x[0], y[0]), eager[0], rtol=1e-12)


@pytest.mark.parametrize(("metric", "order"), [(mse, 2), (psnr, 1), (ssim, 1)])
def test_derivatives_agree_with_differences(metric, order):
    x, y = (jnp.asarray(v) for v in pair((1, 11, 12, 1), noise=0.3))
    check_grads(lambda v: metric(v, y), (x,), order=order, modes=["rev"], eps=1e-4)


def test_ssim_and_mse_have_zero_gradient_at_the_truth():
    x = jnp.asarray(pair((1, 11, 11, 1))[0])
    for metric in (mse, ssim):
        gradient = jax.grad(lambda v, metric=metric: metric(v, x)[0])(x)
        np.testing.assert_allclose(gradient, np.zeros(x.shape), atol=1e-12)


def test_nan_stays_in_its_own_image():
    x, y = pair((3, 12, 12, 1))
    x[1, 5, 5, 0] = np.nan
    for metric in (mse, psnr, ssim):
        np.testing.assert_array_equal(np.isnan(metric(x, y)), [False, True, False])


def test_no_images_give_no_values():
    empty = np.zeros((0, 12, 12, 1))
    for metric in (mse, psnr, ssim):
        assert metric(empty, empty).shape == (0,)


def test_the_cap_is_near_the_rounding_of_eight_bits():
    x = np.random.default_rng(0).random((1, 200, 200, 1))
    rounded = np.round(255 * x) / 255
    assert PSNR_CAP_DB - 2 < float(psnr(rounded, x)[0]) < PSNR_CAP_DB


@pytest.mark.parametrize("cap", [0.0, -1.0, np.inf, np.nan])
def test_a_bad_cap_is_refused(cap):
    with pytest.raises(ValueError, match="cap must be positive"):
        capped_mean_psnr(np.ones(2), cap)


@pytest.mark.usefixtures("as_users_run")
class TestRefusals:
    @pytest.mark.parametrize("metric", [mse, psnr, ssim])
    def test_shapes(self, metric):
        x = np.zeros((2, 12, 12, 1))
        with pytest.raises(ValueError, match=r"same shape.*\(2, 12, 12, 1\) and \(1, 12, 12, 1\)"):
            metric(x, x[:1])
        with pytest.raises(ValueError, match="add a leading axis"):
            metric(x[0], x[0])
        with pytest.raises(ValueError, match="at least one pixel"):
            metric(x[:, :0], x[:, :0])

    @pytest.mark.parametrize("metric", [mse, psnr, ssim])
    def test_bytes(self, metric):
        x = np.zeros((2, 12, 12, 1))
        with pytest.raises(ValueError, match="reference must be floating point, got uint8"):
            metric(x, x.astype(np.uint8))

    def test_vectors(self):
        for mean in (capped_mean_psnr, psnr_of_mean_mse):
            with pytest.raises(ValueError, match="at least one"):
                mean(np.zeros(0))
            with pytest.raises(ValueError, match=r"\(2, 2\)"):
                mean(np.zeros((2, 2)))


@pytest.mark.parametrize("shape", [(1, 10, 20, 3), (1, 20, 10, 3), (1, 8, 8, 1)])
def test_ssim_says_what_to_do_with_small_images(shape):
    x = np.zeros(shape)
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got .*report psnr"):
        ssim(x, x)
    assert ssim(x, x, window_size=7).tolist() == [1.0]


@pytest.mark.parametrize(
    "options",
    [{"window_size": 10}, {"window_size": -1}, {"sigma": 0.0}, {"k1": 0.0}, {"data_range": -1.0}],
    ids=str,
)
def test_ssim_refuses_bad_options(options):
    x = np.zeros((1, 12, 12, 1))
    (name,) = options
    with pytest.raises(ValueError, match=name):
        ssim(x, x, **options)
