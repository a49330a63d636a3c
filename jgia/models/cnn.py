"""Convolutions, one wide fully connected layer, a head: the CNN of ARES."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array


class CNN(nn.Module):
    """``[conv3x3 - ReLU] x n - flatten - FC - ReLU - head``, stride 1, SAME padding.

    With the default widths this is the network that ARES (IEEE S&P 2026) attacks: 3 -> 12 -> 12
    channels, a fully connected layer of 1024 neurons, a classification head.

    Attributes:
      channels: output channels of each convolution.
      fc_width: neurons of the fully connected layer.
      num_classes: outputs of the head.
    """

    channels: Sequence[int] = (12, 12)
    fc_width: int = 1024
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        for i, width in enumerate(self.channels, start=1):
            x = nn.relu(nn.Conv(width, (3, 3), padding="SAME", name=f"conv{i}")(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(self.fc_width, name="fc")(x))
        return nn.Dense(self.num_classes, name="head")(x)
