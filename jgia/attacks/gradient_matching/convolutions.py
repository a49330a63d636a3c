"""Convolutions whose derivatives of every order are convolutions that XLA runs well."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_FEW_ENTRIES = 2**18  # of a patch matrix that stays in a core's cache
_MANY_CHANNELS = 32

Pads = tuple[tuple[int, int], tuple[int, int]]


class _Window(NamedTuple):
    """What is static of a convolution.

    Attributes:
      strides: down and right.
      padding: before and after, for rows and columns.
      patches: whether it is computed as a product with the matrix of patches.
    """

    strides: tuple[int, int]
    padding: Pads
    patches: bool


def fast_convolutions(*, vmapped: bool = False) -> contextlib.AbstractContextManager[None]:
    r"""Inside it ``flax.linen.Conv`` computes the same, with derivatives that stay convolutions.

    Gradient matching differentiates a gradient. JAX derives the derivative of a kernel's gradient
    by transposing its rule, which leaves convolutions with swapped axes and dilations that XLA runs
    many times slower than those they stand for. The trilinear form ``<conv(x, k), d>`` has three
    partial derivatives: the convolution itself, that to its input, and that to its kernel; and the
    derivatives of each are the other two. Written so, no other operation ever appears.

    Where few patches of many channels are read on CPU, or searches are vmapped there (each then
    has a kernel gradient of its own, which XLA runs as a grouped convolution), each of the three is
    a product with the matrix of patches instead.

    Args:
      vmapped: whether what is traced inside is vmapped over searches.

    Edge cases:
      Grouped, dilated, circular, masked and transposed convolutions, other ranks and mixed
      precision are left as they are. Reverse mode of any order, not forward mode.

    >>> with fast_convolutions():
    ...     y = nn.Conv(2, (3, 3)).apply({"params": params}, images)  # doctest: +SKIP
    """
    return nn.intercept_methods(functools.partial(_intercept, vmapped))


def _intercept(
    vmapped: bool,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if type(module) is not nn.Conv or context.method_name != "__call__" or kwargs:
        return method(*args, **kwargs)
    (x,) = args
    kernel = module.get_variable("params", "kernel")
    if kernel is None or not _plain(module, x, kernel):  # no kernel: it is being initialized
        return method(*args, **kwargs)
    strides = _pair(module.strides)
    window = _Window(strides, _pads(module, x.shape, strides), patches=False)
    patches = jax.default_backend() == "cpu" and (vmapped or _few(x, kernel, window))
    y = _convolve(window._replace(patches=patches), x, kernel)
    if module.use_bias:
        y = y + module.get_variable("params", "bias")[None, None, None]
    return y


def _plain(module: nn.Conv, x: Array, kernel: Array) -> bool:
    return (
        x.ndim == kernel.ndim == 4
        and x.dtype == kernel.dtype
        and module.dtype in (None, x.dtype)
        and module.feature_group_count == 1
        and _pair(module.input_dilation) == _pair(module.kernel_dilation) == (1, 1)
        and module.mask is None
        and module.precision is None
        and module.padding not in ("CIRCULAR", "CAUSAL", "REFLECT")
    )


def _pair(value: Any) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return value or 1, value or 1
    first, second = value
    return first, second


def _pads(module: nn.Conv, shape: tuple[int, ...], strides: tuple[int, int]) -> Pads:
    given: Any = module.padding
    if isinstance(given, str):
        size: Any = module.kernel_size
        given = lax.padtype_to_pads(shape[1:3], tuple(size), strides, given)
    elif isinstance(given, int):
        given = given, given
    return _both_sides(given[0]), _both_sides(given[1])


def _both_sides(pad: Any) -> tuple[int, int]:
    return (pad, pad) if isinstance(pad, int) else (pad[0], pad[1])


def _few(x: Array, kernel: Array, window: _Window) -> bool:
    rows, columns = _output(x.shape, kernel.shape, window)
    entries = x.shape[0] * rows * columns * kernel[..., 0].size
    return x.shape[-1] >= _MANY_CHANNELS and entries <= _FEW_ENTRIES


def _output(shape: tuple[int, ...], kernel: tuple[int, ...], window: _Window) -> tuple[int, int]:
    rows, columns = (
        (shape[1 + i] + sum(window.padding[i]) - kernel[i]) // window.strides[i] + 1 for i in (0, 1)
    )
    return rows, columns


def _forward(window: _Window, x: Array, kernel: Array) -> Array:
    """The convolution; linear in ``x`` and in ``kernel``."""
    if not window.patches:
        return lax.conv_general_dilated(
            x, kernel, window.strides, window.padding, dimension_numbers=_LAYOUT
        )
    height, width, _, features = kernel.shape
    rows, columns = _output(x.shape, kernel.shape, window)
    down, right = window.strides
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    shifted = [
        x[:, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(shifted, axis=-1).reshape(len(x) * rows * columns, -1)
    product = patches @ kernel.reshape(-1, features)
    return product.reshape(len(x), rows, columns, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(window: _Window, x: Array, kernel: Array) -> Array:
    """Derivative of the form ``<conv(x, k), d>`` in ``d``."""
    return _forward(window, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_input(window: _Window, shape: tuple[int, ...], d: Array, kernel: Array) -> Array:
    """Its derivative in ``x``."""
    like = jax.ShapeDtypeStruct(shape, d.dtype)
    return jax.linear_transpose(lambda x: _forward(window, x, kernel), like)(d)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_kernel(window: _Window, shape: tuple[int, ...], d: Array, x: Array) -> Array:
    """Its derivative in ``k``."""
    like = jax.ShapeDtypeStruct(shape, d.dtype)
    return jax.linear_transpose(lambda kernel: _forward(window, x, kernel), like)(d)[0]


def _convolve_backward(window: _Window, kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return _to_input(window, x.shape, d, kernel), _to_kernel(window, kernel.shape, d, x)


def _to_input_backward(
    window: _Window, shape: tuple[int, ...], kept: tuple[Array, Array], x: Array
) -> tuple[Array, Array]:
    del shape  # that of x
    d, kernel = kept
    return _convolve(window, x, kernel), _to_kernel(window, kernel.shape, d, x)


def _to_kernel_backward(
    window: _Window, shape: tuple[int, ...], kept: tuple[Array, Array], kernel: Array
) -> tuple[Array, Array]:
    del shape  # that of the kernel
    d, x = kept
    return _convolve(window, x, kernel), _to_input(window, x.shape, d, kernel)


_convolve.defvjp(lambda *args: (_convolve(*args), args[1:]), _convolve_backward)
_to_input.defvjp(lambda *args: (_to_input(*args), args[2:]), _to_input_backward)
_to_kernel.defvjp(lambda *args: (_to_kernel(*args), args[2:]), _to_kernel_backward)
