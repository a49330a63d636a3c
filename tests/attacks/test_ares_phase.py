"""Where masked recovery sets in: formulas against cone projections and linear programs."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from jgia.attacks.ares import phase


def _squared_projection(s: int, n: int, num_draws: int) -> np.ndarray:
    """``||projection of g onto the descent cone||^2 = min_tau dist(g, tau * subdifferential)^2``.

    Minimized for every draw apart, on a grid in tau: the cone's own definition.
    """
    g = np.random.default_rng(0).normal(size=(num_draws, n))
    best = np.full(num_draws, np.inf)
    for tau in np.linspace(0, 4, 401):
        on = ((g[:, :s] - tau) ** 2).sum(axis=1)
        off = (np.maximum(np.abs(g[:, s:]) - tau, 0) ** 2).sum(axis=1)
        best = np.minimum(best, on + off)
    return best


@pytest.mark.parametrize(("s", "n"), [(1, 40), (4, 64), (10, 100), (30, 60), (0, 5), (5, 5)])
def test_statistical_dimension_by_projection(s, n):
    squared = _squared_projection(s, n, 3000)
    got = phase.statistical_dimension(s, n)
    error = squared.std() / math.sqrt(len(squared))
    # The formula exceeds the dimension by at most 2 sqrt(n / s) (proposition 4.5 there).
    slack = 2 * math.sqrt(n / s) if s else 1e-12
    assert squared.mean() - 4 * error <= got <= squared.mean() + 4 * error + slack
    if 0 < s < n:
        assert phase.statistical_dimension(s + 1, n) > got


def test_statistical_dimension_as_an_integral():
    s, n = 7, 90

    def objective(tau):
        tail, _ = integrate.quad(lambda u: (u - tau) ** 2 * math.exp(-u * u / 2), tau, 40)
        return s * (1 + tau**2) + (n - s) * math.sqrt(2 / math.pi) * tail

    found: Any = optimize.minimize_scalar(objective, bounds=(0, 10), method="bounded")
    assert phase.statistical_dimension(s, n) == pytest.approx(float(found.fun), rel=1e-8)


@given(n=st.integers(2, 4000), share=st.floats(0.0, 1.0))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_statistical_dimension_stays_between_its_bounds(n, share):
    s = max(1, min(n - 1, round(share * n)))
    dimension = phase.statistical_dimension(s, n)
    assert s <= dimension <= n
    assert dimension <= phase.sufficient_equations(s, n) + 1.25 * s + 1e-9


def _sparse_vector(rng: np.random.Generator, s: int, n: int) -> np.ndarray:
    x = np.zeros(n)
    x[rng.choice(n, s, replace=False)] = rng.normal(size=s)
    return x / np.linalg.norm(x)


def _basis_pursuit(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    n = a.shape[1]
    solved = optimize.linprog(np.ones(2 * n), A_eq=np.hstack([a, -a]), b_eq=y, method="highs")
    assert solved.status == 0
    return solved.x[:n] - solved.x[n:]


def _success_rate(m: int, s: int, n: int, bias: float, num_draws: int) -> float:
    """How often the active neurons of a ReLU layer determine x: masked basis pursuit."""
    recovered = 0
    for seed in range(num_draws):
        rng = np.random.default_rng((m, seed))
        x, w = _sparse_vector(rng, s, n), rng.normal(size=(m, n))
        h = np.maximum(w @ x + bias, 0)
        on = h > 0
        if on.any():
            recovered += np.linalg.norm(_basis_pursuit(w[on], h[on] - bias) - x) < 1e-6
    return recovered / num_draws


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_masked_recovery_sets_in_where_predicted(share):
    s, n, num_draws = 5, 80, 40
    m = round(share * phase.needed_neurons(s, n, probability=0.5))
    rate = _success_rate(m, s, n, 0.0, num_draws)
    expected = phase.masked_recovery_probability(m, s, n)
    # The transition is a step at D in theory and about sqrt(n) / 2 equations wide in fact.
    widths = 0.5 * math.sqrt(n) / math.sqrt(m / 4)
    low, high = stats.norm.cdf(stats.norm.ppf(expected) + np.array([-widths, widths]))
    margin = 3 * math.sqrt(0.25 / num_draws)
    assert low - margin <= rate <= high + margin
    if share in (0.5, 1.5):
        assert abs(rate - round(share / 2)) < 0.1
        wrong = 1 - expected  # the prediction of the other side
        assert abs(rate - wrong) > 0.8


def test_rule_of_thumb_recovers_most_and_half_of_it_little():
    s, n = 4, 80
    m = math.ceil(2 * phase.sufficient_equations(s, n))
    assert _success_rate(m, s, n, 0.0, 40) > 0.85
    assert _success_rate(m // 2, s, n, 0.0, 40) < 0.4
    assert phase.masked_recovery_probability(m, s, n) > 0.95


def test_number_of_active_neurons_is_binomial():
    rng = np.random.default_rng(0)
    x = 2.5 * _sparse_vector(rng, 3, 20)
    counts = np.array([(rng.normal(size=(50, 20)) @ x - 1.0 > 0).sum() for _ in range(2000)])
    p = phase.active_probability(-1.0, 2.5)
    assert abs(counts.mean() - 50 * p) < 4 * math.sqrt(50 * p * (1 - p) / 2000)
    assert counts.var() == pytest.approx(50 * p * (1 - p), rel=0.15)


@pytest.mark.parametrize("bias", [-1.5, -0.5, 0.0, 0.5, 2.0])
def test_second_moment_of_active_rows(bias):
    norm = 2.0
    a = np.random.default_rng(1).normal(size=(400_000, 3))
    x = np.array([0.0, norm, 0.0])
    on = a[a @ x + bias > 0]
    moments = on.T @ on / len(on)
    c = phase.active_second_moment(bias, norm)
    expected = np.diag([1, 1 + c, 1])
    error = 6 * (on**2).std(axis=0).max() / math.sqrt(len(on))
    assert np.abs(moments - expected).max() < error
    if bias:
        assert np.abs(moments - np.eye(3)).max() > error


def test_second_moment_extremes():
    assert phase.active_second_moment(0.0) == 0.0
    assert phase.active_second_moment(-40.0) == pytest.approx(1600.0, rel=2e-3)
    assert phase.active_second_moment(40.0) == 0.0
    grid = [phase.active_second_moment(t) for t in np.linspace(0, 4, 401)]
    assert min(grid) == pytest.approx(-0.2945, abs=5e-4)
    assert np.linspace(0, 4, 401)[int(np.argmin(grid))] == pytest.approx(0.84, abs=0.011)


def test_active_rows_are_conditioned_like_an_unconditioned_gaussian_matrix():
    """Singular values of active rows follow those of fresh rows; of biased ones they do not."""
    rng = np.random.default_rng(3)
    x = _sparse_vector(rng, 4, 30)

    def singular_values(bias):
        w = rng.normal(size=(120, 30))
        on = w[w @ x + bias > 0] if bias is not None else w[:60]
        return np.linalg.svd(on[:50], compute_uv=False) if len(on) >= 50 else None

    fresh = np.array([singular_values(None) for _ in range(150)])
    active = np.array([v for _ in range(150) if (v := singular_values(0.0)) is not None])
    assert _same_distribution(fresh[:, 0], active[:, 0]) > 1e-3
    few = np.array([np.linalg.svd(_rows_on(rng, x, -1.5), compute_uv=False) for _ in range(150)])
    assert _same_distribution(fresh[:, 0], few[:, 0]) < 1e-10


def _same_distribution(first: np.ndarray, second: np.ndarray) -> float:
    """P-value of the two-sample Kolmogorov-Smirnov test."""
    return float(np.asarray(stats.ks_2samp(first, second))[1])


def _rows_on(rng: np.random.Generator, x: np.ndarray, bias: float) -> np.ndarray:
    w = rng.normal(size=(2000, len(x)))
    return w[w @ x + bias > 0][:50]


def test_needed_neurons_is_the_first_that_suffices():
    for bias in (0.0, -0.7):
        m = phase.needed_neurons(6, 90, probability=0.9, bias=bias)
        assert phase.masked_recovery_probability(m, 6, 90, bias=bias) >= 0.9
        assert phase.masked_recovery_probability(m - 1, 6, 90, bias=bias) < 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: phase.statistical_dimension(5, 4), "between 0 and size=4"),
        (lambda: phase.sufficient_equations(-1, 4), "between 0 and size=4"),
        (lambda: phase.active_probability(math.inf), "bias must be finite"),
        (lambda: phase.active_probability(0.0, 0.0), "norm must be positive"),
        (lambda: phase.masked_recovery_probability(-1, 1, 4), "num_neurons must be at least 0"),
        (lambda: phase.needed_neurons(1, 4, bias=-40.0), "no neuron on"),
        (lambda: phase.needed_neurons(0, 4), "num_nonzero must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
