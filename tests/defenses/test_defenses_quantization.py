from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp
from scipy import stats

from jgia.defenses import quantize_nearest, quantize_stochastic

ARRAYS = hnp.arrays(np.float64, 12, elements=st.floats(-1e6, 1e6, allow_subnormal=False))
CASES = hypothesis.settings(derandomize=True, deadline=None, max_examples=15)


def applied(transformation: Any, update: Any) -> Any:
    return transformation.update(update, transformation.init(update))


def levels(array: np.ndarray, num_bits: int) -> np.ndarray:
    """All levels, by the definition."""
    positive = 2 ** (num_bits - 1) - 1
    return np.arange(-positive, positive + 1) * (np.abs(array).max() / positive)


@CASES
@hypothesis.given(array=ARRAYS, num_bits=st.sampled_from([2, 3, 5, 8]))
def test_nearest_is_the_nearest_level(array, num_bits):
    shared, state = applied(quantize_nearest(num_bits=num_bits), jnp.asarray(array))
    shared, grid = np.asarray(shared), levels(array, num_bits)
    distance = np.abs(array[:, None] - grid).min(axis=1)
    slack = 8 * np.finfo(float).eps * np.abs(array).max()
    np.testing.assert_allclose(np.abs(shared - array), distance, rtol=0, atol=slack)
    assert np.abs(shared[:, None] - grid).min(axis=1).max() <= slack
    assert np.abs(shared - array).max() <= float(state.step) / 2 + slack


def test_number_of_levels_is_what_the_bits_can_hold():
    values = jnp.linspace(-1.0, 1.0, 4001)
    for num_bits in (2, 4, 6):
        shared, _ = applied(quantize_nearest(num_bits=num_bits), values)
        assert len(np.unique(np.asarray(shared))) == 2**num_bits - 1


def test_each_array_has_its_own_step():
    update = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([0.04, 0.01])}
    shared, state = applied(quantize_nearest(num_bits=4), update)
    np.testing.assert_allclose(state.step["a"] / state.step["b"], 100.0, rtol=1e-14)
    np.testing.assert_allclose(shared["a"], 100 * shared["b"], rtol=1e-14)


@CASES
@hypothesis.given(array=ARRAYS, num_bits=st.sampled_from([2, 3, 8]), seed=st.integers(0, 2**31))
def test_stochastic_takes_one_of_the_two_neighbors(array, num_bits, seed):
    rounding = quantize_stochastic(jax.random.key(seed), num_bits=num_bits)
    shared, state = applied(rounding, jnp.asarray(array))
    step, grid = float(state.step), levels(array, num_bits)
    slack = 8 * np.finfo(float).eps * np.abs(array).max()
    assert np.abs(np.asarray(shared)[:, None] - grid).min(axis=1).max() <= slack
    assert np.all(np.abs(np.asarray(shared) - array) <= step + slack)


def test_stochastic_is_unbiased_with_the_binomial_variance_and_nearest_is_not(key):
    repeats, fractions = 20_000, np.array([0.02, 0.3, 0.5, 0.9])
    steps = 3.0 / 7  # m = 3, 4 bits
    entries = (np.array([2, -3, 0, 5]) + fractions) * steps
    block = jnp.asarray(np.concatenate([np.repeat(entries[:, None], repeats, 1).ravel(), [3.0]]))
    shared, state = applied(quantize_stochastic(key, num_bits=4), block)
    np.testing.assert_allclose(float(state.step), steps, rtol=1e-14)
    up = np.asarray(shared)[:-1].reshape(4, repeats) > entries[:, None]
    for count, fraction in zip(up.sum(axis=1), fractions, strict=True):
        assert stats.binomtest(int(count), repeats, fraction).pvalue > 1e-4
        assert stats.binomtest(int(count), repeats, fraction + 0.02).pvalue < 1e-4
    rounded, _ = applied(quantize_nearest(num_bits=4), block)
    bias = np.asarray(rounded)[:-1].reshape(4, repeats).mean(axis=1) - entries
    np.testing.assert_allclose(np.abs(bias) / steps, [0.02, 0.3, 0.5, 0.1], atol=1e-12)


def test_unbiased_in_float32_where_few_bits_of_the_position_are_fractional(key):
    repeats, position = 40_000, 2.0**20 + 0.25  # its spacing is 1/8: a sum would round
    positive = 2.0**21 - 1
    values = jnp.full((repeats,), position / positive, "float32").at[0].set(1.0)
    exact = np.float32(position / positive) / np.float32(1) * np.float32(positive)
    fraction = float(exact - np.floor(exact))
    shared, _ = applied(quantize_stochastic(key, num_bits=22), values)
    count = int((np.asarray(shared)[1:] > np.floor(exact) / positive).sum())
    assert stats.binomtest(count, repeats - 1, fraction).pvalue > 1e-4


def test_uniform_model_of_the_error():
    values = jax.random.uniform(jax.random.key(3), (20_000,), minval=-1.0, maxval=1.0)
    shared, state = applied(quantize_nearest(num_bits=6), values)
    measured = float(jnp.std(shared - values))
    np.testing.assert_allclose(measured, float(state.step) / np.sqrt(12), rtol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_extremes_of_the_dtype(dtype):
    info = jnp.finfo(dtype)
    for top in (info.max, info.tiny):
        values = jnp.asarray([top, -top, 0], dtype)
        for make in (quantize_nearest, lambda **k: quantize_stochastic(jax.random.key(0), **k)):
            shared, _ = applied(make(num_bits=8), values)
            np.testing.assert_array_equal(np.asarray(shared), np.asarray(values))


def test_zeros_stay_zero_and_nonfinite_entries_stay_visible():
    for make in (quantize_nearest, lambda **k: quantize_stochastic(jax.random.key(0), **k)):
        shared, state = applied(make(num_bits=8), jnp.zeros(3))
        assert not np.any(np.asarray(shared))
        assert float(state.step) == 0
        for bad in (jnp.nan, jnp.inf):
            shared, _ = applied(make(num_bits=8), jnp.array([1.0, bad]))
            assert not np.isfinite(np.asarray(shared)[1])


@pytest.mark.parametrize("bits", [1, 0, -3, 33])
def test_bad_bits_are_refused(bits):
    with pytest.raises(ValueError, match="num_bits"):
        quantize_nearest(num_bits=bits)
    with pytest.raises(ValueError, match="num_bits"):
        quantize_stochastic(jax.random.key(0), num_bits=bits)
