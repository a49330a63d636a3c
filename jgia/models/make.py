"""The bundled victim models by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn

from jgia import _checks
from jgia.models.cnn import CNN
from jgia.models.convnet import ConvNet
from jgia.models.imprint_block import ImprintBlock
from jgia.models.layers import BatchNormMode, flattened_features
from jgia.models.lenet import LeNet
from jgia.models.mlp import MLP
from jgia.models.normalizing import Norm
from jgia.models.resnet import ResNet, Stem
from jgia.models.vgg import VGG, WIDTHS
from jgia.models.victim import Victim
from jgia.normalization import Normalization

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

_OPTIONS = {
    "cnn": {"strides", "pool", "pool_every", "kernel_size"},
    "mlp": set(),
    "imprint_cnn": set(),
    "imprint_mlp": set(),
    "lenet": {"strides"},
    "convnet": set(),
    "resnet": {"strides", "blocks", "norm", "batch_norm", "head"},
    "resnet18": {"norm", "batch_norm", "stem"},
    "vgg11": {"norm", "batch_norm"},
}


def make_victim(
    name: ModelName,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    normalization: Normalization | None = None,
    widths: tuple[int, ...] | None = None,
    fc_width: int = 1024,
    strides: tuple[int, ...] | None = None,
    pool: Literal["none", "average", "max"] | None = None,
    pool_every: int | None = None,
    kernel_size: int | None = None,
    blocks: int | None = None,
    norm: Norm | None = None,
    batch_norm: BatchNormMode | None = None,
    head: Literal["flatten_fc", "pool"] | None = None,
    stem: Stem | None = None,
) -> Victim:
    """Build one of the bundled victim models.

    Args:
      name: ``"cnn"`` (ARES; VGG-like with pooling), ``"resnet"``, ``"resnet18"``, ``"vgg11"``,
        ``"mlp"``, ``"lenet"`` (DLG), ``"convnet"``, or a cnn or mlp behind the block of Robbing
        the Fed (``"imprint_cnn"``, ``"imprint_mlp"``).
      input_shape: (H, W, C) of one image.
      num_classes: number of classes, at least 2.
      normalization: defaults to none (pixels stay in [0, 1]).
      widths: convolution channels (cnn, convnet, lenet, the eight of vgg11), channels of the
        stages (resnet, the four of resnet18) or hidden widths (mlp); the model's default when
        left out.
      fc_width: neurons of the fully connected layer (cnn, resnet) or of the block (imprint_cnn,
        imprint_mlp).
      strides: one for each width (cnn: 1; lenet: 2, 2, then 1; resnet, of a stage's first block:
        1, then 2).
      pool: 2x2 pooling after convolutions (cnn).
      pool_every: pool after every so many convolutions (cnn with ``pool``), 1 by default.
      kernel_size: odd side of every convolution (cnn), 3 by default.
      blocks: residual blocks per stage (resnet), 1 by default.
      norm: ``"none"`` (the default of vgg11), ``"batch"`` (that of resnet and resnet18) or
        ``"group"``.
      batch_norm: ``"eval"`` (the default) or ``"train"``, with batch normalization; see
        :class:`~jgia.models.ResNet` for what they leak.
      head: ``"flatten_fc"`` (the default) or ``"pool"`` (resnet).
      stem: ``"cifar"`` (the default) or ``"imagenet"`` (resnet18).

    Raises:
      ValueError: an unknown name, sizes that the model cannot take, or an option that it does
        not have.

    >>> make_victim("cnn", input_shape=(32, 32, 3), num_classes=10).layers()[-1].features
    10
    """
    _checks.one_of(_OPTIONS, name=name)
    _checks.at_least(2, num_classes=num_classes)
    _checks.at_least(1, fc_width=fc_width)
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape}.")
    for option, sizes in (("widths", widths), ("strides", strides)):
        if sizes is not None and not sizes:
            raise ValueError(
                f"{option} must name at least one layer; leave it out for the default."
            )
    for size in (*input_shape, *(widths or ()), *(strides or ())):
        _checks.at_least(1, **{"every size of the model": size})
    normalization = normalization or Normalization.identity(input_shape[-1])
    if normalization.num_channels != input_shape[-1]:
        raise ValueError(
            f"the normalization is for {normalization.num_channels} channels, "
            f"the images have {input_shape[-1]}."
        )
    _check_options(
        name,
        strides=strides,
        pool=pool,
        pool_every=pool_every,
        kernel_size=kernel_size,
        blocks=blocks,
        norm=norm,
        batch_norm=batch_norm,
        head=head,
        stem=stem,
    )
    module: nn.Module
    if name == "cnn":
        module = _cnn(
            widths or (12, 12), fc_width, num_classes, strides, pool, pool_every, kernel_size
        )
    elif name == "resnet":
        module = _resnet(
            widths or (16, 32, 64),
            fc_width,
            num_classes,
            strides,
            1 if blocks is None else blocks,
            norm or "batch",
            batch_norm,
            head or "flatten_fc",
        )
    elif name == "resnet18":
        module = _resnet18(widths or (64, 128, 256, 512), num_classes, norm, batch_norm, stem)
    elif name == "vgg11":
        module = _vgg11(widths or WIDTHS, num_classes, norm or "none", batch_norm)
    elif name == "mlp":
        module = MLP(widths or (1024,), num_classes)
    elif name == "imprint_cnn":
        inner = CNN(widths or (12, 12), 128, num_classes)
        module = ImprintBlock(inner, input_shape, fc_width)
    elif name == "imprint_mlp":
        module = ImprintBlock(MLP(widths or (128,), num_classes), input_shape, fc_width)
    elif name == "lenet":
        widths = widths or (12,) * len(strides or (2, 2, 1))
        strides = strides or (2, 2, *(1,) * (len(widths) - 2))[: len(widths)]
        module = LeNet(num_classes, widths, _one_each(strides, widths))
    else:
        module = _convnet(widths or (32, 64, 128), num_classes, input_shape)
    victim = Victim(module, input_shape, num_classes, normalization, name)
    flattened_features(victim)  # pooling windows fit
    return victim


def _check_options(name: str, **options: object) -> None:
    given = {option for option, value in options.items() if value is not None}
    foreign = sorted(given - _OPTIONS[name])
    if foreign:
        owners = [model for model, own in _OPTIONS.items() if foreign[0] in own]
        raise ValueError(
            f"the model {name!r} has no option {foreign[0]!r}; leave it out, or choose the model "
            f"{' or '.join(owners)}."
        )


def _one_each(strides: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
    if len(strides) != len(widths):
        raise ValueError(
            f"strides need one value for each of the {len(widths)} widths {tuple(widths)}, got "
            f"{tuple(strides)}."
        )
    return tuple(strides)


def _cnn(
    widths: tuple[int, ...],
    fc_width: int,
    num_classes: int,
    strides: tuple[int, ...] | None,
    pool: Literal["none", "average", "max"] | None,
    pool_every: int | None,
    kernel_size: int | None,
) -> CNN:
    pool = pool or "none"
    _checks.one_of(("none", "average", "max"), pool=pool)
    if pool_every is not None:
        _checks.at_least(1, pool_every=pool_every)
        if pool == "none":
            raise ValueError("pool_every needs pool='average' or pool='max'.")
        if pool_every > len(widths):
            raise ValueError(
                f"pool_every={pool_every} would never pool: there are {len(widths)} convolutions."
            )
    size = 3 if kernel_size is None else kernel_size
    _checks.at_least(1, kernel_size=size)
    if size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that it has a center, got {size}.")
    return CNN(
        widths,
        fc_width,
        num_classes,
        _one_each(strides, widths) if strides else (),
        pool,
        pool_every or 1,
        (size, size),
    )


def _resnet(
    widths: tuple[int, ...],
    fc_width: int,
    num_classes: int,
    strides: tuple[int, ...] | None,
    blocks: int,
    norm: Norm,
    batch_norm: BatchNormMode | None,
    head: Literal["flatten_fc", "pool"],
) -> ResNet:
    _checks.at_least(1, blocks=blocks)
    _check_norm(norm, batch_norm)
    _checks.one_of(("flatten_fc", "pool"), head=head)
    return ResNet(
        widths,
        blocks,
        _one_each(strides, widths) if strides else (),
        norm,
        batch_norm or "eval",
        _groups(widths),
        head,
        fc_width,
        num_classes,
    )


def _resnet18(
    widths: tuple[int, ...],
    num_classes: int,
    norm: Norm | None,
    batch_norm: BatchNormMode | None,
    stem: Stem | None,
) -> ResNet:
    norm, stem = norm or "batch", stem or "cifar"
    _check_norm(norm, batch_norm)
    _checks.one_of(("cifar", "imagenet"), stem=stem)
    _check_number(4, widths, "resnet18 has 4 stages")
    return ResNet(
        widths,
        blocks=2,
        norm=norm,
        batch_norm=batch_norm or "eval",
        groups=_groups(widths),
        head="pool",
        num_classes=num_classes,
        stem=stem,
    )


def _vgg11(
    widths: tuple[int, ...], num_classes: int, norm: Norm, batch_norm: BatchNormMode | None
) -> VGG:
    _check_norm(norm, batch_norm)
    _check_number(len(WIDTHS), widths, "vgg11 has 8 convolutions")
    return VGG(widths, norm, batch_norm or "eval", _groups(widths), num_classes)


def _check_norm(norm: Norm, batch_norm: BatchNormMode | None) -> None:
    _checks.one_of(("none", "batch", "group"), norm=norm)
    _checks.one_of(("eval", "train"), batch_norm=batch_norm or "eval")
    if batch_norm is not None and norm != "batch":
        raise ValueError(f"batch_norm needs norm='batch', got norm={norm!r}.")


def _check_number(number: int, widths: tuple[int, ...], subject: str) -> None:
    if len(widths) != number:
        raise ValueError(f"{subject}: widths need {number} values, got {widths}.")


def _groups(widths: tuple[int, ...]) -> int:
    return math.gcd(8, *widths)


def _convnet(
    widths: tuple[int, ...], num_classes: int, input_shape: tuple[int, int, int]
) -> ConvNet:
    module = ConvNet(widths, num_classes=num_classes)
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
    return module
