"""VGG-11 without the wide fully connected layers that it has for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from jgia.models.layers import BatchNormMode, Conv, Dense, Layer, Pool
from jgia.models.normalizing import Buffers, Norm, described, normalize
from jgia.models.pooling import WINDOW, pool

WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
POOLED = (1, 2, 4, 6, 8)
"""The convolutions of configuration A that maxima follow, counted from 1."""


class VGG(nn.Module):
    """``[conv3x3 - norm - ReLU (- max pool 2x2)] x 8 - flatten - head``.

    Configuration A of the paper up to the last pooling, which leaves 1x1x512 features of a 32x32
    image. Convolutions have biases where no normalization follows.

    Attributes:
      channels: output channels of the eight convolutions.
      norm: ``"none"`` (the paper's), ``"batch"`` or ``"group"``.
      batch_norm: ``"eval"`` or ``"train"``, see :class:`~jgia.models.ResNet`; only for
        ``norm="batch"``.
      groups: groups of group normalization; must divide every number of channels.
      num_classes: outputs of the head.
      buffers: running statistics of batch normalizations, as in :class:`~jgia.models.ResNet`.

    References:
      Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
      (ICLR 2015, arXiv 1409.1556), table 1.

    Departures from the paper: the head replaces its three fully connected layers and their
    dropout, as usual for small images. Torchvision's ``vgg11_bn`` keeps convolution biases in
    front of batch normalizations, which undo them.
    """

    channels: Sequence[int] = WIDTHS
    norm: Norm = "none"
    batch_norm: BatchNormMode = "eval"
    groups: int = 8
    num_classes: int = 10
    buffers: Buffers = ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        for i, width in enumerate(self.channels, start=1):
            conv = nn.Conv(
                width,
                (3, 3),
                padding=((1, 1), (1, 1)),
                use_bias=self.norm == "none",
                kernel_init=nn.initializers.he_normal(),
                name=f"conv{i}",
            )
            name = f"norm{i}"
            x = normalize(conv(x), name, self.norm, self.batch_norm, self.groups, self.buffers)
            x = nn.relu(x)
            if i in POOLED:
                x = pool(x, "max")
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        parts: list[Layer] = []
        for i, width in enumerate(self.channels, start=1):
            norm = described(f"norm{i}", self.norm, self.batch_norm, self.groups, self.buffers)
            pooled = i in POOLED
            parts += [Conv(f"conv{i}", (3, 3), width, 1, "relu", bool(norm), pooled), *norm]
            if pooled:
                parts.append(Pool("max", WINDOW, WINDOW))
        return (*parts, Dense("head", self.num_classes, "none"))
