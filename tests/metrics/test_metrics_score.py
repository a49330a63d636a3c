import json
import math

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from jgia.metrics import PSNR_CEILING_DB, SUCCESS_THRESHOLDS_DB, score
from jgia.report import records

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")

STATISTICS = ("median", "mean_capped", "of_mean_mse")
unit = st.floats(0, 1, width=32)
maybe_nan = st.one_of(unit, st.just(math.nan))


def flat(*levels, side=12):
    return np.array(levels, np.float64).reshape(-1, 1, 1, 1) * np.ones((1, side, side, 1))


def shape_of(value):
    return {k: shape_of(v) for k, v in value.items()} if isinstance(value, dict) else None


RATES = {t: {"rate": None, "low": None, "high": None} for t in ("18", "25", "30", "40")}
BASELINE = {"median": None, "mean_capped": None, "success_rate": RATES}
SHAPE = {
    "num_true": None,
    "num_reconstructed": None,
    "num_recovered": None,
    "recovered_threshold_db": None,
    "mse": None,
    "psnr": {
        "per_image": None,
        **dict.fromkeys(STATISTICS),
        "median_all": None,
        "quantiles": dict.fromkeys(("5", "25", "50", "75", "95")),
    },
    "ssim": {"per_image": None, "median": None},
    "success_rate": RATES,
    "baselines": {"dataset_mean": BASELINE, "nearest_neighbor": BASELINE, "random": BASELINE},
    "matching": None,
}


def strict(result):
    return json.loads(json.dumps(result, allow_nan=False))


def test_the_shape_is_the_documented_one():
    rng = np.random.default_rng(0)
    truths, pool = rng.random((2, 12, 12, 1)), rng.random((3, 12, 12, 1))
    for reconstructions in (truths, truths[:1], truths[:0]):
        result = score(reconstructions, truths, pool=pool)
        assert shape_of(result) == SHAPE
        assert strict(result) == result
    without = {**SHAPE, "baselines": {"random": BASELINE}}
    assert shape_of(score(truths, truths)) == without


@pytest.mark.parametrize(
    ("typed_dict", "keys"),
    [
        (records.Scores, set(SHAPE)),
        (records.PSNR, set(SHAPE["psnr"])),
        (records.Similarity, set(SHAPE["ssim"])),
        (records.Baseline, set(BASELINE)),
    ],
)
def test_the_shape_is_that_of_the_reported_schema(typed_dict, keys):
    assert typed_dict.__required_keys__ <= keys
    assert keys <= typed_dict.__required_keys__ | typed_dict.__optional_keys__


def test_the_constants_are_those_of_the_reported_schema():
    assert tuple(map(str, SUCCESS_THRESHOLDS_DB)) == records.THRESHOLDS
    assert PSNR_CEILING_DB == records.EXACT_PSNR


def test_known_answer():
    truths = flat(0.2, 0.5, 0.8)
    result = score(flat(0.81, 0.2), truths, num_recovered_threshold_db=41.0)
    assert result["matching"] == [1, None, 0]
    exact, missing, close = result["psnr"]["per_image"]
    assert (exact, missing) == (200.0, None)
    assert close == pytest.approx(40.0)
    assert (result["num_true"], result["num_reconstructed"], result["num_recovered"]) == (3, 2, 1)
    assert result["recovered_threshold_db"] == 41.0
    assert result["mse"] == pytest.approx(0.5e-4)
    psnr = result["psnr"]
    assert psnr["median"] == pytest.approx(120.0)
    assert psnr["median_all"] == pytest.approx(40.0)  # of 200, 40 and an unmatched 0
    assert psnr["mean_capped"] == pytest.approx(50.0)
    assert psnr["of_mean_mse"] == pytest.approx(10 * np.log10(2e4))
    assert psnr["quantiles"]["25"] == pytest.approx(80.0)
    assert result["success_rate"]["30"]["rate"] == pytest.approx(2 / 3)
    assert result["ssim"]["per_image"][:2] == [1.0, None]


def test_an_exact_hit_is_not_traded_for_a_smaller_sum_of_errors():
    """Paired by the sum of errors, [1, 0], the attack's exact hit would count as a failure."""
    result = score(flat(0.4, 0.1), flat(0.4, 0.9))
    assert result["matching"] == [0, 1]
    assert result["psnr"]["per_image"][0] == 200.0
    assert result["num_recovered"] == 1


def test_nothing_reconstructed():
    result = score(flat()[:0], flat(0.1, 0.9))
    assert result["mse"] is None
    assert [result["psnr"][name] for name in STATISTICS] == [None] * 3
    assert set(result["psnr"]["quantiles"].values()) == {None}
    assert result["psnr"]["median_all"] == 0.0
    assert result["ssim"] == {"per_image": [None, None], "median": None}
    assert result["num_recovered"] == 0
    rate = result["success_rate"]["18"]
    assert rate["rate"] == rate["low"] == 0.0 < rate["high"]


def test_nan_reconstructions_are_unmatched_but_counted():
    reconstructions = flat(0.1, 0.9)
    reconstructions[0, 0, 0, 0] = np.nan
    result = strict(score(reconstructions, flat(0.1, 0.9)))
    assert result["matching"] == [None, 1]
    assert result["num_reconstructed"] == 2
    assert result["success_rate"]["18"]["rate"] == 0.5


def test_small_images_have_no_ssim_and_a_note_says_why():
    result = strict(score(flat(0.1, side=8), flat(0.1, side=8)))
    assert result["ssim"]["per_image"] == [None]
    assert result["ssim"]["median"] is None
    assert result["ssim"]["note"] == "SSIM needs 11 x 11 pixels; the images are 8 x 8."
    assert result["psnr"]["per_image"] == [200.0]


def test_ssim_follows_the_matching_and_any_number_of_images(photographs):
    truths = np.concatenate([photographs] * 4)[:17]  # more than one block, the last not full
    noise = 0.1 * np.random.default_rng(0).standard_normal(truths.shape)
    reconstructions = np.clip(truths + noise, 0, 1)[::-1]
    result = score(reconstructions, truths)
    for truth, j, value in zip(
        truths, result["matching"], result["ssim"]["per_image"], strict=True
    ):
        oracle = structural_similarity(
            truth,
            reconstructions[j],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            data_range=1.0,
        )
        assert value == pytest.approx(oracle, abs=1e-6)


def test_follows_the_order_of_the_truths_and_not_that_of_the_reconstructions():
    rng = np.random.default_rng(0)
    truths = rng.random((5, 12, 12, 1))
    reconstructions = np.clip(truths[:4] + 0.1 * rng.standard_normal((4, 12, 12, 1)), 0, 1)
    base = score(reconstructions, truths)
    moved = score(reconstructions[::-1], truths)
    assert moved["psnr"] == base["psnr"]
    assert [None if j is None else 3 - j for j in moved["matching"]] == base["matching"]
    order = [3, 1, 4, 0, 2]
    permuted = score(reconstructions, truths[order])
    assert permuted["psnr"]["per_image"] == [base["psnr"]["per_image"][i] for i in order]
    assert permuted["success_rate"] == base["success_rate"]


def test_same_numbers_with_and_without_float64_and_for_jax_arrays():
    rng = np.random.default_rng(0)
    truths = rng.random((3, 12, 12, 3)).astype(np.float32)
    reconstructions = rng.random((3, 12, 12, 3)).astype(np.float32)
    base = score(reconstructions, truths, pool=truths[::-1])
    with jax.enable_x64(False):
        assert score(reconstructions, truths, pool=truths[::-1]) == base
    on_device = map(jax.numpy.asarray, (reconstructions, truths))
    assert score(*on_device, pool=truths[::-1]) == base


@given(
    st.tuples(st.integers(0, 4), st.integers(1, 4)).flatmap(
        lambda counts: st.tuples(
            hnp.arrays(np.float32, (counts[0], 2, 1, 1), elements=maybe_nan),
            hnp.arrays(np.float32, (counts[1], 2, 1, 1), elements=unit),
        )
    )
)
def test_always_strict_json_within_bounds(images):
    reconstructions, truths = images
    result = strict(score(reconstructions, truths, pool=truths))
    per_image, matching = result["psnr"]["per_image"], result["matching"]
    assert len(per_image) == len(matching) == len(truths)
    used = [j for j in matching if j is not None]
    usable = int((~np.isnan(reconstructions).any((1, 2, 3))).sum())
    assert len(used) == len(set(used)) == min(usable, len(truths))
    assert [p is None for p in per_image] == [j is None for j in matching]
    assert all(0 <= p <= 200 for p in per_image if p is not None)
    assert 0 <= result["psnr"]["median_all"] <= 200
    assert result["num_recovered"] <= len(used)
    assert result["success_rate"]["18"]["rate"] == result["num_recovered"] / len(truths)
    for rate in result["success_rate"].values():
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("reconstructions", "truths", "message"),
    [
        (flat(0.1), flat()[:0], "truths must hold at least 1"),
        (flat(0.1), flat(0.1, side=13), "one shape"),
        (flat(0.1, 1.5), flat(0.1), r"image 1 spans 1.5 to 1.5.*clip"),
        (flat(0.1, -0.01), flat(0.1), r"reconstructions must lie in \[0, 1\], but image 1"),
        (flat(np.inf), flat(0.1), "image 0 spans inf"),
        (flat(0.1), flat(np.nan), "truths must lie"),
        (flat(0.1), flat(2.0), "truths must lie"),
        (np.zeros(0), flat(0.1), r"use shape \(0, H, W, C\)"),
        (flat(0.1).astype(np.uint8), flat(0.1), "divide 8-bit pixels by 255"),
    ],
)
def test_refusals(reconstructions, truths, message):
    with pytest.raises(ValueError, match=message):
        score(reconstructions, truths)


def test_a_threshold_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="num_recovered_threshold_db"):
        score(flat(0.1), flat(0.1), num_recovered_threshold_db=math.nan)
