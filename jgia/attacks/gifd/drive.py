"""Compiled parts of a stage, and the two ways to run its steps: from Python, or in ``scan``.

Searches are grouped; every array of a group has a leading axis, one entry per search.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd import stages
from jgia.attacks.gifd.matching import Matching, vmapped
from jgia.attacks.gifd.stages import Anchor, Point, Stage, State, Weights
from jgia.generators.protocol import GeneratorState, Side

Driver = Literal["auto", "python", "scan"]
PyTree = Any


class Group(NamedTuple):
    """Searches that advance together, at the start of a stage.

    Attributes:
      matching: what they look for; the same for all, or stacked.
      side: their side inputs.
      state: what enters the stage's block; ``None`` in stage 0.
    """

    matching: Matching
    side: Side
    state: GeneratorState | None


def resolve_driver(driver: Driver) -> Literal["python", "scan"]:
    """``auto``: Python on CPU, where XLA runs convolutions inside a loop slowly, else ``scan``."""
    if driver != "auto":
        return driver
    return "python" if jax.default_backend() == "cpu" else "scan"


@functools.partial(jax.jit, static_argnums=0)
def begin(
    stage: Stage,
    side: Side,
    state: GeneratorState | None,
    radii: tuple[ArrayLike, ArrayLike, ArrayLike],
) -> tuple[Anchor, State]:
    """:func:`~jgia.attacks.gifd.stages.begin` of a group."""
    return jax.vmap(lambda a, b: stages.begin(stage, a, b, radii))(side, state)


def advance(
    stage: Stage,
    weights: Weights,
    params: PyTree,
    matching: Matching,
    anchor: Anchor,
    state: State,
    rates: np.ndarray,
    *,
    driver: Literal["python", "scan"],
) -> tuple[State, np.ndarray]:
    """Some steps of a group.

    From Python a step is three compiled functions: the generator, the victim, and the way back
    through the generator with the optimizer. The victim's, which takes longest to compile, is the
    same in all stages.

    Args:
      stage: which.
      weights: of the terms beside the distance.
      params: the generator's.
      matching: what is looked for.
      anchor: the stage's start.
      state: of every search.
      rates: (n,) learning rates of the steps.
      driver: as :func:`resolve_driver` says.

    Returns:
      The state, and the losses (searches, n) before each step.
    """
    rates = rates.astype(np.float32)
    if driver == "scan":
        state, losses = _scan(stage, weights, params, matching, anchor, state, rates)
        return state, np.asarray(losses).T
    collected = []
    for rate in rates:
        pixels, pullback = _render(stage, params, anchor, state.point)
        loss, _, gradient = _image_loss(weights, matching, pixels)
        state = _move(anchor, state, loss, gradient, pullback, rate)
        collected.append(loss)
    return state, np.stack(jax.device_get(collected), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _render(stage: Stage, params: PyTree, anchor: Anchor, point: Point) -> tuple[Array, Any]:
    """(pixels, the way back to the point) of a group."""
    return jax.vjp(lambda point: _rendered(stage, params, anchor, point), point)


def _rendered(stage: Stage, params: PyTree, anchor: Anchor, point: Point) -> Array:
    return _each(lambda a, p: stages.render(stage, params, a, p), anchor, point)


def _each(function: Any, *arguments: PyTree) -> PyTree:
    """``vmap``, but a single one as it is, which is quicker."""
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(function)(*arguments)
    first = jax.tree.map(lambda leaf: leaf[0], arguments)
    return jax.tree.map(lambda leaf: leaf[None], function(*first))


@functools.partial(jax.jit, static_argnums=0)
def _image_loss(weights: Weights, matching: Matching, pixels: Array) -> tuple[Array, Array, Array]:
    """(losses, distances of updates, the losses' derivatives in the pixels) of a group."""

    def one(matching: Matching, pixels: Array) -> tuple[Array, Array, Array]:
        def loss(pixels: Array) -> tuple[Array, Array]:
            return stages.image_loss(weights, matching, pixels)

        (value, fit), gradient = jax.value_and_grad(loss, has_aux=True)(pixels)
        return value, fit, gradient

    return vmapped(matching, one, pixels)


@jax.jit
def _move(
    anchor: Anchor, state: State, loss: Array, gradient: Array, pullback: Any, rate: Array
) -> State:
    (back,) = pullback(gradient)
    return _each(
        lambda a, s, value, g: stages.move(a, s, value, g, rate), anchor, state, loss, back
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _scan(
    stage: Stage,
    weights: Weights,
    params: PyTree,
    matching: Matching,
    anchor: Anchor,
    state: State,
    rates: Array,
) -> tuple[State, Array]:
    def step(state: State, rate: Array) -> tuple[State, Array]:
        pixels, pullback = _render(stage, params, anchor, state.point)
        loss, _, gradient = _image_loss(weights, matching, pixels)
        return _move(anchor, state, loss, gradient, pullback, rate), loss

    return jax.lax.scan(step, state, rates)


def images(stage: Stage, params: PyTree, anchor: Anchor, point: Point) -> Array:
    """(searches, B, H, W, C) pixels in [0, 1]; compiles nothing after a step from Python."""
    return jnp.clip(_render(stage, params, anchor, point)[0], 0, 1)


def distances(weights: Weights, matching: Matching, pixels: Array) -> Array:
    """(searches,) distances of updates, of pixels in [0, 1]; compiles nothing after a step."""
    return _image_loss(weights, matching, pixels)[1]


@functools.partial(jax.jit, static_argnums=0)
def leave(
    stage: Stage, params: PyTree, anchor: Anchor, point: Point
) -> tuple[Side, GeneratorState]:
    """Where the next stage of a group starts."""
    return _each(lambda a, p: stages.leave(stage, params, a, p), anchor, point)
