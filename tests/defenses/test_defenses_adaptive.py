"""Noise made to measure: scale, shape, input, coordinates; and pruning of a representation."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jgia.defenses import declared_noise_std, gaussian_noise
from jgia.defenses.adaptive_scale import (
    adaptive_scale_noise,
    layer_scales_for_target,
    scale_for_target,
)
from jgia.defenses.coordinate import coordinate_noise
from jgia.defenses.shaped import input_noise, shaped_noise, shaped_noise_transformation
from jgia.defenses.soteria import soteria, soteria_scores
from jgia.risk.shaping import covariance_factor, expected_error, shaped_covariance

PRIOR = 0.08
D, P = 4, 12


@pytest.fixture
def untyped():
    """Without the shape checks that only tests have: what users see comes from the functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def release(x):
    """A smooth release of a (2, 2) input: 12 numbers in two arrays."""
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(8, D)), x.dtype)
    second = jnp.asarray(rng.normal(size=(2, 2, D)), x.dtype)
    flat = x.reshape(-1)
    return {"a": jnp.tanh(first @ flat), "b": jnp.sin(second @ flat)}


X = jnp.array([[0.2, 0.7], [0.5, 0.1]])


def flat_of(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def dense_jacobian(fn=release, x=X):
    leaves = jax.tree.leaves(jax.jacfwd(fn)(x))
    return np.concatenate([np.asarray(leaf).reshape(-1, x.size) for leaf in leaves])


JACOBIAN = dense_jacobian()
GRAM = jnp.asarray(JACOBIAN.T @ JACOBIAN)


def invertibility_loss(jacobian, noise_std, prior=PRIOR):
    """By a dense SVD: the posterior trace of isotropic noise and prior."""
    sigma = np.zeros(jacobian.shape[1])
    values = np.linalg.svd(jacobian, compute_uv=False)
    sigma[: len(values)] = values
    return np.sum(prior * noise_std**2 / (prior * sigma**2 + noise_std**2))


def covariance_fits(draws, covariance):
    """Whether every entry of the second moments is within 5.5 of its standard errors."""
    size = len(draws)
    moments = draws.T @ draws / size
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / size)
    return bool(np.all(np.abs(moments - covariance) <= 5.5 * error + 1e-15))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_scale_reaches_its_target_and_no_other_does(share):
    sigma = jnp.asarray(np.linalg.svd(JACOBIAN, compute_uv=False))
    target = share * D * PRIOR
    scale = float(scale_for_target(sigma, PRIOR, target))
    np.testing.assert_allclose(invertibility_loss(JACOBIAN, scale), target, rtol=1e-12)
    for wrong in (0.99, 1.01):
        assert abs(invertibility_loss(JACOBIAN, wrong * scale) / target - 1) > 1e-5
    assert scale < float(scale_for_target(sigma, PRIOR, 0.5 * (target + D * PRIOR)))


def test_scale_with_unseen_directions():
    wide = JACOBIAN[:2]  # two numbers about four pixels: half of the energy is safe
    sigma = jnp.concatenate([jnp.asarray(np.linalg.svd(wide, compute_uv=False)), jnp.zeros(2)])
    assert float(scale_for_target(sigma, PRIOR, 1.9 * PRIOR)) == 0
    scale = float(scale_for_target(sigma, PRIOR, 3.0 * PRIOR))
    np.testing.assert_allclose(invertibility_loss(wide, scale), 3.0 * PRIOR, rtol=1e-12)


def test_scale_compiles_vectorizes_and_differentiates():
    sigma = jnp.array([3.0, 0.0, 1.0, 0.2])
    targets = PRIOR * jnp.array([0.5, 1.5, 3.9])

    def scale(target):
        return scale_for_target(sigma, PRIOR, target)

    eager = jnp.stack([scale(t) for t in targets])
    assert float(eager[0]) == 0
    np.testing.assert_allclose(jax.jit(jax.vmap(scale))(targets), eager, rtol=1e-12)
    check_grads(
        jax.jit(scale_for_target), (sigma, jnp.asarray(PRIOR), targets[1]), order=1, eps=1e-6
    )
    gradient = jax.grad(scale_for_target, argnums=(0, 2))(sigma, PRIOR, targets[0])
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient)
    low = scale_for_target(sigma.astype("float32"), PRIOR, float(targets[1]))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, eager[1], rtol=1e-5)


def test_layers_share_the_noise_by_what_they_leak():
    grams = [jnp.asarray(part.T @ part) for part in (JACOBIAN[:8], 0.1 * JACOBIAN[8:])]
    grams.append(jnp.zeros((D, D)))
    target = 0.6 * D * PRIOR
    scales = np.asarray(layer_scales_for_target(grams, PRIOR, target))
    assert scales[2] == 0
    information = [float(jnp.trace(g)) / s**2 for g, s in zip(grams[:2], scales[:2], strict=True)]
    np.testing.assert_allclose(information[0], information[1], rtol=1e-12)
    precision = np.eye(D) / PRIOR + sum(
        np.asarray(g) / s**2 for g, s in zip(grams[:2], scales[:2], strict=True)
    )
    np.testing.assert_allclose(np.trace(np.linalg.inv(precision)), target, rtol=1e-11)
    alone = layer_scales_for_target(grams[:1], PRIOR, target)
    sigma = jnp.asarray(np.linalg.svd(JACOBIAN[:8], compute_uv=False))
    np.testing.assert_allclose(alone[0], scale_for_target(sigma, PRIOR, target), rtol=1e-10)


def test_adaptive_scale_declares_what_it_adds():
    sigma = jnp.asarray(np.linalg.svd(JACOBIAN, compute_uv=False))
    noise: Any = adaptive_scale_noise(
        jax.random.key(0), sigma, prior_variance=PRIOR, target=0.5 * D * PRIOR
    )
    update = {"w": jnp.zeros(20_000)}
    chain: Any = optax.chain(noise, gaussian_noise(jax.random.key(1), noise_std=0.1))
    shared, state = noise.update(update, noise.init(update))
    declared = float(state.noise_std)
    sample = np.asarray(shared["w"])
    spread = 4.5 * np.sqrt(2 / sample.size)
    assert abs(np.mean(sample**2) / declared**2 - 1) < spread
    assert abs(np.mean(sample**2) / (1.1 * declared) ** 2 - 1) > spread
    np.testing.assert_allclose(invertibility_loss(JACOBIAN, declared), 0.5 * D * PRIOR, rtol=1e-10)
    _, both = chain.update(update, chain.init(update))
    np.testing.assert_allclose(
        declared_noise_std(both, jnp.zeros(())), np.hypot(declared, 0.1), rtol=1e-12
    )
    again, later = noise.update(update, state)
    assert not np.allclose(again["w"], shared["w"])
    assert float(later.noise_std) == declared


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_shaped_noise_has_the_declared_covariance_and_no_other(floor):
    covariance = shaped_covariance(GRAM, PRIOR, 0.6 * D * PRIOR)
    factor = covariance_factor(covariance)
    keys = jax.random.split(jax.random.key(3), 20_000)

    @jax.jit
    @jax.vmap
    def draw(key):
        return shaped_noise(key, release, X, factor, gram=GRAM, floor=floor).noise

    made = shaped_noise(jax.random.key(4), release, X, factor, gram=GRAM, floor=floor)
    noise = draw(keys)
    draws = np.concatenate(
        [np.asarray(leaf).reshape(len(keys), -1) for leaf in jax.tree.leaves(noise)], axis=1
    )
    energy = float(jnp.sum(GRAM * covariance))
    np.testing.assert_allclose(made.energy, energy, rtol=1e-10)
    np.testing.assert_allclose(made.floor_std, np.sqrt(floor * energy / P), rtol=1e-10)

    def declared(xi, std):
        return JACOBIAN @ np.asarray(xi) @ JACOBIAN.T + std**2 * np.eye(P)

    std = float(made.floor_std)
    declared_one = declared(made.factor @ made.factor.T, std)
    assert covariance_fits(draws, declared_one)
    uniform = shaped_covariance(GRAM, PRIOR, 0.6 * D * PRIOR, shape="uniform")
    for wrong in (
        declared(uniform, std),
        declared(1.1 * covariance, std),
        declared(covariance, std + 0.1),
        energy * (1 + floor) / P * np.eye(P),
    ):
        assert not covariance_fits(draws, wrong)
    error = np.abs(draws.mean(axis=0)) / np.sqrt(np.diag(declared_one) / len(keys))
    assert error.max() < 5


def test_transformation_adds_shaped_noise_and_declares_its_mean_square():
    update = release(X)
    target = 0.5 * D * PRIOR
    noise: Any = shaped_noise_transformation(
        jax.random.key(5), release, X, prior=PRIOR, target=target, gram=GRAM, floor=0.1
    )

    @jax.jit
    @jax.vmap
    def many(key):
        made: Any = shaped_noise_transformation(
            key, release, X, prior=PRIOR, target=target, gram=GRAM, floor=0.1
        )
        return made.update(update, made.init(update))[0]

    shared, state = noise.update(update, noise.init(update))
    draws = many(jax.random.split(jax.random.key(6), 4000))
    squares = sum(jnp.sum((draws[n] - update[n][None]) ** 2) for n in update) / (4000 * P)
    declared = float(state.noise_std)
    # The variance of a mean over draws of sum_j n_j^2 is 2 tr(C^2) / draws.
    assert abs(float(squares) / declared**2 - 1) < 4.5 * np.sqrt(2 / 4000)
    assert abs(float(squares) / (1.2 * declared) ** 2 - 1) > 4.5 * np.sqrt(2 / 4000)
    np.testing.assert_allclose(declared_noise_std(state, jnp.zeros(())), declared)
    assert float(state.floor_std) < declared
    again, _ = noise.update(update, state)
    assert not np.allclose(flat_of(again), flat_of(shared))
    with pytest.raises(ValueError, match="structure"):
        noise.update({"a": update["a"]}, state)


@pytest.mark.parametrize("shape", ["water_filling", "uniform", "maxmin"])
def test_error_that_is_left_is_at_least_the_target(shape):
    """By the dense posterior, for the own Gram matrix and for one of other data."""
    target = 0.5 * D * PRIOR
    elsewhere = dense_jacobian(x=X[::-1] * 0.5)
    other = jnp.asarray(elsewhere.T @ elsewhere)
    for floor, gram in ((0.0, GRAM), (0.1, GRAM), (0.1, other)):
        covariance = shaped_covariance(gram, PRIOR, target, shape=shape)
        made = shaped_noise(
            jax.random.key(0), release, X, covariance_factor(covariance), gram=gram, floor=floor
        )
        std = float(made.floor_std)
        left = float(expected_error(GRAM, covariance, PRIOR, noise_std=std))
        if floor:
            noise = JACOBIAN @ np.asarray(covariance) @ JACOBIAN.T + std**2 * np.eye(P)
            inner = np.eye(D) / PRIOR + JACOBIAN.T @ np.linalg.solve(noise, JACOBIAN)
            np.testing.assert_allclose(left, np.trace(np.linalg.inv(inner)), rtol=1e-7)
            assert left > target
        elif shape != "water_filling":
            np.testing.assert_allclose(left, target, rtol=1e-9)
        assert left >= target * (1 - 1e-9)


def test_public_gram_hides_directions_that_the_public_data_do_not_show():
    blind = GRAM.at[:, 3].set(0).at[3, :].set(0)
    update = release(X)
    target = 0.7 * D * PRIOR

    def left(**options):
        noise: Any = shaped_noise_transformation(
            jax.random.key(0), release, X, prior=PRIOR, target=target, floor=0.0, **options
        )
        keys = jax.random.split(jax.random.key(1), 3000)
        states = jax.vmap(lambda key: noise.init(update)._replace(key=key))(keys)
        draws = jax.jit(jax.vmap(lambda s: noise.update(update, s)[0]))(states)
        noisy = np.concatenate([np.asarray(draws[n]).reshape(3000, -1) for n in ("a", "b")], 1)
        noisy = noisy - flat_of(update)[None]
        inputs = noisy @ np.linalg.pinv(JACOBIAN).T  # what the noise is in input space
        xi = inputs.T @ inputs / 3000
        return np.trace(np.linalg.inv(np.eye(D) / PRIOR + np.linalg.pinv(xi + 1e-12 * np.eye(D))))

    lifted, bare = left(public_gram=blind), left(public_gram=blind, ridge=0.0)
    assert abs(lifted / target - 1) < 0.05
    assert bare < 0.9 * target


def test_repeated_releases_get_more_noise():
    update = release(X)
    stds = []
    for count in (1, 4):
        noise: Any = shaped_noise_transformation(
            jax.random.key(0),
            release,
            X,
            prior=PRIOR,
            target=0.1,
            gram=GRAM,
            num_releases=count,
        )
        stds.append(float(noise.update(update, noise.init(update))[1].noise_std))
    np.testing.assert_allclose(stds[1], 2 * stds[0], rtol=1e-12)


def test_input_noise_is_the_release_of_the_moved_input():
    factor = 0.3 * jnp.eye(D)[:, :2]
    key = jax.random.key(9)
    moved = X + (factor @ jax.random.normal(key, (2,))).reshape(2, 2)
    got = input_noise(jax.random.clone(key), release, X, factor)
    np.testing.assert_array_equal(flat_of(got), flat_of(release(moved)))
    keys = jax.random.split(jax.random.key(1), 20_000)
    inputs = jax.vmap(lambda k: input_noise(k, lambda x: x, X, factor))(keys)
    draws = np.asarray(inputs).reshape(-1, D) - np.asarray(X).ravel()
    assert covariance_fits(draws, np.asarray(factor @ factor.T))
    assert not covariance_fits(draws, 1.1 * np.asarray(factor @ factor.T))


def test_shaped_noise_is_input_noise_to_first_order():
    factor = 1e-5 * covariance_factor(shaped_covariance(GRAM, PRIOR, 0.1))
    key = jax.random.key(2)
    linear = shaped_noise(key, release, X, factor, gram=GRAM, floor=0.0).noise
    shape_key = jax.random.split(jax.random.clone(key))[0]
    moved = input_noise(shape_key, release, X, factor)
    change = flat_of(moved) - flat_of(release(X))
    np.testing.assert_allclose(flat_of(linear), change, rtol=1e-4, atol=1e-9)


def transformed(**options):
    defaults: dict[str, Any] = {"prior": PRIOR, "target": 0.1, "gram": GRAM}
    return shaped_noise_transformation(jax.random.key(0), release, X, **{**defaults, **options})


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: scale_for_target(jnp.array([-1.0]), 1.0, 0.5), "sigma must be finite"),
        (lambda: scale_for_target(jnp.ones((1, 1)), 1.0, 0.5), "vector"),
        (lambda: scale_for_target(jnp.ones(2), -1.0, 0.5), "prior_variance"),
        (lambda: scale_for_target(jnp.ones(2), 1.0, 2.0), "prior energy 2"),
        (lambda: scale_for_target(jnp.ones(2), 1.0, 0.0), "target"),
        (lambda: layer_scales_for_target([jnp.ones((2, 3))], 1.0, 0.5), "square"),
        (
            lambda: adaptive_scale_noise(
                jax.random.key(0), jnp.ones(2), prior_variance=1.0, target=3.0
            ),
            "target",
        ),
        (lambda: transformed(target=D * PRIOR), "target"),
        (lambda: transformed(target=-0.1), "target"),
        (lambda: transformed(floor=-0.1), "floor"),
        (lambda: transformed(gram=-GRAM), "semidefinite"),
        (lambda: transformed(gram=GRAM.at[0, 1].add(1.0)), "symmetric"),
        (lambda: transformed(gram=jnp.eye(3)), "gram must have shape"),
        (lambda: transformed(public_gram=GRAM), "both"),
        (lambda: transformed(gram=None), "neither"),
        (lambda: transformed(prior=-1.0), "prior_variance"),
        (lambda: transformed(prior=jnp.diag(jnp.array([1.0, 1.0, 1.0, -0.5]))), "prior must be"),
        (lambda: transformed(shape="protect"), "shape"),
        (lambda: transformed(num_releases=0), "num_releases"),
        (
            lambda: shaped_noise(jax.random.key(0), release, X, jnp.eye(3), gram=GRAM),
            "covariance_factor",
        ),
        (
            lambda: shaped_noise(jax.random.key(0), release, X, jnp.eye(4), gram=-GRAM),
            "semidefinite",
        ),
        (
            lambda: input_noise(jax.random.key(0), release, X, jnp.full((D, 1), jnp.nan)),
            "finite",
        ),
        (lambda: input_noise(jax.random.key(0), release, jnp.arange(4), jnp.eye(4)), "x must"),
        (lambda: coordinate_noise(jax.random.key(0), release, X, energy=-1.0), "energy"),
        (
            lambda: coordinate_noise(jax.random.key(0), release, X, energy=1.0, num_probes=0),
            "num_probes",
        ),
        (lambda: coordinate_noise(jax.random.key(0), release, X, energy=1.0, floor=0.0), "floor"),
        (lambda: soteria_scores(lambda x: x.sum(), X), "row of features"),
        (lambda: soteria({"w": jnp.ones(2)}, jnp.ones(2)), "fully connected"),
        (lambda: soteria({"head": {"kernel": jnp.ones((2, 2))}}, jnp.ones(3)), "scores"),
        (
            lambda: soteria({"head": {"kernel": jnp.ones((2, 2))}}, jnp.ones(2), keep_fraction=0.0),
            "keep_fraction",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(call, word, untyped):
    with pytest.raises(ValueError, match=word):
        call()
