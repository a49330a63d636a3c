"""Convolutions, one wide fully connected layer, a head: the CNN of ARES, and VGG-like ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
from jax import Array

from jgia.models.layers import Conv, Dense, Layer, Pool
from jgia.models.pooling import WINDOW, pool


class CNN(nn.Module):
    """``[conv - ReLU (- pool 2x2)] x n - flatten - FC - ReLU - head``.

    With the defaults this is the network that ARES (IEEE S&P 2026) attacks: 3x3 convolutions of
    stride 1, 3 -> 12 -> 12 channels, a fully connected layer of 1024 neurons, a classification
    head. With ``pool="average"`` or ``"max"`` and more channels it is a small VGG.

    Attributes:
      channels: output channels of each convolution.
      fc_width: neurons of the fully connected layer.
      num_classes: outputs of the head.
      strides: of each convolution; all 1 when empty.
      pool: 2x2 pooling after the activation, or ``"none"``.
      pool_every: pool after every so many convolutions.
      kernel_size: (kh, kw) of every convolution, zero padded as :class:`Conv` describes.
    """

    channels: Sequence[int] = (12, 12)
    fc_width: int = 1024
    num_classes: int = 10
    strides: Sequence[int] = ()
    pool: Literal["none", "average", "max"] = "none"
    pool_every: int = 1
    kernel_size: tuple[int, int] = (3, 3)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        padding = [((k - 1) // 2, k // 2) for k in self.kernel_size]
        for i, (width, stride, pooled) in enumerate(self._convolutions(), start=1):
            conv = nn.Conv(
                width, self.kernel_size, (stride, stride), padding=padding, name=f"conv{i}"
            )
            x = nn.relu(conv(x))
            if pooled and self.pool != "none":
                x = pool(x, self.pool)
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(self.fc_width, name="fc")(x))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        layers: list[Layer] = []
        for i, (width, stride, pooled) in enumerate(self._convolutions(), start=1):
            layers.append(Conv(f"conv{i}", self.kernel_size, width, stride, "relu", pooled=pooled))
            if pooled and self.pool != "none":
                layers.append(Pool(self.pool, WINDOW, WINDOW))
        layers += [Dense("fc", self.fc_width, "relu"), Dense("head", self.num_classes, "none")]
        return tuple(layers)

    def _convolutions(self) -> list[tuple[int, int, bool]]:
        """Width, stride, and whether pooling follows, of each convolution."""
        strides = self.strides or (1,) * len(self.channels)
        return [
            (width, stride, self.pool != "none" and i % self.pool_every == 0)
            for i, (width, stride) in enumerate(zip(self.channels, strides, strict=True), start=1)
        ]
