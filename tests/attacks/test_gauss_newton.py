"""The most probable image: against closed forms, SciPy, and clients that it must refuse."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jgia.attacks import gauss_newton
from jgia.attacks.gauss_newton import Settings, posterior_mode
from jgia.config import ClientConfig, GaussNewtonOptions
from jgia.federated import client_update
from jgia.models import make_victim, smooth_activations
from jgia.observation import restrict
from jgia.risk import Prior, prior_draws

RNG = np.random.default_rng(0)
D, P, TAU = 6, 9, 0.3
J, SHIFT = RNG.normal(size=(P, D)), RNG.normal(size=P)
ROOT = RNG.normal(size=(12, D))
PRIORS = {
    "isotropic": Prior.isotropic(D, variance=0.4, dtype="float64"),
    "gaussian": Prior.gaussian(ROOT.T @ ROOT / 12, RNG.normal(size=D)),
    "low_rank": Prior.low_rank(ROOT, rank=2),
}


def linear(x):
    moved = jnp.asarray(J) @ x
    return {"a": moved[:4], "b": moved[4:].reshape(5, 1)}


def curved(x):
    return jnp.tanh(jnp.asarray(J) @ x + jnp.asarray(SHIFT))


def tree(o):
    return {"a": o[:4], "b": o[4:].reshape(5, 1)}


def covariance(prior):
    rows = np.asarray(prior.rows())
    sigma = rows.T @ rows
    if prior.rank < D:
        basis = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        sigma = sigma + float(prior.tail_variance) * (np.eye(D) - basis.T @ basis)
    return sigma


def posterior_mean(prior, o, noise):
    sigma, mean = covariance(prior), np.asarray(prior.mean)
    gain = sigma @ J.T @ np.linalg.inv(J @ sigma @ J.T + noise)
    return mean + gain @ (o - J @ mean)


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("kind", list(PRIORS))
def test_linear_release_gives_the_posterior_mean(kind, solver):
    prior, o = PRIORS[kind], RNG.normal(size=P)
    settings = Settings(solver=solver, forcing=1e-10, tolerance=1e-10)
    found = posterior_mode(linear, tree(o), prior, shape=(D,), noise=TAU, settings=settings)
    expected = posterior_mean(prior, o, TAU**2 * np.eye(P))
    np.testing.assert_allclose(found.images, expected, atol=1e-8)
    assert found.end == "converged"
    assert found.losses[-1] == pytest.approx(found.objective)
    wrong = posterior_mean(prior, o, (1.05 * TAU) ** 2 * np.eye(P))
    assert np.abs(found.images - wrong).max() > 1e-4


def test_declared_covariance_is_whitened():
    root = np.tril(RNG.normal(size=(P, P))) + 2 * np.eye(P)
    inverse = jnp.asarray(np.linalg.inv(root))
    o = RNG.normal(size=P)

    def whiten(release):
        return inverse @ jnp.concatenate([release["a"], release["b"].reshape(-1)])

    found = posterior_mode(
        linear,
        tree(o),
        PRIORS["gaussian"],
        shape=(D,),
        noise=whiten,
        settings=Settings(forcing=1e-10, tolerance=1e-10),
    )
    expected = posterior_mean(PRIORS["gaussian"], o, root @ root.T)
    np.testing.assert_allclose(found.images, expected, atol=1e-8)


@pytest.mark.parametrize("kind", ["isotropic", "gaussian"])
def test_curved_release_agrees_with_scipy(kind):
    prior = PRIORS[kind]
    x = np.asarray(prior_draws(jax.random.key(0), prior, 1))[0]
    o = np.asarray(curved(jnp.asarray(x))) + 0.05 * RNG.normal(size=P)
    rows, mean = np.asarray(prior.rows()), np.asarray(prior.mean)

    def residuals(z):
        fit = np.tanh(J @ (mean + z @ rows) + SHIFT)
        return np.concatenate([(o - fit) / 0.05, z])

    starts = [np.zeros(D), *np.random.default_rng(1).normal(size=(4, D))]
    solved = [
        scipy.optimize.least_squares(residuals, z, "3-point", xtol=1e-15, ftol=1e-15)
        for z in starts
    ]
    best = min(solved, key=lambda s: s.cost)
    found = posterior_mode(
        curved,
        o,
        prior,
        shape=(D,),
        noise=0.05,
        starts=mean + np.stack(starts) @ rows,
        settings=Settings(forcing=1e-8, tolerance=1e-9, enough=0.0),
    )
    assert found.objective == pytest.approx(best.cost, rel=1e-8)
    np.testing.assert_allclose(found.images, mean + best.x @ rows, atol=1e-6)
    assert found.start == int(np.argmin(found.start_objectives))


def test_batch_has_independent_images():
    prior, o = PRIORS["gaussian"], RNG.normal(size=(2, P))
    found = posterior_mode(
        lambda x: x @ jnp.asarray(J).T,
        o,
        prior,
        shape=(2, D),
        noise=TAU,
        settings=Settings(forcing=1e-10, tolerance=1e-10),
    )
    expected = [posterior_mean(prior, row, TAU**2 * np.eye(P)) for row in o]
    np.testing.assert_allclose(found.images, expected, atol=1e-8)


def test_nothing_finite_is_said():
    found = posterior_mode(
        lambda x: jnp.log(x - 10), np.zeros(D), PRIORS["isotropic"], shape=(D,), noise=1.0
    )
    assert found.end == "nonfinite"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise must be positive"),
        ({"shape": (D + 1,)}, "whole images|pixel values"),
        ({"observed": np.zeros(P)}, "structure and shapes"),
        ({"starts": np.zeros((1, D + 1))}, "starts must have shape"),
    ],
)
def test_bad_input_is_refused(options, message):
    given = {"observed": tree(np.zeros(P)), "shape": (D,), "noise": 1.0} | options
    with pytest.raises(ValueError, match=message):
        posterior_mode(linear, given.pop("observed"), PRIORS["isotropic"], **given)


def wide(parameters):
    return jax.tree.map(lambda leaf: leaf.astype("float64"), parameters)


def setting(model: Any = "mlp", count=1, client=None, noise=0.0, **options):
    """An observation, its images, and public ones."""
    sizes: dict[str, Any] = {"widths": (20,)} if model == "mlp" else {}
    victim = make_victim(model, input_shape=(4, 4, 1), num_classes=3, **sizes | options)
    params = wide(victim.init(jax.random.key(0)))
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(16, 16)) / 16
    public = np.clip(0.5 + rng.normal(size=(200, 16)) @ mix, 0, 1).reshape(200, 4, 4, 1)
    images, labels = public[:count], np.arange(count) % 3
    seen = client_update(
        jax.random.key(1), victim, params, images, labels, client or ClientConfig()
    )
    draw = lambda leaf: np.asarray(leaf) + noise * rng.normal(size=leaf.shape)  # noqa: E731
    threat = dataclasses.replace(
        seen.threat_model, server="honest_but_curious", noise_std=noise, num_examples=count
    )
    update = jax.tree.map(draw, seen.update)
    return dataclasses.replace(seen, update=update, threat_model=threat), images, public[count:]


def error(result, images):
    """Root mean square over the images in their best order."""
    cost = ((result.images[:, None] - images[None]) ** 2).mean((2, 3, 4))
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def test_image_behind_a_gradient_is_found():
    observation, images, public = setting()
    result = gauss_newton.attack(jax.random.key(2), observation, public=public)
    assert error(result, images) < 1e-4
    assert result.labels.tolist() == [0]
    assert result.stats["labels_by"] == "idlg"
    json.dumps(result.stats, allow_nan=False)


def test_error_under_noise_is_near_the_prediction_and_a_wrong_label_shows():
    observation, images, public = setting(noise=0.01)
    result = gauss_newton.attack(jax.random.key(2), observation, public=public)
    assert error(result, images) < 0.1
    assert 0.5 < result.stats["misfit"] < 1.5
    threat = dataclasses.replace(observation.threat_model, labels=(1,))
    wrong = dataclasses.replace(observation, threat_model=threat)
    assert gauss_newton.attack(jax.random.key(2), wrong, public=public).stats["misfit"] > 5


@pytest.mark.parametrize("case", ["batch", "fedavg", "layers"])
def test_what_clients_share(case):
    options = GaussNewtonOptions(newton_starts=3 if case == "batch" else 1)
    client = None
    if case == "fedavg":
        client = ClientConfig(protocol="fedavg", learning_rate=0.1, local_epochs=2)
    observation, images, public = setting(count=2 if case == "batch" else 1, client=client)
    if case == "layers":
        observation = restrict(observation, ("fc1",))
        threat = dataclasses.replace(observation.threat_model, labels=(0,))
        observation = dataclasses.replace(observation, threat_model=threat)
    result = gauss_newton.attack(jax.random.key(2), observation, public=public, options=options)
    assert error(result, images) < 0.02
    assert len(result.images) == len(images)


def test_clients_that_cannot_be_computed_are_refused():
    observation, _, public = setting()
    threat = dataclasses.replace(
        observation.threat_model, protocol="fedavg", local_steps=None, num_examples=1
    )
    unknown = dataclasses.replace(observation, threat_model=threat)
    with pytest.raises(ValueError, match="local_learning_rate"):
        gauss_newton.attack(jax.random.key(0), unknown, public=public)
    with pytest.raises(ValueError, match="public images"):
        gauss_newton.attack(jax.random.key(0), observation)
    with pytest.raises(ValueError, match="shape"):
        gauss_newton.attack(jax.random.key(0), observation, public=public[:, :2])
    with pytest.raises(ValueError, match="contradicts"):
        gauss_newton.attack(jax.random.key(0), observation, public=public, num_examples=2)


def test_update_that_is_not_finite_gives_no_image():
    observation, _, public = setting()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, observation.update)
    result = gauss_newton.attack(
        jax.random.key(0), dataclasses.replace(observation, update=broken), public=public
    )
    assert len(result.images) == 0
    assert result.candidates[0]["status"] == "nonfinite"


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_smoothed_kinks_become_exact_and_are_smooth_before(model: Any):
    sizes: dict[str, Any] = {
        "mlp": {"widths": (5,)},
        "cnn": {"widths": (2,), "pool": "max", "fc_width": 4},
    }
    victim = make_victim(model, input_shape=(4, 4, 1), num_classes=3, **sizes[model])
    params = wide(victim.init(jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (2, 4, 4, 1), "float64")

    def smoothed(width):
        with smooth_activations(width):
            return victim.apply(params, x)

    exact = victim.apply(params, x)
    np.testing.assert_allclose(jax.jit(smoothed)(jnp.zeros(())), exact, rtol=1e-12)
    near, far = (np.abs(smoothed(w) - exact).max() for w in (1e-3, 0.3))
    assert near < 1e-3 < far


def test_release_without_kinks_is_left_alone():
    victim = make_victim("lenet", input_shape=(8, 8, 1), num_classes=3)
    params = victim.init(jax.random.key(0))
    x = jnp.full((1, 8, 8, 1), 0.5, "float32")
    with smooth_activations(0.3):
        smooth = victim.apply(params, x)
    np.testing.assert_array_equal(smooth, victim.apply(params, x))
