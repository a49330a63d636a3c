"""Levels, covariances and errors of shaped noise, against SciPy, formulas and simulation."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.optimize import brentq, minimize

from jgia.risk.shaping import (
    covariance_factor,
    expected_error,
    noise_energy,
    shaped_covariance,
    water_filling,
    water_level,
)
from jgia.risk.weighted_shaping import geometric_mean

PRIOR = 0.3
UNKNOWN: Any = "round"
SIGMA = np.array([2.0, 0.05, 0.7, 0.3, 1.1, 0.02])


@pytest.fixture
def untyped():
    """Without the shape checks that only tests have: what users see comes from the functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def problem(seed: int, d: int = 4, rows: int = 9, *, spread: float = 1.5):
    """A Gram matrix of a wide spectrum and a prior covariance that does not commute with it."""
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(rows, d)) * np.logspace(0, -spread, d)
    half = rng.normal(size=(d, d))
    return jacobian, half @ half.T / d + 0.1 * np.eye(d)


def spectral_error(xi, sigma, prior=PRIOR, floor=0.0):
    """Error of an isotropic prior by the scalar formula, with isotropic noise ``floor``."""
    noise = sigma**2 * xi + floor**2
    return np.where(
        sigma > 0, prior * noise / np.where(sigma > 0, prior * sigma**2 + noise, 1), prior
    )


def minimized(cost, error, target, start):
    """SciPy's constrained minimum of ``cost``."""
    found = minimize(
        cost,
        start,
        constraints={"type": "ineq", "fun": lambda v: error(v) - target},
        method="SLSQP",
        options={"maxiter": 3000, "ftol": 1e-14},
    )
    # Status 8 is a line search that cannot improve any more.
    assert found.success or found.status == 8, found.message
    assert error(found.x) > target * (1 - 1e-9)
    return found.fun


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_water_filling_is_the_constrained_minimum(share, floor):
    target = share * PRIOR * SIGMA.size
    here = spectral_error(np.zeros(SIGMA.size), SIGMA, floor=floor).sum()
    xi = np.asarray(water_filling(jnp.asarray(SIGMA), PRIOR, target, noise_std=floor))
    if here >= target:
        np.testing.assert_array_equal(xi, 0)
        return
    np.testing.assert_allclose(spectral_error(xi, SIGMA, floor=floor).sum(), target, rtol=1e-12)
    energy = np.sum(SIGMA**2 * xi)
    # In v = sqrt(energy per direction), where SLSQP is well scaled.
    best = minimized(
        lambda v: np.sum(v**2),
        lambda v: spectral_error(v**2 / SIGMA**2, SIGMA, floor=floor).sum(),
        target,
        np.full(SIGMA.size, 0.3),
    )
    np.testing.assert_allclose(energy, best, rtol=1e-6)
    isotropic: Any = brentq(
        lambda t: spectral_error(np.zeros(SIGMA.size), SIGMA, floor=t).sum() - target, 1e-9, 1e3
    )
    assert energy <= SIGMA.size * (isotropic**2 - floor**2) * (1 + 1e-12)
    for wrong in (0.98, 1.02):  # the same criterion rejects a wrong level
        level = wrong * float(water_level(jnp.asarray(SIGMA), PRIOR, target, noise_std=floor))
        off = np.maximum(PRIOR * (level / SIGMA - 1) - floor**2 / SIGMA**2, 0)
        assert abs(spectral_error(off, SIGMA, floor=floor).sum() / target - 1) > 1e-4


def test_unseen_directions_cost_nothing_and_keep_their_error():
    sigma = jnp.array([0.0, 2.0, 1.0, 0.0])
    for floor in (0.0, 0.1):
        xi = water_filling(sigma, PRIOR, 2.3 * PRIOR, noise_std=floor)
        np.testing.assert_array_equal(xi[jnp.array([0, 3])], 0)
        error = spectral_error(np.asarray(xi), np.asarray(sigma), floor=floor)
        np.testing.assert_array_equal(error[[0, 3]], PRIOR)
        np.testing.assert_allclose(error.sum(), 2.3 * PRIOR, rtol=1e-13)
    assert float(water_level(sigma, PRIOR, 2 * PRIOR)) == 0
    assert float(water_level(sigma, PRIOR, 1.0 * PRIOR)) == 0
    assert float(water_level(jnp.zeros(3), PRIOR, 3 * PRIOR)) == 0
    assert float(water_level(jnp.array([1.0, 2.0]), PRIOR, 0.0)) == 0


def test_targets_out_of_reach_are_clipped():
    top = water_level(jnp.asarray(SIGMA), PRIOR, PRIOR * SIGMA.size)
    assert np.isfinite(float(top))
    assert float(top) == float(water_level(jnp.asarray(SIGMA), PRIOR, 1e9))
    xi = np.asarray(water_filling(jnp.asarray(SIGMA), PRIOR, 1e9))
    np.testing.assert_allclose(spectral_error(xi, SIGMA).sum(), PRIOR * SIGMA.size, rtol=1e-7)
    assert float(water_level(jnp.asarray(SIGMA), PRIOR, -1.0)) == 0
    assert np.isnan(float(water_level(jnp.asarray(SIGMA), PRIOR, jnp.nan)))


def test_level_compiles_vectorizes_and_differentiates():
    sigma = jnp.asarray(SIGMA)
    targets = PRIOR * jnp.array([0.5, 2.0, 4.0])
    looped = jnp.stack([water_filling(sigma, PRIOR, t) for t in targets])
    mapped = jax.vmap(lambda t: water_filling(sigma, PRIOR, t))(targets)
    np.testing.assert_allclose(mapped, looped, rtol=1e-14, atol=1e-16)
    compiled = jax.jit(water_level)
    np.testing.assert_allclose(
        compiled(sigma, PRIOR, targets[1]), water_level(sigma, PRIOR, targets[1]), rtol=1e-14
    )
    check_grads(
        jax.jit(lambda s, t: water_filling(jnp.asarray(s), PRIOR, jnp.asarray(t))),
        (jnp.array([2.0, 0.5, 0.7, 0.3, 1.1]), targets[1]),
        order=2,
    )
    check_grads(
        jax.jit(lambda s, p: water_level(s, p, targets[1], noise_std=0.1)),
        (sigma, jnp.asarray(PRIOR)),
        order=1,
    )


def test_level_in_float32_is_that_in_float64():
    rng = np.random.default_rng(3)
    sigma = rng.lognormal(sigma=2.0, size=500)
    for share in (0.1, 0.5, 0.9):
        low = water_level(jnp.asarray(sigma, "float32"), 0.07, share * 500 * 0.07)
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(
            low, water_level(jnp.asarray(sigma), 0.07, share * 500 * 0.07), rtol=2e-4
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sigma=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=5, max_size=5),
    shares=st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.999)),
    floor=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_more_error_takes_more_noise_in_every_direction(sigma, shares, floor):
    values = jnp.asarray(sigma, "float64")
    few, many = (
        np.asarray(water_filling(values, PRIOR, s * 5 * PRIOR, noise_std=floor))
        for s in sorted(shares)
    )
    assert np.all(many >= few * (1 - 1e-9))
    here = spectral_error(np.zeros(5), np.asarray(sigma), floor=floor).sum()
    reached = spectral_error(many, np.asarray(sigma), floor=floor).sum()
    np.testing.assert_allclose(reached, max(here, max(shares) * 5 * PRIOR), rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_expected_error_is_the_posterior_trace(seed):
    jacobian, prior = problem(seed)
    rng = np.random.default_rng(seed + 50)
    half = rng.normal(size=(4, 4))
    covariance = half @ half.T
    noise = jacobian @ covariance @ jacobian.T + 0.2**2 * np.eye(9)
    posterior = np.linalg.inv(np.linalg.inv(prior) + jacobian.T @ np.linalg.solve(noise, jacobian))
    got = expected_error(
        jnp.asarray(jacobian.T @ jacobian),
        jnp.asarray(covariance),
        jnp.asarray(prior),
        noise_std=0.2,
    )
    np.testing.assert_allclose(got, np.trace(posterior), rtol=1e-11)
    parallel = np.trace(np.linalg.inv(np.linalg.inv(prior) + np.linalg.inv(covariance)))
    gram = jnp.asarray(jacobian.T @ jacobian)
    np.testing.assert_allclose(
        expected_error(gram, jnp.asarray(covariance), jnp.asarray(prior)), parallel, rtol=1e-11
    )
    np.testing.assert_allclose(
        noise_energy(gram, jnp.asarray(covariance)), np.trace(noise) - 9 * 0.2**2, rtol=1e-12
    )


def test_expected_error_of_a_release_with_fewer_numbers_than_pixels():
    jacobian, prior = problem(2, d=6, rows=2)
    observed = jacobian @ (prior + np.eye(6)) @ jacobian.T
    gain = prior @ jacobian.T @ np.linalg.inv(observed)
    expected = np.trace(prior - gain @ jacobian @ prior)
    got = expected_error(jnp.asarray(jacobian.T @ jacobian), jnp.eye(6), jnp.asarray(prior))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_expected_error_is_what_the_best_linear_attack_gets():
    jacobian, prior = problem(4)
    covariance = np.asarray(
        shaped_covariance(
            jnp.asarray(jacobian.T @ jacobian), jnp.asarray(prior), 0.4 * np.trace(prior)
        )
    )
    rng = np.random.default_rng(0)
    inputs = rng.multivariate_normal(np.zeros(4), prior, size=40_000)
    noisy = inputs + rng.multivariate_normal(np.zeros(4), covariance, size=40_000)
    gain = prior @ np.linalg.inv(prior + covariance)
    errors = np.sum((inputs - noisy @ gain.T) ** 2, axis=1)
    standard = errors.std() / 200
    assert abs(errors.mean() - 0.4 * np.trace(prior)) < 4.5 * standard
    assert abs(errors.mean() - 0.43 * np.trace(prior)) > 4.5 * standard


SHAPED: dict[str, dict[str, Any]] = {
    "water_filling": {},
    "uniform": {},
    "maxmin": {},
    "protect": {"weight": jnp.diag(jnp.array([1.0, 2.0, 0.5, 1.0]))},
}


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_every_shape_reaches_its_target_and_no_shape_beats_water_filling(shape, isotropic, share):
    jacobian, prior = problem(5)
    prior = PRIOR * np.eye(4) if isotropic else prior
    given_prior: Any = PRIOR if isotropic else jnp.asarray(prior)
    gram = jnp.asarray(jacobian.T @ jacobian)
    options = SHAPED[shape]
    weight = np.asarray(options.get("weight", np.eye(4)))
    target = share * np.trace(weight @ prior)
    noise = shaped_covariance(gram, given_prior, target, shape=shape, **options)
    posterior = prior - prior @ np.linalg.solve(prior + np.asarray(noise), prior)
    np.testing.assert_allclose(np.trace(weight @ posterior), target, rtol=1e-10)
    assert np.linalg.eigvalsh(noise)[0] > -1e-12 * np.linalg.norm(noise)
    np.testing.assert_array_equal(noise, noise.T)
    reached = float(expected_error(gram, noise, given_prior))
    cheapest = shaped_covariance(gram, given_prior, reached)
    assert float(noise_energy(gram, cheapest)) <= float(noise_energy(gram, noise)) * (1 + 1e-6)
    if shape == "maxmin":
        shares = np.linalg.eigvals(np.linalg.solve(prior, posterior)).real
        np.testing.assert_allclose(shares, share, rtol=1e-9)
    if shape == "uniform":
        np.testing.assert_allclose(
            noise, noise[0, 0] * np.eye(4), rtol=0, atol=1e-10 * float(noise[0, 0])
        )


@pytest.mark.parametrize("shape", ["water_filling", "uniform", "maxmin"])
def test_unseen_directions_get_no_noise(shape):
    jacobian, prior = problem(6, d=5, rows=3)
    gram = jnp.asarray(jacobian.T @ jacobian)
    for given_prior in (PRIOR, jnp.asarray(prior)):
        energy = 5 * PRIOR if isinstance(given_prior, float) else np.trace(prior)
        noise = shaped_covariance(gram, given_prior, 0.9 * energy, shape=shape)
        hidden = np.linalg.svd(jacobian)[2][3:].T
        np.testing.assert_allclose(noise @ hidden, 0, atol=1e-9 * float(jnp.abs(noise).max()))
        got = expected_error(gram, noise, given_prior)
        np.testing.assert_allclose(got, 0.9 * energy, rtol=1e-8)


@pytest.mark.parametrize("shape", ["water_filling", "uniform", "maxmin"])
def test_covariances_compile_and_vectorize(shape):
    jacobian, prior = problem(8)
    gram = jnp.asarray(jacobian.T @ jacobian)
    targets = np.trace(prior) * jnp.array([0.2, 0.9])

    def shaped(target):
        return shaped_covariance(gram, jnp.asarray(prior), target, shape=shape)

    eager = jnp.stack([shaped(t) for t in targets])
    scale = np.abs(eager).max()
    np.testing.assert_allclose(jax.jit(jax.vmap(shaped))(targets), eager, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(jax.jit(shaped)(targets[1]), eager[1], rtol=0, atol=1e-9 * scale)
    if shape != "water_filling":
        check_grads(jax.jit(shaped), (targets[1],), order=1)


def test_float32_reaches_the_target():
    jacobian, prior = problem(9, d=20, rows=40, spread=0.5)
    gram = jnp.asarray(jacobian.T @ jacobian, "float32")
    wide: Any = jnp.asarray(prior, "float32")
    for given_prior, energy in ((PRIOR, 20 * PRIOR), (wide, np.trace(prior))):
        for shape in ("water_filling", "uniform", "maxmin"):
            noise = shaped_covariance(gram, given_prior, 0.5 * energy, shape=shape)
            assert noise.dtype == jnp.float32
            got = expected_error(
                jnp.asarray(jacobian.T @ jacobian),
                noise.astype("float64"),
                given_prior if isinstance(given_prior, float) else jnp.asarray(prior),
            )
            np.testing.assert_allclose(got, 0.5 * energy, rtol=1e-3)


def test_ridge_leaves_no_direction_without_noise():
    gram = jnp.diag(jnp.array([4.0, 1.0, 0.0]))
    target = 0.5 * 3 * PRIOR
    hidden = shaped_covariance(gram, PRIOR, target)
    assert float(hidden[2, 2]) == 0
    lifted = shaped_covariance(gram, PRIOR, target, ridge=1e-3)
    assert float(lifted[2, 2]) > 0
    np.testing.assert_allclose(expected_error(jnp.eye(3), lifted, PRIOR), target, rtol=1e-9)
    assert float(expected_error(jnp.eye(3), hidden, PRIOR)) < 0.5 * target  # another release


def test_factor_squares_to_the_positive_part():
    jacobian, prior = problem(10, d=5, rows=3)
    noise = shaped_covariance(jnp.asarray(jacobian.T @ jacobian), jnp.asarray(prior), 1.0)
    factor = covariance_factor(noise)
    np.testing.assert_allclose(factor @ factor.T, noise, atol=1e-10 * np.abs(noise).max())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: water_level(jnp.ones(()), 1.0, 1.0), "one singular value"),
        (lambda: water_level(jnp.arange(3), 1.0, 1.0), "floating"),
        (lambda: shaped_covariance(jnp.ones((2, 3)), 1.0, 1.0), "square"),
        (lambda: shaped_covariance(jnp.eye(2), jnp.eye(3), 1.0), "prior"),
        (lambda: shaped_covariance(jnp.eye(2), 1.0, 1.0, shape=UNKNOWN), "shape"),
        (lambda: shaped_covariance(jnp.eye(2), 1.0, 1.0, shape="protect"), "weight"),
        (lambda: shaped_covariance(jnp.eye(2), 1.0, 1.0, weight=jnp.eye(2)), "weight"),
        (lambda: shaped_covariance(jnp.eye(2), 1.0, 1.0, ridge=-1.0), "ridge"),
        (lambda: expected_error(jnp.eye(2), jnp.eye(3), 1.0), "covariance"),
        (lambda: noise_energy(jnp.eye(2), jnp.eye(3)), "covariance"),
        (lambda: covariance_factor(jnp.ones((1, 2))), "square"),
        (lambda: geometric_mean(jnp.eye(2), jnp.eye(3)), "b must"),
    ],
)
def test_bad_shapes_are_refused(call, word, untyped):
    with pytest.raises(ValueError, match=word):
        call()
