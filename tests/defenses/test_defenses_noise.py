from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jgia.defenses import (
    clip_update,
    declared_noise_std,
    gaussian_noise,
    keep_top_k,
    laplace_noise,
)

SIZE = 40_000
NOISES = {
    "gaussian": (gaussian_noise, lambda std: stats.norm(scale=std)),
    "laplace": (laplace_noise, lambda std: stats.laplace(scale=std / np.sqrt(2))),
}
noises = pytest.mark.parametrize("name", NOISES)


def fits(sample: np.ndarray, distribution) -> bool:
    """Whether shape (Kolmogorov-Smirnov, level 1e-4) and size (4.5 standard errors) fit."""
    variance, kurtosis = distribution.stats(moments="vk")
    error = np.mean(sample**2) / variance - 1
    sized = abs(error) < 4.5 * np.sqrt((kurtosis + 2) / len(sample))
    return bool(sized and stats.kstest(sample, distribution.cdf).pvalue > 1e-4)


def applied(transformation: Any, update: Any) -> Any:
    return transformation.update(update, transformation.init(update))


@noises
@pytest.mark.parametrize("std", [1e-3, 2.0])
def test_noise_has_the_declared_distribution_and_no_other(name, std):
    make, law = NOISES[name]
    update = {"a": jnp.full((SIZE // 2,), 0.3), "b": jnp.full((2, SIZE // 4), -7.0)}
    shared, state = applied(make(jax.random.key(1), noise_std=std), update)
    parts = jax.tree.map(lambda s, u: np.asarray(s - u).ravel(), shared, update)
    sample = np.concatenate([parts["a"], parts["b"]])
    assert float(state.noise_std) == std
    assert fits(sample, law(std))
    for wrong in (0.95, 1.05, np.sqrt(2), np.sqrt(0.5)):
        assert not fits(sample, law(wrong * std))
    other = NOISES["laplace" if name == "gaussian" else "gaussian"][1]
    assert not fits(sample, other(std))
    assert abs(np.corrcoef(parts["a"], parts["b"])[0, 1]) < 5 / np.sqrt(SIZE / 2)


@noises
def test_relative_noise_follows_the_root_mean_square_of_the_whole_update(name):
    make, law = NOISES[name]
    update = {"small": jnp.full((SIZE,), 1e-3), "large": jnp.full((SIZE,), 4.0)}
    rms = np.sqrt((1e-6 + 16) / 2)
    shared, state = applied(make(jax.random.key(1), noise_std=0.5, relative=True), update)
    np.testing.assert_allclose(float(state.noise_std), 0.5 * rms, rtol=1e-14)
    assert fits(np.asarray(shared["small"]) - 1e-3, law(0.5 * rms))
    assert not fits(np.asarray(shared["small"]) - 1e-3, law(0.5))


@noises
def test_relative_scale_neither_overflows_nor_underflows(name):
    make, _ = NOISES[name]
    for size in (1e30, 1e-30):
        update = {"w": jnp.full((100,), size, "float32")}
        _, state = applied(make(jax.random.key(0), noise_std=1.0, relative=True), update)
        np.testing.assert_allclose(float(state.noise_std), size, rtol=1e-5)


@noises
def test_each_update_draws_anew(name):
    make, _ = NOISES[name]
    noise: Any = make(jax.random.key(0), noise_std=1.0)
    update = {"w": jnp.zeros(2000)}
    first, state = noise.update(update, noise.init(update))
    second, _ = noise.update(update, state)
    assert abs(np.corrcoef(first["w"], second["w"])[0, 1]) < 5 / np.sqrt(2000)


@noises
def test_leaves_of_equal_shape_get_different_noise(name):
    make, _ = NOISES[name]
    shared, _ = applied(make(jax.random.key(0), noise_std=1.0), [jnp.zeros(9), jnp.zeros(9)])
    assert not np.any(np.asarray(shared[0]) == np.asarray(shared[1]))


def test_declared_noise_through_a_chain_is_what_is_measured():
    keys = jax.random.split(jax.random.key(5), 3)
    chain = optax.chain(
        gaussian_noise(keys[0], noise_std=1.0),
        clip_update(clip_norm=30.0),
        laplace_noise(keys[1], noise_std=0.1),
        optax.identity(),
    )
    update = {"w": jnp.zeros(SIZE)}
    shared, state = applied(chain, update)
    declared = float(declared_noise_std(state, jnp.zeros(())))
    np.testing.assert_allclose(declared, np.hypot(30 / np.sqrt(SIZE), 0.1), rtol=0.02)
    measured = np.std(np.asarray(shared["w"]))
    np.testing.assert_allclose(measured, declared, rtol=5 / np.sqrt(SIZE))
    assert abs(measured - np.hypot(1, 0.1)) > 0.5  # not what it was before the clipping


def test_noise_that_was_there_before_counts_and_sparsity_changes_nothing():
    chain = optax.chain(
        gaussian_noise(jax.random.key(0), noise_std=3.0), keep_top_k(keep_fraction=0.5)
    )
    _, state = applied(chain, {"w": jnp.ones(4)})
    assert float(declared_noise_std(state, jnp.asarray(4.0))) == 5.0


@noises
def test_works_inside_a_training_loop(name):
    make, _ = NOISES[name]
    optimizer = optax.chain(make(jax.random.key(2), noise_std=0.01), optax.sgd(0.1))
    start: Any = {"w": jnp.array([3.0, -2.0])}

    def step(carry, _):
        params, state = carry
        change, state = optimizer.update(params, state, params)  # gradient of ||w||^2 / 2
        return (optax.apply_updates(params, change), state), None

    final: Any = jax.lax.scan(step, (start, optimizer.init(start)), None, length=200)[0][0]
    assert float(jnp.max(jnp.abs(final["w"]))) < 0.05


@noises
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_scale_is_refused(name, bad):
    with pytest.raises(ValueError, match="noise_std"):
        NOISES[name][0](jax.random.key(0), noise_std=bad)
