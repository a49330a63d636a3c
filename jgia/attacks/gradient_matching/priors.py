"""What images look like, in terms of normalized pixels: the terms beside the gradient distance."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jgia.attacks.gradient_matching.distances import root
from jgia.config.gradient_matching import TotalVariation

Statistics = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""Means and variances per channel, by the name of the batch normalization."""


def total_variation(images: Array, form: TotalVariation = "l1") -> Array:
    """Mean difference of neighboring pixels.

    Args:
      images: (B, H, W, C).
      form: ``"l1"``: mean ``|dx|`` plus mean ``|dy|``, each over the pairs that exist (as the code
        of Inverting Gradients has it); ``"l2"``: mean of ``sqrt(dx^2 + dy^2)`` over the pixels that
        have both neighbors; ``"zero_padded"``: mean of ``|dx| + |dy|`` over all pixels, where those
        beyond the last row and column are zeros (as a padded convolution has it).

    Returns:
      A scalar, with derivative zero where neighbors are equal, as clipped ones often are.

    >>> float(total_variation(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1)))
    1.0
    """
    if form == "zero_padded":
        down = jnp.diff(jnp.pad(images, ((0, 0), (0, 1), (0, 0), (0, 0))), axis=1)
        right = jnp.diff(jnp.pad(images, ((0, 0), (0, 0), (0, 1), (0, 0))), axis=2)
        return jnp.mean(_abs(down) + _abs(right))
    down, right = jnp.diff(images, axis=1), jnp.diff(images, axis=2)
    if form == "l1":
        return _mean(_abs(down)) + _mean(_abs(right))
    squares = jnp.square(down[:, :, :-1]) + jnp.square(right[:, :-1])
    return _mean(root(squares))


def image_l2(images: Array) -> Array:
    """``||x|| / (H W)``, the norm over the whole batch (Yin et al. 2021)."""
    return root(jnp.sum(jnp.square(images))) / (images.shape[1] * images.shape[2])


def batch_norm_distance(found: Statistics, wanted: Statistics) -> Array:
    """``sum_l ||mean_l - mean*_l|| + ||var_l - var*_l||`` over batch normalizations.

    Args:
      found: statistics of the images that are searched.
      wanted: what the client sent, or running statistics; of the same layers.

    References:
      Yin et al., "See through Gradients" (CVPR 2021, arXiv 2104.07586), eq. 8.
    """
    terms = []
    for name, statistics in found.items():
        for mine, theirs in zip(statistics, wanted[name], strict=True):
            here = jnp.asarray(mine)
            terms.append(root(jnp.sum(jnp.square(here - jnp.asarray(theirs, here.dtype)))))
    return jnp.stack(terms).sum()


def group_distance(images: Array, consensus: Array) -> Array:
    """``||x - consensus||^2`` per pixel: how far a restart is from the mean of all of them.

    References:
      Yin et al. 2021, eq. 11; there images are registered before they are averaged.
    """
    return jnp.mean(jnp.square(images - consensus))


def _abs(values: Array) -> Array:
    """Absolute values, with derivative zero at zero; that of ``jnp.abs`` is one."""
    return values * lax.stop_gradient(jnp.sign(values))


def _mean(values: Array) -> Array:
    return values.mean() if values.size else jnp.zeros((), values.dtype)
