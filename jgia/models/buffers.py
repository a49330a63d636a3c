"""Running statistics and the mode of batch normalizations, as values of a victim."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import numpy as np
from jax.typing import ArrayLike

from jgia import _checks
from jgia.models.layers import BatchNormMode
from jgia.models.normalizing import Buffers
from jgia.models.victim import Victim, batch_norm_names, flatten_params


def with_buffers(victim: Victim, buffers: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Victim:
    """The same victim with running statistics of batch normalizations.

    In this library running statistics are part of the model, not of its parameters: the server
    sends them, no client updates them, and no update contains them.

    Args:
      victim: a resnet, resnet18 or vgg11 with ``norm="batch"``.
      buffers: ``{"block1/norm1": (means, variances)}``, one entry per channel each; layers not
        named get means 0 and variances 1. An empty mapping takes the statistics away.

    Raises:
      ValueError: a name or shape that the model does not have, or a variance below zero.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("resnet", input_shape=(8, 8, 1), num_classes=2, widths=(2,))
    >>> sent = with_buffers(victim, {"norm1": (np.array([0.5, 0]), np.array([4.0, 1]))})
    >>> sent.layers()[1].mean
    (0.5, 0.0)
    """
    names = _normalized_names(victim)
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
    return dataclasses.replace(victim, module=victim.module.clone(buffers=new))


def with_batch_norm(victim: Victim, mode: BatchNormMode) -> Victim:
    """The same victim, whose batch normalizations use running (``eval``) or batch statistics.

    Parameters and running statistics fit either mode; ``train`` keeps the latter for
    :meth:`Victim.running_statistics`, but computes without them.

    Raises:
      ValueError: an unknown mode, or a model without batch normalization.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("resnet18", input_shape=(8, 8, 1), num_classes=2, widths=(2,) * 4)
    >>> with_batch_norm(victim, "train").layers()[1].mode
    'train'
    """
    _checks.one_of(("eval", "train"), mode=mode)
    _normalized_names(victim)
    return dataclasses.replace(victim, module=victim.module.clone(batch_norm=mode))


def _normalized_names(victim: Victim) -> tuple[str, ...]:
    module: nn.Module = victim.module
    fields = {field.name for field in dataclasses.fields(module)}
    names = batch_norm_names(victim) if {"buffers", "batch_norm"} <= fields else ()
    if not names:
        raise ValueError(
            f"the model {victim.name!r} has no batch normalization whose statistics can be set; "
            "choose --model resnet, resnet18 or vgg11 with --norm batch."
        )
    return names
