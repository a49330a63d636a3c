"""Conjugate gradients on the normal equations, in columns."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jgia.sparse.problem import nonzero, total


def cgls(
    forward: Callable[[Array], Array],
    adjoint: Callable[[Array], Array],
    x: Array,
    b: Array,
    goal: Array,
    limit: int,
) -> tuple[Array, Array, Array]:
    """``min_x ||B x - b||`` from x, each column until ``||B^T (b - B x)||^2`` is at most its goal.

    Returns x, the last squared gradient and the iterations, both (1, J).
    """

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, p, square, used, k = carry
        q = forward(p)
        curvature = total(q**2)
        live = (square > goal) & (curvature > 0)
        length = jnp.where(live, square / nonzero(curvature), 0)
        x, r = x + length * p, r - length * q
        slope = adjoint(r)
        following = jnp.where(live, total(slope**2), square)
        p = jnp.where(live, slope + following / nonzero(square) * p, p)
        return x, r, p, following, used + live.astype(jnp.int32), k + 1

    residual = b - forward(x)
    slope = adjoint(residual)
    square = total(slope**2)
    count = jnp.zeros(square.shape, jnp.int32)
    start = (x, residual, slope, square, count, jnp.zeros((), jnp.int32))
    end = lax.while_loop(lambda s: (s[5] < limit) & jnp.any(s[3] > goal), body, start)
    return end[0], end[3], end[4]
