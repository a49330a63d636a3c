"""A small residual network whose normalization and head are explicit choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jgia.models import layers
from jgia.models.layers import Conv, Dense, Layer
from jgia.models.normalizing import BatchNorm, group_norm

Norm = Literal["none", "batch", "group"]
Buffers = tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]


class ResNet(nn.Module):
    """``stem - blocks - head``, of 3x3 convolutions, as small ResNets for 32x32 images are.

    The stem is ``conv - norm - ReLU``; a block is ``ReLU(branch(x) + shortcut(x))`` with the
    branch ``conv - norm - ReLU - conv - norm`` and the shortcut the identity, or a 1x1
    convolution and a normalization where the stride or the number of channels changes. Without
    normalization the convolutions have biases.

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

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        x = _convolution(self.channels[0], 3, 1, self.norm == "none", "conv1")(x)
        x = nn.relu(self._normalize(x, "norm1"))
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
        described: list[Layer] = [
            *self._describe_conv("conv1", "norm1", (3, 3), self.channels[0], 1, "relu")
        ]
        for name, width, stride, projected in self._blocks():
            first = self._describe_conv(
                f"{name}/conv1", f"{name}/norm1", (3, 3), width, stride, "relu"
            )
            second = self._describe_conv(f"{name}/conv2", f"{name}/norm2", (3, 3), width, 1, "none")
            shortcut = self._describe_conv(
                f"{name}/shortcut", f"{name}/shortcut_norm", (1, 1), width, stride, "none"
            )
            described.append(
                layers.Residual(name, (*first, *second), shortcut if projected else (), "relu")
            )
        if self.head == "pool":
            described.append(layers.Pool("global_average", 0, 0))
        else:
            described.append(Dense("fc", self.fc_width, "relu"))
        return (*described, Dense("head", self.num_classes, "none"))

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
        return _normalize(x, name, self.norm, self.batch_norm, self.groups, self.buffers)

    def _describe_conv(
        self,
        name: str,
        norm_name: str,
        kernel_size: tuple[int, int],
        width: int,
        stride: int,
        activation: str,
    ) -> tuple[Layer, ...]:
        normalized = self.norm != "none"
        conv = Conv(name, kernel_size, width, stride, activation, normalized=normalized)
        if self.norm == "batch":
            statistics = _statistics(self.buffers, norm_name)
            return conv, layers.BatchNorm(norm_name, self.batch_norm, *statistics)
        return (conv, layers.GroupNorm(norm_name, self.groups)) if normalized else (conv,)


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
        return _normalize(x, name, self.norm, self.batch_norm, self.groups, self.buffers)


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


def _normalize(
    x: Array,
    name: str,
    norm: Norm,
    batch_norm: layers.BatchNormMode,
    groups: int,
    buffers: Buffers,
) -> Array:
    if norm == "none":
        return x
    if norm == "group":
        return group_norm(groups, jnp.dtype(x.dtype), name)(x)
    return BatchNorm(batch_norm, *_statistics(buffers, name), name=name)(x)


def _statistics(buffers: Buffers, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for key, mean, var in buffers:
        if key == name:
            return mean, var
    return (), ()
