"""Derivatives of InvLoss: the right ones, and finite where spectra degenerate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jgia.risk import (
    differentiable_invloss,
    invloss,
    invloss_of_gram,
    invloss_of_jacobian,
    spectrum,
)

OPTIONS: dict[str, Any] = {"noise_std": 0.4, "prior_variance": 0.7}


def by_gram(j):
    return invloss_of_gram(j.T @ j, **OPTIONS)


def by_factor(j):
    return invloss_of_jacobian(j, **OPTIONS)


def by_values(j):
    sigma = jnp.linalg.svd(j, compute_uv=False)
    return invloss(sigma, num_inputs=j.shape[1], **OPTIONS)


@pytest.fixture
def j():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))


@pytest.mark.slow
def test_values_and_gradients_agree(j):
    expected, slope = jax.value_and_grad(by_values)(j)
    for form in (by_gram, by_factor):
        found, gradient = jax.value_and_grad(form)(j)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(gradient, slope, atol=1e-12)
        check_grads(lambda a, f=form: f(jnp.asarray(a)), (j,), order=2, atol=1e-5, rtol=1e-5)
    wrong = slope.at[0, 0].add(1e-6)
    assert not np.allclose(jax.grad(by_gram)(j), wrong, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("degenerate", ["repeated", "rank", "zero"])
def test_derivatives_are_finite_on_degenerate_spectra(degenerate):
    j = {
        "repeated": 2 * jnp.eye(4),
        "rank": jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)))
        @ jnp.asarray(np.random.default_rng(2).normal(size=(2, 4))),
        "zero": jnp.zeros((4, 4)),
    }[degenerate]
    hessian = jax.hessian(by_gram)(j)
    assert bool(jnp.isfinite(hessian).all())
    step = 1e-4 * jnp.asarray(np.random.default_rng(3).normal(size=j.shape))
    second = (by_gram(j + step) - 2 * by_gram(j) + by_gram(j - step)) / 1
    form = jnp.einsum("ij,ijkl,kl->", step, hessian, step)
    np.testing.assert_allclose(second, form, rtol=1e-3, atol=1e-14)
    assert bool(jnp.isfinite(jax.grad(by_factor)(j)).all())


def fn(params, x):
    hidden = jnp.tanh(params["w"] @ x)
    return {"a": params["v"] @ hidden, "b": hidden**2}


def params():
    rng = np.random.default_rng(4)
    return {"w": jnp.asarray(rng.normal(size=(6, 3))), "v": jnp.asarray(rng.normal(size=(2, 6)))}


X = jnp.asarray([0.3, -0.2, 0.5])


def risk(p, **options):
    return differentiable_invloss(fn, p, X, **OPTIONS, **options)


@pytest.mark.slow
def test_surrogate_is_autodiffs_gradient():
    expected, slope = jax.value_and_grad(lambda p: risk(p, method="autodiff"))(params())
    found, gradient = jax.jit(jax.value_and_grad(risk))(params())
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for name in slope:
        np.testing.assert_allclose(gradient[name], slope[name], atol=1e-12)
    sigma = spectrum(lambda x: fn(params(), x), X).sigma
    np.testing.assert_allclose(found, invloss(sigma, num_inputs=3, **OPTIONS), rtol=1e-10)


@pytest.mark.slow
def test_probes_are_unbiased():
    slope = jax.grad(risk)(params())

    def one(key):
        return jax.grad(lambda p: risk(p, key=key, num_probes=1))(params())

    draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
    for name, leaf in draws.items():
        spread = leaf.std(0) / np.sqrt(4000) + 1e-12
        assert float(jnp.max(jnp.abs(leaf.mean(0) - slope[name]) / spread)) < 4.5
        assert float(jnp.max(jnp.abs(1.3 * leaf.mean(0) - slope[name]) / spread)) > 4.5
    with pytest.raises(ValueError, match="give a key"):
        risk(params(), num_probes=2)


def test_the_iterative_method_is_the_surrogate_with_the_same_probes():
    probes = {"key": jax.random.key(3), "num_probes": 8}
    exact = jax.grad(lambda p: risk(p, **probes))(params())
    options = probes | {"key": jax.random.key(3), "method": "iterative"}
    found, gradient = jax.jit(jax.value_and_grad(lambda p: risk(p, **options)))(params())
    for name in exact:
        np.testing.assert_allclose(gradient[name], exact[name], rtol=2e-3, atol=1e-5)
    draws = jax.random.split(jax.random.key(4), 500)
    one = jax.jit(jax.vmap(lambda key: risk(params(), key=key, num_probes=2, method="iterative")))(
        draws
    )
    spread = float(one.std()) / np.sqrt(500)
    assert abs(float(one.mean()) - float(risk(params()))) < 4 * spread
    assert np.isfinite(float(found))


def test_iterations_that_stop_early_estimate_too_much_risk():
    options = {"num_probes": 8, "method": "iterative"}
    values = [
        float(risk(params(), key=jax.random.key(5), num_iterations=count, **options))
        for count in (1, 2, 3)
    ]
    assert values[0] < values[1] <= values[2] * (1 + 1e-6)
    with pytest.raises(ValueError, match="give num_probes"):
        risk(params(), method="iterative")
    with pytest.raises(ValueError, match="num_iterations"):
        risk(params(), key=jax.random.key(5), num_iterations=0, **options)


@pytest.mark.slow
def test_descent_lowers_the_risk():
    p = params()
    before = float(risk(p))
    gradient = jax.grad(risk)(p)
    better = jax.tree.map(lambda leaf, g: leaf + 1e-2 * g, p, gradient)
    assert float(risk(better)) > before


def test_input_gradient_by_autodiff():
    check_grads(
        lambda x: differentiable_invloss(
            fn, params(), jnp.asarray(x), **OPTIONS, method="autodiff"
        ),
        (X,),
        order=1,
        modes=("rev",),
    )
