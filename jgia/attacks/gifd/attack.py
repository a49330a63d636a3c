"""The attack as one call: from an observation and a generator to images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.drive import Group, resolve_driver
from jgia.attacks.gifd.matching import stack
from jgia.attacks.gifd.plan import FeaturePlan
from jgia.attacks.gifd.prepare import TrainedGenerator, prepare
from jgia.attacks.gifd.result import reconstruction
from jgia.attacks.gifd.run import Progress, Run
from jgia.attacks.gifd.settings import Settings, settings
from jgia.attacks.gradient_matching.checkpoint import digest
from jgia.config.gifd import GifdOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import Side
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction

_MOST_ON_CPU = 4  # more fill no core better, and lengthen what has to be kept


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
    one = prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
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
        prepare(
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
    plan = FeaturePlan(
        generator=prior.generator,
        generator_params=prior.params,
        settings=chosen,
        factor=prior.generator.resolution // victim.input_shape[0],
    )
    return Run(
        plan=plan,
        driver=resolve_driver(performance.driver),
        options=run_options,
        mark=mark,
        progress=progress,
    )
