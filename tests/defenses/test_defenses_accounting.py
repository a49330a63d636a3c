import math
import sys

import numpy as np
import pytest
from scipy import integrate, stats

from jgia.defenses import dp_sgd_epsilon, gaussian_delta, gaussian_epsilon


def hockey_stick(epsilon: float, std: float) -> float:
    """``integral max(p - e^eps q, 0)`` for N(1, std^2) and N(0, std^2), by quadrature."""
    cut = epsilon * std**2 + 0.5  # where the two densities are in the ratio e^eps
    value, _ = integrate.quad(
        lambda x: stats.norm.pdf(x, 1, std) - math.exp(epsilon) * stats.norm.pdf(x, 0, std),
        cut, max(cut, 1) + 40 * std, epsabs=1e-14, limit=200,
        points=[cut + std, cut + 3 * std],
    )  # fmt: skip
    return value


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_delta_is_the_hockey_stick_divergence(epsilon, std):
    found = gaussian_delta(epsilon=epsilon, noise_multiplier=std)
    np.testing.assert_allclose(found, hockey_stick(epsilon, std), rtol=1e-8, atol=1e-12)


def test_delta_at_zero_is_total_variation():
    found = gaussian_delta(epsilon=0.0, noise_multiplier=2.0)
    np.testing.assert_allclose(found, math.erf(1 / (4 * math.sqrt(2))), rtol=1e-12)


def test_composition_is_less_noise():
    one = gaussian_delta(epsilon=1.5, noise_multiplier=2.0)
    np.testing.assert_allclose(
        gaussian_delta(epsilon=1.5, noise_multiplier=6.0, num_releases=9), one, rtol=1e-13
    )


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("std", [0.05, 1.0, 40.0])
def test_epsilon_inverts_delta(delta, std):
    epsilon = gaussian_epsilon(delta=delta, noise_multiplier=std)
    if epsilon > 0:
        back = gaussian_delta(epsilon=epsilon, noise_multiplier=std)
        np.testing.assert_allclose(back, delta, rtol=1e-6)
    else:
        assert gaussian_delta(epsilon=0.0, noise_multiplier=std) <= delta


def test_classical_bound_holds_and_is_looser():
    for epsilon in (0.2, 0.9):
        std = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
        assert gaussian_epsilon(delta=1e-5, noise_multiplier=std) < epsilon


def test_extremes_stay_finite():
    for std in (1e-3, 1e6):
        assert math.isfinite(gaussian_epsilon(delta=1e-10, noise_multiplier=std))
    assert gaussian_delta(epsilon=800.0, noise_multiplier=1.0) == 0.0


def test_accountant_agrees_with_the_closed_form_without_sampling():
    pytest.importorskip("dp_accounting")
    for std, steps in ((1.0, 1), (3.0, 10)):
        found = dp_sgd_epsilon(delta=1e-5, noise_multiplier=std, sampling_rate=1.0, num_steps=steps)
        exact = gaussian_epsilon(delta=1e-5, noise_multiplier=std, num_releases=steps)
        assert exact <= found <= exact * (1 + 2e-3)
        wrong = gaussian_epsilon(delta=1e-5, noise_multiplier=std, num_releases=steps + 1)
        assert found < wrong


def test_sampling_amplifies():
    pytest.importorskip("dp_accounting")
    sampled, full = (
        dp_sgd_epsilon(delta=1e-5, noise_multiplier=1.0, sampling_rate=rate, num_steps=10)
        for rate in (0.01, 1.0)
    )
    assert sampled < full / 10


def test_missing_accountant_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"jgia\[dp\]"):
        dp_sgd_epsilon(delta=1e-5, noise_multiplier=1.0, sampling_rate=0.1, num_steps=1)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_bad_arguments_are_refused(fields, word):
    options = {"delta": 1e-5, "noise_multiplier": 1.0, "sampling_rate": 0.1, "num_steps": 1}
    with pytest.raises(ValueError, match=word):
        dp_sgd_epsilon(**{**options, **fields})
