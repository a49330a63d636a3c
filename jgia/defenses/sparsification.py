"""Only the largest entries are shared."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Int

from jgia import _checks
from jgia.defenses._tree import wide_dtype

PyTree = Any


class SparsityState(NamedTuple):
    """State of :func:`keep_top_k`.

    Attributes:
      num_kept: entries that the last update kept, 0 before any.
    """

    num_kept: Int[Array, ""]


def keep_top_k(*, keep_fraction: float, scope: str = "global") -> optax.GradientTransformation:
    r"""Keep the entries of largest magnitude and set the others to zero.

    ``k = ceil(keep_fraction * size)`` entries survive, of the whole update (``"global"``) or of
    every array (``"layer"``). Ties are broken by position: the first ones stay.

    Args:
      keep_fraction: share of the entries to keep, in (0, 1].
      scope: what is compared.

    Returns:
      A deterministic gradient transformation whose state is a :class:`SparsityState`.

    Raises:
      ValueError: ``keep_fraction`` or ``scope`` is out of range, or an update is not floating
        point.

    Guarantees:
      Exactly k entries are taken over, bit by bit; no kept one is smaller in magnitude than a
      dropped one. ``keep_fraction=1`` returns the update as it is. NaN counts as largest, so it is
      never dropped silently.

    Edge cases:
      No residual is kept for the next round (no error feedback): one update is one release. The
      k-th magnitude is found by bisection on the bits of the floats, in 31 counts (63 for
      float64), without sorting or copying the update.

    >>> update = {"w": jnp.array([1.0, -3.0, 2.0, 0.5])}
    >>> half = keep_top_k(keep_fraction=0.5)
    >>> [float(x) for x in half.update(update, half.init(update))[0]["w"]]
    [0.0, -3.0, 2.0, 0.0]

    References:
      Lin et al., "Deep Gradient Compression" (ICLR 2018, arXiv 1712.01887), algorithm 1, without
      its momentum correction. As a defense: Zhu, Liu and Han, "Deep Leakage from Gradients"
      (NeurIPS 2019, arXiv 1906.08935), section 5.2.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction must lie in (0, 1], got {keep_fraction!r}.")
    _checks.one_of(("global", "layer"), scope=scope)

    def init(params: PyTree) -> SparsityState:
        del params
        return SparsityState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, SparsityState]:
        del state, params
        dtype = wide_dtype(updates)
        leaves, structure = jax.tree.flatten(updates)
        groups = [leaves] if scope == "global" else [[leaf] for leaf in leaves]
        kept, count = [], 0
        for group in groups:
            k = _num_kept(keep_fraction, sum(leaf.size for leaf in group))
            kept += _largest_k(group, k, dtype)
            count += k
        return structure.unflatten(kept), SparsityState(jnp.asarray(count, jnp.int32))

    return optax.GradientTransformation(init, update)


def _num_kept(fraction: float, size: int) -> int:
    """``ceil(fraction * size)``, where 0.7 of 10 is 7 although 0.7 * 10 is above 7 in floats."""
    return math.ceil(fraction * size * (1 - 1e-12))


def _largest_k(leaves: list[Array], k: int, dtype: Any) -> list[Array]:
    """Arrays with all but the k largest magnitudes among them set to zero."""
    if k >= sum(leaf.size for leaf in leaves):
        return leaves
    width = jnp.finfo(dtype).bits
    kind = jnp.dtype(f"uint{width}")
    # The bits of non-negative floats, read as integers, are in the order of the floats.
    ranks = [lax.bitcast_convert_type(jnp.abs(leaf.astype(dtype)), kind) for leaf in leaves]

    def counted(threshold: Array, strict: bool) -> Array:
        above = [(rank > threshold) if strict else (rank >= threshold) for rank in ranks]
        return sum((jnp.sum(mask, dtype=jnp.int32) for mask in above), jnp.zeros((), jnp.int32))

    def refine(step: Array, threshold: Array) -> Array:
        bit = jnp.asarray(1, kind) << (width - 2 - step).astype(kind)
        return jnp.where(counted(threshold | bit, strict=False) >= k, threshold | bit, threshold)

    threshold = lax.fori_loop(0, width - 1, refine, jnp.zeros((), kind))
    ties_left = k - counted(threshold, strict=True)
    result = []
    for leaf, rank in zip(leaves, ranks, strict=True):
        tied = rank == threshold
        position = jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(leaf.shape)
        kept = (rank > threshold) | (tied & (position <= ties_left))
        ties_left = jnp.maximum(ties_left - jnp.sum(tied, dtype=jnp.int32), 0)
        result.append(jnp.where(kept, leaf, 0))
    return result
