"""How any shape becomes the two-dimensional, padded arrays that the kernels tile."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Folded(NamedTuple):
    """Arrays folded to two dimensions, and what is needed to unfold the result.

    Attributes:
      x: ``(R, P)`` with ``P`` a multiple of ``lanes``; padding is zero.
      lam: ``(1, 1)``, one for all; ``(R, 1)``, one per row; or ``(R, P)``, one per entry.
      rows: rows before the padding was cut into lanes.
      cols: entries of a row before padding.
      shape: the shape of the operand.
    """

    x: jax.Array
    lam: jax.Array
    rows: int
    cols: int
    shape: tuple[int, ...]

    def unfold(self, y: jax.Array) -> jax.Array:
        """Bring an ``(R, P)`` result back to the operand's shape, without the padding."""
        return y.reshape(self.rows, -1)[:, : self.cols].reshape(self.shape)


def fold(x: jax.Array, lam: jax.Array, *, lanes: int) -> Folded:
    """Fold ``x`` and ``lam`` to two dimensions, padded to whole lanes.

    A threshold per leading index (``lam`` of shape ``(B, 1, ..., 1)``) keeps one row per index
    if rows are at least ``lanes`` long; then ``lam`` is never written out at the size of ``x``.
    Otherwise everything is flattened, and a ``lam`` with more than one entry is broadcast to
    ``x`` first. Sizes that are no multiple of ``lanes`` cost one copy for the padding.

    Args:
      x: operand with at least one entry.
      lam: shape ``()`` or of ``x``'s rank and broadcastable to it.
      lanes: length of a tile along the last axis.
    """
    rows, cols = 1, x.size
    if lam.size > 1:
        lead = max(axis for axis, size in enumerate(lam.shape) if size > 1) + 1
        per_row = lam.shape[:lead] == x.shape[:lead]
        if per_row and math.prod(x.shape[lead:]) >= lanes:
            rows, cols = lam.size, x.size // lam.size
        else:
            lam = jnp.broadcast_to(lam, x.shape)

    def pad(array: jax.Array) -> jax.Array:
        array = array.reshape(rows, cols)
        array = jnp.pad(array, ((0, 0), (0, -cols % lanes)))
        return array if rows > 1 else array.reshape(-1, lanes)

    folded_lam = pad(lam) if lam.size == x.size and lam.size > rows else lam.reshape(-1, 1)
    return Folded(x=pad(x), lam=folded_lam, rows=rows, cols=cols, shape=x.shape)
