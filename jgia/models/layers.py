"""What a victim's layers are, as plain data that an attack can decide on."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jgia.models.victim import Victim

BatchNormMode = Literal["eval", "train"]
PoolKind = Literal["average", "max", "global_average"]


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution with zero padding, and what follows it.

    ``(k - 1) // 2`` rows of zeros in front and ``k // 2`` behind, whatever the stride, so that n
    rows become ``ceil(n / stride)``: for odd kernels PyTorch's ``padding=k // 2``.

    Attributes:
      name: of its parameters, modules separated by ``/``.
      kernel_size: (kh, kw).
      features: output channels.
      stride: in both directions.
      activation: after a normalization, if one follows; ``"none"`` if there is none.
      normalized: a normalization follows; it is the next layer of the description.
      pooled: pooling follows the activation; it is a layer of the description too.
    """

    name: str
    kernel_size: tuple[int, int]
    features: int
    stride: int
    activation: str
    normalized: bool = False
    pooled: bool = False


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """``scale * (x - mean) / sqrt(var + epsilon) + bias``, channel by channel.

    Attributes:
      name: of its parameters ``scale`` and ``bias``.
      mode: ``"eval"`` uses ``mean`` and ``var``, ``"train"`` the batch's own statistics.
      mean: running means as the server sends them, one per channel; empty for zeros.
      var: running variances; empty for ones.
      epsilon: added to the variance.
    """

    name: str
    mode: BatchNormMode
    mean: tuple[float, ...] = ()
    var: tuple[float, ...] = ()
    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class GroupNorm:
    """Normalization of each example by the statistics of groups of its own channels."""

    name: str
    groups: int


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pooling: rows that fill no window are dropped.

    ``"global_average"`` averages the whole image; its window and stride are 0.

    Attributes:
      kind: what is taken of a window.
      window: rows and columns of it.
      stride: between windows.
      padding: rows around the image that no maximum comes from; only maxima have any.
    """

    kind: PoolKind
    window: int
    stride: int
    padding: int = 0


@dataclasses.dataclass(frozen=True)
class Residual:
    """``activation(branch(x) + shortcut(x))``; an empty shortcut is the identity."""

    name: str
    branch: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    activation: str


@dataclasses.dataclass(frozen=True)
class Dense:
    """One fully connected layer; ``activation`` is ``"none"`` for the head."""

    name: str
    features: int
    activation: str


Layer = Conv | BatchNorm | GroupNorm | Pool | Residual | Dense


def output_shape(
    layers: tuple[Layer, ...], input_shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    """(H, W, C) behind layers without a fully connected one among them.

    >>> output_shape((Conv("conv1", (3, 3), 8, 2, "relu"), Pool("max", 2, 2)), (9, 6, 3))
    (2, 1, 8)

    Raises:
      ValueError: there is a fully connected layer, or a window does not fit.
    """
    return functools.reduce(_step, layers, input_shape)


def _step(shape: tuple[int, int, int], layer: Layer) -> tuple[int, int, int]:
    height, width, channels = shape
    if isinstance(layer, Conv):
        return -(-height // layer.stride), -(-width // layer.stride), layer.features
    if isinstance(layer, Residual):
        return output_shape(layer.branch, shape)
    if isinstance(layer, Dense):
        raise ValueError(f"layer {layer.name} is fully connected: its output is no image.")
    if isinstance(layer, Pool):
        if layer.kind == "global_average":
            return 1, 1, channels
        height, width = height + 2 * layer.padding, width + 2 * layer.padding
        if min(height, width) < layer.window:
            raise ValueError(
                f"a {layer.window}x{layer.window} pooling window does not fit into "
                f"{height}x{width} features; pool less often or take larger images."
            )
        rows, columns = ((n - layer.window) // layer.stride + 1 for n in (height, width))
        return rows, columns, channels
    return shape


def flattened_features(victim: Victim) -> tuple[str, tuple[int, int, int]]:
    """The first fully connected layer and the (H, W, C) that it flattens.

    Raises:
      ValueError: there is none, or the module is not described.
    """
    layers = victim.layers()
    for i, layer in enumerate(layers):
        if isinstance(layer, Dense):
            return layer.name, output_shape(layers[:i], victim.input_shape)
    raise ValueError(f"model {victim.name!r} has no fully connected layer.")
