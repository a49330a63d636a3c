"""A victim model as plain data: module, input shape, normalization, and its layer list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from flax import traverse_util
from jax import Array

from jgia import _checks
from jgia.models.cnn import CNN
from jgia.models.convnet import ConvNet
from jgia.models.lenet import LeNet
from jgia.models.mlp import MLP
from jgia.normalization import Normalization

PyTree = Any
ModelName = Literal["cnn", "mlp", "lenet", "convnet"]


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution with what follows it, as an attack needs to know it."""

    name: str
    kernel_size: tuple[int, int]
    features: int
    stride: int
    activation: str
    normalized: bool = False
    pooled: bool = False


@dataclasses.dataclass(frozen=True)
class Dense:
    """One fully connected layer; ``activation`` is ``"none"`` for the head."""

    name: str
    features: int
    activation: str


@dataclasses.dataclass(frozen=True)
class Victim:
    """A model under attack: pure functions of ``params``, nothing mutable.

    Attributes:
      module: the flax.linen module.
      input_shape: (H, W, C) of one image.
      num_classes: number of classes.
      normalization: applied by the client before the model, and undone by the attack after.
      name: for reports.
    """

    module: nn.Module
    input_shape: tuple[int, int, int]
    num_classes: int
    normalization: Normalization
    name: str = "custom"

    def __post_init__(self) -> None:
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"the attributes of {type(self.module).__name__}, and input_shape, must be "
                "hashable (tuples, not lists): the victim is a static argument of compiled "
                "functions."
            ) from error

    def init(self, key: Array) -> PyTree:
        """Random benign parameters, as an honest server would start with."""
        return self.module.init(key, jax.numpy.zeros((1, *self.input_shape), "float32"))["params"]

    def param_shapes(self) -> PyTree:
        """The parameters' structure as ``jax.ShapeDtypeStruct``: nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params: PyTree, inputs: Array) -> Array:
        """Normalized inputs (B, H, W, C) to logits (B, num_classes)."""
        return self.module.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]

    def loss(self, params: PyTree, images: Array, labels: Array) -> Array:
        """Mean cross-entropy of pixels (B, H, W, C) in [0, 1] and integer labels (B,).

        Client and attacks share this one function, so their scale cannot differ.
        """
        logits = self.apply(params, self.normalization.normalize(images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def layers(self) -> tuple[Conv | Dense, ...]:
        """The layers in order, or ``ValueError`` for a module this library does not describe."""
        describe = _DESCRIBE.get(type(self.module))
        if describe is None:
            raise ValueError(
                f"the layers of {type(self.module).__name__} are not described; "
                f"known modules: {', '.join(m.__name__ for m in _DESCRIBE)}."
            )
        return describe(self.module)


def _describe_cnn(m: CNN) -> tuple[Conv | Dense, ...]:
    convs = (Conv(f"conv{i}", (3, 3), w, 1, "relu") for i, w in enumerate(m.channels, 1))
    return (*convs, Dense("fc", m.fc_width, "relu"), Dense("head", m.num_classes, "none"))


def _describe_mlp(m: MLP) -> tuple[Conv | Dense, ...]:
    hidden = (Dense(f"fc{i}", w, "relu") for i, w in enumerate(m.widths, 1))
    return (*hidden, Dense("head", m.num_classes, "none"))


def _describe_lenet(m: LeNet) -> tuple[Conv | Dense, ...]:
    pairs = enumerate(zip(m.channels, m.strides, strict=True), 1)
    convs = (Conv(f"conv{i}", (5, 5), w, s, "sigmoid") for i, (w, s) in pairs)
    return (*convs, Dense("head", m.num_classes, "none"))


def _describe_convnet(m: ConvNet) -> tuple[Conv | Dense, ...]:
    convs = (
        Conv(f"conv{i}", (3, 3), w, 1, "relu", normalized=m.groups > 0, pooled=True)
        for i, w in enumerate(m.channels, 1)
    )
    return (*convs, Dense("head", m.num_classes, "none"))


_DESCRIBE: Mapping[type, Callable[[Any], tuple[Conv | Dense, ...]]] = {
    CNN: _describe_cnn,
    MLP: _describe_mlp,
    LeNet: _describe_lenet,
    ConvNet: _describe_convnet,
}


def make_victim(
    name: ModelName,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    normalization: Normalization | None = None,
    widths: tuple[int, ...] | None = None,
    fc_width: int = 1024,
) -> Victim:
    """Build one of the bundled victim models.

    Args:
      name: ``"cnn"`` (ARES), ``"mlp"``, ``"lenet"`` (DLG) or ``"convnet"``.
      input_shape: (H, W, C) of one image.
      num_classes: number of classes, at least 2.
      normalization: defaults to none (pixels stay in [0, 1]).
      widths: convolution channels (cnn, convnet, lenet) or hidden widths (mlp); the model's
        default when left out.
      fc_width: neurons of the cnn's fully connected layer.

    Raises:
      ValueError: an unknown name, or sizes that the model cannot take.

    >>> make_victim("cnn", input_shape=(32, 32, 3), num_classes=10).layers()[-1].features
    10
    """
    _checks.one_of(("cnn", "mlp", "lenet", "convnet"), name=name)
    _checks.at_least(2, num_classes=num_classes)
    _checks.at_least(1, fc_width=fc_width)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape}.")
    if widths is not None and not widths:
        raise ValueError("widths must name at least one layer; leave it out for the default.")
    for size in (*input_shape, *(widths or ())):
        _checks.at_least(1, **{"every size of the model": size})
    norm = normalization or Normalization.identity(input_shape[-1])
    if norm.num_channels != input_shape[-1]:
        raise ValueError(
            f"the normalization is for {norm.num_channels} channels, "
            f"the images have {input_shape[-1]}."
        )
    module: nn.Module
    if name == "cnn":
        module = CNN(widths or (12, 12), fc_width, num_classes)
    elif name == "mlp":
        module = MLP(widths or (1024,), num_classes)
    elif name == "lenet":
        module = (
            LeNet(num_classes)
            if widths is None
            else LeNet(num_classes, widths, (2, 2, *(1,) * (len(widths) - 2))[: len(widths)])
        )
    else:
        module = ConvNet(widths or (32, 64, 128), num_classes=num_classes)
        if min(input_shape[:2]) < 2 ** len(module.channels):
            raise ValueError(
                f"convnet halves the image {len(module.channels)} times; "
                f"{input_shape[:2]} is too small."
            )
        if any(width % module.groups for width in module.channels):
            raise ValueError(
                f"convnet normalizes in {module.groups} groups, so every width must be a multiple "
                f"of {module.groups}; got {tuple(module.channels)}."
            )
    return Victim(module, input_shape, num_classes, norm, name)


def flatten_params(params: PyTree) -> dict[str, Any]:
    """Nested parameters to ``{"conv1/kernel": array, ...}``."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten_params(flat: Mapping[str, Any]) -> PyTree:
    """The inverse of :func:`flatten_params`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
