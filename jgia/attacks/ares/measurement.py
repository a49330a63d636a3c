"""The linear map from an image to what reaches the fully connected layer."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jgia.attacks.ares.front import Front, checked_bias, checked_kernel, feature_range, route_of
from jgia.attacks.ares.route import Route, Unit, all_units, units
from jgia.models import Pool
from jgia.sparse import AveragePool, Composition, ConvOperator, LinearOperator

_ROUNDING = 1e-5  # of a feature's range: what float32 sums may lack to be positive


class Measurement(NamedTuple):
    """What crafted layers measure of an image, where it is linear.

    With h the planes (F', H', W', J) that reach the fully connected layer in its first F'
    channels and x the planes of normalized images: at entries that are ``exact``,
    ``h = max(operator.apply(x) + bias[..., None], 0)``.

    Attributes:
      operator: planes (C, H, W, J) to (F', H', W', J).
      bias: (F', H', W').
      exact: (F', H', W'). Where it is False, a tap of a later layer fell off the image and h is
        0, or a rectifier came before an average and h is no linear function of the image.
      always_on: (F',) channels that are positive for every image with pixels in [0, 1].
      feature: (F',) the first-layer feature that each channel carries.
    """

    operator: LinearOperator
    bias: np.ndarray
    exact: np.ndarray
    always_on: np.ndarray
    feature: np.ndarray


def measurement(front: Front, kernel: np.ndarray, bias: np.ndarray | None = None) -> Measurement:
    """The linear map that the parameters of :func:`pass_through_params` make of the layers.

    One strided convolution describes all layers together: the filters, moved to the taps by which
    later layers pass them on, averaged over the windows of pooling. Only where an average mixes
    what is inside the image with what is off it does the operator go layer by layer.

    Args:
      front: from :func:`front_layers`.
      kernel: (kh, kw, C, F) filters of the first layer, F at most its features; the operator
        computes in their dtype.
      bias: (F,) their biases; zeros when left out.

    Raises:
      ValueError: kernel or bias do not fit the first layer.

    References:
      ARES (IEEE S&P 2026, arXiv 2603.17623), equation 4 and figure 2: a stride of 1 without
      pooling, normalization or shortcuts, where the map is the first layer's.
    """
    kernel = checked_kernel(front, kernel)
    bias = checked_bias(kernel, bias)
    low, high = feature_range(front, kernel)
    on = low + bias > _ROUNDING * (high - low)
    route = route_of(front, kernel.shape[-1], on)
    if _is_one_convolution(front, route, on):
        operator = _one_convolution(front, kernel, route)
        planes = np.broadcast_to(bias[route.feature, None, None], route.measured.shape)
    else:
        operator, planes = _layer_by_layer(front, kernel, bias, route)
    return Measurement(
        operator=operator,
        bias=planes,
        exact=route.measured,
        always_on=on[route.feature],
        feature=route.feature,
    )


def _is_one_convolution(front: Front, route: Route, always_on: np.ndarray) -> bool:
    stride = front.first.stride * route.stride
    height, width, _ = front.input_shape
    if route.size != (-(-height // stride), -(-width // stride)):
        return False  # pooling dropped rows that fill no window
    return not front.averages or bool(route.inside[always_on[route.feature]].all())


def _one_convolution(front: Front, kernel: np.ndarray, route: Route) -> ConvOperator:
    first = front.first
    # Rows of the image, relative to stride * i, where each channel's filter begins.
    rows, columns = (
        first.stride * (route.offset[:, axis, None] + route.window) - (k - 1) // 2
        for axis, k in enumerate(first.kernel_size)
    )
    kh, kw = first.kernel_size
    top, left = rows.min(), columns.min()
    num_in, num_out = kernel.shape[2], len(route.feature)
    shape = (rows.max() - top + kh, columns.max() - left + kw, num_in, num_out)
    whole = np.zeros(shape, kernel.dtype)
    share = 1 / len(route.window) ** 2
    for g, feature in enumerate(route.feature):
        for a in rows[g] - top:
            for b in columns[g] - left:
                whole[a : a + kh, b : b + kw, :, g] += share * kernel[..., feature]
    height, width, _ = front.input_shape
    stride = first.stride * route.stride
    return _convolution(whole, stride, (height, width), (-int(top), -int(left)))


def _layer_by_layer(
    front: Front, kernel: np.ndarray, bias: np.ndarray, route: Route
) -> tuple[LinearOperator, np.ndarray]:
    """The composition of all layers, and the planes that the biases become."""
    _, *rest = units(front.layers)
    height, width, _ = front.input_shape
    stride = front.first.stride
    size = (height, width)
    operator: LinearOperator = _convolution(kernel, stride, size)
    size = (-(-height // stride), -(-width // stride))
    planes = jnp.broadcast_to(jnp.asarray(bias)[:, None, None, None], (len(bias), *size, 1))
    for part in rest:
        if isinstance(part, Pool):
            layers: list[LinearOperator] = [AveragePool(part.window, part.stride, "VALID", size)]
        else:
            inner = [part] if isinstance(part, Unit) else all_units((part,))
            layers = []
            for unit in inner:
                table = route.taps[unit.conv.name]
                if not len(table):
                    continue
                source, a, b = table.T
                taps = np.zeros((*unit.conv.kernel_size, len(planes), len(table)), kernel.dtype)
                taps[a, b, source, np.arange(len(table))] = 1
                layers.append(_convolution(taps, unit.conv.stride, size))
        for layer in layers:
            planes = layer.apply(planes)
            size = (planes.shape[1], planes.shape[2])
            operator = Composition(layer, operator)
    return operator, np.asarray(planes)[..., 0]


def _convolution(
    kernel: np.ndarray,
    stride: int,
    size: tuple[int, int],
    padding: tuple[int, int] | None = None,
) -> ConvOperator:
    """Cross-correlation with so many rows and columns of zeros in front, half the kernel's if None.

    The operator's own padding depends on size and stride; zeros around the kernel make up for it.
    """
    if padding is None:
        padding = ((kernel.shape[0] - 1) // 2, (kernel.shape[1] - 1) // 2)
    placed = [
        _same_window(n, stride, k, p)
        for n, k, p in zip(size, kernel.shape[:2], padding, strict=True)
    ]
    whole = np.zeros((placed[0][0], placed[1][0], *kernel.shape[2:]), kernel.dtype)
    (_, top), (_, left) = placed
    whole[top : top + kernel.shape[0], left : left + kernel.shape[1]] = kernel
    return ConvOperator(jnp.asarray(whole), stride, None if stride == 1 else size)


def _same_window(size: int, stride: int, side: int, padding: int) -> tuple[int, int]:
    """Rows of the smallest SAME window around a kernel, and where in it the kernel begins."""
    rows = side
    while True:
        zeros = max((-(-size // stride) - 1) * stride + rows - size, 0) // 2
        if zeros >= padding and rows - zeros >= side - padding:
            return rows, zeros - padding
        rows += 1
