import numpy as np
import pytest

from jgia.metrics import capped_mean_psnr, psnr, success_rate
from jgia.metrics.baselines import baseline_scores

RNG = np.random.default_rng(0)
TRUTHS, POOL = RNG.random((5, 4, 4, 3)), RNG.random((9, 4, 4, 3))


def expected(values):
    values = np.asarray(values)
    rates = {}
    for threshold in ("18", "25", "30", "40"):
        rate = success_rate(values, float(threshold))
        rates[threshold] = {"rate": rate.rate, "low": rate.low, "high": rate.high}
    return {
        "median": pytest.approx(float(np.median(values)), rel=1e-9),
        "mean_capped": pytest.approx(float(capped_mean_psnr(values)), rel=1e-9),
        "success_rate": rates,
    }


def test_against_loops_over_images():
    scores = baseline_scores(TRUTHS, seed=0, pool=POOL)
    mean = np.broadcast_to(POOL.mean(0), TRUTHS.shape)
    nearest = np.stack([POOL[np.argmin(((POOL - t) ** 2).sum((1, 2, 3)))] for t in TRUTHS])
    assert scores["dataset_mean"] == expected(psnr(mean, TRUTHS))
    assert scores["nearest_neighbor"] == expected(psnr(nearest, TRUTHS))
    assert scores["nearest_neighbor"] != expected(psnr(POOL[:5], TRUTHS))  # the check can fail


def test_a_pool_with_the_truth_in_it_shows():
    leaked = baseline_scores(TRUTHS, seed=0, pool=np.concatenate([POOL, TRUTHS]))
    nearest = leaked["nearest_neighbor"]
    assert (nearest["median"], nearest["mean_capped"]) == (200.0, 60.0)
    assert nearest["success_rate"]["40"]["rate"] == 1.0


def test_the_random_image_follows_its_seed():
    assert baseline_scores(TRUTHS, seed=1) == baseline_scores(TRUTHS, seed=1)
    assert baseline_scores(TRUTHS, seed=1) != baseline_scores(TRUTHS, seed=2)
    assert list(baseline_scores(TRUTHS, seed=1)) == ["random"]


def test_the_random_image_of_a_grey_field_has_the_variance_of_uniform_noise():
    grey = np.full((4, 40, 40, 3), 0.5)
    assert baseline_scores(grey, seed=0)["random"]["median"] == pytest.approx(
        10 * np.log10(12), abs=0.05
    )


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("truths", "pool", "message"),
    [
        (TRUTHS[:0], None, "truths must hold at least 1"),
        (TRUTHS, POOL[:0], "pool must hold at least 1"),
        (TRUTHS, POOL[:, :3], "one shape"),
        (TRUTHS, POOL * 2 - 1, r"pool must lie in \[0, 1\]"),
        (TRUTHS * np.nan, None, r"truths must lie in \[0, 1\]"),
        (TRUTHS.astype(np.uint8), None, "divide 8-bit"),
    ],
)
def test_refusals(truths, pool, message):
    with pytest.raises(ValueError, match=message):
        baseline_scores(truths, seed=0, pool=pool)
