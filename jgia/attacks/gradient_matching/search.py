"""The loop's three parts: where a search starts, one step of it, and what is left at its end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jgia.attacks.gradient_matching.objective import Problem, Variables, loss
from jgia.attacks.gradient_matching.optimizers import direction, schedule

PyTree = Any


class State(NamedTuple):
    """What one search carries from step to step.

    Attributes:
      variables: the current point.
      optimizer: optax's state.
      best: the point with the smallest loss so far.
      best_loss: its loss; infinite before the first finite one.
      best_distance: its gradient distance.
      consensus: mean of all restarts for the group prior, else as the first images.
      rate: factor on the learning rate: halved whenever a step left the finite numbers.
      step: steps done.
      num_nonfinite: steps that were undone.
    """

    variables: Variables
    optimizer: PyTree
    best: Variables
    best_loss: Array
    best_distance: Array
    consensus: Array
    rate: Array
    step: Array
    num_nonfinite: Array


class Info(NamedTuple):
    """Diagnostics of one step: loss and gradient distance at the point that it started from."""

    loss: Array
    distance: Array


def init(key: Array, problem: Problem) -> State:
    """A random start.

    Args:
      key: PRNG key.
      problem: what is searched.

    References:
      Normal noise in normalized units: Geiping et al. 2020; in DLG images and label logits.
    """
    settings, victim = problem.settings, problem.victim
    dtype = jax.tree.leaves(problem.params)[0].dtype
    key_images, key_labels = jax.random.split(key)
    shape = (len(problem.labels), *victim.input_shape)
    if settings.start == "normal":
        inputs = jax.random.normal(key_images, shape, dtype)
    elif settings.start == "uniform":
        inputs = jax.random.uniform(key_images, shape, dtype, -1.0, 1.0)
    else:
        inputs = jnp.zeros(shape, dtype)
    logits = None
    if settings.labels == "joint" and problem.threat_model.labels is None:
        logits = jax.random.normal(key_labels, (shape[0], victim.num_classes), dtype)
    return start_from(problem, Variables(inputs, logits))


def start_from(problem: Problem, variables: Variables) -> State:
    """A search that starts at given normalized images."""
    dtype = variables.inputs.dtype
    return State(
        variables=variables,
        optimizer=direction(problem.settings.optimizer).init(variables),
        best=jax.tree.map(jnp.copy, variables),
        best_loss=jnp.array(jnp.inf, dtype),
        best_distance=jnp.array(jnp.inf, dtype),
        consensus=jnp.copy(variables.inputs),
        rate=jnp.ones((), dtype),
        step=jnp.zeros((), jnp.int32),
        num_nonfinite=jnp.zeros((), jnp.int32),
    )


def step(state: State, problem: Problem) -> tuple[State, Info]:
    """One step of the optimizer from the current point, which is remembered if it is the best.

    A step from or to numbers that are not finite is not taken: the search goes on from its best
    point with a fresh optimizer at half the rate, and counts it.
    """
    settings, point = problem.settings, state.variables
    (value, fit), gradient = jax.value_and_grad(
        lambda variables: loss(problem, variables, state.consensus), has_aux=True
    )(point)
    optimizer = direction(settings.optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
        change, moved = optimizer.update(gradient, state.optimizer, point)
        plan = schedule(settings.schedule, settings.learning_rate, settings.num_steps)
        rate = jnp.asarray(state.rate * plan(state.step), value.dtype)
    new = jax.tree.map(lambda x, d: x - rate * d, point, change)
    if settings.box:
        new = new._replace(inputs=_boxed(problem, new.inputs))
    finite = jnp.isfinite(value) & _all_finite(new)

    better = jnp.isfinite(value) & (value < state.best_loss)
    best = _where(better, point, state.best)
    return State(
        variables=_where(finite, new, best),
        optimizer=_where(finite, moved, optimizer.init(point)),
        best=best,
        best_loss=jnp.where(better, value, state.best_loss),
        best_distance=jnp.where(better, fit, state.best_distance),
        consensus=state.consensus,
        rate=jnp.where(finite, state.rate, state.rate / 2),
        step=state.step + 1,
        num_nonfinite=state.num_nonfinite + jnp.where(finite, 0, 1),
    ), Info(value, fit)


def finalize(state: State, problem: Problem) -> tuple[Array, Array]:
    """(images (B, H, W, C) in [0, 1], labels (B,)) of the best point."""
    images = problem.victim.normalization.denormalize(state.best.inputs)
    labels = problem.labels
    if state.best.label_logits is not None:
        labels = jnp.argmax(state.best.label_logits, axis=-1)
    return jnp.clip(images, 0, 1), labels


def _boxed(problem: Problem, inputs: Array) -> Array:
    normalize = problem.victim.normalization.normalize
    pixel = (1, 1, 1, inputs.shape[-1])
    low, high = (normalize(jnp.full(pixel, v, inputs.dtype)) for v in (0.0, 1.0))
    return jnp.clip(inputs, low, high)


def _where(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
