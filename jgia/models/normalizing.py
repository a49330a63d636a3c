"""Normalization layers without hidden state, and the choice among them."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from jgia.models import layers
from jgia.models.layers import BatchNormMode, Layer

Norm = Literal["none", "batch", "group"]
Buffers = tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]

EPSILON = 1e-5
"""PyTorch's default, so that exchanged models agree."""

STATISTICS = "batch_statistics"
"""The collection that receives what enters batch normalizations, when it is mutable."""


class BatchNorm(nn.Module):
    """``scale * (x - mean) / sqrt(var + epsilon) + bias``, channel by channel.

    The running statistics are constants of the module, not variables: whoever sends the model
    chooses them, and nothing is updated while training. Where the collection
    ``"batch_statistics"`` is mutable, the mean and the biased variance of the batch are sown into
    it, in either mode.

    Attributes:
      mode: ``"eval"`` normalizes with ``mean`` and ``var``; ``"train"`` with the statistics of
        the batch, which couples its examples.
      mean: one value per channel; empty for zeros.
      var: one value per channel; empty for ones.
    """

    mode: BatchNormMode = "eval"
    mean: tuple[float, ...] = ()
    var: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) to the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), x.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), x.dtype)
        sown = self.is_mutable_collection(STATISTICS) and not self.is_initializing()
        batch = moments(x) if sown or self.mode == "train" else None
        if sown:
            self.sow(STATISTICS, "moments", batch, reduce_fn=_last, init_fn=tuple)
        if self.mode == "train" and batch is not None:
            mean, var = batch
        else:
            mean = jnp.asarray(self.mean or (0.0,) * channels, x.dtype)
            var = jnp.asarray(self.var or (1.0,) * channels, x.dtype)
        factor = lax.rsqrt(var + EPSILON) * scale
        return (x - mean[None, None, None]) * factor[None, None, None] + bias[None, None, None]


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel of (B, H, W, C)."""
    mean = x.mean(axis=(0, 1, 2))
    return mean, jnp.square(x - mean[None, None, None]).mean(axis=(0, 1, 2))


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


def normalize(
    x: Array, name: str, norm: Norm, mode: BatchNormMode, groups: int, buffers: Buffers
) -> Array:
    """``x`` through a normalization of this name, made in the module that calls; or ``x``."""
    if norm == "none":
        return x
    if norm == "group":
        return group_norm(groups, jnp.dtype(x.dtype), name)(x)
    return BatchNorm(mode, *statistics_of(buffers, name), name=name)(x)


def described(
    name: str, norm: Norm, mode: BatchNormMode, groups: int, buffers: Buffers
) -> tuple[Layer, ...]:
    """What :func:`normalize` adds to a description."""
    if norm == "none":
        return ()
    if norm == "group":
        return (layers.GroupNorm(name, groups),)
    return (layers.BatchNorm(name, mode, *statistics_of(buffers, name)),)


def statistics_of(buffers: Buffers, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Running means and variances of one layer; empty where none are named."""
    for key, mean, var in buffers:
        if key == name:
            return mean, var
    return (), ()


def _last(_: object, value: object) -> object:
    return value
