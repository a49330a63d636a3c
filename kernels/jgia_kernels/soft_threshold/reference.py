"""The contract of soft-thresholding in plain JAX: truth, fallback and default."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def shrink(x: Float[Array, "*shape"], lam: Float[Array, "*lam_shape"]) -> Float[Array, "*shape"]:
    """Shrink ``x`` toward zero by ``lam``: ``sign(x) max(|x| - lam, 0)``, elementwise.

    Written as ``x`` minus its clip to ``[-lam, lam]``, with comparisons only: one rounding, a
    positive zero inside the interval, and no reliance on how a device's min and max treat NaN.

    Args:
      x: any shape.
      lam: threshold, shape ``()`` or of ``x``'s rank and broadcastable to it.

    Returns:
      An array of ``x``'s shape and dtype. NaN where ``x`` or ``lam`` is NaN, and where
      ``lam < 0``, which is no threshold.
    """
    clipped = jnp.where(x > lam, lam, jnp.where(x < -lam, -lam, x))
    return jnp.where(lam >= 0, x - clipped, jnp.nan)
