"""Which models the recursion can walk back through, decided from their description alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jgia.attacks.analytic.activations import Activation, parse_activation
from jgia.attacks.imprint.plan import refuse
from jgia.models import Conv, Dense, Layer, Victim, flatten_params, output_shape

NAME = "analytic"


class Stage(NamedTuple):
    """One layer of a plain chain.

    Attributes:
      layer: its description.
      activation: what follows it.
      input_shape: (H, W, C) of a convolution, (n,) of a fully connected layer.
      output_shape: the same of its output.
    """

    layer: Conv | Dense
    activation: Activation
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


class Count(NamedTuple):
    """How many linear equations there can be for the input of a layer.

    Attributes:
      layer: its name.
      unknowns: entries of its input.
      gradient_equations: independent ones at most, from the layer's own update.
      weight_equations: at most, from its output. Where a ReLU is off there is none: about half.
    """

    layer: str
    unknowns: int
    gradient_equations: int
    weight_equations: int


def check(victim: Victim) -> None:
    """Refuse a victim that the attack cannot walk back through, before any compute.

    Raises:
      ValueError: the reason and what to choose.
    """
    stages(victim)


def stages(victim: Victim) -> tuple[Stage, ...]:
    """The layers that the attack reads, from the image on.

    Of a model that starts with a fully connected layer that is the first one alone: its update
    has the image. Else all of them, which must be convolutions and fully connected layers in a
    plain chain.

    Raises:
      ValueError: as :func:`check`.
    """
    layers = victim.layers()
    shapes = flatten_params(victim.param_shapes())
    if isinstance(layers[0], Dense):
        first = layers[0]
        _require_bias(victim, first, shapes)
        size = math.prod(victim.input_shape)
        activation = parse_activation(first.activation) or Activation(first.activation)
        return (Stage(first, activation, (size,), (first.features,)),)
    chain: list[Stage] = []
    shape: tuple[int, ...] = victim.input_shape
    for i, layer in enumerate(layers):
        chain.append(_stage(victim, layer, shape, last=i == len(layers) - 1))
        shape = chain[-1].output_shape
    _require_bias(victim, chain[-1].layer, shapes)
    return tuple(chain)


def count_equations(victim: Victim) -> tuple[Count, ...]:
    """What can be known of every convolution's input, from the shapes alone.

    The update of a convolution, ``dW[a, b, c, f] = sum_ij u[s i + a, s j + b, c] delta[i, j, f]``,
    has the same ``kh kw F`` coefficients for each of the C channels of u, which has H W entries in
    each: ``C min(kh kw F, H W)`` independent equations at most. Its output gives one for each
    entry whose pre-activation is known. Fewer than unknowns means that the linear equations of
    this layer cannot determine its input; enough is no proof.

    Args:
      victim: a model that :func:`check` accepts.

    Raises:
      ValueError: as :func:`check`.

    References:
      Zhu & Blaschko (ICLR 2021, arXiv 2010.07733), section on rank analysis.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("lenet", input_shape=(32, 32, 3), num_classes=10)
    >>> count_equations(victim)[0]
    Count(layer='conv1', unknowns=3072, gradient_equations=900, weight_equations=3072)
    """
    counts = []
    for stage in stages(victim):
        if isinstance(stage.layer, Conv):
            height, width, channels = stage.input_shape
            rows = math.prod(stage.layer.kernel_size) * stage.layer.features
            counts.append(
                Count(
                    stage.layer.name,
                    height * width * channels,
                    channels * min(rows, height * width),
                    math.prod(stage.output_shape),
                )
            )
    return tuple(counts)


def head_name(victim: Victim) -> str | None:
    """The linear fully connected layer at the end, if the model ends with one."""
    last = victim.layers()[-1]
    return last.name if isinstance(last, Dense) and last.activation == "none" else None


def _stage(victim: Victim, layer: Layer, shape: tuple[int, ...], *, last: bool) -> Stage:
    if not isinstance(layer, Conv | Dense):
        kind = type(layer).__name__
        raise _refusal(victim, f"it has a layer of kind {kind}, which mixes or drops activations")
    if isinstance(layer, Conv) and (layer.normalized or layer.pooled):
        what = "a normalization" if layer.normalized else "pooling"
        raise _refusal(victim, f"{what} follows the layer {layer.name}")
    activation = parse_activation(layer.activation)
    if activation is None:
        raise _refusal(
            victim,
            f"the activation {layer.activation!r} of the layer {layer.name} is none of relu, "
            "leaky_relu, leaky_relu(slope), sigmoid, tanh, none",
        )
    if last and not (isinstance(layer, Dense) and layer.activation == "none"):
        raise _refusal(victim, f"it does not end with a linear fully connected layer: {layer.name}")
    if isinstance(layer, Dense):
        return Stage(layer, activation, (math.prod(shape),), (layer.features,))
    if len(shape) != 3:
        raise _refusal(victim, f"the convolution {layer.name} comes after a fully connected layer")
    return Stage(layer, activation, shape, output_shape((layer,), (shape[0], shape[1], shape[2])))


def _require_bias(victim: Victim, layer: Layer, shapes: Mapping[str, Any]) -> None:
    name = layer.name if isinstance(layer, Dense) else ""
    if f"{name}/bias" not in shapes:
        raise _refusal(victim, f"the fully connected layer {name} has no bias to divide by")


def _refusal(victim: Victim, reason: str) -> ValueError:
    return refuse(
        NAME,
        victim,
        reason,
        "choose --model mlp or lenet, a cnn without pooling, or attack by gradient matching",
    )
