"""Run searches to their end: in Python or in ``scan``, one by one or vmapped, with a memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.gradient_matching import search
from jgia.attacks.gradient_matching.objective import Problem
from jgia.attacks.gradient_matching.search import Info, State

Driver = Literal["auto", "python", "scan"]
PyTree = Any

_CONSENSUS_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Event:
    """What a run has to show between two stretches of steps.

    Attributes:
      step: steps done.
      losses: (R, n) losses of the last stretch, one row for each restart.
      states: the states, one for each group of restarts.
    """

    step: int
    losses: np.ndarray
    states: list[State]


def resolve_driver(driver: Driver, problem: Problem, state: State) -> Literal["python", "scan"]:
    """``auto``: ``scan``, but Python on CPU where XLA's convolutions are part of a step.

    Inside a loop of its own XLA runs them slowly there. A step of which all convolutions have
    become products of matrices is quicker in a loop than called from Python.
    """
    if driver != "auto":
        return driver
    if jax.default_backend() != "cpu":
        return "scan"
    step = _one_step.trace(problem, state).jaxpr
    return "python" if _convolves(step.jaxpr) else "scan"


def _convolves(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value) and _convolves(getattr(value, "jaxpr", value)):
                return True
    return False


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def run(
    problems: Sequence[Problem],
    states: list[State],
    *,
    num_steps: int,
    stretch: int,
    driver: Driver = "auto",
    on_event: Callable[[Event], bool] | None = None,
) -> list[State]:
    """Advance all states to ``num_steps``, in stretches between which the host looks at them.

    Args:
      problems: what each group of searches looks for; the same one again for restarts.
      states: groups of searches, every array with a leading axis (R,); their buffers are given up.
        All have done the same number of steps.
      num_steps: steps in all, those done before included.
      stretch: steps between events.
      driver: ``"python"`` calls a compiled step, ``"scan"`` compiles a stretch; the answers agree
        to rounding.
      on_event: called after every stretch; the run ends when it returns true.

    Returns:
      The states.
    """
    by = resolve_driver(driver, problems[0], states[0])
    advance = _advance_python if by == "python" else _advance_scan
    settings = problems[0].settings
    done = int(np.asarray(states[0].step).reshape(-1)[0])
    while done < num_steps:
        count = min(stretch - done % stretch, num_steps - done)
        if settings.group_prior:
            count = min(count, _CONSENSUS_EVERY - done % _CONSENSUS_EVERY)
        losses = []
        for i, (problem, state) in enumerate(zip(problems, states, strict=True)):
            states[i], values = advance(problem, state, count)
            losses.append(values)
        done += count
        if settings.group_prior and done % _CONSENSUS_EVERY == 0:
            states = _with_consensus(states)
        if on_event is not None:
            event = Event(done, np.concatenate(losses), states)
            if on_event(event):
                break
    return states


@functools.partial(jax.jit, donate_argnums=1)
def _one_step(problem: Problem, state: State) -> tuple[State, Info]:
    if state.step.shape == (1,):  # one is quicker without vmap
        single = jax.tree.map(lambda leaf: leaf[0], state)
        own = _own(problem, *_first(problem)) if problem.stacked else problem
        return jax.tree.map(lambda leaf: leaf[None], search.step(single, own))
    problem = dataclasses.replace(problem, vmapped=True)
    if not problem.stacked:
        return jax.vmap(search.step, in_axes=(0, None))(state, problem)

    def one(state: State, *data: PyTree) -> tuple[State, Info]:
        return search.step(state, _own(problem, *data))

    return jax.vmap(one)(state, *_data(problem))


def _data(problem: Problem) -> tuple[PyTree, PyTree, Array]:
    """What differs among the clients of a stacked problem."""
    return problem.update, problem.statistics, problem.labels


def _first(problem: Problem) -> tuple[PyTree, PyTree, Array]:
    return jax.tree.map(lambda leaf: leaf[0], _data(problem))


def _own(problem: Problem, update: PyTree, statistics: PyTree, labels: Array) -> Problem:
    """One client's part of a stacked problem."""
    return dataclasses.replace(
        problem, update=update, statistics=statistics, labels=labels, stacked=False
    )


def _advance_python(problem: Problem, state: State, count: int) -> tuple[State, np.ndarray]:
    """The state after some steps, and the losses (R, count)."""
    losses = []
    for _ in range(count):
        state, info = _one_step(problem, state)
        losses.append(info.loss)
    return state, np.stack(jax.device_get(losses), axis=1)  # jnp.stack compiles for every count


def _advance_scan(problem: Problem, state: State, count: int) -> tuple[State, np.ndarray]:
    state, losses = _scan(problem, state, count)
    return state, np.asarray(losses).T


@functools.partial(jax.jit, static_argnames="count", donate_argnums=1)
def _scan(problem: Problem, state: State, count: int) -> tuple[State, Array]:
    state, infos = jax.lax.scan(lambda s, _: _one_step(problem, s), state, None, length=count)
    return state, infos.loss


def _with_consensus(states: list[State]) -> list[State]:
    """The mean over all searches, given to each."""
    inputs: list[Array] = [state.variables.inputs for state in states]
    mean = jnp.concatenate(inputs).mean(axis=0, keepdims=True)
    return [
        state._replace(consensus=jnp.broadcast_to(mean, state.consensus.shape) + 0)
        for state in states
    ]
