"""Which first-layer activation each input of the fully connected layer carries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jgia.models import BatchNorm, Conv, Layer, Pool, Residual


class Unit(NamedTuple):
    """A convolution and the batch normalization that follows it, if any."""

    conv: Conv
    norm: BatchNorm | None


class Route(NamedTuple):
    """How first-layer activations reach a later layer, when every layer passes what it can.

    Channel g at (i, j) is the mean over ``(u, v)`` in ``window x window`` of first-layer feature
    ``feature[g]`` at ``(stride i + offset[g, 0] + u, stride j + offset[g, 1] + v)``.

    Attributes:
      feature: (G,).
      offset: (G, 2), in pixels of the first layer's output.
      window: (V,) offsets that pooling averages, with repetitions if windows overlap.
      stride: pixels of the first layer's output per pixel here.
      size: (H', W').
      inside: (G, H', W') where the formula holds because no tap fell off the image.
      measured: (G, H', W') where a linear function of the first layer's activations arrives:
        also where some of the averaged taps fell off, as zeros; not where all did, nor where a
        rectifier came before an average.
      lossless: whether nothing was left out for want of channels or of kernel taps.
      taps: for each later convolution, rows (input channel, kernel row, kernel column), one for
        each output channel that passes one; empty where the convolution is switched off.
    """

    feature: np.ndarray
    offset: np.ndarray
    window: np.ndarray
    stride: int
    size: tuple[int, int]
    inside: np.ndarray
    measured: np.ndarray
    lossless: bool
    taps: dict[str, np.ndarray]


def units(layers: tuple[Layer, ...]) -> Iterator[Unit | Pool | Residual]:
    """Layers with each convolution joined to the batch normalization behind it."""
    for layer, after in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer, Conv):
            yield Unit(layer, after if isinstance(after, BatchNorm) else None)
        elif isinstance(layer, Pool | Residual):
            yield layer


def all_units(layers: tuple[Layer, ...]) -> Iterator[Unit]:
    """Every convolution with its normalization, those inside residual blocks included."""
    for part in units(layers):
        if isinstance(part, Unit):
            yield part
        elif isinstance(part, Residual):
            yield from all_units(part.branch)
            yield from all_units(part.shortcut)


def trace(
    layers: tuple[Layer, ...], input_shape: tuple[int, int, int], always_on: np.ndarray
) -> Route:
    """Follow F first-layer features to the end of ``layers``.

    Args:
      layers: everything in front of the fully connected layer, beginning with a convolution.
      input_shape: (H, W, C) of one image.
      always_on: (F,) which features are positive for every image, everywhere: only those
        survive an average as a linear map.
    """
    first, *rest = units(layers)
    if not isinstance(first, Unit):
        raise ValueError("the first layer must be a convolution.")
    num = len(always_on)
    height, width, _ = input_shape
    size = (-(-height // first.conv.stride), -(-width // first.conv.stride))
    route = Route(
        feature=np.arange(num),
        offset=np.zeros((num, 2), int),
        window=np.zeros(1, int),
        stride=1,
        size=size,
        inside=np.ones((num, *size), bool),
        measured=np.ones((num, *size), bool),
        lossless=True,
        taps={},
    )
    for i, part in enumerate(rest):
        if isinstance(part, Unit):
            route = _through(route, part.conv, _pooling_stride(rest[i + 1 :]))
        elif isinstance(part, Pool):
            route = _pooled(route, part, always_on)
        else:
            route = _around(route, part)
    return route


def _pooling_stride(after: list[Unit | Pool | Residual]) -> int:
    """The stride of the pooling that follows directly."""
    stride = 1
    for part in after:
        if not isinstance(part, Pool):
            break
        stride *= part.stride
    return stride


def _around(route: Route, block: Residual) -> Route:
    """Through a residual block: the shortcut, or the branch where that carries more."""
    branch, shortcut = (list(all_units(part)) for part in (block.branch, block.shortcut))
    by_shortcut = route._replace(taps=route.taps | _switched_off(branch))
    for unit in shortcut:
        by_shortcut = _through(by_shortcut, unit.conv)
    if not shortcut:
        return by_shortcut
    by_branch = route._replace(taps=route.taps | _switched_off(shortcut))
    for unit in branch:
        by_branch = _through(by_branch, unit.conv)
    return by_branch if len(by_branch.feature) > len(by_shortcut.feature) else by_shortcut


def _switched_off(parts: list[Unit]) -> dict[str, np.ndarray]:
    return {unit.conv.name: np.zeros((0, 3), int) for unit in parts}


def _through(route: Route, conv: Conv, pooling_stride: int = 1) -> Route:
    """Space to depth: each output channel takes one input channel through one kernel tap.

    Taps are taken phase by phase, the center first, so that with too few channels what is lost
    is resolution, not whole features. Pooling behind the convolution keeps one place of several
    too: channels that pass the other places beforehand save them.
    """
    paddings = [(k - 1) // 2 for k in conv.kernel_size]
    stride = conv.stride * pooling_stride
    rows, columns = (_phases(k, stride) for k in conv.kernel_size)
    num = len(route.feature)
    taps = [(g, a, b) for a in rows for b in columns for g in range(num)]
    lossless = len(rows) == len(columns) == stride and len(taps) <= conv.features
    table = np.asarray(taps[: conv.features], int).reshape(-1, 3)
    source, shift = table[:, 0], table[:, 1:] - paddings
    size = (-(-route.size[0] // conv.stride), -(-route.size[1] // conv.stride))
    return route._replace(
        feature=route.feature[source],
        offset=route.offset[source] + route.stride * shift,
        stride=route.stride * conv.stride,
        size=size,
        inside=_sampled(route.inside, source, shift, conv.stride, size),
        measured=_sampled(route.measured, source, shift, conv.stride, size),
        lossless=route.lossless and lossless,
        taps=route.taps | {conv.name: table},
    )


def _phases(size: int, stride: int) -> list[int]:
    """Kernel rows that together see every input row once, as far as the kernel has them."""
    center = (size - 1) // 2
    ahead = [center + r for r in range(stride) if center + r < size]
    behind = [
        center + r - stride
        for r in range(stride)
        if center + r >= size and center + r - stride >= 0
    ]
    return ahead + behind


def _sampled(
    mask: np.ndarray, source: np.ndarray, shift: np.ndarray, stride: int, size: tuple[int, int]
) -> np.ndarray:
    """``mask[source[g], stride i + shift[g, 0], stride j + shift[g, 1]]``, false outside."""
    rows, columns = (stride * np.arange(n) + shift[:, axis, None] for axis, n in enumerate(size))
    inside = ((rows >= 0) & (rows < mask.shape[1]))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < mask.shape[2]))[:, None, :]
    rows, columns = (
        np.clip(x, 0, n - 1) for x, n in zip((rows, columns), mask.shape[1:], strict=True)
    )
    return inside & mask[source[:, None, None], rows[:, :, None], columns[:, None, :]]


def _pooled(route: Route, pool: Pool, always_on: np.ndarray) -> Route:
    window = (pool.window, pool.window)
    inside, measured = (
        np.lib.stride_tricks.sliding_window_view(mask, window, axis=(1, 2))[
            :, :: pool.stride, :: pool.stride
        ]
        for mask in (route.inside, route.measured)
    )
    return route._replace(
        window=(route.window[:, None] + route.stride * np.arange(pool.window)).reshape(-1),
        stride=route.stride * pool.stride,
        size=(inside.shape[1], inside.shape[2]),
        inside=inside.all(axis=(3, 4)),
        measured=measured.any(axis=(3, 4)) & always_on[route.feature][:, None, None],
    )
