"""Noise per coordinate, and pruning of a representation: what others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.defenses import coordinate_noise, soteria, soteria_scores

D, P = 4, 12
X = jnp.array([[0.2, 0.7], [0.5, 0.1]])


def release(x):
    """A smooth release of a (2, 2) input: 12 numbers in two arrays."""
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(8, D)), x.dtype)
    second = jnp.asarray(rng.normal(size=(2, 2, D)), x.dtype)
    flat = x.reshape(-1)
    return {"a": jnp.tanh(first @ flat), "b": jnp.sin(second @ flat)}


def flat_of(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def covariance_fits(draws, covariance):
    """Whether every entry of the second moments is within 5.5 of its standard errors."""
    size = len(draws)
    moments = draws.T @ draws / size
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / size)
    return bool(np.all(np.abs(moments - covariance) <= 5.5 * error + 1e-15))


LEAVES = jax.tree.leaves(jax.jacfwd(release)(X))
JACOBIAN = np.concatenate([np.asarray(leaf).reshape(-1, D) for leaf in LEAVES])


@pytest.mark.slow
def test_coordinate_noise_is_that_of_the_dense_jacobian():
    made = coordinate_noise(jax.random.key(0), release, X, energy=2.0)
    expected = np.linalg.norm(JACOBIAN, axis=1) / np.abs(flat_of(release(X)))
    expected = np.sqrt(2.0 * expected / expected.sum())
    np.testing.assert_allclose(flat_of(made.std), expected, rtol=1e-12)
    np.testing.assert_allclose(np.sum(flat_of(made.std) ** 2), 2.0, rtol=1e-12)
    sketched = coordinate_noise(jax.random.key(0), release, X, energy=2.0, num_probes=4000)
    np.testing.assert_allclose(flat_of(sketched.std), expected, rtol=0.05)
    rough = coordinate_noise(jax.random.key(0), release, X, energy=2.0, num_probes=2)
    assert np.abs(flat_of(rough.std) / expected - 1).max() > 0.05
    keys = jax.random.split(jax.random.key(4), 20_000)
    draws = jax.jit(jax.vmap(lambda k: coordinate_noise(k, release, X, energy=2.0).noise))(keys)
    sample = np.concatenate([np.asarray(draws[n]).reshape(len(keys), -1) for n in ("a", "b")], 1)
    assert covariance_fits(sample, np.diag(expected**2))
    assert not covariance_fits(sample, 2.0 / P * np.eye(P))


def test_coordinate_noise_is_the_best_diagonal_one_for_its_two_figures():
    """No other diagonal of equal harm has less scalar information."""
    made = coordinate_noise(jax.random.key(0), release, X, energy=1.0)
    variances, gradient = flat_of(made.std) ** 2, flat_of(release(X))
    rows = np.sum(JACOBIAN**2, axis=1)
    harm, information = np.sum(gradient**2 * variances), np.sum(rows / variances)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = variances * rng.lognormal(sigma=0.3, size=P)
        other *= harm / np.sum(gradient**2 * other)
        assert np.sum(rows / other) >= information * (1 - 1e-12)


def test_coordinate_noise_without_dependence_or_with_zero_entries():
    made = coordinate_noise(jax.random.key(0), lambda x: {"w": jnp.ones(3)}, X, energy=1.0)
    np.testing.assert_array_equal(flat_of(made.std), 0)
    made = coordinate_noise(jax.random.key(0), lambda x: x - X, X, energy=1.0)
    np.testing.assert_allclose(flat_of(made.std), 0.5, rtol=1e-12)


@pytest.mark.slow
def test_soteria_scores_are_those_of_the_dense_jacobian():
    rng = np.random.default_rng(5)
    weights = jnp.asarray(rng.normal(size=(6, 5)))
    batch = jnp.asarray(rng.normal(size=(3, 2, 3)))

    def features(x):
        return jax.nn.relu(x.reshape(len(x), -1) @ weights) + 0.1

    scores = soteria_scores(features, batch)
    expected = np.zeros(5)
    for image in batch:
        jacobian = np.asarray(jax.jacfwd(lambda x: features(x[None])[0])(image)).reshape(5, -1)
        expected += np.linalg.norm(jacobian, axis=1) / np.abs(np.asarray(features(image[None])[0]))
    np.testing.assert_allclose(scores, expected, rtol=1e-8)


def test_soteria_prunes_the_lowest_scores_of_one_layer_and_nothing_else():
    update = {
        "fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    }
    shared, kept = soteria(update, jnp.array([0.3, 0.1, 0.2]), keep_fraction=0.5)
    assert kept.tolist() == [True, False, True]
    np.testing.assert_array_equal(shared["head"]["kernel"], [[1, 1], [0, 0], [1, 1]])
    for name in ("fc/kernel", "fc/bias", "head/bias"):
        layer, leaf = name.split("/")
        np.testing.assert_array_equal(shared[layer][leaf], update[layer][leaf])
    same, kept = soteria(update, jnp.array([0.3, 0.1, 0.2]), keep_fraction=1.0)
    assert bool(kept.all())
    np.testing.assert_array_equal(flat_of(same), flat_of(update))
