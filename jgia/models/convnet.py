"""A plain modern ConvNet: convolution, group normalization, ReLU, average pooling."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array


class ConvNet(nn.Module):
    """``[conv3x3 - GroupNorm - ReLU - average pool 2x2] x n - flatten - head``.

    Group normalization has no batch statistics, so examples never couple and there is no
    train/eval ambiguity (the batch-normalization policy of a model decides what leaks).

    Attributes:
      channels: output channels of each block; each must be a multiple of ``groups``.
      groups: groups of the normalization; 0 leaves it out.
      num_classes: outputs of the head.
    """

    channels: Sequence[int] = (32, 64, 128)
    groups: int = 8
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        for i, width in enumerate(self.channels, start=1):
            x = nn.Conv(width, (3, 3), padding="SAME", name=f"conv{i}")(x)
            if self.groups:
                x = nn.GroupNorm(
                    self.groups,
                    epsilon=1e-5,  # PyTorch's default, so that exchanged models agree
                    use_fast_variance=False,  # the fast form cancels
                    force_float32_reductions=False,  # float64 in, float64 throughout
                    param_dtype=x.dtype,
                    name=f"norm{i}",
                )(x)
            x = _average_pool(nn.relu(x))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)


def _average_pool(x: Array) -> Array:
    """Means of 2x2 windows; an odd last row or column is dropped.

    Flax's ``avg_pool`` divides by an integer array, which strict dtype promotion refuses.
    """
    batch, height, width, channels = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(batch, height, 2, width, 2, channels).mean(axis=(2, 4))
