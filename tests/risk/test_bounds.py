"""The bracket around InvLoss: tight where the release is linear, right where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jgia.risk import Prior, invloss, invloss_bracket, lower_bound, prior_draws, upper_bound

J = np.random.default_rng(0).normal(size=(6, 3))


def linear(x):
    return jnp.asarray(J) @ x


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["isotropic", "gaussian"])
def test_bracket_is_tight_for_a_linear_release(kind):
    c = np.random.default_rng(1).normal(size=(8, 3))
    prior = (
        Prior.isotropic(3, variance=0.4, dtype="float64")
        if kind == "isotropic"
        else Prior.gaussian(c.T @ c / 8)
    )
    sigma = np.asarray(prior.rows().T @ prior.rows())
    truth = np.trace(np.linalg.inv(np.linalg.inv(sigma) + J.T @ J / 0.5**2))
    low = lower_bound(jax.random.key(0), linear, (3,), prior, noise_std=0.5, num_draws=3)
    high = upper_bound(jax.random.key(1), linear, jnp.zeros(3), prior, noise_std=0.5)
    np.testing.assert_allclose(low, truth, rtol=1e-10)
    np.testing.assert_allclose(high, truth, rtol=1e-6)
    both = invloss_bracket(
        jax.random.key(2), linear, jnp.zeros(3), prior, noise_std=0.5, num_draws=3
    )
    np.testing.assert_allclose(both, truth, rtol=1e-6)
    if kind == "isotropic":
        values = jnp.asarray(np.linalg.svd(J, compute_uv=False))
        closed = invloss(values, noise_std=0.5, prior_variance=0.4, num_inputs=3)
        np.testing.assert_allclose(closed, truth, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bend", [0.1, 0.5])
def test_bracket_holds_for_a_curved_release(bend):
    """One input: the posterior mean's error by numerical integration is between the two."""
    tau, s2 = 0.3, 0.5

    def fn(x):
        return x + bend * jnp.sin(3 * x)

    def release(x):
        return x + bend * np.sin(3 * x)

    x = np.linspace(-6, 6, 4001) * np.sqrt(s2)
    weight = np.exp(-(x**2) / (2 * s2))
    weight /= weight.sum()
    o = np.linspace(release(x).min() - 2, release(x).max() + 2, 1501)
    likelihood = np.exp(-((o[:, None] - release(x)[None]) ** 2) / (2 * tau**2)) * weight
    evidence = likelihood.sum(1)
    mean = likelihood @ x / np.maximum(evidence, 1e-300)
    second = likelihood @ x**2 / np.maximum(evidence, 1e-300)
    density = evidence / np.sqrt(2 * np.pi * tau**2)
    truth = scipy.integrate.trapezoid((second - mean**2) * density, o)

    prior = Prior.isotropic(1, variance=s2, mean=0.0, dtype="float64")
    low = lower_bound(jax.random.key(0), fn, (1,), prior, noise_std=tau, num_draws=2000)
    high = upper_bound(jax.random.key(1), fn, jnp.zeros(1), prior, noise_std=tau, num_draws=2000)
    assert float(low) <= truth * 1.01
    assert truth * 0.99 <= float(high) <= s2 * (1 + 1e-9)


@pytest.mark.slow
def test_draws_have_the_priors_covariance():
    data = np.random.default_rng(2).normal(size=(50, 6)) * np.array([3, 2, 1, 0.5, 0.5, 0.5])
    for prior in (
        Prior.isotropic(6, variance=0.3, dtype="float64"),
        Prior.from_data(data),
        Prior.low_rank(data, rank=2),
    ):
        draws = np.asarray(prior_draws(jax.random.key(0), prior, 100_000))
        rows = prior.rows()
        expected = np.asarray(rows.T @ rows)
        if prior.rank < 6:
            basis = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
            expected = expected + np.asarray(prior.tail_variance * (jnp.eye(6) - basis.T @ basis))
        np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.02 * expected.max())
        np.testing.assert_allclose(np.trace(expected), prior.energy, rtol=1e-10)
        np.testing.assert_allclose(draws.mean(0), prior.mean, atol=0.02 * expected.max())


def test_bad_input_is_refused():
    prior = Prior.isotropic(3, variance=0.4, dtype="float64")
    with pytest.raises(ValueError, match="num_draws"):
        upper_bound(jax.random.key(0), linear, jnp.zeros(3), prior, noise_std=0.5, num_draws=1)
    data = np.random.default_rng(2).normal(size=(50, 3))
    with pytest.raises(ValueError, match="full rank"):
        upper_bound(
            jax.random.key(0), linear, jnp.zeros(3), Prior.low_rank(data, rank=1), noise_std=0.5
        )


def test_priors_refuse_what_is_no_covariance():
    with pytest.raises(ValueError, match="square"):
        Prior.gaussian(np.ones((2, 3)))
    with pytest.raises(ValueError, match="symmetric"):
        Prior.gaussian(np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"positive definite.*shrinkage"):
        Prior.gaussian(np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="mean must have 2"):
        Prior.gaussian(np.eye(2), np.zeros(3))
    with pytest.raises(ValueError, match="at least two"):
        Prior.from_data(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="differ"):
        Prior.from_data(np.zeros((5, 4)))
    with pytest.raises(ValueError, match="rank=4 needs"):
        Prior.low_rank(np.random.default_rng(0).normal(size=(9, 4)), rank=4)
    with pytest.raises(ValueError, match="variance"):
        Prior.isotropic(4, variance=0.0)
