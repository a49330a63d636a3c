"""Residual networks whose stem, normalization and head are explicit choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
from jax import Array

from jgia.models import layers
from jgia.models.layers import Conv, Dense, Layer
from jgia.models.normalizing import Buffers, Norm, described, normalize
from jgia.models.pooling import STEM_PADDING, STEM_STRIDE, STEM_WINDOW, stem_pool

Stem = Literal["cifar", "imagenet"]


class ResNet(nn.Module):
    """``stem - blocks - head``, of 3x3 convolutions.

    The stem is ``conv - norm - ReLU``; a block is ``ReLU(branch(x) + shortcut(x))`` with the
    branch ``conv - norm - ReLU - conv - norm`` and the shortcut the identity, or a 1x1
    convolution and a normalization where the stride or the number of channels changes. Without
    normalization the convolutions have biases.

    With ``channels=(64, 128, 256, 512)``, ``blocks=2`` and ``head="pool"`` it is ResNet-18, in
    the arrangement of torchvision: the stride is in a block's first 3x3 convolution.

    Batch normalization is a policy, not a default. ``batch_norm="eval"`` normalizes with running
    statistics that are constants of the module: buffers that the server sends with the
    parameters, and that a malicious server therefore chooses like everything else. Each example
    then is processed on its own. ``batch_norm="train"`` normalizes with the statistics of the
    batch: every example's activations then depend on all others.

    Attributes:
      channels: output channels of each stage.
      blocks: residual blocks per stage.
      strides: of the first block of each stage; 1, then 2s when empty.
      norm: ``"none"``, ``"batch"`` or ``"group"``.
      batch_norm: ``"eval"`` or ``"train"``; only for ``norm="batch"``.
      groups: groups of group normalization; must divide every number of channels.
      head: ``"flatten_fc"`` is ``flatten - FC - ReLU - head``; ``"pool"`` is ``global average
        pool - head``, as in classic ResNets.
      fc_width: neurons of the fully connected layer.
      num_classes: outputs of the head.
      buffers: running statistics (name, means, variances) of batch normalizations; those not
        named have means 0 and variances 1. See :func:`~jgia.models.with_buffers`.
      stem: ``"cifar"`` is a 3x3 convolution of stride 1; ``"imagenet"`` a 7x7 one of stride 2 and
        3x3 maxima at stride 2.

    References:
      He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016, arXiv 1512.03385),
      table 1 and section 4.2.
    """

    channels: Sequence[int] = (16, 32, 64)
    blocks: int = 1
    strides: Sequence[int] = ()
    norm: Norm = "batch"
    batch_norm: layers.BatchNormMode = "eval"
    groups: int = 8
    head: Literal["flatten_fc", "pool"] = "flatten_fc"
    fc_width: int = 1024
    num_classes: int = 10
    buffers: Buffers = ()
    stem: Stem = "cifar"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        x = _convolution(self.channels[0], size, stride, self.norm == "none", "conv1")(x)
        x = nn.relu(self._normalize(x, "norm1"))
        if self.stem == "imagenet":
            x = stem_pool(x)
        for name, width, stride, projected in self._blocks():
            block = ResidualBlock(
                width,
                stride,
                projected,
                self.norm,
                self.batch_norm,
                self.groups,
                tuple(
                    (key.removeprefix(f"{name}/"), mean, var)
                    for key, mean, var in self.buffers
                    if key.startswith(f"{name}/")
                ),
                name=name,
            )
            x = block(x)
        if self.head == "pool":
            x = x.mean(axis=(1, 2))
        else:
            x = x.reshape((x.shape[0], -1))
            x = nn.relu(nn.Dense(self.fc_width, name="fc")(x))
        return nn.Dense(self.num_classes, name="head")(x)

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        parts = list(self._describe_stem())
        for name, width, stride, projected in self._blocks():
            first = self._describe_conv(
                f"{name}/conv1", f"{name}/norm1", (3, 3), width, stride, "relu"
            )
            second = self._describe_conv(f"{name}/conv2", f"{name}/norm2", (3, 3), width, 1, "none")
            shortcut = self._describe_conv(
                f"{name}/shortcut", f"{name}/shortcut_norm", (1, 1), width, stride, "none"
            )
            parts.append(
                layers.Residual(name, (*first, *second), shortcut if projected else (), "relu")
            )
        if self.head == "pool":
            parts.append(layers.Pool("global_average", 0, 0))
        else:
            parts.append(Dense("fc", self.fc_width, "relu"))
        return (*parts, Dense("head", self.num_classes, "none"))

    def _blocks(self) -> list[tuple[str, int, int, bool]]:
        """Name, width, stride of each block, and whether its shortcut is projected."""
        strides = self.strides or (1, *(2,) * (len(self.channels) - 1))
        found, inputs = [], self.channels[0]
        for width, first_stride in zip(self.channels, strides, strict=True):
            for i in range(self.blocks):
                stride = first_stride if i == 0 else 1
                found.append(
                    (f"block{len(found) + 1}", width, stride, (inputs, 1) != (width, stride))
                )
                inputs = width
        return found

    def _normalize(self, x: Array, name: str) -> Array:
        return normalize(x, name, self.norm, self.batch_norm, self.groups, self.buffers)

    def _describe_stem(self) -> tuple[Layer, ...]:
        if self.stem == "cifar":
            return self._describe_conv("conv1", "norm1", (3, 3), self.channels[0], 1, "relu")
        return (
            *self._describe_conv("conv1", "norm1", (7, 7), self.channels[0], 2, "relu", True),
            layers.Pool("max", STEM_WINDOW, STEM_STRIDE, STEM_PADDING),
        )

    def _describe_conv(
        self,
        name: str,
        norm_name: str,
        kernel_size: tuple[int, int],
        width: int,
        stride: int,
        activation: str,
        pooled: bool = False,
    ) -> tuple[Layer, ...]:
        norm = described(norm_name, self.norm, self.batch_norm, self.groups, self.buffers)
        return Conv(name, kernel_size, width, stride, activation, bool(norm), pooled), *norm


class ResidualBlock(nn.Module):
    """``ReLU(conv - norm - ReLU - conv - norm + shortcut)``; see :class:`ResNet`."""

    width: int
    stride: int
    projected: bool
    norm: Norm
    batch_norm: layers.BatchNormMode
    groups: int
    buffers: Buffers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), width)."""
        use_bias = self.norm == "none"
        branch = _convolution(self.width, 3, self.stride, use_bias, "conv1")(x)
        branch = nn.relu(self._normalize(branch, "norm1"))
        branch = _convolution(self.width, 3, 1, use_bias, "conv2")(branch)
        branch = self._normalize(branch, "norm2")
        if self.projected:
            x = _convolution(self.width, 1, self.stride, use_bias, "shortcut")(x)
            x = self._normalize(x, "shortcut_norm")
        return nn.relu(branch + x)

    def _normalize(self, x: Array, name: str) -> Array:
        return normalize(x, name, self.norm, self.batch_norm, self.groups, self.buffers)


def _convolution(width: int, size: int, stride: int, use_bias: bool, name: str) -> nn.Conv:
    padding = ((size - 1) // 2, size // 2)
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=(padding, padding),
        use_bias=use_bias,
        name=name,
    )
