"""Directions orthogonal to the gradient in its place: a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from jgia import _checks
from jgia.defenses._tree import global_norm, in_units, leaf_keys, wide_dtype

PyTree = Any


class CensorState(NamedTuple):
    """State of :func:`censor_update`.

    Attributes:
      loss: after a step along what was shared; NaN before any update.
      trial: the direction that was shared, -1 before any.
    """

    loss: Float[Array, ""]
    trial: Int[Array, ""]


def censor_update(
    key: PRNGKeyArray,
    loss: Callable[[PyTree], Array],
    params: PyTree,
    *,
    num_trials: int = 20,
    step_size: float = 1e-4,
) -> optax.GradientTransformation:
    r"""Replace every array g of a gradient by a random one orthogonal to it, of its length.

    ``u = (z - g <z, g> / ||g||^2) ||g|| / ||z - g <z, g> / ||g||^2||`` for normal z, array by
    array. Of ``num_trials`` such gradients the one with the smallest ``loss(params - step_size u)``
    is shared.

    Args:
      key: random key.
      loss: of the client's batch, at any parameters. It is called from a Python loop; compile it.
      params: where the gradient was taken.
      num_trials: T, how many directions are tried.
      step_size: of the step after which they are compared, > 0.

    Returns:
      A gradient transformation whose state is a :class:`CensorState`. Another key is needed for
      every update: the same one draws the same directions.

    Raises:
      ValueError: an option is out of range, or an update is not floating point.

    Guarantees:
      Up to rounding, every shared array is orthogonal to the true one and of the same length. The
      true gradient is never among the candidates. A loss that is not finite loses to one that is.

    Edge cases:
      An array of one entry has no orthogonal direction and is shared as zero, as are arrays of
      zeros. An array with entries that are not finite is shared as NaN.
      **What it does not promise**: no differential privacy. The true length of every array is
      shared as it is, and an attacker who knows of the defense knows a hyperplane for each. The
      update is no descent direction to first order: what it is worth to training is left to the
      choice among T draws and to averaging over clients.

    >>> update = {"w": jnp.array([3.0, 4.0])}
    >>> censor = censor_update(jax.random.key(0), lambda p: jnp.sum(p["w"]), {"w": jnp.zeros(2)})
    >>> shared, _ = censor.update(update, censor.init(update))
    >>> [round(abs(float(x)), 4) for x in shared["w"]]  # of length 5
    [4.0, 3.0]

    References:
      Zhang et al., "CENSOR: Defense Against Gradient Inversion via Orthogonal Subspace Bayesian
      Sampling" (NDSS 2025).

    Departures:
      Code that goes by that name begins the comparison with the true gradient, and shares it where
      no trial is better.
    """
    _checks.at_least(1, num_trials=num_trials)
    _checks.positive(step_size=step_size)

    taken_at = params

    def init(params: PyTree) -> CensorState:
        return CensorState(jnp.full((), jnp.nan, wide_dtype(params)), jnp.full((), -1, "int32"))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, CensorState]:
        del state, params
        dtype = wide_dtype(updates)
        least, trial = jnp.full((), jnp.inf, dtype), jnp.zeros((), "int32")
        best = None
        for i, trial_key in enumerate(jax.random.split(key, num_trials)):
            candidate = _orthogonal(trial_key, updates)
            moved = jax.tree.map(
                lambda p, u: p - jnp.asarray(step_size, p.dtype) * u.astype(p.dtype),
                taken_at,
                candidate,
            )
            value = jnp.asarray(loss(moved)).astype(dtype)
            value = jnp.where(jnp.isfinite(value), value, jnp.inf)
            if best is None:
                best, least = candidate, value
                continue
            better = value < least
            best = jax.tree.map(lambda a, b, c=better: jnp.where(c, a, b), candidate, best)
            least = jnp.where(better, value, least)
            trial = jnp.where(better, jnp.asarray(i, "int32"), trial)
        return best, CensorState(least, trial)

    return optax.GradientTransformation(init, update)


@jax.jit
def _orthogonal(key: PRNGKeyArray, updates: PyTree) -> PyTree:
    return jax.tree.map(_leaf, leaf_keys(key, updates), updates)


def _leaf(key: PRNGKeyArray, leaf: Array) -> Array:
    length = global_norm(leaf)
    unit = in_units(leaf.astype(length.dtype), length)  # the gradient's direction
    if leaf.size < 2:
        return 0 * unit.astype(leaf.dtype)
    draw = jax.random.normal(key, leaf.shape, length.dtype)
    for _ in range(2):  # the second time removes what rounding left
        draw = draw - jnp.vdot(unit, draw) * unit
    return (in_units(draw, global_norm(draw)) * length).astype(leaf.dtype)
