"""Inversion modes, at fixed true activations of a Gaussian first layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.attacks.ares import modes
from jgia.attacks.ares.nonlinearity import lasso_constants
from jgia.attacks.ares.plan import measured_by
from jgia.config import AresOptions
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.normalization import Normalization

MODES = ("masked_onesided", "masked_eq", "klasso_mu", "pinv", "activation_matching")


@pytest.fixture(scope="module")
def leaked(pools):
    """One crafted perceptron without pairs, its candidates, and the true images."""
    images, labels, public = pools
    images, public = images[:, :12, :12, :1], public[:, :12, :12, :1]
    victim = make_victim(
        "mlp",
        input_shape=(12, 12, 1),
        num_classes=int(labels.max()) + 1,
        normalization=Normalization.fit(public),
        widths=(144, 128),
    )
    options = AresOptions(paired=False, isolating_fraction=0.0, first_layer="ignore")
    params, plan = ares.craft(jax.random.key(0), victim, public, options=options)
    observation = client_update(jax.random.key(1), victim, params, images[:8], labels[:8])
    return victim, plan, ares.leak(observation, plan, first_layer="ignore"), images[:8]


@pytest.fixture(scope="module")
def quality(leaked, best_psnr):
    victim, plan, candidates, images = leaked
    found = {}
    for mode in MODES:
        options = AresOptions(inversion=mode)
        result = ares.invert(jax.random.key(2), candidates, plan, victim, options=options)
        assert result.stats["inversion"] == mode
        assert np.all(np.isfinite(result.images))
        found[mode] = np.median(best_psnr(images, result.images))
    return found


@pytest.mark.slow
def test_masked_modes_beat_the_papers_linearization_and_the_baselines(quality):
    assert quality["masked_onesided"] >= quality["masked_eq"]
    for baseline in ("klasso_mu", "pinv"):
        assert quality["masked_eq"] > quality[baseline]


@pytest.mark.slow
def test_pseudoinverse_solves_a_linear_layer_exactly():
    key_a, key_x = jax.random.split(jax.random.key(0))
    kernel = np.asarray(jax.random.normal(key_a, (12, 20)))
    victim = make_victim("mlp", input_shape=(2, 2, 3), num_classes=2, widths=(20, 4))
    measured = measured_by(victim, kernel, np.zeros(20))
    x = jax.random.normal(key_x, (3, 2, 2, 5))
    y = measured.operator.apply(x)
    found = modes.pseudoinverse(measured.operator, y, jnp.ones(y.shape, bool))
    np.testing.assert_allclose(found, x, atol=1e-8)
    assert np.abs(np.asarray(modes.pseudoinverse(measured.operator, 2 * y, y < 9.0)) - x).max() > 1


def test_activation_matching_lowers_the_misfit_it_descends():
    key_a, key_x, key_s = jax.random.split(jax.random.key(0), 3)
    kernel = np.asarray(jax.random.normal(key_a, (12, 60)))
    victim = make_victim("mlp", input_shape=(2, 2, 3), num_classes=2, widths=(60, 4))
    measured = measured_by(victim, kernel, np.zeros(60))
    x = jax.random.normal(key_x, (3, 2, 2, 5))
    h = jax.nn.relu(measured.operator.apply(x))
    start = 0.1 * jax.random.normal(key_s, x.shape)
    found = modes.match_activations(
        measured.operator, h, jnp.zeros((60, 1, 1, 1)), jnp.ones(h.shape, bool), start
    )
    np.testing.assert_allclose(found, x, atol=1e-3)  # five equations per unknown
    assert np.abs(np.asarray(start - x)).max() > 0.5


@pytest.mark.slow
def test_klasso_removes_the_mean_and_the_scale_of_the_rectifier():
    """With many more rows than unknowns the scaled, centered lasso approaches x, as in B2."""
    key_a, key_x = jax.random.split(jax.random.key(0))
    size, rows = 12, 4000
    kernel = np.asarray(jax.random.normal(key_a, (size, rows))) / np.sqrt(size)
    victim = make_victim("mlp", input_shape=(2, 2, 3), num_classes=2, widths=(rows, 4))
    bias = np.where(np.arange(rows) % 2, 0.0, -0.3)
    x = jax.random.normal(key_x, (3, 2, 2, 4))
    norm = jnp.sqrt(jnp.sum(x**2, axis=(0, 1, 2), keepdims=True))
    x = x / norm * np.sqrt(size)  # outputs are N(0, 1)
    measured = measured_by(victim, kernel, bias)
    h = jax.nn.relu(measured.operator.apply(x) + measured.bias[..., None])
    found = modes.klasso_mu(measured, h, jnp.ones(h.shape, bool), (3, 2, 2))
    error = np.linalg.norm(np.asarray(found - x).reshape(size, -1), axis=0) / np.sqrt(size)
    constants = lasso_constants(lambda t: np.maximum(t, 0.0), bias, intercept=True)
    shrinkage = constants.sigma / constants.mu * np.sqrt(2 * np.log(size) * size / rows)
    assert np.all(error < 3 * shrinkage)
    halved = modes.klasso_mu(measured, h / 2, jnp.ones(h.shape, bool), (3, 2, 2))
    wrong = np.linalg.norm(np.asarray(halved - x).reshape(size, -1), axis=0) / np.sqrt(size)
    assert np.all(wrong > 3 * shrinkage)
