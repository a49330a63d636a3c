"""Multilayer perceptron with free widths."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jgia.models.layers import Dense, Layer


class MLP(nn.Module):
    """``flatten - [FC - ReLU] x n - head``.

    Attributes:
      widths: neurons of each hidden layer.
      num_classes: outputs of the head.
    """

    widths: Sequence[int] = (1024,)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        x = x.reshape((x.shape[0], -1))
        for i, width in enumerate(self.widths, start=1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        hidden = (Dense(f"fc{i}", w, "relu") for i, w in enumerate(self.widths, start=1))
        return (*hidden, Dense("head", self.num_classes, "none"))
