"""The update of a recovered example, computed again with the client's own loss."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.analytic.arrays import noise, rounding
from jgia.models import Victim, flatten_params
from jgia.observation import Observation

PyTree = Any


class Match(NamedTuple):
    """How well one example explains an update.

    Attributes:
      label: its class.
      residual: ``|update - s gradient| / |update|`` at the best factor s.
      scale: s; 1 for a gradient, minus the learning rate for a FedAvg difference.
      leaves: root mean square of what is left over in every array, by name.
      rounding: the residual that rounding alone leaves.
      told: the residual that rounding and the declared noise leave.
    """

    label: int
    residual: float
    scale: float
    leaves: dict[str, float]
    rounding: float
    told: float


def match(observation: Observation, inputs: np.ndarray, label: int | None) -> Match:
    """Compare the gradient at one example with the update, over all visible layers.

    Args:
      observation: what the server holds.
      inputs: (H, W, C) normalized pixels.
      label: its class; ``None`` tries all classes for the one that matches best.

    Guarantees:
      Computed in float64 whatever the session's precision, if the model follows its inputs' dtype.
    """
    update = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in flatten_params(observation.update).items()
    }
    square = sum(float(np.sum(leaf**2)) for leaf in update.values())
    limits = [
        float(np.sqrt(sum(update[name].size * std**2 for name, std in stds.items()) / square))
        for stds in (rounding(observation), noise(observation))
    ]
    classes = range(observation.victim.num_classes) if label is None else (label,)
    best: Match | None = None
    for each in classes:
        gradient = _gradient_at(observation, inputs, each)
        product = sum(float(np.sum(update[name] * gradient[name])) for name in update)
        norm = sum(float(np.sum(gradient[name] ** 2)) for name in update)
        scale = product / norm if norm > 0 else 0.0
        left = {name: leaf - scale * gradient[name] for name, leaf in update.items()}
        residual = float(np.sqrt(sum(float(np.sum(leaf**2)) for leaf in left.values()) / square))
        if best is None or residual < best.residual:
            leaves = {name: float(np.sqrt(np.mean(leaf**2))) for name, leaf in left.items()}
            best = Match(each, residual, scale, leaves, *limits)
    if best is None:
        raise ValueError(f"the model {observation.victim.name!r} has no classes.")
    return best


def _gradient_at(observation: Observation, inputs: np.ndarray, label: int) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), observation.params)
        gradient = _gradient(
            observation.victim,
            params,
            jnp.asarray(inputs[None], jnp.float64),
            jnp.asarray([label], jnp.int32),
        )
        return {
            name: np.asarray(leaf, np.float64) for name, leaf in flatten_params(gradient).items()
        }


@functools.partial(jax.jit, static_argnums=0)
def _gradient(victim: Victim, params: PyTree, inputs: Array, labels: Array) -> PyTree:
    return jax.grad(victim.loss_of_inputs)(params, inputs, labels)
