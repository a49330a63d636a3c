"""Orthogonal directions in a gradient's place: what they are, and which one is taken."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgia import defenses
from jgia.defenses import CensorState, clip_update

RNG = np.random.default_rng(0)
censor_update: Any = defenses.censor_update  # optax says little of its types
GRADIENT = {
    "fc": {"kernel": jnp.asarray(RNG.normal(size=(7, 3))), "bias": jnp.asarray([1e-6, 2e-6])},
    "gain": jnp.asarray([4.0]),
    "idle": jnp.zeros(3),
}
PARAMS = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), GRADIENT)
TARGET = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape)), GRADIENT)


@jax.jit
def _loss(params):
    return sum(
        jnp.square(p - t).sum()
        for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True)
    )


def _share(key=0, gradient=GRADIENT, loss: Any = _loss, **knobs):
    censor = censor_update(jax.random.key(key), loss, PARAMS, **knobs)
    return censor.update(gradient, censor.init(gradient))


def test_every_array_is_orthogonal_and_as_long():
    shared, _ = _share()
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(GRADIENT), strict=True):
        length = float(jnp.linalg.norm(b))
        if b.size == 1 or length == 0:
            np.testing.assert_array_equal(a, jnp.zeros_like(b))
            continue
        assert abs(float(jnp.vdot(a, b))) < 1e-14 * length**2
        np.testing.assert_allclose(jnp.linalg.norm(a), length, rtol=1e-13)


def test_directions_are_uniform_in_what_is_orthogonal():
    """The mean of the projections' squares is the same for all orthogonal directions."""
    gradient = {"w": jnp.asarray([3.0, 0.0, 4.0])}
    normal = jax.jit(
        lambda key: censor_update(key, lambda p: jnp.zeros(()), gradient, num_trials=1).update(
            gradient, None
        )[0]["w"]
    )
    draws = np.stack([normal(key) for key in jax.random.split(jax.random.key(1), 400)]) / 5
    basis = np.array([[0.8, 0, -0.6], [0, 1, 0]])
    squares = np.square(draws @ basis.T).mean(axis=0)
    np.testing.assert_allclose(squares, 0.5, atol=4.5 * np.sqrt(1 / 8 / 400))
    assert np.abs((draws @ basis.T).mean(axis=0)).max() < 4.5 * np.sqrt(1 / 2 / 400)


def test_the_candidate_with_the_smallest_loss_after_a_step_is_taken():
    shared, state = _share(num_trials=6, step_size=0.1)
    assert isinstance(state, CensorState)
    losses = []

    def spy(params):
        losses.append(float(_loss(params)))
        return _loss(params)

    again, _ = _share(num_trials=6, step_size=0.1, loss=spy)
    jax.tree.map(np.testing.assert_array_equal, again, shared)
    assert len(set(losses)) == 6
    assert int(state.trial) == int(np.argmin(losses))
    np.testing.assert_allclose(state.loss, min(losses), rtol=1e-14)
    stepped = jax.tree.map(lambda p, u: p - 0.1 * u, PARAMS, shared)
    np.testing.assert_allclose(_loss(stepped), min(losses), rtol=1e-12)


def test_the_true_gradient_is_not_shared_though_it_is_best():
    """Of the loss whose gradient this is, every trial is worse than the gradient itself."""
    target = jax.tree.map(lambda p, g: p - g, PARAMS, GRADIENT)

    def distance(params):
        return sum(
            jnp.square(p - t).sum()
            for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    shared, state = _share(loss=distance, step_size=1.0)
    assert float(distance(target)) == 0
    assert float(state.loss) > 1
    kernel = shared["fc"]["kernel"]
    assert abs(float(jnp.vdot(kernel, GRADIENT["fc"]["kernel"]))) < 1e-12


def test_one_that_is_not_finite_is_passed_over_and_nan_stays_visible():
    count = iter(range(4))
    _, state = _share(
        num_trials=4, loss=lambda p: _loss(p) if next(count) == 2 else jnp.asarray(jnp.nan)
    )
    assert int(state.trial) == 2
    for bad in (jnp.nan, jnp.inf):
        spoiled = {**GRADIENT, "gain": jnp.asarray([bad])}
        assert np.isnan(_share(gradient=spoiled)[0]["gain"]).all()
        spoiled = {**GRADIENT, "idle": jnp.asarray([1.0, bad, 0.0])}
        assert np.isnan(_share(gradient=spoiled)[0]["idle"]).any()


def test_keys_chains_compilation_and_dtypes():
    one, again, other = (_share(key)[0] for key in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert np.any(np.asarray(one["fc"]["kernel"]) != np.asarray(other["fc"]["kernel"]))
    chain = optax.chain(censor_update(jax.random.key(1), _loss, PARAMS), clip_update(clip_norm=0.5))
    shared, _ = jax.jit(lambda g: chain.update(g, chain.init(g)))(GRADIENT)
    np.testing.assert_allclose(optax.tree.norm(shared), 0.5, rtol=1e-12)
    scale = float(optax.tree.norm(one))
    np.testing.assert_allclose(
        shared["fc"]["kernel"], one["fc"]["kernel"] * 0.5 / scale, rtol=1e-10
    )
    single = jax.tree.map(lambda leaf: leaf.astype("float32"), GRADIENT)
    assert {leaf.dtype for leaf in jax.tree.leaves(_share(gradient=single)[0])} == {
        jnp.dtype("float32")
    }


def test_bad_knobs_are_refused():
    for knobs in ({"num_trials": 0}, {"step_size": 0.0}, {"step_size": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            censor_update(jax.random.key(0), _loss, PARAMS, **knobs)
    with pytest.raises(ValueError, match="floating point"):
        _share(gradient={"w": jnp.arange(3)})
