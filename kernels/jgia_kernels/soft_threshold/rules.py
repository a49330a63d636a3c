"""Derivative and batching rules, attached to every implementation alike."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Forward = Callable[[jax.Array, jax.Array], jax.Array]


def differentiable(forward: Forward) -> Forward:
    """Give ``forward(x, lam)`` the derivative of the proximal map.

    With ``y = forward(x, lam)`` and ``s = sign(y)``::

        dy = s (s dx - dlam)  where y != 0,      dy = 0  where y == 0

    The map is not differentiable at the kink ``|x| = lam``; the rule takes 0 there, an element
    of its generalized Jacobian. The rule is a function of ``forward`` and of ``s``, which is
    locally constant, so higher derivatives exist and are zero. NaN gives NaN.
    """

    @jax.custom_jvp
    def primal(x: jax.Array, lam: jax.Array) -> jax.Array:
        return forward(x, lam)

    @primal.defjvp
    def _jvp(primals, tangents):
        dx, dlam = tangents
        y = primal(*primals)
        slope = jnp.sign(y)
        return y, jnp.where(y == 0, 0, slope * (slope * dx - dlam))

    return primal


def batched_as_one_call(forward: Forward) -> Forward:
    """Make ``vmap`` of a kernel one call on the stacked arrays.

    The operation is elementwise, so a batch is one more leading axis. A rule of our own keeps
    ``vmap`` independent of Pallas's batching rules and pads a batch of short vectors once, not
    once for each.
    """

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, lam: jax.Array) -> jax.Array:
        return forward(x, lam)

    @call.def_vmap
    def _vmap(axis_size, in_batched, x, lam):
        x_batched, lam_batched = in_batched
        if not x_batched:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        if not lam_batched:
            lam = lam[None] if lam.ndim else lam
        elif lam.ndim == 1:  # one scalar threshold per example
            lam = lam.reshape((axis_size,) + (1,) * (x.ndim - 1))
        return call(x, lam), True

    return call
