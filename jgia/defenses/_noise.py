"""Additive noise as a gradient transformation: what Gaussian and Laplace noise share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.defenses._tree import leaf_keys, root_mean_square, wide_dtype

PyTree = Any


class NoiseState(NamedTuple):
    """State of an additive-noise transformation.

    Attributes:
      key: for the next update.
      noise_std: standard deviation of what the last update added to every entry, 0 before any.
    """

    key: PRNGKeyArray
    noise_std: Float[Array, ""]


def additive_noise(
    key: PRNGKeyArray,
    sample: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array],
    *,
    noise_std: float | Float[Array, ""],
    relative: bool,
) -> optax.GradientTransformation:
    """Add ``noise_std * sample`` to every entry; ``sample`` has mean 0 and variance 1."""
    if not isinstance(noise_std, Tracer):
        _checks.non_negative(noise_std=float(noise_std))

    def init(params: PyTree) -> NoiseState:
        return NoiseState(jax.random.clone(key), jnp.zeros((), wide_dtype(params)))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, NoiseState]:
        del params
        dtype = wide_dtype(updates)
        std = noise_std * root_mean_square(updates) if relative else jnp.asarray(noise_std, dtype)
        next_key, draw = jax.random.split(state.key)

        def noisy(leaf: Array, leaf_key: PRNGKeyArray) -> Array:
            return leaf + std.astype(leaf.dtype) * sample(leaf_key, leaf.shape, leaf.dtype)

        shared = jax.tree.map(noisy, updates, leaf_keys(draw, updates))
        return shared, NoiseState(next_key, std)

    return optax.GradientTransformation(init, update)
