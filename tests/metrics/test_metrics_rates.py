import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jgia.metrics import Rate, success_rate, wilson_interval

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("total", [1, 2, 7, 32, 1000])
def test_agrees_with_scipy(total, confidence):
    for successes in {0, 1, total // 3, total // 2, total - 1, total}:
        interval = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
        np.testing.assert_allclose(
            wilson_interval(successes, total, confidence=confidence),
            (interval.low, interval.high),
            rtol=1e-12,
            atol=1e-15,
        )


def test_the_textbook_interval_is_rejected():
    share, total = 0.9, 20
    half = 1.96 * np.sqrt(share * (1 - share) / total)
    assert share + half > 1  # Wald leaves [0, 1]
    low, high = wilson_interval(18, total)
    assert high < 1
    assert abs(low - (share - half)) > 0.05


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_contains_the_share_and_mirrors(counts):
    successes, total = counts
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    assert low < high
    mirrored = wilson_interval(total - successes, total)
    np.testing.assert_allclose((1 - high, 1 - low), mirrored, atol=1e-12)
    wider = wilson_interval(successes, total, confidence=0.99)
    assert wider[0] <= low <= high <= wider[1]


@pytest.mark.parametrize(("level", "accepted"), [(0.95, True), (0.6, False)])
def test_coverage_over_proportions_is_near_nominal(level, accepted):
    """Exact coverage, averaged over p: 0.95 holds what it says; 0.6 does not hold 0.95."""
    total = 30
    intervals = np.array([wilson_interval(k, total, confidence=level) for k in range(total + 1)])
    shares = np.linspace(0.02, 0.98, 97)
    inside = (intervals[:, :1] <= shares) & (shares <= intervals[:, 1:])
    mass = stats.binom.pmf(np.arange(total + 1)[:, None], total, shares)
    assert (abs((mass * inside).sum(0).mean() - 0.95) < 0.01) == accepted


@pytest.mark.parametrize(
    ("successes", "total", "confidence", "name"),
    [
        (0, 0, 0.95, "total"),
        (3, 2, 0.95, "successes"),
        (-1, 2, 0.95, "successes"),
        (1, 2, 1.0, "confidence"),
        (1, 2, 0.0, "confidence"),
    ],
)
def test_bad_counts_are_refused(successes, total, confidence, name):
    with pytest.raises(ValueError, match=name):
        wilson_interval(successes, total, confidence=confidence)


def test_every_true_image_counts():
    values = [200.0, 18.0, 17.999, None, float("nan"), float("inf")]
    rate = success_rate(values, 18.0)
    assert rate == Rate(0.5, *wilson_interval(3, 6), 3, 6)
    dropped = success_rate([v for v in values if v is not None and not np.isnan(v)], 18.0)
    assert dropped.rate > rate.rate  # what leaving unmatched images out would claim


def test_rates_fall_as_the_threshold_rises():
    values = np.random.default_rng(0).uniform(0, 60, 50)
    rates = [success_rate(values, float(t)).rate for t in range(0, 61, 5)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, 0.0)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        success_rate([], 18.0)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        success_rate(np.zeros((1, 2)), 18.0)
    with pytest.raises(ValueError, match="threshold"):
        success_rate([1.0], float("nan"))
