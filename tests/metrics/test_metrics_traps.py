"""Ways in which published inversion metrics went wrong; each test holds this library to the fix.

D6 (the range of LPIPS inputs) is in ``test_metrics_lpips.py``; D10 and D12 (selection by the true
image) are in ``test_metrics_boundary.py``.
"""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity

from jgia.metrics import capped_mean_psnr, match, psnr, psnr_of_mean_mse, score, ssim
from jgia.normalization import Normalization

CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def flat(*levels):
    return np.array(levels, np.float64).reshape(-1, 1, 1, 1) * np.ones((1, 12, 12, 1))


def test_d4_one_exact_image_does_not_make_the_others_infinite():
    truths = np.random.default_rng(0).random((4, 12, 12, 3))
    images = truths[::-1].copy()
    images[2] = truths[2]
    values = np.asarray(psnr(images, truths))
    assert np.isinf(values).tolist() == [False, False, True, False]
    np.testing.assert_allclose(values[[0, 1, 3]], psnr(images[[0, 1, 3]], truths[[0, 1, 3]]))
    assert np.isfinite(capped_mean_psnr(values))
    one_nan = images.copy()
    one_nan[0, 0, 0, 0] = np.nan
    assert np.isnan(psnr(one_nan, truths)).tolist() == [True, False, False, False]


def test_d5_ssim_is_ssim():
    """Complex-wavelet similarity, once reported as SSIM, hardly sees a shift by one pixel."""
    stripes = np.tile([0.0, 1.0], (1, 16, 8))[..., None]
    assert float(ssim(np.roll(stripes, 1, axis=2), stripes)[0]) < -0.9
    image = np.random.default_rng(0).random((1, 16, 16, 3))
    shifted = np.roll(image, 1, axis=2)
    oracle = structural_similarity(
        shifted[0],
        image[0],
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        data_range=1.0,
    )
    assert float(ssim(shifted, image)[0]) == pytest.approx(oracle, abs=1e-12)
    uniform_window = structural_similarity(shifted[0], image[0], channel_axis=-1, data_range=1.0)
    assert uniform_window != pytest.approx(oracle, abs=1e-3)  # another SSIM is told apart


@pytest.mark.parametrize("metric", ["mse", "psnr"])
def test_d11_an_exact_hit_is_the_best_match(metric):
    truths, reconstructions = flat(0.2, 0.8), flat(0.8, 0.5)
    assert match(reconstructions, truths, metric=metric)[0].tolist() == [1, 0]
    errors = np.mean((reconstructions[:, None] - truths[None]) ** 2, axis=(2, 3, 4))
    with np.errstate(divide="ignore"):
        wrong = np.where(errors == 0, 0.0, 10 * np.log10(errors))  # exact: 0, others: -PSNR < 0
    rows, columns = linear_sum_assignment(wrong)
    assert rows[np.argsort(columns)].tolist() == [0, 1]  # what that cost makes of it


def arrange(decibels):
    """True images, and reconstructions in [0, 1] off by exactly that PSNR."""
    rng = np.random.default_rng(0)
    truths = 0.32 + 0.36 * rng.random((len(decibels), 12, 12, 1))
    offsets = 10 ** (-np.asarray(decibels, np.float64) / 20).reshape(-1, 1, 1, 1)
    return truths + offsets * np.sign(rng.random(truths.shape) - 0.5), truths


def test_d15_exact_hits_do_not_hide_failures():
    """26 images at 133 dB and 6 at 10 dB were once summarized as 110 dB."""
    decibels = np.array([133.0] * 26 + [10.0] * 6)
    errors = 10 ** (-decibels / 10)
    assert decibels.mean() == pytest.approx(109.94, abs=0.01)  # the number to avoid
    assert float(capped_mean_psnr(decibels)) == pytest.approx((26 * 60 + 6 * 10) / 32)
    assert float(psnr_of_mean_mse(errors)) == pytest.approx(17.27, abs=0.01)

    reconstructions, truths = arrange(decibels)
    result = score(reconstructions, truths)
    assert result["matching"] == list(range(32))
    assert result["psnr"]["mean_capped"] == pytest.approx(50.625)
    assert result["psnr"]["median"] == pytest.approx(133.0)
    assert result["psnr"]["of_mean_mse"] == pytest.approx(17.27, abs=0.01)
    assert result["psnr"]["quantiles"]["5"] == pytest.approx(10.0)
    assert result["success_rate"]["18"]["rate"] == 26 / 32


def test_d15_missing_images_are_not_zero_padded():
    reconstructions, truths = arrange([30.0] * 4)
    found = score(reconstructions[:3], truths)
    blank = np.concatenate([reconstructions[:3], np.zeros_like(truths[:1])])
    padded = score(blank, truths)
    assert found["mse"] == pytest.approx(1e-3, rel=1e-9)
    assert padded["mse"] > 10 * found["mse"]  # what padding would have done
    assert found["psnr"]["of_mean_mse"] == pytest.approx(30.0)
    assert found["psnr"]["mean_capped"] == pytest.approx(30.0)
    assert found["ssim"]["per_image"][3] is None
    assert found["matching"][3] is None
    assert found["success_rate"]["18"]["rate"] == 3 / 4  # missing is still a failure


def test_d18_averages_do_not_grow_with_the_number_of_images():
    reconstructions, truths = arrange([20.0])
    for count in (1, 2, 50):
        values = psnr(np.repeat(reconstructions, count, 0), np.repeat(truths, count, 0))
        assert values.shape == (count,)
        assert float(capped_mean_psnr(values)) == pytest.approx(20.0)
    reconstructions, truths = arrange([20.0] * 6)
    result = score(reconstructions, truths)
    assert result["psnr"]["mean_capped"] == pytest.approx(20.0)
    assert result["mse"] == pytest.approx(0.01)


def test_d19_ssim_is_per_matched_image_and_not_a_mean_over_all_originals():
    rng = np.random.default_rng(0)
    truths = rng.random((4, 16, 16, 1))
    reconstructions = np.clip(truths[:3] + np.array([0.0, 0.05, 0.9]).reshape(3, 1, 1, 1), 0, 1)
    result = score(reconstructions, truths)
    values = [v for v in result["ssim"]["per_image"] if v is not None]
    pairs = [(j, n) for n, j in enumerate(result["matching"]) if j is not None]
    expected = np.array(
        [float(ssim(reconstructions[j][None], truths[n][None])[0]) for j, n in pairs]
    )
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert result["ssim"]["median"] == pytest.approx(float(np.median(expected)), abs=1e-6)
    assert abs(np.mean(values) - result["ssim"]["median"]) > 0.05  # a mean is told apart
    of_all = [[float(ssim(r[None], t[None])[0]) for t in truths] for r in reconstructions]
    assert abs(np.mean(of_all) - result["ssim"]["median"]) > 0.05  # so is one over all originals
    wide = np.array(
        [
            float(ssim(reconstructions[j][None], truths[n][None], data_range=6.0)[0])
            for j, n in pairs
        ]
    )
    assert np.max(np.abs(wide - expected)) > 0.05  # and so is a data range of 6


def test_one_normalization_object_denormalizes_exactly_and_two_do_not(photographs):
    truths = photographs.astype(np.float32)
    inputs = CIFAR10.normalize(truths)
    same = np.clip(CIFAR10.denormalize(inputs), 0, 1)
    other = np.clip(IMAGENET.denormalize(inputs), 0, 1)
    assert min(score(same, truths)["psnr"]["per_image"]) > 130
    assert max(score(other, truths)["psnr"]["per_image"]) < 40
    with pytest.raises(ValueError, match="denormalize it and clip it"):
        score(inputs, truths)  # not denormalized at all
