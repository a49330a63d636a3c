"""Normalization layers without hidden state."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

EPSILON = 1e-5
"""PyTorch's default, so that exchanged models agree."""


class BatchNorm(nn.Module):
    """``scale * (x - mean) / sqrt(var + epsilon) + bias``, channel by channel.

    The running statistics are constants of the module, not variables: whoever sends the model
    chooses them, and nothing is updated while training.

    Attributes:
      mode: ``"eval"`` normalizes with ``mean`` and ``var``; ``"train"`` with the statistics of
        the batch, which couples its examples.
      mean: one value per channel; empty for zeros.
      var: one value per channel; empty for ones.
    """

    mode: Literal["eval", "train"] = "eval"
    mean: tuple[float, ...] = ()
    var: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) to the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), x.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), x.dtype)
        if self.mode == "train":
            mean = x.mean(axis=(0, 1, 2))
            var = jnp.square(x - mean[None, None, None]).mean(axis=(0, 1, 2))
        else:
            mean = jnp.asarray(self.mean or (0.0,) * channels, x.dtype)
            var = jnp.asarray(self.var or (1.0,) * channels, x.dtype)
        factor = lax.rsqrt(var + EPSILON) * scale
        return (x - mean[None, None, None]) * factor[None, None, None] + bias[None, None, None]


def group_norm(groups: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Group normalization in the precision of its input."""
    return nn.GroupNorm(
        groups,
        epsilon=EPSILON,
        use_fast_variance=False,  # the fast form cancels
        force_float32_reductions=False,  # float64 in, float64 throughout
        param_dtype=dtype,
        name=name,
    )
