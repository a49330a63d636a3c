"""The small LeNet of Deep Leakage from Gradients."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jgia.models.layers import Conv, Dense, Layer


class LeNet(nn.Module):
    """Three 5x5 sigmoid convolutions (12 channels, strides 2, 2, 1) and a linear head.

    The network of Zhu, Liu and Han, "Deep Leakage from Gradients" (NeurIPS 2019,
    arXiv 1906.08935): twice differentiable everywhere, which is why gradient matching likes it.
    Padding is 2 on every side, as there, so 32x32 inputs give 8x8x12 features.

    Attributes:
      num_classes: outputs of the head.
      channels: output channels of each convolution.
      strides: stride of each convolution.
    """

    num_classes: int = 10
    channels: Sequence[int] = (12, 12, 12)
    strides: Sequence[int] = (2, 2, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        layers = zip(self.channels, self.strides, strict=True)
        for i, (width, stride) in enumerate(layers, start=1):
            conv = nn.Conv(
                width, (5, 5), (stride, stride), padding=((2, 2), (2, 2)), name=f"conv{i}"
            )
            x = nn.sigmoid(conv(x))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        pairs = enumerate(zip(self.channels, self.strides, strict=True), start=1)
        convs = (Conv(f"conv{i}", (5, 5), w, s, "sigmoid") for i, (w, s) in pairs)
        return (*convs, Dense("head", self.num_classes, "none"))
