"""The l1 projection against sorting ones, and against its optimality conditions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.attacks.gifd import project_l1

SHAPES = [(1, 1), (2, 7), (3, 4, 5, 2), (1, 5000)]


def _values(shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_t(2, size=shape)


def _optax(values, radius):
    with jax.numpy_dtype_promotion("standard"):
        return optax.projections.projection_l1_ball(jnp.ravel(values), radius)


def _jaxopt(values, radius):
    import jaxopt

    with jax.numpy_dtype_promotion("standard"):
        return jaxopt.projection.projection_l1_ball(jnp.ravel(values), radius)


@pytest.mark.parametrize("oracle", [_optax, _jaxopt], ids=["optax", "jaxopt"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", [0.003, 0.3, 0.95, 2.0])
def test_it_agrees_with_projections_that_sort(oracle, shape, part):
    values = _values(shape)
    radius = part * np.abs(values.reshape(shape[0], -1)).sum(axis=1)
    found = project_l1(jnp.asarray(values), jnp.asarray(radius))
    for one, mine, r in zip(values, found, radius, strict=True):
        np.testing.assert_allclose(np.ravel(mine), oracle(one, r), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", [0.005, 0.5])
def test_float32_is_exact_to_rounding(part):
    values = _values((2, 40_000)).astype(np.float32)
    radius = (part * np.abs(values).sum(axis=1)).astype(np.float32)
    found = project_l1(jnp.asarray(values), jnp.asarray(radius))
    assert found.dtype == jnp.float32
    wanted = project_l1(jnp.asarray(values, jnp.float64), jnp.asarray(radius, jnp.float64))
    np.testing.assert_allclose(found, wanted, atol=4e-6 * float(jnp.abs(wanted).max()))


def _violation(values, projected, radius):
    """How far a point is from the optimality conditions of the projection, in units of v."""
    v, p = np.ravel(values), np.ravel(projected)
    size = max(np.abs(v).max(), 1e-300)
    over = max(np.abs(p).sum() - radius, 0)
    if np.abs(v).sum() <= radius:
        return np.abs(v - p).max() / size
    short = abs(np.abs(p).sum() - radius)
    left = np.abs(v) - np.abs(p)  # theta where p is not 0, at most theta elsewhere
    active = p != 0
    theta = left[active].mean() if active.any() else left.max()
    uneven = np.abs(left[active] - theta).max(initial=0)
    beyond = max(left[~active].max(initial=0) - theta, 0)
    flipped = np.any(p * v < 0)
    return max(over, short, uneven, beyond, size * flipped) / size


# Over many orders of magnitude, where Newton's method has to drop entries a few at a time.
_ENTRIES = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: x**3), min_size=1, max_size=40
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(_ENTRIES, st.floats(1e-4, 1.5))
def test_it_satisfies_the_optimality_conditions(entries, part):
    values = np.zeros((1, 40))  # one shape, so that it is compiled once
    values[0, : len(entries)] = entries
    radius = max(part * np.abs(values).sum(), 1e-3)
    found = _compiled(jnp.asarray(values), radius)
    assert _violation(values, found, radius) < 1e-11
    assert np.abs(found).sum() <= radius * (1 + 1e-13)


_compiled = jax.jit(project_l1)


def test_geometric_entries_take_many_steps_and_are_exact():
    values = 2.0 ** -np.arange(200)[None]
    assert _violation(values, project_l1(jnp.asarray(values), 1.5), 1.5) < 1e-12


def test_a_wrong_threshold_is_rejected():
    values = _values((1, 50))
    radius = 0.3 * np.abs(values).sum()
    found = np.asarray(project_l1(jnp.asarray(values), radius))
    right = (np.abs(values) - np.abs(found))[found != 0].mean()
    for factor in (0.99, 1.01):
        wrong = np.sign(values) * np.maximum(np.abs(values) - factor * right, 0)
        assert _violation(values, wrong, radius) > 1e-3
    scaled = values * (radius / np.abs(values).sum())  # in the ball, but not the nearest point
    assert _violation(values, scaled, radius) > 1e-3


def test_too_few_steps_still_end_in_the_ball():
    values = jnp.asarray(_values((1, 500)))
    radius = 0.01 * float(jnp.abs(values).sum())
    few = project_l1(values, radius, iterations=1)
    assert float(jnp.abs(few).sum()) <= radius * (1 + 1e-13)
    assert _violation(values, few, radius) > 1e-3  # and the test above would notice


def test_infinity_is_no_ball_and_trees_keep_their_balls():
    tree = {"a": jnp.asarray(_values((2, 3, 3))), "b": jnp.asarray(_values((2, 8), 1))}
    found = project_l1(tree, {"a": jnp.array([jnp.inf, 0.5]), "b": 1.0})
    np.testing.assert_array_equal(found["a"][0], tree["a"][0])
    chex.assert_trees_all_close(found["a"], project_l1(tree["a"], jnp.array([jnp.inf, 0.5])))
    chex.assert_trees_all_close(found["b"], project_l1(tree["b"], 1.0))
    assert project_l1({}, {}) == {}


def test_it_compiles_vmaps_and_maps_no_image_onto_another():
    values, radius = jnp.asarray(_values((4, 3, 6))), jnp.array([0.1, 1.0, 5.0, 100.0])
    whole = project_l1(values, radius)
    chex.assert_trees_all_close(jax.jit(project_l1)(values, radius), whole, rtol=1e-14)
    one_by_one = jax.vmap(lambda v, r: project_l1(v[None], r)[0])(values, radius)
    chex.assert_trees_all_close(one_by_one, whole, rtol=1e-14)
    chex.assert_trees_all_close(project_l1(whole, radius), whole, rtol=1e-12)


def test_its_derivative_is_finite_and_right():
    values = jnp.asarray(_values((2, 6)))
    radius = jnp.array([1.0, 100.0])
    chex.assert_numerical_grads(lambda v: project_l1(v, radius), (values,), order=1, atol=1e-6)
    at_zero = jax.grad(lambda v: project_l1(v, 1.0).sum())(jnp.zeros((1, 3)))
    assert jnp.isfinite(at_zero).all()


def test_nan_stays_where_it_is():
    found = project_l1(jnp.array([[jnp.nan, 3.0, 1.0], [3.0, 1.0, 0.0]]), 2.0)
    assert np.isnan(found[0]).tolist() == [True, False, False]
    np.testing.assert_allclose(found[1], [2.0, 0.0, 0.0])
