"""Optimizers and schedules of the search, from optax."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgia.config.gradient_matching import MatchingOptimizer, Schedule

_WARMUP_STEPS = 50
_LBFGS_MEMORY = 20


def schedule(kind: Schedule, learning_rate: float, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, from 0.

    Args:
      kind: ``"constant"``; ``"step"``: a tenth after 3/8, 5/8 and 7/8 of the steps, rounded down as
        Inverting Gradients does (``n // 2.667``, ``n // 1.6``, ``n // 1.142``); ``"cosine"`` to 0;
        ``"warmup_cosine"``: 50 linear steps before it (fewer if the search is short).
      learning_rate: the largest.
      num_steps: length of the search.
    """
    if kind == "constant":
        return optax.constant_schedule(learning_rate)
    if kind == "step":
        bounds = {int(num_steps // part): 0.1 for part in (2.667, 1.6, 1.142)}
        return optax.piecewise_constant_schedule(learning_rate, bounds)
    if kind == "cosine":
        return optax.cosine_decay_schedule(learning_rate, num_steps)
    warmup = min(_WARMUP_STEPS, max(1, num_steps // 10))
    return optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup, max(num_steps, warmup + 1)
    )


def signs() -> optax.GradientTransformation:
    """Replace every gradient entry by its sign (Geiping et al. 2020, section 4)."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """:func:`optax.scale_by_adam`, with bias corrections that are exact in float32.

    There ``1 - b2**t`` has lost four of seven digits in the first steps. Images whose gradient is
    reduced to signs notice: the search leaves its float64 path within tens of steps.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        first = optax.tree.update_moment(updates, state.mu, b1, 1)
        second = optax.tree.update_moment(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)

        def step(m: Array, v: Array) -> Array:
            steps = jnp.asarray(count, m.dtype)
            m, v = (x / -jnp.expm1(steps * math.log(b)) for x, b in ((m, b1), (v, b2)))
            return m / (jnp.sqrt(v) + eps)

        return jax.tree.map(step, first, second), state._replace(count=count, mu=first, nu=second)

    return optax.GradientTransformation(plain.init, update)


def direction(name: MatchingOptimizer) -> Any:
    """The transformation of ``adam``, ``signed_adam`` or ``lbfgs``, without learning rate.

    L-BFGS keeps the last 20 steps and takes them at a fixed length, as PyTorch's optimizer does
    unless told otherwise: a line search would put convolutions inside a loop of XLA, which is slow
    on CPU.
    """
    if name == "lbfgs":
        return optax.scale_by_lbfgs(_LBFGS_MEMORY)
    if name == "signed_adam":
        return optax.chain(signs(), scale_by_adam())
    return scale_by_adam()
