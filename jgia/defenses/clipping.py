"""A bound on the norm of what is shared."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jgia import _checks
from jgia.defenses._tree import global_norm, in_units, scaled, wide_dtype

PyTree = Any


class ClipState(NamedTuple):
    """State of :func:`clip_update`.

    Attributes:
      scale: factor in (0, 1] that the last update was multiplied by, 1 before any.
    """

    scale: Float[Array, ""]


def clip_scale(norm: Float[Array, ""], clip_norm: float | Array) -> Float[Array, ""]:
    """``min(1, clip_norm / norm)``; 1 at norm 0, NaN where the norm is NaN."""
    bound = jnp.asarray(clip_norm, norm.dtype)
    return jnp.where(norm <= bound, 1, in_units(bound, norm))


def clip_update(*, clip_norm: float) -> optax.GradientTransformation:
    r"""Scale an update down to an l2 norm of at most ``clip_norm``: ``u min(1, C / ||u||)``.

    Args:
      clip_norm: C > 0, the largest norm over all entries together.

    Returns:
      A gradient transformation whose state is a :class:`ClipState`.

    Raises:
      ValueError: ``clip_norm`` is not positive and finite, or an update is not floating point.

    Guarantees:
      ``||result|| <= clip_norm`` up to rounding: the sensitivity of a client's update is
      ``clip_norm`` when a client is added or removed and twice that when one is replaced. The
      direction is kept. An update within the bound is returned as it is. NaN stays NaN, and an
      infinite entry gives NaN.

    Edge cases:
      By itself this does not hinder reading: attacks on single layers divide one entry by another,
      and a common factor cancels. It is what noise needs to have a meaning, as in ``optax.chain(
      clip_update(clip_norm=1.0), gaussian_noise(key, noise_std=z))``: client-level differential
      privacy with noise multiplier z. The norm is taken in units of the largest entry, so that it
      neither overflows nor underflows.

    >>> update = {"w": jnp.array([3.0, 4.0])}
    >>> clip = clip_update(clip_norm=1.0)
    >>> [round(float(x), 3) for x in clip.update(update, clip.init(update))[0]["w"]]
    [0.6, 0.8]

    References:
      McMahan et al., "Learning Differentially Private Recurrent Language Models" (ICLR 2018,
      arXiv 1710.06963), algorithm 1: a client's update is clipped as a whole.
    """
    _checks.positive(clip_norm=clip_norm)

    def init(params: PyTree) -> ClipState:
        return ClipState(jnp.ones((), wide_dtype(params)))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, ClipState]:
        del state, params
        scale = clip_scale(global_norm(updates), clip_norm)
        return scaled(updates, scale), ClipState(scale)

    return optax.GradientTransformation(init, update)
