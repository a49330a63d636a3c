"""How many examples end up alone in a bin, against simulation and exact sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.attacks import ares

_DRAWS = 4000


def _simulated(masses: np.ndarray, num_examples: int, seed: int) -> np.ndarray:
    """Numbers of lone examples in independent draws; the last bin is 'never seen'."""
    rng = np.random.default_rng(seed)
    lost = max(0.0, 1 - masses.sum())
    counts = rng.multinomial(num_examples, np.append(masses, lost), size=_DRAWS)[:, :-1]
    return (counts == 1).sum(axis=1)


def _uneven(num_bins: int, lost: float) -> np.ndarray:
    p = np.random.default_rng(num_bins).gamma(0.5, size=num_bins)
    return p / p.sum() * (1 - lost)


@pytest.mark.parametrize(
    ("masses", "num_examples"),
    [
        (np.full(32, 1 / 32), 16),
        (_uneven(20, 0.0), 12),
        (_uneven(64, 0.3), 40),
        (_uneven(5, 0.1), 1),
        (_uneven(5, 0.1), 2),
    ],
    ids=["equal", "uneven", "some-lost", "one-example", "two-examples"],
)
def test_mean_and_deviation_agree_with_simulation(masses, num_examples):
    lone = _simulated(masses, num_examples, seed=1)
    mean = ares.expected_singletons(masses, num_examples)
    deviation = ares.singleton_standard_deviation(masses, num_examples)
    assert abs(lone.mean() - mean) < 4 * deviation / math.sqrt(_DRAWS)
    # The deviation of a sample deviation is at most about sd * sqrt((kurtosis - 1) / (4 n)).
    assert lone.std() == pytest.approx(deviation, rel=0.06)


def test_simulation_rejects_the_wrong_distribution():
    lone = _simulated(_uneven(20, 0.0), 12, seed=1)
    wrong = ares.expected_singletons(np.full(20, 1 / 20), 12)
    assert abs(lone.mean() - wrong) > 10 * lone.std() / math.sqrt(_DRAWS)


@given(num_bins=st.integers(1, 200), num_examples=st.integers(1, 200))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_equal_masses_have_the_closed_form(num_bins, num_examples):
    n, k = num_examples, num_bins
    expected = n * (1 - 1 / k) ** (n - 1)
    got = ares.expected_singletons(np.full(k, 1 / k), n)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert 0 <= got <= n * (1 + 1e-12)


def test_four_bins_per_example_isolate_78_percent():
    # MANDRAKE reports 77 %; 0.779 is exp(-1/4).
    rate = ares.expected_singletons(np.full(512, 1 / 512), 128) / 128
    assert rate == pytest.approx(math.exp(-0.25), abs=2e-3)


def test_deviation_of_two_examples_by_hand():
    # Both or none are alone: U = 2 with probability 1 - sum p^2, else 0.
    p = np.array([0.5, 0.3, 0.2])
    alone = 1 - np.sum(p**2)
    assert ares.expected_singletons(p, 2) == pytest.approx(2 * alone)
    expected = 2 * math.sqrt(alone * (1 - alone))
    assert ares.singleton_standard_deviation(p, 2) == pytest.approx(expected)


def _published_sum(n: int, k: int) -> float:
    """The sum over occupancy vectors as it was published, in exact integers."""
    total = n * math.comb(k, n)
    for i in range(1, min(k, n - 2) + 1):
        total += (
            i
            * math.comb(k, i)
            * sum(
                math.comb(k - i, j) * math.comb(n - i - j - 1, j - 1)
                for j in range(1, (n - i) // 2 + 1)
            )
        )
    return total / math.comb(n + k - 1, k - 1)


def _enumerated(n: int, k: int) -> float:
    """Mean number of ones over all occupancy vectors of n in k, by listing them."""

    def vectors(n, k):
        if k == 1:
            yield (n,)
            return
        for first in range(n + 1):
            for rest in vectors(n - first, k - 1):
                yield (first, *rest)

    return float(np.mean([v.count(1) for v in vectors(n, k)]))


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 5), (4, 4), (7, 3), (8, 16), (64, 128), (30, 8)])
def test_rtf_bound_is_the_published_sum(n, k):
    assert ares.rtf_bound(k, n) == pytest.approx(_published_sum(n, k), rel=1e-12)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (1, 2), (3, 1), (1, 7), (2, 3), (4, 3)])
def test_rtf_bound_of_small_cases_by_enumeration(n, k):
    assert ares.rtf_bound(k, n) == pytest.approx(_enumerated(n, k), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "k", "bound", "true"), [(64, 128, 28.7, 39.1), (384, 1024, 203, 264)]
)
def test_rtf_bound_understates_the_expectation(n, k, bound, true):
    assert ares.rtf_bound(k, n) == pytest.approx(bound, rel=5e-3)
    assert ares.expected_singletons(np.full(k, 1 / k), n) == pytest.approx(true, rel=5e-3)


@pytest.mark.parametrize(
    ("masses", "num_examples", "message"),
    [
        (np.array([0.5, 0.6]), 2, "sum at most 1"),
        (np.array([-0.1, 0.6]), 2, "minimum -0.1"),
        (np.array([[0.5, 0.5]]), 2, "one-dimensional"),
        (np.array([0.5, math.nan]), 2, "probabilities"),
        (np.array([0.5, 0.5]), 0, "at least 1"),
    ],
)
@pytest.mark.parametrize("function", [ares.expected_singletons, ares.singleton_standard_deviation])
def test_what_is_no_distribution_is_refused(function, masses, num_examples, message):
    with pytest.raises(ValueError, match=message):
        function(masses, num_examples)


def test_rtf_bound_refuses_nothing_to_place():
    for arguments in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            ares.rtf_bound(*arguments)
