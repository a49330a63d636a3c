"""What vectors GGL searches, what they stand for, and how well they match."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.gifd import stages
from jgia.attacks.gifd.matching import Matching, matching_distance, vmapped
from jgia.attacks.gifd.result import Client
from jgia.attacks.gifd.stages import Anchor, Point, Stage
from jgia.config.gifd_baselines import GglOptions
from jgia.generators.protocol import Side

PyTree = Any

_SPREAD_DRAWS = 256  # for the spread of side inputs


@runtime_checkable
class MappedGenerator(Protocol):
    """A generator that makes one style of a normal vector, as StyleGAN2 does."""

    @property
    def latent_dim(self) -> int: ...  # noqa: D102

    def map(self, params: PyTree, latents: Array, labels: Array | None = None) -> Array:
        """(B, latent_dim) normal vectors to (B, D) styles."""
        ...

    def broadcast(self, style: Array) -> Array:
        """(B, D) styles to what ``side["styles"]`` holds."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """What is static of the vectors searched.

    Attributes:
      stage: stage 0, with the side inputs that vectors replace.
      mapped: whether they are normal vectors before a mapping network.
      shapes: of the parts of a vector, in order; each (B, ...).
      tanh: whether it is applied.
      kld: weight of the divergence.
      arrays: what a sum of squares is divided by, else 1.
    """

    stage: Stage
    mapped: bool
    shapes: tuple[tuple[int, ...], ...]
    tanh: bool
    kld: float
    arrays: int

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return sum(math.prod(shape) for shape in self.shapes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
    """What vectors stand for in one restart: leaves of side inputs, classes, and the unit."""

    leaves: list[Array]
    labels: Array | None
    mean: list[Array]
    deviation: list[Array]


def make_space(options: GglOptions, stage: Stage, client: Client) -> Space:
    """What is searched of a generator for one client.

    Args:
      options: see :class:`~jgia.config.gifd_baselines.GglOptions`.
      stage: stage 0 of a search without noise maps.
      client: its number of images, and side inputs.

    Raises:
      ValueError: ``ggl_space="latent"`` for a generator without a mapping network.
    """
    generator, images = stage.generator, len(client.matching.labels)
    length = generator.latent_dim if isinstance(generator, MappedGenerator) else None
    if options.ggl_space == "latent" and length is None:
        raise ValueError(
            f"ggl_space='latent' needs a generator with a mapping network, and "
            f"{type(generator).__name__} has none; take 'side'."
        )
    mapped = length is not None and options.ggl_space != "side"
    if length is not None and mapped:
        shapes = ((images, length),)
    else:
        leaves = stage.structure.flatten_up_to(client.side)  # (restarts, B, ...)
        shapes = tuple(x.shape[1:] for x, may in zip(leaves, stage.free, strict=True) if may)
    squares = options.ggl_distance == "l2"
    arrays = len(jax.tree.leaves(client.matching.update)) if squares else 1
    return Space(stage, mapped, shapes, options.ggl_tanh, options.ggl_kld, arrays)


def make_basis(space: Space, params: PyTree, side: Side, client: Client, seed: int) -> Basis:
    """The unit of a restart's vectors, from random draws."""
    labels = client.generator_labels
    labels = None if labels is None else jnp.asarray(labels, jnp.int32)
    leaves = space.stage.structure.flatten_up_to(side)
    if space.mapped:
        return Basis(leaves, labels, [], [])
    mean, deviation = _spread(
        space, params, jax.random.split(jax.random.key(seed), _SPREAD_DRAWS), labels
    )
    return Basis(leaves, labels, mean, deviation)


@functools.partial(jax.jit, static_argnums=0)
def _spread(
    space: Space, params: PyTree, keys: Array, labels: Array | None
) -> tuple[list[Array], list[Array]]:
    """Mean and deviation of the free side inputs, each (B, ...)."""
    count = space.shapes[0][0]
    draw = space.stage.generator.draw
    drawn = jax.vmap(lambda key: draw(params, key, count, labels))(keys)
    leaves = space.stage.structure.flatten_up_to(drawn)
    free = [leaf for leaf, may in zip(leaves, space.stage.free, strict=True) if may]
    return [leaf.mean(axis=0) for leaf in free], [leaf.std(axis=0) for leaf in free]


@functools.partial(jax.jit, static_argnums=0)
def evaluate(
    space: Space, params: PyTree, matching: Matching, basis: Basis, vectors: Array
) -> tuple[Array, Array, Array]:
    """(losses, distances, pixels in [0, 1]) of (P, n) vectors."""
    pixels, parts = _rendered(space, params, basis, vectors)

    def one(matching: Matching, pixels: Array) -> Array:
        return matching_distance(matching, matching.victim.normalization.normalize(pixels))

    fits = vmapped(matching, one, pixels)
    losses = fits / space.arrays
    if space.kld:
        losses = losses + space.kld * sum(_divergence(part) for part in parts)
    return losses, fits, pixels


def _rendered(
    space: Space, params: PyTree, basis: Basis, vectors: Array
) -> tuple[Array, list[Array]]:
    """(P, B, H, W, C) pixels, and the parts of the vectors, (P, B, ...), that make them."""
    count = len(vectors)
    vectors = jnp.tanh(vectors) if space.tanh else vectors
    ends = np.cumsum([math.prod(shape) for shape in space.shapes])[:-1]
    parts = [
        part.reshape(count, *shape)
        for part, shape in zip(jnp.split(vectors, ends, axis=1), space.shapes, strict=True)
    ]

    def tiled(leaf: Array) -> Array:
        whole = jnp.broadcast_to(leaf[None], (count, *leaf.shape))
        return whole.reshape(-1, *leaf.shape[1:])

    leaves = [tiled(leaf) for leaf in basis.leaves]
    if space.mapped:
        side = jax.tree.unflatten(space.stage.structure, leaves)
        labels = None if basis.labels is None else tiled(basis.labels)
        flat = parts[0].reshape(-1, parts[0].shape[-1])
        generator: Any = space.stage.generator
        style = generator.map(params, flat, labels)
        leaves = jax.tree.leaves({**side, "styles": generator.broadcast(style)})
    else:
        scaled = iter(
            (mean[None] + deviation[None] * part).reshape(-1, *part.shape[2:])
            for mean, deviation, part in zip(basis.mean, basis.deviation, parts, strict=True)
        )
        leaves = [
            next(scaled) if may else leaf
            for leaf, may in zip(leaves, space.stage.free, strict=True)
        ]
    # All side inputs are of the point: the generator sees one batch of P B images.
    whole = dataclasses.replace(space.stage, free=(True,) * len(leaves))
    point = Point(None, None, tuple(leaves))
    pixels = stages.render(whole, params, Anchor(point, point, (), None), point)
    images = space.shapes[0][0]
    return jnp.clip(pixels, 0, 1).reshape(count, images, *pixels.shape[1:]), parts


def _divergence(part: Array) -> Array:
    """(P,) mean over images of ``-(1 + log s^2 - m^2 - s^2) / 2`` (Li et al. 2022, code)."""
    flat = part.reshape(*part.shape[:2], -1)
    mean, variance = flat.mean(axis=2), flat.var(axis=2)
    return jnp.mean(-0.5 * (1 + jnp.log(variance + 1e-10) - mean**2 - variance), axis=1)
