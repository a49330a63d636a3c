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
                x = nn.GroupNorm(num_groups=self.groups, name=f"norm{i}")(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)
