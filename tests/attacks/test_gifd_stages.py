"""One stage's parts: balls, what is free, where the next stage starts."""

import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.gifd import Settings, stages
from jgia.generators.protocol import GeneratorState, StagedGenerator


def _load(name) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny_generator")
PRIOR = tiny.make_prior()
GENERATOR, PARAMS = PRIOR.generator, PRIOR.params
BATCH = 2
RADII = (0.02, 0.05, math.inf)


@functools.cache
def _start(index):
    """Side inputs and what enters a block."""
    side = jax.jit(lambda key: GENERATOR.draw(PARAMS, key, BATCH))(jax.random.key(1))
    if index == 0:
        return side, None
    run = jax.jit(lambda side: GENERATOR.run(PARAMS, side, None, stop=index))
    return side, run(side)


def _begin(index, radii=RADII, **fields):
    side, state = _start(index)
    settings = Settings(last_stage=2, **fields)
    stage = stages.make_stage(GENERATOR, index, side, settings, 1)
    return stage, *_jitted_begin(stage, side, state, radii)


_jitted_begin = jax.jit(stages.begin, static_argnums=0)
_jitted_move = jax.jit(stages.move)
_jitted_render = jax.jit(stages.render, static_argnums=0)


def _length(tree):
    """(B,) l1 norms."""
    return jnp.sum(jnp.abs(tree.reshape(tree.shape[0], -1)), axis=1)


def _moved(anchor, state, steps=4, rate=0.3):
    """After steps along a gradient that never changes, so that every ball is reached."""
    keys = iter(jax.random.split(jax.random.key(5), 20))
    gradient = jax.tree.map(
        lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), state.point
    )
    for _ in range(steps):
        state = _jitted_move(anchor, state, jnp.float32(1.0), gradient, jnp.float32(rate))
    return state


def test_the_protocol_is_met():
    assert isinstance(GENERATOR, StagedGenerator)
    hash(GENERATOR)


@pytest.mark.parametrize("mode", ["per_element", "relative", "absolute"])
def test_every_image_of_every_part_stays_in_its_ball(mode):
    radii = (3.0, 2.0, 40.0) if mode == "absolute" else (0.02, 0.05, 0.3)
    _, anchor, state = _begin(1, radii, radius_mode=mode)
    assert state.point.features is not None
    after = _moved(anchor, state).point
    styles = anchor.start.side[-1]
    assert styles.shape == (BATCH, 3, tiny.LATENT)
    for start, new, radius in (
        (anchor.start.features, after.features, radii[0]),
        (styles, after.side[-1], radii[1]),
        (anchor.start.side[0], after.side[0], radii[2]),
    ):
        wanted = {
            "per_element": radius * start[0].size,
            "relative": radius * _length(start),
            "absolute": radius,
        }[mode]
        np.testing.assert_allclose(_length(new - start), wanted, rtol=1e-4)


def test_no_ball_holds_nothing_back():
    _, anchor, state = _begin(1, (math.inf,) * 3)
    after = _moved(anchor, state).point
    np.testing.assert_allclose(jnp.abs(after.features - anchor.start.features), 4 * 0.3, rtol=1e-3)


@pytest.mark.parametrize(
    ("search", "index", "free"),
    [
        ("all", 0, [True, False, True]),
        ("all", 1, [True, True, True]),
        ("features_styles", 0, [False, False, True]),
        ("features_styles", 2, [False, False, True]),
        ("features", 0, [True, False, True]),
        ("features", 1, [False, False, False]),
    ],
)
def test_what_a_stage_searches(search, index, free):
    stage, anchor, state = _begin(index, search=search)
    assert list(stage.free) == free  # noise of two blocks, then styles
    assert len(state.point.side) == sum(free)
    moved = state.point._replace(side=tuple(leaf + 1 for leaf in state.point.side))
    side, _ = stages.inputs_of(stage, anchor, moved)
    for leaf, start, may in zip(
        jax.tree.leaves(side), jax.tree.leaves(_start(index)[0]), free, strict=True
    ):
        assert bool(jnp.any(leaf != start)) == may


@functools.cache
def _jitted_run(skip):
    """Images of what enters block 1, from the bottom or without the image carried."""

    @jax.jit
    def run(side, state):
        if skip == "drop":
            none = GeneratorState(state.features, jnp.zeros_like(state.image))
            last = GENERATOR.run(PARAMS, side, none, start=1)
        else:
            last = GENERATOR.run(PARAMS, side, None)
        return (GENERATOR.image(PARAMS, side, last) + 1) / 2

    return run


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["carry", "drop", "optimize"])
def test_a_stage_starts_with_the_image_that_the_last_one_left(skip):
    before, anchor, state = _begin(1, skip=skip)
    image = _jitted_render(before, PARAMS, anchor, state.point)
    expected = _jitted_run(skip)(*_start(1))
    np.testing.assert_allclose(image, expected, atol=1e-6)
    assert (state.point.image is not None) == (skip == "optimize")

    moved = _moved(anchor, state)
    side, after = stages.leave(before, PARAMS, anchor, moved.point)
    settings = Settings(last_stage=2, skip=skip)
    stage = stages.make_stage(GENERATOR, 2, side, settings, 1)
    next_anchor, next_state = _jitted_begin(stage, side, after, RADII)
    end = _jitted_render(before, PARAMS, anchor, moved.point)
    start = _jitted_render(stage, PARAMS, next_anchor, next_state.point)
    gap = float(jnp.abs(end - start).max())
    assert gap < 1e-6 if skip != "drop" else gap > 1e-3
    assert int(next_state.optimizer.count) == 0  # a fresh optimizer


def test_moments_are_not_projected():
    _, anchor, state = _begin(1)
    _, free, other = _begin(1, (math.inf,) * 3)
    held, loose = _moved(anchor, state, 2), _moved(free, other, 2)
    chex.assert_trees_all_equal(held.optimizer, loose.optimizer)
    assert float(jnp.abs(held.point.features - loose.point.features).max()) > 0.1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_search_that_leaves_the_numbers_stays_where_it_was(where):
    _, anchor, state = _begin(1)
    state = _moved(anchor, state, 1)
    gradient = jax.tree.map(jnp.ones_like, state.point)
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), gradient)
    loss = jnp.float32(jnp.nan if where == "loss" else 1.0)
    gone = _jitted_move(anchor, state, loss, gradient if where == "loss" else bad, 0.1)
    assert not bool(gone.alive)
    chex.assert_trees_all_equal(gone.point, state.point)
    later = _jitted_move(anchor, gone, jnp.float32(1.0), gradient, 0.1)  # nor ever again
    chex.assert_trees_all_equal(later.point, state.point)


def test_smaller_images_are_means_of_pixels():
    side, _ = _start(0)
    settings = Settings(last_stage=2)
    whole, half = (stages.make_stage(GENERATOR, 0, side, settings, n) for n in (1, 2))
    anchor, state = _jitted_begin(whole, side, None, RADII)
    large = np.asarray(_jitted_render(whole, PARAMS, anchor, state.point))
    small = _jitted_render(half, PARAMS, anchor, state.point)
    wanted = sum(large[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    np.testing.assert_allclose(small, wanted, atol=1e-6)
