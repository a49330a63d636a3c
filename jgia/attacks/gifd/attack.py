"""The attack as one call: from an observation and a generator to images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.drive import Group, resolve_driver
from jgia.attacks.gifd.matching import make_matching, stack
from jgia.attacks.gifd.result import Client, reconstruction
from jgia.attacks.gifd.run import Progress, Run
from jgia.attacks.gifd.settings import Settings, settings
from jgia.attacks.gifd.transform import Transform, estimate_transform
from jgia.attacks.gradient_matching.checkpoint import digest
from jgia.attacks.labels.known import example_count, given_or_inferred
from jgia.config.gifd import GifdOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import Side, StagedGenerator
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_MOST_ON_CPU = 4  # more fill no core better, and lengthen what has to be kept


@runtime_checkable
class TrainedGenerator(Protocol):
    """What the attack needs of a prior: see :class:`jgia.generators.Prior`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def generator(self) -> StagedGenerator: ...  # noqa: D102
    @property
    def params(self) -> PyTree: ...  # noqa: D102


def attack(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    *,
    options: GifdOptions | Settings | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
    num_examples: int | None = None,
    generator_labels: ArrayLike | None = None,
    start_side: Side | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    r"""Search a generator's latent codes, then its features block by block, for the images.

    Stage 0 minimizes ``D(T'(update(G(z))), g*) + R(G(z))`` over latent codes; stage k over the
    features ``h_k`` that enter block k, and the side inputs of later blocks, from what stage k - 1
    left. After every step each of them is projected on the l1 ball around its start. Of all stages
    and restarts, the images with the smallest distance of updates are returned.

    Args:
      key: PRNG key: where searches start, and ties in label inference. The same key draws the same
        latent codes whatever the labels.
      observation: update, parameters that were sent, model, threat model. The server may be honest
        but curious.
      prior: a generator, and its parameters.
      options: replace single settings of a preset; or all of them, as :class:`Settings`.
      performance: searches at once (``microbatch``), driver.
      run_options: checkpoint, steps between looks; ``dump`` gets one picture per stage.
      num_examples: how many images to search for where the threat model does not tell.
      generator_labels: (B,) classes that a conditional generator is given; those of the victim
        when left out. The update is matched with the victim's labels always.
      start_side: side inputs to start from, every leaf (restarts, B, ...), instead of random ones.
      progress: called with (steps done, steps in all, smallest loss so far).

    Returns:
      All images of the winning restart and stage, with status ``matched``; none, with status
      ``nonfinite``, where no distance is finite. ``stats`` holds distances and curves of every
      stage and restart, and why this one was chosen; ``history`` one frame per stage of the
      restart returned.

    Raises:
      ValueError: the prior does not fit the model, labels do not fit the generator, the update is
        not finite, the threat model does not allow the search, or arguments do not fit; before any
        step.

    Guarantees:
      The same key gives the same bits on the same device, whether the run was interrupted and
      resumed from its checkpoint or not (without ``budget_seconds``). Another client of the same
      model, batch and settings compiles nothing. A restart never sees another's variables.

    References:
      Fang et al., "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization"
      (ICCV 2023, arXiv 2308.04699).

    Departures: the restart with the best score is returned, not the last one; every restart has
    noise of its own; the image of earlier blocks is carried along; the client's transformation is
    estimated from the update alone; balls are sized per entry of the features, unless a preset of
    the paper is chosen. The released code differs in each.
    """
    chosen = _settings(options, prior)
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    one = _prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
    size = _group_size(performance, chosen.restarts)
    groups = [
        Group(one.matching, jax.tree.map(lambda leaf, i=i: leaf[i : i + size], one.side), None)
        for i in range(0, chosen.restarts, size)
    ]
    run = _run(key, prior, chosen, performance, run_options, groups, observation.victim, progress)
    return reconstruction(one, run(groups), range(chosen.restarts), chosen, prior.name)


def attack_clients(
    key: Array,
    observations: Sequence[Observation],
    prior: TrainedGenerator,
    *,
    options: GifdOptions | Settings | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
    generator_labels: Sequence[ArrayLike] | None = None,
    progress: Progress | None = None,
) -> list[Reconstruction]:
    """:func:`attack` for many clients of one round, all searches of a group advanced at once.

    Args:
      key: PRNG key; client k has ``jax.random.split(key, len(observations))[k]``, so that it gets
        the same images as :func:`attack` with that key, up to rounding.
      observations: of clients with the same model, parameters, threat model (labels aside) and
        number of examples.
      prior: as for :func:`attack`.
      options: as for :func:`attack`.
      performance: ``microbatch`` searches (clients times restarts) run at once; up to four on CPU
        and all elsewhere when left out. Compiled once in all.
      run_options: as for :func:`attack`; one checkpoint holds all clients.
      generator_labels: one entry per client.
      progress: as for :func:`attack`.

    Returns:
      One reconstruction per observation, in order.

    Raises:
      ValueError: as :func:`attack`; or clients differ in more than their data.
    """
    if not observations:
        raise ValueError("observations must hold at least one client's.")
    if generator_labels is not None and len(generator_labels) != len(observations):
        raise ValueError(
            f"generator_labels must have one entry for each of {len(observations)} clients, got "
            f"{len(generator_labels)}."
        )
    chosen = _settings(options, prior)
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    keys = jax.random.split(key, len(observations))
    clients = [
        _prepare(
            keys[k],
            observation,
            prior,
            chosen,
            None,
            None if generator_labels is None else generator_labels[k],
            None,
        )
        for k, observation in enumerate(observations)
    ]
    searches = [client.matching for client in clients for _ in range(chosen.restarts)]
    sides = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(c.side for c in clients))
    size = _group_size(performance, len(searches))
    groups = [
        Group(
            stack(searches[i : i + size]),
            jax.tree.map(lambda leaf, i=i: leaf[i : i + size], sides),
            None,
        )
        for i in range(0, len(searches), size)
    ]
    victim = observations[0].victim
    run = _run(key, prior, chosen, performance, run_options, groups, victim, progress)
    results = run(groups)
    return [
        reconstruction(
            client,
            results,
            range(k * chosen.restarts, (k + 1) * chosen.restarts),
            chosen,
            prior.name,
        )
        for k, client in enumerate(clients)
    ]


def _settings(options: GifdOptions | Settings | None, prior: TrainedGenerator) -> Settings:
    if isinstance(options, Settings):
        if options.last_stage >= prior.generator.num_blocks:
            settings(GifdOptions(last_stage=options.last_stage), generator=prior.generator)
        return options
    return settings(options, generator=prior.generator)


def _prepare(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    chosen: Settings,
    num_examples: int | None,
    generator_labels: ArrayLike | None,
    start_side: Side | None,
) -> Client:
    _check_prior(prior.generator, observation.victim)
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


def _check_prior(generator: StagedGenerator, victim: Victim) -> None:
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


def _group_size(performance: PerformanceFlags, searches: int) -> int:
    """Searches advanced at once: as many as divide them evenly, on CPU four at most, else all."""
    if performance.microbatch is not None:
        return performance.microbatch
    if jax.default_backend() != "cpu":
        return searches
    return max(size for size in range(1, _MOST_ON_CPU + 1) if searches % size == 0)


def _run(
    key: Array,
    prior: TrainedGenerator,
    chosen: Settings,
    performance: PerformanceFlags,
    run_options: RunOptions,
    groups: list[Group],
    victim: Victim,
    progress: Progress | None,
) -> Run:
    mark = ""
    if run_options.checkpoint is not None:
        statics = prior.generator, chosen, victim, groups[0].matching.threat_model
        mark = digest(statics, (prior.params, groups), key)
    return Run(
        generator=prior.generator,
        params=prior.params,
        settings=chosen,
        factor=prior.generator.resolution // victim.input_shape[0],
        driver=resolve_driver(performance.driver),
        options=run_options,
        mark=mark,
        progress=progress,
    )
