"""Closed forms of InvLoss against simulation, optimization and each other."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jgia.risk import (
    Posterior,
    Prior,
    flat_spectrum_bound,
    invloss,
    posterior_from_gram,
    posterior_from_triangular,
    predicted_psnr,
    recoverable_fraction,
    success_rates,
    without_nuisance,
    without_nuisance_triangular,
)

SIGMA = jnp.asarray([2.0, 0.7, 0.1, 0.0])
OPTIONS: dict[str, Any] = {"noise_std": 0.3, "prior_variance": 0.5, "num_inputs": 4}


def test_mmse_is_the_best_affine_attacks_error():
    """Simulated: linear-Gaussian, the posterior mean as the attack; within 1 %."""
    rng = np.random.default_rng(0)
    right, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    left, _ = np.linalg.qr(rng.normal(size=(9, 4)))
    j = left * np.asarray(SIGMA) @ right.T
    x = np.sqrt(0.5) * rng.normal(size=(200_000, 4))
    o = x @ j.T + 0.3 * rng.normal(size=(200_000, 9))
    gain = 0.5 * j.T @ np.linalg.inv(0.5 * j @ j.T + 0.09 * np.eye(9))
    error = np.mean(np.sum((x - o @ gain.T) ** 2, axis=1))
    predicted = float(invloss(SIGMA, **OPTIONS))
    np.testing.assert_allclose(error, predicted, rtol=0.01)
    worse = np.mean(np.sum((x - 0.8 * o @ gain.T) ** 2, axis=1))
    assert worse > 1.01 * predicted


def test_full_covariance_of_an_isotropic_prior_is_mmse():
    k = jnp.diag(SIGMA**2)
    rows = jnp.sqrt(0.5) * jnp.eye(4)
    whitened = rows @ k @ rows.T / 0.3**2
    expected = float(invloss(SIGMA, **OPTIONS))
    for found in (
        posterior_from_gram(whitened, rows),
        posterior_from_triangular(rows * SIGMA[None] / 0.3, rows),
    ):
        np.testing.assert_allclose(found.error, expected, rtol=1e-12)
        np.testing.assert_allclose(found.pixel_errors.sum(), expected, rtol=1e-12)
        snr = 0.5 * np.asarray(SIGMA) ** 2 / 0.09
        np.testing.assert_allclose(found.information, np.log1p(snr).sum() / 2, rtol=1e-12)
        np.testing.assert_allclose(found.dimensions, np.sum(snr / (1 + snr)), rtol=1e-12)


def test_full_covariance_is_the_inverse_of_the_precision():
    rng = np.random.default_rng(1)
    j, c = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    sigma = c.T @ c / 9
    prior = Prior.gaussian(sigma)
    expected = np.linalg.inv(np.linalg.inv(sigma) + j.T @ j / 0.2**2)
    rows = prior.rows()
    moved = jnp.asarray(j) @ rows.T / 0.2
    for found in (
        posterior_from_gram(moved.T @ moved, rows),
        posterior_from_triangular(moved, rows),
    ):
        np.testing.assert_allclose(found.root.T @ found.root, expected, atol=1e-12)


def test_cramer_rao_is_the_limit_of_a_wide_prior():
    sigma = jnp.asarray([2.0, 0.7, 0.1])
    unbiased = float(
        invloss(sigma, noise_std=0.3, prior_variance=1.0, num_inputs=3, form="cramer_rao")
    )
    wide = float(invloss(sigma, noise_std=0.3, prior_variance=1e9, num_inputs=3))
    np.testing.assert_allclose(wide, unbiased, rtol=1e-5)
    rank = float(invloss(SIGMA, **OPTIONS, form="cramer_rao"))
    np.testing.assert_allclose(rank, unbiased + 0.5, rtol=1e-12)


def test_minimax_is_the_least_favourable_prior():
    """Numerically: the Gaussian prior of the same energy that leaves the largest error."""
    sigma = np.array([2.0, 0.7, 0.4])
    energy, tau = 3 * 0.5, 0.3

    def negative(raw):
        g = energy * np.exp(raw) / np.exp(raw).sum()
        return -np.sum(g * tau**2 / (g * sigma**2 + tau**2))

    worst = -scipy.optimize.minimize(negative, np.zeros(3), tol=1e-14).fun
    found = float(
        invloss(jnp.asarray(sigma), noise_std=tau, prior_variance=0.5, num_inputs=3, form="minimax")
    )
    np.testing.assert_allclose(found, worst, rtol=1e-8)
    assert float(invloss(SIGMA, **OPTIONS, form="minimax")) == 2.0


def test_opnorm_is_the_worst_direction():
    sigma = jnp.asarray([2.0, 0.5])
    options: dict[str, Any] = {"noise_std": 0.1, "prior_variance": 1.0, "form": "opnorm"}
    np.testing.assert_allclose(invloss(sigma, num_inputs=2, **options), 0.04, rtol=1e-12)
    assert np.isinf(invloss(sigma, num_inputs=3, **options))


@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
@hypothesis.given(seed=st.integers(0, 10_000), tau=st.floats(1e-3, 10))
def test_properties(seed, tau):
    """Monotone in the noise, within [0, E0], above dFIL's bound; dropping rows tells less."""
    rng = np.random.default_rng(seed)
    j = rng.normal(size=(8, 5)) * rng.uniform(0, 2, size=5)
    values = jnp.asarray(np.linalg.svd(j, compute_uv=False))
    fewer = jnp.asarray(np.linalg.svd(j[: rng.integers(1, 8)], compute_uv=False))
    options: dict[str, Any] = {"noise_std": tau, "prior_variance": 0.3, "num_inputs": 5}
    error = float(invloss(values, **options))
    assert 0 <= error <= 1.5 * (1 + 1e-12)
    assert error <= float(invloss(values, **options | {"noise_std": 1.1 * tau})) * (1 + 1e-12)
    assert error <= float(invloss(fewer, **options)) * (1 + 1e-12)
    bound = flat_spectrum_bound(jnp.sum(values**2) / 5, **options)
    assert error >= float(bound) * (1 - 1e-12)
    assert 0 <= float(recoverable_fraction(jnp.asarray(error), jnp.asarray(1.5))) <= 1


def test_flat_spectrum_reaches_the_bound():
    options: dict[str, Any] = {"noise_std": 0.2, "prior_variance": 0.3, "num_inputs": 4}
    error = invloss(jnp.full(4, 0.7), **options)
    np.testing.assert_allclose(error, flat_spectrum_bound(jnp.asarray(0.49), **options))


def test_nuisance_is_the_block_of_the_joint_posterior():
    rng = np.random.default_rng(2)
    j = rng.normal(size=(9, 6))
    joint = np.linalg.inv(np.eye(6) + j.T @ j)
    for k in (
        without_nuisance(jnp.asarray(j.T @ j), 2),
        (r := without_nuisance_triangular(jnp.asarray(j), 2)).T @ r,
    ):
        np.testing.assert_allclose(np.linalg.inv(np.eye(4) + k), joint[2:, 2:], atol=1e-12)


def test_success_rates_are_those_of_a_chi_square():
    """With P = e I over d directions the squared error over e is chi-square distributed."""
    posterior = Posterior(jnp.sqrt(0.3) * jnp.eye(4), jnp.zeros(()), jnp.zeros(()))
    thresholds = 0.3 * jnp.asarray(scipy.stats.chi2.ppf([0.1, 0.5, 0.9], 4))
    found = success_rates(jax.random.key(0), posterior, thresholds, num_draws=20_000)
    np.testing.assert_allclose(found, [0.1, 0.5, 0.9], atol=4 * 0.5 / np.sqrt(20_000))


def test_psnr_is_capped():
    energy = jnp.asarray(10.0)
    assert float(predicted_psnr(jnp.asarray(1e-20), energy, 100)) == 60.0
    np.testing.assert_allclose(predicted_psnr(energy, energy, 100), 10.0)


def test_bad_input_is_refused():
    wrongs: list[dict[str, Any]] = [
        {"noise_std": 0.0},
        {"noise_std": -1.0},
        {"prior_variance": 0.0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="positive"):
            invloss(SIGMA, **{**OPTIONS, **wrong})
    with pytest.raises(ValueError, match="below the number"):
        invloss(SIGMA, **{**OPTIONS, "num_inputs": 3})
