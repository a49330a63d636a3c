"""The attack as one call: from an observation to images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gradient_matching import search
from jgia.attacks.gradient_matching.drive import run
from jgia.attacks.gradient_matching.objective import Problem, Variables, make_problem, stack
from jgia.attacks.gradient_matching.record import Progress, Recorder
from jgia.attacks.gradient_matching.search import State
from jgia.attacks.gradient_matching.settings import Settings, settings
from jgia.attacks.labels.known import example_count, given_or_inferred
from jgia.config.gradient_matching import MatchingAttack, MatchingOptions, RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.observation import Observation, Reconstruction, Status


def attack(
    key: Array,
    observation: Observation,
    *,
    method: MatchingAttack = "inverting_gradients",
    options: MatchingOptions | Settings | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
    num_examples: int | None = None,
    start: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Search for images whose update matches the client's.

    Minimizes ``distance(update(x, y), observed) + priors(x)`` over normalized images ``x``, from
    random starts. Labels are given (``threat_model.labels``), inferred first, or searched too.

    Args:
      key: PRNG key: starts, and ties in label inference.
      observation: update, parameters that were sent, model, threat model. The server may be honest
        but curious.
      method: whose settings: ``"dlg"``, ``"idlg"``, ``"inverting_gradients"``, ``"see_through"``.
      options: replaces single settings; or all of them, as :class:`Settings`.
      performance: restarts at once, dtype, driver.
      run_options: checkpoint, loss curve, images on the way.
      num_examples: how many images to search for where the threat model does not tell.
      start: (R, B, H, W, C) pixels in [0, 1] to start from instead of random ones.
      progress: called with (steps done, steps in all, smallest loss so far).

    Returns:
      All images of the restart with the smallest gradient distance, with status ``matched``; none,
      with status ``nonfinite``, where no finite loss was found. ``stats`` holds the curve,
      distances of all restarts and what was known.

    Raises:
      ValueError: the threat model or the model does not allow the search, or arguments do not fit;
        before any step.

    Guarantees:
      The same key gives the same bits on the same device, whether the run was interrupted and
      resumed from its checkpoint or not. A second client of the same model, batch and settings
      compiles nothing.

    Departures: see :func:`settings` and :mod:`~jgia.attacks.gradient_matching.optimizers`.
    """
    chosen = options if isinstance(options, Settings) else settings(method, options)
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    key_labels, key_start = jax.random.split(key)
    problem, labels_by = _prepare(key_labels, observation, chosen, num_examples)
    states = _starts(key_start, problem, performance, start)
    recorder = Recorder(problem, run_options, key=key_start, progress=progress)
    states = run(
        [problem] * len(states),
        recorder.resumed(states),
        num_steps=chosen.num_steps,
        stretch=recorder.stretch,
        driver=performance.driver,
        on_event=recorder,
    )
    rows = range(chosen.restarts)
    return _reconstruction(problem, _merged(states), recorder, rows, labels_by=labels_by)


def attack_clients(
    key: Array,
    observations: Sequence[Observation],
    *,
    method: MatchingAttack = "inverting_gradients",
    options: MatchingOptions | Settings | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
    progress: Progress | None = None,
) -> list[Reconstruction]:
    """:func:`attack` for many clients of one round, all searches of a group advanced at once.

    Args:
      key: PRNG key; client k has ``jax.random.split(key, len(observations))[k]``, so that it gets
        the same images as :func:`attack` with that key, up to rounding.
      observations: of clients with the same model, parameters, threat model (labels aside) and
        number of examples.
      method: as for :func:`attack`.
      options: as for :func:`attack`.
      performance: ``microbatch`` searches (clients times restarts) run at once; one by one on CPU
        and all at once elsewhere when left out. Compiled once in all.
      run_options: as for :func:`attack`; one checkpoint holds all clients.
      progress: as for :func:`attack`.

    Returns:
      One reconstruction per observation, in order.

    Raises:
      ValueError: as :func:`attack`; clients differ in more than their data; or a group prior, whose
        mean would mix clients.
    """
    if not observations:
        raise ValueError("observations must hold at least one client's.")
    chosen = options if isinstance(options, Settings) else settings(method, options)
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    if chosen.group_prior:
        raise ValueError(
            "the group prior averages restarts and would mix clients; attack them one by one, or "
            "set group_prior=0."
        )
    problems, found_by, starts = [], [], []
    for each, observation in zip(
        jax.random.split(key, len(observations)), observations, strict=True
    ):
        key_labels, key_start = jax.random.split(each)
        problem, labels_by = _prepare(key_labels, observation, chosen, None)
        problems += [problem] * chosen.restarts
        found_by.append(labels_by)
        starts.append((key_start, problem))
    everything = stack(problems)
    states = _merged([_all_starts(key_start, problem, None) for key_start, problem in starts])
    size = _group_size(performance, len(problems))
    groups = [stack(problems[i : i + size]) for i in range(0, len(problems), size)]
    recorder = Recorder(everything, run_options, key=key, progress=progress)
    done = run(
        groups,
        recorder.resumed(_grouped(states, size)),
        num_steps=chosen.num_steps,
        stretch=recorder.stretch,
        driver=performance.driver,
        on_event=recorder,
    )
    merged = _merged(done)
    return [
        _reconstruction(
            problems[k * chosen.restarts],
            merged,
            recorder,
            range(k * chosen.restarts, (k + 1) * chosen.restarts),
            labels_by=labels_by,
        )
        for k, labels_by in enumerate(found_by)
    ]


def _prepare(
    key: Array, observation: Observation, chosen: Settings, num_examples: int | None
) -> tuple[Problem, str]:
    """What is searched, and how its labels were found."""
    labels, how = _labels(key, observation, chosen, example_count(observation, num_examples))
    return make_problem(observation, labels, chosen), how


def _labels(
    key: Array, observation: Observation, chosen: Settings, count: int
) -> tuple[Array, str]:
    """(B,) labels and how they were found."""
    if chosen.labels == "joint":
        if observation.threat_model.labels is None:
            return jnp.zeros(count, jnp.int32), "joint"
        return given_or_inferred(key, observation, "auto", count)
    return given_or_inferred(key, observation, chosen.labels, count)


def _starts(
    key: Array, problem: Problem, performance: PerformanceFlags, start: ArrayLike | None
) -> list[State]:
    """Restarts in groups that are advanced together."""
    states = _all_starts(key, problem, start)
    return _grouped(states, _group_size(performance, problem.settings.restarts))


def _all_starts(key: Array, problem: Problem, start: ArrayLike | None) -> State:
    restarts = problem.settings.restarts
    states = jax.vmap(search.init, in_axes=(0, None))(jax.random.split(key, restarts), problem)
    if start is None:
        return states
    pixels = jnp.asarray(start, states.variables.inputs.dtype)
    expected = (restarts, len(problem.labels), *problem.victim.input_shape)
    if pixels.shape != expected:
        raise ValueError(
            f"start must have shape {expected} (restarts, images, height, width, channels), got "
            f"{pixels.shape}."
        )
    inputs = jax.vmap(problem.victim.normalization.normalize)(pixels)
    variables = Variables(inputs, states.variables.label_logits)
    return jax.vmap(search.start_from, in_axes=(None, 0))(problem, variables)


def _group_size(performance: PerformanceFlags, searches: int) -> int:
    """Searches advanced at once: one on CPU, where vmapped convolutions are slow, else all."""
    if performance.microbatch is not None:
        return performance.microbatch
    return 1 if jax.default_backend() == "cpu" else searches


def _grouped(states: State, size: int) -> list[State]:
    return [
        jax.tree.map(lambda leaf, i=i: jnp.copy(leaf[i : i + size]), states)
        for i in range(0, len(states.step), size)
    ]


def _merged(states: Sequence[State]) -> State:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)


def _reconstruction(
    problem: Problem, states: State, recorder: Recorder, rows: range, *, labels_by: str
) -> Reconstruction:
    """The best of some rows' images, in the order in which they were searched."""
    distances = np.asarray(states.best_distance)[rows.start : rows.stop]
    winner = rows[int(np.argmin(np.where(np.isfinite(distances), distances, np.inf)))]
    images, labels = search.finalize(jax.tree.map(lambda leaf: leaf[winner], states), problem)
    value = float(distances[winner - rows.start])
    finite = math.isfinite(value)
    status = Status.MATCHED if finite else Status.NONFINITE
    kept = len(problem.labels) if finite else 0
    return Reconstruction(
        images=np.asarray(images)[:kept],
        scores=np.full(kept, -value),
        statuses=(status,) * kept,
        selected_by="gradient distance",
        labels=np.asarray(labels)[:kept],
        candidates=tuple(
            {"status": str(status), "label": int(label), "distance": value if finite else None}
            for label in np.asarray(labels)
        ),
        stats={
            "settings": dataclasses.asdict(problem.settings),
            "labels_by": labels_by,
            "restart": winner - rows.start,
            "restart_distances": [float(d) if math.isfinite(d) else None for d in distances],
            "steps": int(states.step[winner]),
            "stopped_early": recorder.stopped_early,
            "undone_steps": int(states.num_nonfinite[rows.start : rows.stop].sum()),
            **recorder.stats(winner),
        },
        history=recorder.history(winner),
    )
