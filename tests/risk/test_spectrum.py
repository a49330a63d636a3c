"""Spectra: every route against LAPACK in float64, and what float32 loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.risk import (
    Sizes,
    choose_route,
    invloss,
    invloss_bracket_by_quadrature,
    invloss_of_gram,
    invloss_of_jacobian,
    spectrum,
    top_spectrum,
)


def matrix(rows, columns, sigma, *, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(sigma))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(sigma))))
    return left * sigma @ right.T


@pytest.mark.parametrize("route", ["svd", "qr", "rows", "gram"])
@pytest.mark.parametrize("shape", [(30, 12), (7, 12)], ids=["tall", "short"])
def test_routes_agree_with_lapack(route, shape):
    count = min(shape)
    a = jnp.asarray(matrix(shape[0], shape[1], np.linspace(3, 0.5, count)))

    def fn(x):
        moved = a @ x
        return {"first": moved[:5], "second": [moved[5:].reshape(-1, 1)]}

    found = spectrum(fn, jnp.zeros(12), route=route, vectors=True, chunk_size=5)
    np.testing.assert_allclose(found.sigma, np.linspace(3, 0.5, count), rtol=1e-12)
    assert found.complete
    assert found.right is not None
    reached = np.linalg.norm(a @ np.asarray(found.right).T, axis=0)
    np.testing.assert_allclose(reached, found.sigma, rtol=1e-10)


def test_repeated_and_zero_singular_values():
    sigma = np.array([2.0, 2.0, 2.0, 0.0, 0.0])
    a = jnp.asarray(matrix(9, 5, sigma))
    for route in ("svd", "qr", "gram"):
        found = spectrum(lambda x: a @ x, jnp.zeros(5), route=route).sigma
        np.testing.assert_allclose(found, sigma, atol=1e-7 if route == "gram" else 1e-14)


def test_krylov_finds_the_leading_values():
    sigma = 0.7 ** np.arange(60)
    a = jnp.asarray(matrix(200, 60, sigma))
    top = top_spectrum(jax.random.key(0), lambda x: a @ x, jnp.zeros(60), num_steps=25)
    np.testing.assert_allclose(top.sigma[:5], sigma[:5], rtol=1e-8)
    assert bool(jnp.all(top.sigma <= sigma[:25] * (1 + 1e-10)))
    reached = np.linalg.norm(a @ np.asarray(top.right[:5]).T, axis=0)
    np.testing.assert_allclose(reached, sigma[:5], rtol=1e-7)
    with pytest.raises(ValueError, match="num_steps"):
        top_spectrum(jax.random.key(0), lambda x: a @ x, jnp.zeros(60), num_steps=61)


@pytest.mark.slow
def test_quadrature_brackets_the_trace():
    """Gauss below, Gauss-Radau above, on each probe; and both close in."""
    sigma = np.logspace(1, -2, 40)
    a = matrix(80, 40, sigma)
    k = jnp.asarray(a.T @ a)
    truth = np.sum(1 / (1 + sigma**2))
    gaps = []
    for steps in (4, 8, 16, 32):
        found = invloss_bracket_by_quadrature(
            jax.random.key(1), lambda v: k @ v, jnp.ones(()), 40, num_steps=steps, num_probes=64
        )
        error = 4 * float(found.standard_error)
        assert float(found.lower) <= truth + error
        assert float(found.upper) >= truth - error
        gaps.append(float(found.upper - found.lower))
        assert gaps[-1] >= -1e-9
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3 * truth


def test_quadrature_is_exact_for_every_probe():
    """Against the same probes' exact values: no Monte Carlo error in the comparison."""
    sigma = np.logspace(1, -2, 30)
    a = matrix(50, 30, sigma)
    k = a.T @ a
    key = jax.random.key(5)
    signs = np.asarray(jax.random.rademacher(jax.random.clone(key), (8, 30), "float64"))
    exact = np.mean([z @ np.linalg.solve(np.eye(30) + k, z) for z in signs])
    found = invloss_bracket_by_quadrature(
        key, lambda v: jnp.asarray(k) @ v, jnp.ones(()), 30, num_steps=6, num_probes=8
    )
    assert float(found.lower) < exact < float(found.upper)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
def test_float32_needs_orthogonal_steps(noise):
    """Singular values from 1 to 1e-6: what squares is right only where noise hides its error."""
    sigma = np.logspace(0, -6, 64)
    truth = np.sum(1 / (1 + (sigma / noise) ** 2))
    a = matrix(300, 64, sigma).astype("float32")
    with jax.enable_x64(False):
        j = jnp.asarray(a)
        options = {"noise_std": noise, "prior_variance": 1.0}
        stable = float(invloss_of_jacobian(j, **options))
        np.testing.assert_allclose(stable, truth, rtol=2e-4)
        for route in ("svd", "qr"):
            found = spectrum(lambda x: j @ x, jnp.zeros(64), route=route).sigma
            value = float(invloss(found, num_inputs=64, **options))
            np.testing.assert_allclose(value, truth, rtol=2e-4)
        squared = float(invloss_of_gram(j.T @ j, **options))
    if noise >= 1e-2:
        np.testing.assert_allclose(squared, truth, rtol=2e-3)
    if noise <= 1e-4:
        assert not abs(squared - truth) < 2e-4 * truth


def test_choice_of_the_route():
    def chosen(inputs, outputs, **options):
        shape = Sizes(inputs, outputs, (outputs,), ("w",))
        return choose_route(shape, **options)

    assert chosen(784, 10_000).route == "svd"
    assert chosen(3072, 15_826, relative_noise=0.1).route == "rows"
    assert chosen(3072, 15_826, relative_noise=1e-4).route == "qr"
    assert chosen(3072, 15_826, relative_noise=1e-4, dtype="float64").route == "rows"
    assert chosen(3072, 11_000_000, relative_noise=0.1, memory_bytes=2**33).route == "gram"
    with pytest.raises(ValueError, match=r"8300 directions.*GiB.*krylov"):
        chosen(8300, 1000)
    with pytest.raises(ValueError, match=r"memory_bytes allows"):
        chosen(3072, 11_000_000, memory_bytes=2**20)
    assert chosen(150_528, 1000, rank=512).route == "svd"
    dense = {"structured_outputs": 4000, "relative_noise": 0.1}
    assert chosen(3072, 400_000, **dense).route == "structured"
    assert chosen(3072, 12_000, **dense).route == "rows"  # little to save
    assert chosen(3072, 400_000, **dense | {"relative_noise": 1e-4}).route != "structured"
    assert chosen(784, 10_000, **dense | {"structured_outputs": 900}).route == "svd"


def test_bad_routes_are_refused():
    with pytest.raises(ValueError, match="give a key"):
        spectrum(lambda x: x, jnp.zeros(3), route="krylov")
    with pytest.raises(ValueError, match="structured_gram"):
        spectrum(lambda x: x, jnp.zeros(3), route="structured")
    with pytest.raises(ValueError, match="float32 or float64"):
        spectrum(lambda x: x, jnp.zeros(3, "float16"))


def test_nan_is_not_hidden():
    for route in ("svd", "gram"):
        found = spectrum(lambda x: x * jnp.nan, jnp.ones(3), route=route).sigma
        assert bool(jnp.isnan(found).all())
