"""The constants of the generalized Lasso, against closed forms, sampling and a solver."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jgia.attacks.ares import nonlinearity as nl
from jgia.attacks.ares import phase


def relu(t):
    return np.maximum(t, 0.0)


def step(t):
    return (t > 0.3).astype(np.float64)


# Moments of ReLU(xi + b): f^2, f^2 xi^2 and f xi^3 from integration by parts.
def relu_closed_form(b: float) -> tuple[float, float, float, float]:
    density, below = math.exp(-b * b / 2) / math.sqrt(2 * math.pi), float(special.ndtr(b))
    mean = b * below + density
    second = (1 + b * b) * below + b * density
    cubic = 3 * below - b * density  # E[f xi^3]
    fourth = (3 + b * b) * below + b * density  # E[f^2 xi^2]
    return mean, below, second - below**2, fourth - 2 * below * cubic + 3 * below**2


@pytest.mark.parametrize("bias", [0.0, -0.5, -1.0, -2.0, 0.5, 3.0, -6.0])
def test_relu_has_closed_forms(bias):
    mean, mu, sigma2, eta2 = relu_closed_form(bias)
    got = nl.lasso_constants(relu, bias)
    assert got.mu == pytest.approx(mu, rel=1e-11, abs=1e-13)
    assert got.sigma**2 == pytest.approx(sigma2, rel=1e-10)
    assert got.eta**2 == pytest.approx(eta2, rel=1e-10)
    centered = nl.lasso_constants(relu, bias, intercept=True)
    assert centered.intercept == pytest.approx(mean, rel=1e-11)
    assert centered.sigma**2 == pytest.approx(sigma2 - mean**2, rel=1e-8)
    assert centered.mu == pytest.approx(mu, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(
    ("bias", "published"),
    [
        (0.0, (0.5, 0.25, 0.75)),
        (-0.5, (0.308, 0.114, 0.433)),
        (-1.0, (0.159, 0.050, 0.240)),
        (-2.0, (0.023, 0.005, 0.045)),
        (0.5, (0.691, 0.562, 1.23)),
    ],
)
def test_relu_constants_as_tabulated(bias, published):
    got = nl.lasso_constants(relu, bias)
    assert (got.mu, got.sigma**2, got.eta**2) == pytest.approx(published, abs=2.5e-3)


def test_intercept_leaves_a_third_of_relus_noise():
    assert nl.lasso_constants(relu, intercept=True).sigma ** 2 == pytest.approx(
        0.25 - 1 / (2 * math.pi), rel=1e-11
    )


def test_sign_is_one_bit_compressed_sensing():
    got = nl.lasso_constants(np.sign)
    assert got.mu == pytest.approx(math.sqrt(2 / math.pi), rel=1e-12)
    assert got.sigma**2 == pytest.approx(1 - 2 / math.pi, rel=1e-11)
    assert got.eta**2 == pytest.approx(1 - 2 / math.pi, rel=1e-11)


def test_linear_layers_leave_no_noise():
    got = nl.lasso_constants(lambda t: 3 * t, 0.7, intercept=True)
    assert got.mu == pytest.approx(3.0, rel=1e-13)
    assert got.intercept == pytest.approx(2.1, rel=1e-13)
    assert got.sigma < 1e-12
    assert got.eta < 1e-12


ACTIVATIONS = {
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "gelu": lambda t: t * special.ndtr(t),
    "leaky": lambda t: np.where(t > 0, t, 0.1 * t),
    "step": step,
    "exp": np.exp,
}


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_activation_agrees_with_sampling(name, intercept):
    f, bias = ACTIVATIONS[name], -0.4
    got = nl.lasso_constants(f, bias, intercept=intercept)
    xi = np.random.default_rng(0).normal(size=400_000)
    value = f(xi + bias) - got.intercept
    residual = value - got.mu * xi
    pairs = [
        (value * xi, got.mu),
        (residual**2, got.sigma**2),
        ((residual * xi) ** 2, got.eta**2),
        (f(xi + bias), got.intercept if intercept else f(xi + bias).mean()),
    ]
    for sample, expected in pairs:
        assert abs(sample.mean() - expected) < 5 * sample.std() / math.sqrt(len(xi)) + 1e-12
    # A wrong scale does not pass.
    wrong = value - 1.1 * got.mu * xi
    assert abs((wrong * xi).mean()) > 5 * (wrong * xi).std() / math.sqrt(len(xi))


def test_rows_with_different_biases_are_averaged():
    biases = np.array([-1.0, 0.0, 0.0, 0.5])
    got = nl.lasso_constants(relu, biases, intercept=True)
    each = [nl.lasso_constants(relu, float(b), intercept=True) for b in biases]
    assert got.mu == pytest.approx(np.mean([c.mu for c in each]), rel=1e-12)
    assert got.intercept == pytest.approx(np.mean([c.intercept for c in each]), rel=1e-12)
    # Rows differ in their scales, and one common mu leaves that as noise, too.
    spread = np.var([c.mu for c in each])
    mean_sigma2 = np.mean([c.sigma**2 for c in each])
    assert got.sigma**2 == pytest.approx(mean_sigma2 + spread, rel=1e-11)


def test_jax_activations_work_in_both_precisions():
    exact = nl.lasso_constants(lambda t: t * special.ndtr(t), 0.2)
    double = nl.lasso_constants(lambda t: jax.nn.gelu(t, approximate=False), 0.2)
    assert double == pytest.approx(exact, rel=1e-11)

    def single(t):
        return np.asarray(jax.nn.gelu(t.astype(np.float32), approximate=False))

    eps = float(np.finfo(np.float32).eps)
    assert nl.lasso_constants(single, 0.2) == pytest.approx(exact, abs=100 * eps)


@given(scale=st.floats(0.01, 100.0), bias=st.floats(-3.0, 3.0), shift=st.floats(-5.0, 5.0))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_constants_scale_with_f_and_ignore_shifts_under_an_intercept(scale, bias, shift):
    base = nl.lasso_constants(np.tanh, bias, intercept=True)
    other = nl.lasso_constants(lambda t: scale * np.tanh(t) + shift, bias, intercept=True)
    size = scale + abs(shift)
    for name in ("mu", "sigma", "eta"):
        expected = scale * getattr(base, name)
        assert getattr(other, name) == pytest.approx(expected, rel=1e-7, abs=1e-9 * size)


@pytest.mark.parametrize(
    ("f", "bias", "message"),
    [
        (lambda t: np.exp(t * t), 0.0, "grows too fast"),
        (lambda t: np.full_like(t, np.nan), 0.0, "finite values"),
        (lambda t: t.sum(), 0.0, "elementwise"),
        (lambda t: np.floor(1e6 * t) % 2, 0.0, "could not be integrated"),
        (relu, math.nan, "finite numbers"),
        (relu, np.zeros(0), "one or more"),
    ],
)
def test_what_has_no_constants_is_refused(f, bias, message):
    with pytest.raises(ValueError, match=message):
        nl.lasso_constants(f, bias)


def _project_to_l1_ball(v: np.ndarray, radius: float) -> np.ndarray:
    magnitude = np.sort(np.abs(v))[::-1]
    if magnitude.sum() <= radius:
        return v
    excess = (np.cumsum(magnitude) - radius) / np.arange(1, len(v) + 1)
    level = excess[np.nonzero(magnitude > excess)[0][-1]]
    return np.sign(v) * np.maximum(np.abs(v) - level, 0)


def _constrained_lasso(a: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Projected gradient in float64: an oracle that shares nothing with the library."""
    step_size = 1 / np.linalg.norm(a, 2) ** 2
    x = z = np.zeros(a.shape[1])
    t = 1.0
    for _ in range(600):
        new = _project_to_l1_ball(z - step_size * (a.T @ (a @ z - y)), radius)
        t_new = (1 + math.sqrt(1 + 4 * t * t)) / 2
        z = new + (t - 1) / t_new * (new - x)
        x, t = new, t_new
    return x


def _mean_errors(num_measurements: int, intercept: bool, num_draws: int = 12) -> np.ndarray:
    """Errors ``||x_hat - mu x||`` of the constrained Lasso on ReLU measurements."""
    n, s = 150, 5
    c = nl.lasso_constants(relu, intercept=intercept)
    x = np.zeros(n)
    x[:s] = np.array([1, -1, 1, -1, 1]) / math.sqrt(s)
    errors = []
    for seed in range(num_draws):
        a = np.random.default_rng(seed).normal(size=(num_measurements, n))
        y = relu(a @ x) - c.intercept
        found = _constrained_lasso(a, y, float(np.abs(c.mu * x).sum()))
        errors.append(np.linalg.norm(found - c.mu * x))
    return np.array(errors)


@pytest.mark.slow
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("num_measurements", [300, 900])
def test_constrained_lasso_has_the_predicted_error(num_measurements, intercept):
    c = nl.lasso_constants(relu, intercept=intercept)
    dimension = phase.statistical_dimension(5, 150)
    predicted = nl.constrained_lasso_error(c, dimension, num_measurements)
    errors = _mean_errors(num_measurements, intercept)
    standard_error = errors.std() / math.sqrt(len(errors))
    # Within sampling error and 10 % for a prediction that is asymptotic in n.
    assert abs(errors.mean() - predicted) < 3 * standard_error + 0.1 * predicted
    other = nl.constrained_lasso_error(
        nl.lasso_constants(relu, intercept=not intercept), dimension, num_measurements
    )
    assert abs(errors.mean() - other) > 3 * standard_error + 0.1 * other
    rate = nl.generalized_lasso_rate(c, math.sqrt(dimension), num_measurements)
    assert errors.mean() < rate


def test_error_laws_at_the_edges():
    c = nl.lasso_constants(relu)
    assert nl.constrained_lasso_error(c, 20.0, 20) == math.inf
    assert nl.constrained_lasso_error(c, 0.0, 20) == 0.0
    fast, slow = (nl.constrained_lasso_error(c, 5.0, m) for m in (100_000, 400_000))
    assert fast / slow == pytest.approx(2.0, rel=1e-4)
    rate = nl.generalized_lasso_rate(c, 4.0, 100, factor=2.0)
    assert rate == pytest.approx(2 * (4 * 0.5 + math.sqrt(0.75)) / 10)
    with pytest.raises(ValueError, match="width must be zero or more"):
        nl.generalized_lasso_rate(c, -1.0, 5)
    with pytest.raises(ValueError, match="num_measurements must be at least 1"):
        nl.constrained_lasso_error(c, 1.0, 0)
