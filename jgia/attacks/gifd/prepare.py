"""What every attack on a prior does before its first step: checks, labels, and where it starts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.matching import make_matching
from jgia.attacks.gifd.result import Client
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gifd.transform import Transform, estimate_transform
from jgia.attacks.labels.known import example_count, given_or_inferred
from jgia.generators.protocol import Side, StagedGenerator
from jgia.models import Victim
from jgia.observation import Observation

PyTree = Any


@runtime_checkable
class TrainedGenerator(Protocol):
    """What the attack needs of a prior: see :class:`jgia.generators.Prior`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def generator(self) -> StagedGenerator: ...  # noqa: D102
    @property
    def params(self) -> PyTree: ...  # noqa: D102


def prepare(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    chosen: Settings,
    num_examples: int | None,
    generator_labels: ArrayLike | None,
    start_side: Side | None,
) -> Client:
    """What is searched for one client: its update, its labels, and the start of every restart.

    Args:
      key: PRNG key: ties in label inference, and where restarts start.
      observation: update, parameters that were sent, model, threat model.
      prior: a generator, and its parameters.
      chosen: says how many restarts there are, how labels are inferred and what is replayed.
      num_examples: how many images to search for where the threat model does not tell.
      generator_labels: (B,) classes that a conditional generator is given; those of the victim
        when left out.
      start_side: side inputs to start from, every leaf (restarts, B, ...), instead of random ones.

    Raises:
      ValueError: the prior does not fit the model, labels do not fit the generator, the update is
        not finite, or the threat model does not allow the search.
    """
    check_prior(prior.generator, observation.victim)
    count = example_count(observation, num_examples)
    transform, record = Transform(), {"found": "not asked for"}
    check = make_matching(observation, np.zeros(count, np.int32), distance=chosen.distance)
    if chosen.replay != "none":
        transform, record = estimate_transform(observation, bound=chosen.replay == "all")
    key_labels, key_start = jax.random.split(key)
    labels, how = given_or_inferred(key_labels, observation, chosen.labels, count)
    shown = _generator_labels(prior.generator, generator_labels, labels)
    side = _draw(
        prior.generator, prior.params, jax.random.split(key_start, chosen.restarts), count, shown
    )
    if start_side is not None:
        side = _given_side(start_side, side)
    return Client(
        matching=dataclasses.replace(check, labels=labels, transform=transform),
        side=side,
        labels_by=how,
        generator_labels=None if shown is None else np.asarray(shown),
        transform=record,
    )


def check_prior(generator: StagedGenerator, victim: Victim) -> None:
    """Refuse a generator whose images are not the victim's, nor averaged down to them.

    Args:
      generator: what is searched.
      victim: whose images are looked for.

    Raises:
      ValueError: channels differ, or sizes are not the same or a multiple.
    """
    height, width, channels = victim.input_shape
    if generator.channels != channels:
        raise ValueError(
            f"the prior makes images of {generator.channels} channels, the victim takes "
            f"{channels}; take a prior trained on such images."
        )
    if height != width or generator.resolution % height:
        raise ValueError(
            f"the prior makes {generator.resolution} x {generator.resolution} images, which are "
            f"averaged down by a whole number; the victim takes {height} x {width}. Take a prior "
            "of that size or a multiple."
        )


def _generator_labels(
    generator: StagedGenerator, given: ArrayLike | None, labels: Array
) -> Array | None:
    """(B,) classes for a conditional generator, ``None`` for an unconditional one."""
    if not generator.num_classes:
        if given is not None:
            raise ValueError(
                "generator_labels were given, and the prior is not conditional; leave them out, or "
                "take a conditional prior."
            )
        return None
    shown = labels if given is None else jnp.asarray(given)
    if shown.shape != labels.shape or not jnp.issubdtype(shown.dtype, jnp.integer):
        raise ValueError(
            f"generator_labels must be {labels.shape} integers, got shape {shown.shape} of "
            f"{shown.dtype}."
        )
    values = np.asarray(shown)
    if values.min() < 0 or values.max() >= generator.num_classes:
        raise ValueError(
            f"the generator has classes 0 to {generator.num_classes - 1}, got {values.tolist()}"
            + (
                "; give generator_labels=, the victim's labels are not among its classes."
                if given is None
                else " in generator_labels."
            )
        )
    return shown.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _draw(
    generator: StagedGenerator, params: PyTree, keys: Array, count: int, labels: Array | None
) -> Side:
    """Side inputs of every restart, every leaf (R, B, ...)."""
    return jax.vmap(lambda key: generator.draw(params, key, count, labels))(keys)


def _given_side(given: Side, like: Side) -> Side:
    expected = jax.tree.map(lambda leaf: leaf.shape, like)
    got = jax.tree.map(jnp.shape, given)
    if jax.tree.structure(given) != jax.tree.structure(like) or expected != got:
        raise ValueError(
            f"start_side must have the shapes {expected} (restarts, images, ...), got {got}."
        )
    return jax.tree.map(lambda leaf, known: jnp.asarray(leaf, known.dtype), given, like)
