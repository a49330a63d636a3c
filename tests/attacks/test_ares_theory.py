"""How many examples end up alone in a bin, against simulation and exact sums."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jgia.attacks import ares
from jgia.attacks.ares import theory

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


def test_one_shot_bound_is_the_share_of_vectors_with_a_one_in_one_place():
    for n, k in [(1, 2), (2, 2), (4, 3), (5, 4), (9, 5)]:
        published = math.comb(n + k - 3, k - 2) / math.comb(n + k - 1, k - 1)
        assert theory.rtf_one_shot_bound(k, n) == pytest.approx(published, rel=1e-12)
        assert theory.rtf_one_shot_bound(k, n) == pytest.approx(ares.rtf_bound(k, n) / k, rel=1e-12)


def _activity(num_rows: int, images: np.ndarray, bias: float, seed: int) -> np.ndarray:
    """(rows, examples): which examples each independent standard Gaussian row is on for."""
    rows = np.random.default_rng(seed).normal(size=(num_rows, images.shape[1]))
    return rows @ images.T + bias > 0


@pytest.fixture(scope="module")
def orthogonal():
    """Twelve orthogonal examples of squared norm d = 40, as the formulas assume."""
    basis, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 12)))
    return basis.T * math.sqrt(40)


def test_quantile_bias_switches_rows_on_once_per_batch(orthogonal):
    on = _activity(40_000, orthogonal, theory.qbi_bias(40, 12), seed=0)
    assert abs(on.mean() - 1 / 12) < 5 * math.sqrt(1 / 12 / on.size)
    # One pixel's standard deviation too low: the rate is visibly off.
    wrong = _activity(40_000, orthogonal, theory.qbi_bias(40, 12) - 1.0, seed=0)
    assert abs(wrong.mean() - 1 / 12) > 20 * math.sqrt(1 / 12 / on.size)


@pytest.mark.parametrize("probability", [1 / 30, 1 / 12, 1 / 4])
def test_rows_isolate_at_the_predicted_rate(orthogonal, probability):
    bias = math.sqrt(40) * special.ndtri(probability)
    alone = (_activity(40_000, orthogonal, bias, seed=1).sum(axis=1) == 1).mean()
    expected = theory.row_isolation_rate(probability, 12)
    assert abs(alone - expected) < 5 * math.sqrt(expected * (1 - expected) / 40_000)
    assert abs(alone - expected * 12 / 11) > 5 * math.sqrt(expected / 40_000)


def test_one_over_n_is_the_best_probability():
    best = theory.row_isolation_rate(1 / 50, 50)
    assert best == pytest.approx((1 - 1 / 50) ** 49)
    grid = np.linspace(0, 1, 2001)
    assert max(theory.row_isolation_rate(p, 50) for p in grid) <= best
    assert theory.row_isolation_rate(1 / 10**6, 10**6) == pytest.approx(math.exp(-1), rel=1e-5)


def test_share_of_examples_that_some_row_isolates(orthogonal):
    on = _activity(60 * 700, orthogonal, theory.qbi_bias(40, 12), seed=2).reshape(700, 60, 12)
    isolated = (on & (on.sum(axis=2, keepdims=True) == 1)).any(axis=1)
    expected = theory.example_isolation_rate(1 / 12, 60, 12)
    error = isolated.mean(axis=1).std() / math.sqrt(700)
    assert abs(isolated.mean() - expected) < 4 * error
    assert abs(isolated.mean() - theory.example_isolation_rate(1 / 12, 54, 12)) > 4 * error


def test_examples_that_resemble_one_another_are_isolated_less_often(orthogonal):
    alike = orthogonal + 2.0 * orthogonal[0]
    alike *= math.sqrt(40) / np.linalg.norm(alike, axis=1, keepdims=True)
    on = _activity(20_000, alike, theory.qbi_bias(40, 12), seed=3)
    assert (on.sum(axis=1) == 1).mean() < 0.8 * theory.row_isolation_rate(1 / 12, 12)


@pytest.mark.parametrize(
    ("n", "rows", "bins", "first", "second", "union"),
    [(128, 512, 256, 0.772, 0.608, 0.911), (384, 1024, 256, 0.626, 0.223, 0.709)],
)
def test_two_layers_by_the_numbers(n, rows, bins, first, second, union):
    r1 = theory.example_isolation_rate(1 / n, rows, n)
    r2 = ares.expected_singletons(np.full(bins, 1 / bins), n) / n
    assert (round(r1, 3), round(r2, 3)) == (first, second)
    assert theory.two_layer_rate(r1, r2) == pytest.approx(union, abs=6e-4)


def test_union_of_a_row_layer_and_a_bin_layer(orthogonal):
    """Rows isolate some examples, bins of an independent feature others."""
    draws, rows, bins = 1500, 12, 24
    on = _activity(rows * draws, orthogonal, theory.qbi_bias(40, 12), seed=4)
    on = on.reshape(draws, rows, 12)
    first = (on & (on.sum(axis=2, keepdims=True) == 1)).any(axis=1)
    where = np.random.default_rng(6).integers(bins, size=(draws, 12))
    second = (where[:, :, None] == where[:, None, :]).sum(axis=2) == 1
    r1 = theory.example_isolation_rate(1 / 12, rows, 12)
    r2 = ares.expected_singletons(np.full(bins, 1 / bins), 12) / 12
    union = (first | second).mean(axis=1)
    error = union.std() / math.sqrt(draws)
    assert abs(union.mean() - theory.two_layer_rate(r1, r2)) < 4 * error
    assert abs(union.mean() - max(r1, r2)) > 20 * error


def test_rates_at_the_edges():
    assert theory.example_isolation_rate(1.0, 5, 1) == 1.0
    assert theory.example_isolation_rate(1.0, 0, 1) == 0.0
    assert theory.example_isolation_rate(1.0, 5, 2) == 0.0
    assert theory.row_isolation_rate(0.0, 7) == 0.0
    assert theory.two_layer_rate(0.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.row_isolation_rate(1.2, 3), "between 0 and 1, got 1.2"),
        (lambda: theory.row_isolation_rate(math.nan, 3), "between 0 and 1"),
        (lambda: theory.example_isolation_rate(0.1, -1, 3), "num_rows must be at least 0"),
        (lambda: theory.qbi_bias(10, 1), "num_examples must be at least 2"),
        (lambda: theory.rtf_one_shot_bound(1, 3), "num_bins must be at least 2"),
        (lambda: theory.two_layer_rate(-0.1, 0.5), "first must lie between"),
    ],
)
def test_rates_refuse_what_is_no_probability(call, message):
    with pytest.raises(ValueError, match=message):
        call()
