"""A plain modern ConvNet: convolution, group normalization, ReLU, average pooling."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jgia.models.layers import Conv, Dense, GroupNorm, Layer, Pool
from jgia.models.normalizing import group_norm
from jgia.models.pooling import WINDOW, pool


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
                x = group_norm(self.groups, x.dtype, f"norm{i}")(x)
            x = pool(nn.relu(x), "average")
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        layers: list[Layer] = []
        for i, width in enumerate(self.channels, start=1):
            normalized = self.groups > 0
            layers.append(
                Conv(f"conv{i}", (3, 3), width, 1, "relu", normalized=normalized, pooled=True)
            )
            if normalized:
                layers.append(GroupNorm(f"norm{i}", self.groups))
            layers.append(Pool("average", WINDOW, WINDOW))
        return (*layers, Dense("head", self.num_classes, "none"))
