"""The bundled victim models by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import numpy as np
from jax.typing import ArrayLike

from jgia import _checks
from jgia.models.cnn import CNN
from jgia.models.convnet import ConvNet
from jgia.models.imprint_block import ImprintBlock
from jgia.models.layers import BatchNorm, BatchNormMode, Residual, flattened_features
from jgia.models.lenet import LeNet
from jgia.models.mlp import MLP
from jgia.models.resnet import Buffers, Norm, ResNet
from jgia.models.victim import Victim, flatten_params
from jgia.normalization import Normalization

ModelName = Literal["cnn", "mlp", "lenet", "convnet", "resnet", "imprint_cnn", "imprint_mlp"]

_OPTIONS = {
    "cnn": {"strides", "pool", "pool_every", "kernel_size"},
    "mlp": set(),
    "imprint_cnn": set(),
    "imprint_mlp": set(),
    "lenet": {"strides"},
    "convnet": set(),
    "resnet": {"strides", "blocks", "norm", "batch_norm", "head"},
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
) -> Victim:
    """Build one of the bundled victim models.

    Args:
      name: ``"cnn"`` (ARES; VGG-like with pooling), ``"resnet"``, ``"mlp"``, ``"lenet"`` (DLG),
        ``"convnet"``, or a cnn or mlp behind the block of Robbing the Fed (``"imprint_cnn"``,
        ``"imprint_mlp"``).
      input_shape: (H, W, C) of one image.
      num_classes: number of classes, at least 2.
      normalization: defaults to none (pixels stay in [0, 1]).
      widths: convolution channels (cnn, convnet, lenet), channels of the stages (resnet) or
        hidden widths (mlp); the model's default when left out.
      fc_width: neurons of the fully connected layer (cnn, resnet) or of the block (imprint_cnn,
        imprint_mlp).
      strides: one for each width (cnn: 1; lenet: 2, 2, then 1; resnet, of a stage's first block:
        1, then 2).
      pool: 2x2 pooling after convolutions (cnn).
      pool_every: pool after every so many convolutions (cnn with ``pool``), 1 by default.
      kernel_size: odd side of every convolution (cnn), 3 by default.
      blocks: residual blocks per stage (resnet), 1 by default.
      norm: ``"none"``, ``"batch"`` (the default) or ``"group"`` (resnet).
      batch_norm: ``"eval"`` (the default) or ``"train"`` (resnet); see
        :class:`~jgia.models.ResNet` for what they leak.
      head: ``"flatten_fc"`` (the default) or ``"pool"`` (resnet).

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


def with_buffers(victim: Victim, buffers: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Victim:
    """The same resnet with running statistics of batch normalizations.

    In this library running statistics are part of the model, not of its parameters: the server
    sends them, no client updates them, and no update contains them.

    Args:
      victim: a resnet with ``norm="batch"``.
      buffers: ``{"block1/norm1": (means, variances)}``, one entry per channel each; layers not
        named get means 0 and variances 1.

    Raises:
      ValueError: a name or shape that the model does not have, or a variance below zero.

    >>> victim = make_victim("resnet", input_shape=(8, 8, 1), num_classes=2, widths=(2,))
    >>> sent = with_buffers(victim, {"norm1": (np.array([0.5, 0]), np.array([4.0, 1]))})
    >>> sent.layers()[1].mean
    (0.5, 0.0)
    """
    module = victim.module
    if not isinstance(module, ResNet) or module.norm != "batch":
        raise ValueError(
            f"the model {victim.name!r} has no batch normalization; use --model resnet "
            "--norm batch."
        )
    names = batch_norm_names(victim)
    shapes = flatten_params(victim.param_shapes())
    entries: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = []
    for name, statistics in buffers.items():
        if name not in names:
            raise ValueError(
                f"the model has no batch normalization {name!r}; it has {', '.join(names)}."
            )
        mean, var = (np.asarray(value, np.float64) for value in statistics)
        shape = shapes[f"{name}/scale"].shape
        if mean.shape != shape or var.shape != shape:
            raise ValueError(
                f"the statistics of {name} must have shape {shape}, got {mean.shape} and "
                f"{var.shape}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
            raise ValueError(
                f"the means of {name} must be finite and its variances finite and not negative."
            )
        entries.append((name, tuple(mean.tolist()), tuple(var.tolist())))
    new: Buffers = tuple(sorted(entries))
    return Victim(
        module.clone(buffers=new),
        victim.input_shape,
        victim.num_classes,
        victim.normalization,
        victim.name,
    )


def batch_norm_names(victim: Victim) -> tuple[str, ...]:
    """The names of the victim's batch normalizations, in order."""
    names: list[str] = []
    for layer in victim.layers():
        parts = (*layer.branch, *layer.shortcut) if isinstance(layer, Residual) else (layer,)
        names += [part.name for part in parts if isinstance(part, BatchNorm)]
    return tuple(names)


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
    _checks.one_of(("none", "batch", "group"), norm=norm)
    _checks.one_of(("eval", "train"), batch_norm=batch_norm or "eval")
    _checks.one_of(("flatten_fc", "pool"), head=head)
    if batch_norm is not None and norm != "batch":
        raise ValueError(f"batch_norm needs norm='batch', got norm={norm!r}.")
    groups = math.gcd(8, *widths)
    return ResNet(
        widths,
        blocks,
        _one_each(strides, widths) if strides else (),
        norm,
        batch_norm or "eval",
        groups,
        head,
        fc_width,
        num_classes,
    )


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
