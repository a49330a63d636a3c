"""What stands in front of the fully connected layer, and how much of an image it can pass."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np

from jgia.attacks.ares.route import Route, trace
from jgia.models import (
    BatchNorm,
    Conv,
    Dense,
    GroupNorm,
    Layer,
    Pool,
    Residual,
    Victim,
    output_shape,
)

_CLEARANCE = 1e-3  # of a feature's range: far above float32 rounding, far below its spread


@dataclasses.dataclass(frozen=True)
class Front:
    """Everything in front of the fully connected layer of an attackable victim.

    Attributes:
      layers: in order, beginning with a convolution.
      fc: the fully connected ReLU layer behind them.
      head: the classification head.
      input_shape: (H, W, C) of one image.
      input_range: (lowest, highest) normalized value of a pixel in [0, 1], for each channel.
    """

    layers: tuple[Layer, ...]
    fc: Dense
    head: Dense
    input_shape: tuple[int, int, int]
    input_range: tuple[tuple[float, float], ...]

    @property
    def first(self) -> Conv:
        """The convolution that measures."""
        return cast(Conv, self.layers[0])

    @property
    def averages(self) -> bool:
        """Whether something is averaged: then only features that are always on are measured."""
        return any(isinstance(layer, Pool) for layer in self.layers)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(H', W', F) at the fully connected layer's input, all channels."""
        return output_shape(self.layers, self.input_shape)


def front_layers(victim: Victim) -> Front:
    """What stands in front of the fully connected layer, or the reason why it cannot be used.

    Supported are convolutions with ReLU, of any stride and kernel size, average pooling,
    residual blocks, and batch normalization by running statistics.

    Raises:
      ValueError: the architecture cannot be made to pass a linear measurement as it is.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("resnet", input_shape=(32, 32, 3), num_classes=10)
    >>> front = front_layers(victim)
    >>> front.output_shape, capacity(front)
    ((8, 8, 64), 4)
    """
    layers = victim.layers()
    before = tuple(layer for layer in layers if not isinstance(layer, Dense))
    dense = tuple(layer for layer in layers if isinstance(layer, Dense))
    reason = _unsupported(before) or _unsupported_ending(layers, dense)
    if reason is not None:
        raise ValueError(
            f"ARES cannot attack the model {victim.name!r} as it is: {reason}. The attack never "
            "changes an architecture; choose --model cnn, or a --model resnet with --norm none "
            "or --batch-norm eval."
        )
    fc, head = dense
    mean, std = (np.asarray(v) for v in (victim.normalization.mean, victim.normalization.std))
    low, high = ((-mean) / std).tolist(), ((1 - mean) / std).tolist()
    return Front(before, fc, head, victim.input_shape, tuple(zip(low, high, strict=True)))


def _unsupported_ending(layers: tuple[Layer, ...], dense: tuple[Dense, ...]) -> str | None:
    if len(dense) != 2:
        return (
            "it needs exactly one fully connected ReLU layer and a head, it has "
            f"{len(dense)} fully connected layers"
        )
    if layers[-2:] != dense:
        return "a fully connected layer comes before other layers"
    if dense[0].activation != "relu":
        return f"layer {dense[0].name} ends in {dense[0].activation}; reading bins needs ReLU"
    if dense[0].features < 2:
        return f"layer {dense[0].name} has {dense[0].features} neuron; bins need at least 2"
    return None


def _unsupported(layers: tuple[Layer, ...], *, last: str = "relu") -> str | None:
    """The first reason, in order of layers; ``last`` is what the last convolution ends in."""
    if not layers or not isinstance(layers[0], Conv):
        return "it does not begin with a convolution"
    convs = [layer for layer in layers if isinstance(layer, Conv)]
    for before, layer, after in zip((None, *layers), layers, (*layers[1:], None), strict=False):
        reason = None
        if isinstance(layer, Conv):
            expected = last if layer is convs[-1] else "relu"
            if layer.activation != expected:
                reason = (
                    f"layer {layer.name} ends in {layer.activation}; an activation is linear "
                    "where it is on only behind ReLU"
                )
            elif layer.normalized and not isinstance(after, BatchNorm | GroupNorm):
                reason = f"layer {layer.name} is normalized in a way that is not described"
        elif isinstance(layer, Pool):
            reason = _unsupported_pool(layer)
        elif isinstance(layer, Residual):
            reason = _unsupported_block(layer)
        elif isinstance(layer, GroupNorm):
            reason = (
                f"layer {layer.name} is a group normalization; it divides by statistics of the "
                "example itself, so that what is measured is no linear function of the image"
            )
        elif isinstance(layer, BatchNorm):
            if layer.mode == "train":
                reason = (
                    f"layer {layer.name} is a batch normalization in training mode; batch "
                    "statistics couple the examples, so that no activation belongs to one image"
                )
            elif not isinstance(before, Conv):
                reason = f"layer {layer.name} normalizes something other than a convolution"
        if reason is not None:
            return reason
    return None


def _unsupported_pool(pool: Pool) -> str | None:
    if pool.kind == "average":
        return None
    if pool.kind == "max":
        return (
            "it pools by maxima; which entry of a window is passed depends on the image, and "
            "parameters that treat all places alike cannot decide it"
        )
    return (
        "global average pooling in front of the head leaves one number per channel, and no fully "
        "connected layer that reads places"
    )


def _unsupported_block(block: Residual) -> str | None:
    if block.activation != "relu":
        return f"block {block.name} ends in {block.activation}; reading bins needs ReLU"
    for part in (block.branch, block.shortcut):
        if any(isinstance(layer, Pool | Residual) for layer in part):
            return f"block {block.name} pools or has blocks inside"
        reason = _unsupported(part, last="none") if part else None
        if reason is not None:
            return reason
    return None


def capacity(front: Front) -> int:
    """The most first-layer features that reach the fully connected layer at full resolution.

    Strides cost channels: a convolution of stride s passes everything on if it has ``s * s``
    times as many output channels as features come in, and a kernel of at least s rows and
    columns. The stride of pooling behind a convolution counts like its own, except behind the
    first, whose filters are the caller's. More features than this can be used; each then passes
    at fewer places. 0 if not even one comes through whole. What falls off the border, where sides
    are no multiple of the stride, is not counted as lost.
    """
    for num in range(front.first.features, 0, -1):
        if route_of(front, num).lossless:
            return num
    return 0


def num_equations(front: Front, num_features: int) -> int:
    """Linear equations per image when every entry that is measured is on.

    About half of them hold for filters without a bias; divide by ``H * W * C`` for equations
    per unknown.

    Args:
      front: from :func:`front_layers`.
      num_features: features of the first layer that are used.
    """
    return int(route_of(front, num_features).measured.sum())


def route_of(front: Front, num_features: int, always_on: np.ndarray | None = None) -> Route:
    """The way of the first ``num_features`` features, all of them on if not told otherwise."""
    if not 1 <= num_features <= front.first.features:
        raise ValueError(
            f"the first layer has {front.first.features} features, cannot use {num_features}."
        )
    on = np.ones(num_features, bool) if always_on is None else always_on
    return trace(front.layers, front.input_shape, on)


def feature_range(front: Front, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (F,) and (F,) of ``<w_f, x>`` over images with pixels in [0, 1], padding included."""
    taps = checked_kernel(front, kernel)[..., None]
    ends = np.asarray([(low, high, 0.0) for low, high in front.input_range])
    values = taps * ends[None, None, :, None, :]
    return values.min(axis=-1).sum(axis=(0, 1, 2)), values.max(axis=-1).sum(axis=(0, 1, 2))


def shift_bias(front: Front, kernel: np.ndarray) -> np.ndarray:
    """The least biases (F,) with which every feature is positive for every image.

    ``b_f = -min_x <w_f, x>`` over normalized pixels, and a thousandth of the feature's range. The
    whole front then is one affine map of the image, average pooling included, and every entry is
    an equation. That costs two things:

    - Digits. The shared gradient holds ``b_f + <w_f, x>`` in float32, relative to its size.
      Filters with many taps of both signs have a large b_f and a small spread: a random 3x3x3
      filter loses about one decimal digit, ``direct`` filters a fraction of one.
    - The test for mixtures. Several images in one bin give an affine combination of their
      activations, and an affine map of it is the activation of the combined image: no residual
      shows it. Leave some features without the shift; whether the recovered image reproduces
      them, through the network itself, then tells.
    """
    low, high = feature_range(front, kernel)
    return (-low + _CLEARANCE * (high - low)).astype(np.float32)


def checked_kernel(front: Front, kernel: np.ndarray) -> np.ndarray:
    """The filters (kh, kw, C, F), or ``ValueError`` if the first layer cannot have them."""
    kernel = np.asarray(kernel)
    first = front.first
    expected = (*first.kernel_size, front.input_shape[-1])
    if kernel.ndim != 4 or kernel.shape[:3] != expected or kernel.shape[3] > first.features:
        raise ValueError(
            f"layer {first.name} takes filters of shape {expected} and has {first.features} of "
            f"them; got a kernel of shape {kernel.shape}."
        )
    return kernel


def checked_bias(kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The biases (F,), zeros for ``None``, or ``ValueError`` if they do not fit the filters."""
    if bias is None:
        return np.zeros(kernel.shape[-1], kernel.dtype)
    if np.shape(bias) != kernel.shape[-1:]:
        raise ValueError(f"{kernel.shape[-1]} filters need as many biases, got {np.shape(bias)}.")
    return np.asarray(bias)
