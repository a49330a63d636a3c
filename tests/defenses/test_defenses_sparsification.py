from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis.extra import numpy as hnp

from jgia.defenses import clip_update, keep_top_k

# Few distinct values, so that ties are the rule.
ARRAYS = hnp.arrays(np.float64, 12, elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]))
CASES = hypothesis.settings(derandomize=True, deadline=None, max_examples=12)


def applied(transformation: Any, update: Any) -> Any:
    return transformation.update(update, transformation.init(update))


def stable_top_k(flat: np.ndarray, k: int) -> np.ndarray:
    """Top k by a stable sort: the oracle."""
    kept = np.zeros_like(flat)
    chosen = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept[chosen] = flat[chosen]
    return kept


@pytest.mark.slow
@CASES
@hypothesis.given(array=ARRAYS, fraction=st.sampled_from([0.01, 0.25, 0.5, 0.7, 1.0]))
def test_global_and_layer_scope_against_a_stable_sort(array, fraction):
    update = {
        "a": jnp.asarray(array[:5]),
        "b": jnp.asarray(array[5:9].reshape(2, 2)),
        "c": jnp.asarray(array[9:]),
    }
    flat = np.concatenate([array[:5], array[5:9], array[9:]])
    shared, state = applied(keep_top_k(keep_fraction=fraction), update)
    found = np.concatenate([np.asarray(shared[name]).ravel() for name in "abc"])
    k = {0.01: 1, 0.25: 3, 0.5: 6, 0.7: 9, 1.0: 12}[fraction]
    np.testing.assert_array_equal(found, stable_top_k(flat, k))
    assert int(state.num_kept) == k
    shared, _ = applied(keep_top_k(keep_fraction=fraction, scope="layer"), update)
    for name, leaf in update.items():
        size = leaf.size
        own = {0.01: 1, 0.25: -(-size // 4), 0.5: -(-size // 2), 0.7: -(-7 * size // 10)}
        expected = stable_top_k(np.asarray(leaf).ravel(), own.get(fraction, size))
        np.testing.assert_array_equal(np.asarray(shared[name]).ravel(), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_against_the_oracle(dtype):
    values = jnp.asarray(np.random.default_rng(0).normal(size=1000) ** 5, dtype)
    shared, _ = applied(keep_top_k(keep_fraction=0.137), values)
    assert shared.dtype == values.dtype
    np.testing.assert_array_equal(
        np.asarray(shared, "float64"), stable_top_k(np.asarray(values, "float64"), 137)
    )


def test_leaves_of_different_dtypes_are_compared_by_value():
    update = {"a": jnp.array([1.0, 3.0], "float32"), "b": jnp.array([2.0, -4.0], "float64")}
    shared, _ = applied(keep_top_k(keep_fraction=0.5), update)
    assert np.asarray(shared["a"]).tolist() == [0.0, 3.0]
    assert np.asarray(shared["b"]).tolist() == [0.0, -4.0]


def test_nan_is_never_dropped_silently():
    shared, _ = applied(keep_top_k(keep_fraction=0.25), jnp.array([1.0, jnp.nan, jnp.inf, 2.0]))
    assert np.isnan(np.asarray(shared)[1])


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fraction_is_refused(bad):
    with pytest.raises(ValueError, match="keep_fraction"):
        keep_top_k(keep_fraction=bad)


def test_bad_scope_is_refused():
    with pytest.raises(ValueError, match="scope"):
        keep_top_k(keep_fraction=0.5, scope="row")


@CASES
@hypothesis.given(array=ARRAYS, bound=st.sampled_from([0.1, 1.0, 5.0]))
def test_clipping_agrees_with_optax_and_bounds_the_norm(array, bound):
    update = {"a": jnp.asarray(array[:5]), "b": jnp.asarray(array[5:])}
    shared, state = applied(clip_update(clip_norm=bound), update)
    oracle, _ = applied(optax.clip_by_global_norm(bound), update)
    for name in update:
        np.testing.assert_allclose(shared[name], oracle[name], rtol=1e-14, atol=1e-16)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in shared.values()))
    assert norm <= bound * (1 + 1e-14)
    if np.linalg.norm(array) <= bound:
        assert float(state.scale) == 1.0
        np.testing.assert_array_equal(shared["b"], update["b"])


def test_clipping_survives_sizes_whose_square_overflows():
    for size in (1e30, 1e-30):
        values = jnp.full((4,), size, "float32")
        shared, _ = applied(clip_update(clip_norm=size), values)
        np.testing.assert_allclose(np.asarray(shared) / size, 0.5, rtol=1e-6)
    overflowed, _ = applied(optax.clip_by_global_norm(1e30), jnp.full((4,), 1e30, "float32"))
    assert not np.any(np.asarray(overflowed))  # what the plain norm would do


def test_clipping_shows_nonfinite_entries():
    for bad in (jnp.nan, jnp.inf):
        shared, _ = applied(clip_update(clip_norm=1.0), jnp.array([1.0, bad]))
        assert np.isnan(np.asarray(shared)).any()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf")])
def test_bad_clip_norm_is_refused(bad):
    with pytest.raises(ValueError, match="clip_norm"):
        clip_update(clip_norm=bad)
