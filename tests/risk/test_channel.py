"""A release as a pair (J, C), against dense linear algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.risk import (
    Channel,
    Prior,
    channel_invloss,
    clipped_jacobian,
    error_at,
    fisher_information,
    invloss,
    isotropic_channel,
    keep_rows,
    with_noise,
)

D, P, M = 5, 14, 3


def drawn(seed, count=P, size=D):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    return {
        "jacobian": rng.normal(size=(count, size)) * rng.uniform(0.1, 3, size),
        "variance": rng.uniform(0.1, 2, count),
        "factor": rng.normal(size=(count, M)),
        "sigma": root @ root.T + 0.1 * np.eye(size),
        "x": rng.normal(size=size),
    }


def channel_of(parts, factor=True):
    return Channel(
        jnp.asarray(parts["jacobian"]),
        jnp.asarray(parts["variance"]),
        jnp.asarray(parts["factor"]) if factor else None,
    )


def dense_fisher(parts, factor=True):
    noise = np.diag(parts["variance"])
    if factor:
        noise = noise + parts["factor"] @ parts["factor"].T
    return parts["jacobian"].T @ np.linalg.solve(noise, parts["jacobian"])


def dense_posterior(parts, factor=True):
    return np.linalg.inv(np.linalg.inv(parts["sigma"]) + dense_fisher(parts, factor))


@pytest.mark.parametrize("factor", [False, True])
def test_fisher_information_and_invloss_are_those_of_dense_matrices(factor):
    parts = drawn(0)
    channel, prior = channel_of(parts, factor), Prior.gaussian(parts["sigma"])
    np.testing.assert_allclose(
        fisher_information(channel), dense_fisher(parts, factor), rtol=1e-9, atol=1e-9
    )
    expected = np.trace(dense_posterior(parts, factor))
    np.testing.assert_allclose(channel_invloss(channel, prior), expected, rtol=1e-10)
    assert not np.isclose(expected, np.trace(dense_posterior(parts, not factor)), rtol=1e-3)


def test_isotropic_channel_is_the_closed_form():
    parts = drawn(1)
    sigma = jnp.linalg.svd(jnp.asarray(parts["jacobian"]), compute_uv=False)
    prior = Prior.isotropic(D, variance=0.3, dtype="float64")
    np.testing.assert_allclose(
        channel_invloss(isotropic_channel(jnp.asarray(parts["jacobian"]), 0.7), prior),
        invloss(sigma, noise_std=0.7, prior_variance=0.3, num_inputs=D),
        rtol=1e-10,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_dropping_rows_never_lowers_invloss(seed, share):
    """Interlacing, for correlated noise as well."""
    parts = drawn(seed)
    channel, prior = channel_of(parts), Prior.gaussian(parts["sigma"])
    kept = jnp.asarray(np.random.default_rng(seed + 1).uniform(size=P) < share)
    before, after = (
        channel_invloss(channel, prior),
        channel_invloss(keep_rows(channel, kept), prior),
    )
    assert float(after) >= float(before) * (1 - 1e-9)
    whole = np.linalg.svd(parts["jacobian"], compute_uv=False)
    part = np.linalg.svd(np.asarray(kept)[:, None] * parts["jacobian"], compute_uv=False)
    assert np.all(part <= whole * (1 + 1e-9) + 1e-12)


def test_more_noise_adds_covariances():
    parts = drawn(2)
    more = with_noise(channel_of(parts), 0.5, jnp.asarray(parts["factor"][:, :1]))
    moved = dict(parts)
    moved["variance"] = parts["variance"] + 0.5
    moved["factor"] = np.concatenate([parts["factor"], parts["factor"][:, :1]], axis=1)
    np.testing.assert_allclose(fisher_information(more), dense_fisher(moved), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bound", [0.3, 1.0, 50.0])
def test_clipping_is_the_derivative_of_the_clipped_release(bound):
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(P, D)))
    x = jnp.asarray(drawn(3)["x"])

    def release(x):
        return jnp.tanh(weights @ x)

    def clipped(x):
        value = release(x)
        return value * jnp.minimum(1, bound / jnp.linalg.norm(value))

    value, jacobian = release(x), jax.jacfwd(release)(x)
    exact = jax.jacfwd(clipped)(x)
    np.testing.assert_allclose(clipped_jacobian(jacobian, value, bound), exact, atol=1e-12)
    wrong = min(1.0, bound / float(jnp.linalg.norm(value))) * jacobian  # scaled, nothing lost
    assert bound > 10 or not np.allclose(wrong, exact, rtol=1e-3)


def test_error_at_an_image_is_what_the_linear_attack_does():
    parts = drawn(4)
    channel, prior = channel_of(parts), Prior.gaussian(parts["sigma"], mean=np.full(D, 0.2))
    noise = np.diag(parts["variance"]) + parts["factor"] @ parts["factor"].T
    rng = np.random.default_rng(5)
    draws = rng.normal(size=(40_000, P)) @ np.linalg.cholesky(noise).T
    seen = parts["jacobian"] @ (parts["x"] - 0.2) + draws
    gain = dense_posterior(parts) @ parts["jacobian"].T @ np.linalg.inv(noise)
    errors = np.sum((seen @ gain.T + 0.2 - parts["x"]) ** 2, axis=1)
    found = float(error_at(channel, prior, jnp.asarray(parts["x"])))
    assert abs(errors.mean() - found) < 5 * errors.std() / 200
    assert abs(errors.mean() - float(channel_invloss(channel, prior))) > 5 * errors.std() / 200


def test_error_over_the_prior_is_invloss():
    parts = drawn(6)
    channel, prior = channel_of(parts), Prior.gaussian(parts["sigma"])
    draws = np.random.default_rng(7).normal(size=(2000, D)) @ np.linalg.cholesky(parts["sigma"]).T
    errors = jax.vmap(lambda x: error_at(channel, prior, x))(jnp.asarray(draws + 0.5))
    np.testing.assert_allclose(errors.mean(), channel_invloss(channel, prior), rtol=0.05)


def test_derivatives_and_compilation_pass_through():
    parts = drawn(8)
    prior = Prior.gaussian(parts["sigma"])

    def error(scale):
        channel = channel_of(parts)
        return channel_invloss(channel._replace(jacobian=scale * channel.jacobian), prior)

    step = 1e-5
    slope = (error(1 + step) - error(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(error))(1.0), slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, p: isotropic_channel(c.jacobian, 0.0), "noise_std"),
        (lambda c, p: clipped_jacobian(c.jacobian, c.variance, -1.0), "clip_norm"),
        (lambda c, p: channel_invloss(c, Prior.isotropic(D + 1, variance=1.0)), "columns"),
        (lambda c, p: channel_invloss(c._replace(variance=c.variance[:2]), p), "entries"),
        (
            lambda c, p: error_at(
                c, Prior.low_rank(np.random.default_rng(0).uniform(size=(9, D)), rank=2), p.mean
            ),
            "full rank",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    prior = Prior.isotropic(D, variance=1.0, dtype="float64")
    with pytest.raises(ValueError, match=message):
        call(channel_of(drawn(9), factor=False), prior)
