"""Which model is attacked."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jgia import _checks

ModelName = Literal[
    "cnn",
    "mlp",
    "lenet",
    "convnet",
    "resnet",
    "resnet18",
    "vgg11",
    "imprint_cnn",
    "imprint_mlp",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The victim model. No attack changes it; only parameter values are chosen."""

    model: ModelName = "cnn"
    """`cnn` (convolutions, one wide fully connected layer, head: what ARES attacks), `resnet`
    (residual blocks, then the same), `resnet18` and `vgg11` (as published, for classes and image
    sizes of your own), `mlp`, `lenet` (Deep Leakage from Gradients), `convnet` (group
    normalization, pooling), `imprint_cnn` and `imprint_mlp` (behind the linear block of Robbing
    the Fed, which no honest model has)."""

    widths: tuple[int, ...] | None = None
    """Convolution channels (cnn, convnet, lenet, the 8 of vgg11), channels of each stage (resnet,
    the 4 of resnet18) or hidden widths (mlp); default of the model."""

    fc_width: int = 1024
    """Neurons of the fully connected layer of a cnn or resnet, or of the block of imprint_cnn and
    imprint_mlp: the number of bins."""

    strides: tuple[int, ...] | None = None
    """One stride for each width (cnn, lenet, resnet); default of the model."""

    pool: Literal["none", "average", "max"] | None = None
    """2x2 pooling after the convolutions of a cnn; none by default."""

    pool_every: int | None = None
    """Pool after every so many convolutions of a cnn; 1 by default."""

    kernel_size: int | None = None
    """Odd side of a cnn's convolutions; 3 by default."""

    blocks: int | None = None
    """Residual blocks in each stage of a resnet; 1 by default."""

    norm: Literal["none", "batch", "group"] | None = None
    """Normalization in a resnet or resnet18 (batch by default) or vgg11 (none by default)."""

    batch_norm: Literal["eval", "train"] | None = None
    """Batch normalization by running statistics that the server sends (`eval`, the default) or by
    those of the client's batch (`train`, which couples its examples)."""

    head: Literal["flatten_fc", "pool"] | None = None
    """What a resnet ends in: flatten, fully connected layer, head (the default), or global average
    pooling, head."""

    stem: Literal["cifar", "imagenet"] | None = None
    """How a resnet18 begins: a 3x3 convolution of stride 1 (`cifar`, the default), or a 7x7 one of
    stride 2 and 3x3 maxima of stride 2 (`imagenet`)."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(ModelName), model=self.model)
        _checks.at_least(1, fc_width=self.fc_width)

    def architecture(self) -> dict[str, Any]:
        """The keyword arguments of :func:`~jgia.models.make_victim` that these options give.

        >>> ModelConfig(model="resnet", norm="none").architecture()["norm"]
        'none'
        """
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name != "model"}
