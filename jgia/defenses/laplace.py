"""Laplace noise on every shared entry."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from jgia.defenses._noise import additive_noise


def laplace_noise(
    key: PRNGKeyArray, *, noise_std: float, relative: bool = False
) -> optax.GradientTransformation:
    r"""Add independent Laplace noise to every entry of an update.

    ``u + b l`` with density ``exp(-|l|) / 2`` per entry. A Laplace variable of scale ``b`` has
    standard deviation ``sqrt(2) b``; the argument is the standard deviation, so that Gaussian and
    Laplace noise of equal ``noise_std`` have equal power: ``b = noise_std / sqrt(2)``.

    Args:
      key: random key; kept in the state, which carries a new one after every update.
      noise_std: standard deviation per entry, >= 0; absolute, or a multiple of the update's root
        mean square over all entries.
      relative: how ``noise_std`` is meant.

    Returns:
      A gradient transformation whose state is a :class:`NoiseState`.

    Raises:
      ValueError: ``noise_std`` is negative or not finite, or an update is not floating point.

    Guarantees:
      As :func:`gaussian_noise`.

    Edge cases:
      The Laplace mechanism takes its scale from the l1 sensitivity, which grows with the number
      of parameters. This function adds noise of a given size; it claims no privacy.

    >>> import jax.numpy as jnp
    >>> noise = laplace_noise(jax.random.key(0), noise_std=0.1)
    >>> update = {"bias": jnp.zeros(3)}
    >>> noise.update(update, noise.init(update))[0]["bias"].shape
    (3,)

    References:
      Zhu, Liu and Han, "Deep Leakage from Gradients" (NeurIPS 2019, arXiv 1906.08935),
      section 5.1: Gaussian and Laplacian noise compared at equal variance.
    """

    def unit(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.laplace(key, shape, dtype) * math.sqrt(0.5)

    return additive_noise(key, unit, noise_std=noise_std, relative=relative)
