"""One stage of the search: what it moves, one step of it, and what the next stage starts from."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.matching import Matching, matching_distance
from jgia.attacks.gifd.projection import project_l1
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gradient_matching import priors
from jgia.attacks.gradient_matching.optimizers import scale_by_adam
from jgia.config.gifd import RadiusMode, Skip
from jgia.generators.protocol import GeneratorState, Side, StagedGenerator

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is static of a stage: an argument of compiled functions.

    Attributes:
      generator: whose features are searched.
      index: 0 for side inputs alone, else the block that the features enter.
      structure: of side inputs, whose leaves the next two go through.
      free: which of them are searched.
      noise: which of them are noise maps.
      skip: what becomes of the image that earlier blocks put out.
      radius_mode: what radii count in.
      factor: the generator's side over the victim's.
    """

    generator: StagedGenerator
    index: int
    structure: Any
    free: tuple[bool, ...]
    noise: tuple[bool, ...]
    skip: Skip
    radius_mode: RadiusMode
    factor: int


class Point(NamedTuple):
    """What a stage moves.

    Attributes:
      features: (B, h, w, C) that enter the stage's block; ``None`` in stage 0.
      image: (B, h, w, channels) of earlier blocks where that is searched, else ``None``.
      side: the free side inputs.
    """

    features: Array | None
    image: Array | None
    side: tuple[Array, ...]


class Anchor(NamedTuple):
    """What a stage does not move.

    Attributes:
      start: the point where the stage began: the centers of its balls.
      radii: (B,) radii, in the structure of a point.
      side: side inputs that are not searched.
      image: (B, h, w, channels) carried along, or ``None``.
    """

    start: Point
    radii: Point
    side: tuple[Array, ...]
    image: Array | None


class State(NamedTuple):
    """What a search carries from step to step.

    Attributes:
      point: the current one.
      optimizer: optax's state, fresh in every stage.
      alive: whether all numbers were finite so far; a search that is not alive stays where it is.
    """

    point: Point
    optimizer: PyTree
    alive: Array


class Weights(NamedTuple):
    """Weights of the terms beside the distance, on normalized images."""

    total_variation: float
    image_l2: float


def make_stage(
    generator: StagedGenerator, index: int, side: Side, settings: Settings, factor: int
) -> Stage:
    """What a stage searches.

    Args:
      generator: says which side inputs a stage may free.
      index: of the stage.
      side: of one search, or their shapes.
      settings: say how many of these are searched.
      factor: the generator's side over the victim's.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(side)
    noise = tuple(getattr(path[0], "key", None) == "noise" for path, _ in paths)
    free = structure.flatten_up_to(generator.free(side, index))
    if settings.search == "features" and index > 0:
        free = [False] * len(free)
    if settings.search == "features_styles":
        free = [may and not is_noise for may, is_noise in zip(free, noise, strict=True)]
    return Stage(
        generator,
        index,
        structure,
        tuple(bool(may) for may in free),
        noise,
        settings.skip,
        settings.radius_mode,
        factor,
    )


def begin(
    stage: Stage,
    side: Side,
    state: GeneratorState | None,
    radii: tuple[ArrayLike, ArrayLike, ArrayLike],
) -> tuple[Anchor, State]:
    """A stage's start: features as the stage before left them, a fresh optimizer.

    Args:
      stage: which.
      side: all side inputs.
      state: what enters the stage's block; ``None`` in stage 0.
      radii: scalars for features, side inputs and noise, in the unit of ``radius_mode``.
    """
    leaves = stage.structure.flatten_up_to(side)
    features, image = (None, None) if state is None else state
    searched = image if stage.skip == "optimize" else None
    carried = None
    if image is not None and stage.skip != "optimize":
        carried = image if stage.skip == "carry" else jnp.zeros_like(image)
    free = tuple(_chosen(leaves, stage.free))
    fixed = tuple(_chosen(leaves, [not may for may in stage.free]))
    start = Point(features, searched, free)
    kinds = [radii[2] if noise else radii[1] for noise in _chosen(stage.noise, stage.free)]
    reach = Point(
        None if features is None else _reach(stage.radius_mode, features, radii[0]),
        None if searched is None else _reach(stage.radius_mode, searched, radii[0]),
        tuple(
            _reach(stage.radius_mode, leaf, radius)
            for leaf, radius in zip(free, kinds, strict=True)
        ),
    )
    anchor = Anchor(start, reach, fixed, carried)
    moving = jax.tree.map(jnp.copy, start)
    return anchor, State(moving, scale_by_adam().init(moving), jnp.ones((), bool))


def _reach(mode: RadiusMode, start: Array, radius: ArrayLike) -> Array:
    """(B,) radii of the balls around a start."""
    radius = jnp.asarray(radius, start.dtype)
    if mode == "per_element":
        return jnp.broadcast_to(radius * start[0].size, start.shape[:1])
    if mode == "relative":
        length = jnp.sum(jnp.abs(start.reshape(start.shape[0], -1)), axis=1)
        return jnp.where(jnp.isinf(radius), radius, radius * length)
    return jnp.broadcast_to(radius, start.shape[:1])


def inputs_of(stage: Stage, anchor: Anchor, point: Point) -> tuple[Side, GeneratorState | None]:
    """What a point stands for: side inputs and what enters the stage's block."""
    free, fixed = iter(point.side), iter(anchor.side)
    leaves = [next(free if may else fixed) for may in stage.free]
    side = jax.tree.unflatten(stage.structure, leaves)
    if point.features is None:
        return side, None
    image = anchor.image if point.image is None else point.image
    return side, GeneratorState(point.features, image)


def render(stage: Stage, params: PyTree, anchor: Anchor, point: Point) -> Array:
    """(B, H, W, C) pixels at the victim's size, about [0, 1], not clipped."""
    generator = stage.generator
    side, state = inputs_of(stage, anchor, point)
    last = generator.run(params, side, state, start=stage.index)
    pixels = (generator.image(params, side, last) + 1) / 2
    if stage.factor == 1:
        return pixels
    batch, height, width, channels = pixels.shape
    n = stage.factor
    return pixels.reshape(batch, height // n, n, width // n, n, channels).mean(axis=(2, 4))


def image_loss(weights: Weights, matching: Matching, pixels: Array) -> tuple[Array, Array]:
    """(loss, distance of updates) of unclipped pixels (B, H, W, C)."""
    inputs = matching.victim.normalization.normalize(pixels)
    fit = matching_distance(matching, inputs)
    total = fit
    if weights.total_variation:
        total = total + weights.total_variation * priors.total_variation(inputs)
    if weights.image_l2:
        total = total + weights.image_l2 * priors.image_l2(inputs)
    return total, fit


def move(anchor: Anchor, state: State, loss: Array, gradient: PyTree, rate: ArrayLike) -> State:
    """A step of Adam, then the projection of every part on the ball around its start.

    Adam's moments are left as they are. A step from or to numbers that are not finite is not
    taken, nor any after it.

    References:
      Fang et al., "GIFD" (ICCV 2023, arXiv 2308.04699), section 3.3; Daras et al., "Intermediate
      Layer Optimization" (ICML 2021, arXiv 2102.07364).
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
        change, optimizer = scale_by_adam().update(gradient, state.optimizer)
    offsets = jax.tree.map(
        lambda x, d, x0: x - jnp.asarray(rate, x.dtype) * d - x0,
        state.point,
        change,
        anchor.start,
    )
    new = jax.tree.map(jnp.add, anchor.start, project_l1(offsets, anchor.radii))
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new)]
    alive = state.alive & jnp.isfinite(loss) & jnp.stack(finite).all()
    point, optimizer = jax.tree.map(
        lambda a, b: jnp.where(alive, a, b), (new, optimizer), (state.point, state.optimizer)
    )
    return State(point, optimizer, alive)


def leave(
    stage: Stage, params: PyTree, anchor: Anchor, point: Point
) -> tuple[Side, GeneratorState]:
    """Side inputs, and what enters the next block: where the next stage starts."""
    side, state = inputs_of(stage, anchor, point)
    after = stage.generator.run(params, side, state, start=stage.index, stop=stage.index + 1)
    return side, after


def _chosen(values: Any, which: Any) -> list[Any]:
    return [value for value, wanted in zip(values, which, strict=True) if wanted]
