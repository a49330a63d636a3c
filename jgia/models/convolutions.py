"""Convolutions whose derivatives of every order are convolutions that XLA runs well."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array, lax

from jgia.models import convolution_forms as forms
from jgia.models.convolution_forms import Window

_FIRST_CACHE = 2**16  # entries of the matrix of patches
_SECOND_CACHE = 2**18
_MANY_CHANNELS = 32
_MANY_PIXELS = 512
_LARGE_KERNEL = 2**15  # channels in times channels out

_UNDERSTOOD = {
    *("features", "kernel_size", "strides", "padding", "use_bias", "dtype", "param_dtype"),
    *("kernel_init", "bias_init", "parent", "name"),
}


def fast_convolutions(*, vmapped: bool = False) -> contextlib.AbstractContextManager[None]:
    r"""Inside it ``flax.linen.Conv`` computes the same, with derivatives that stay convolutions.

    Gradient matching differentiates a gradient. JAX derives the derivative of a kernel's gradient
    by transposing its rule, which leaves convolutions with swapped axes and dilations that XLA runs
    many times slower than those they stand for. The trilinear form ``<conv(x, k), d>`` has three
    partial derivatives: the convolution itself, that to its input, and that to its kernel; and the
    derivatives of each are the other two. Written so, no other operation ever appears.

    On CPU each of the three is a product with the matrix of patches where that fits a cache or
    searches are vmapped (each then has a kernel gradient of its own, which XLA runs as a grouped
    convolution), and minimal filtering (Winograd) where 3x3 kernels join many channels at many
    pixels: 4/9 of the multiplications, at a few roundings more.

    Args:
      vmapped: whether what is traced inside is vmapped over searches.

    Edge cases:
      Grouped, dilated, circular, masked and transposed convolutions, other ranks, mixed precision
      and those with operations of their own are left as they are. Reverse mode of any order, not
      forward mode.

    >>> with fast_convolutions():
    ...     y = nn.Conv(2, (3, 3)).apply({"params": params}, images)  # doctest: +SKIP
    """
    return nn.intercept_methods(functools.partial(_intercept, vmapped))


def patch_convolutions() -> contextlib.AbstractContextManager[None]:
    """Inside it ``flax.linen.Conv`` is a product with the matrix of patches, of plain operations.

    For Jacobians, which push many directions at once forward through a gradient: each direction
    has a kernel gradient of its own, which XLA would run as a grouped convolution. Differentiable
    in both modes and to every order. What is left as it is: see :func:`fast_convolutions`.
    """
    return nn.intercept_methods(_as_patches)


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: forms.Pads = ((0, 0), (0, 0)),
    vmapped: bool = False,
) -> Array:
    """A convolution as :func:`fast_convolutions` computes it, for layers of your own.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, C, F), of the same dtype.
      strides: down and right.
      padding: zeros before and after, for rows and columns.
      vmapped: whether kernels or their gradients are vmapped.

    Returns:
      (B, rows, columns, F). Reverse mode of any order, not forward mode.
    """
    window = Window(strides, padding, "convolution")
    return _convolve(window._replace(form=_form(x, kernel, window, vmapped)), x, kernel)


def _as_patches(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    return _replaced(method, args, kwargs, context, _product_with_patches)


def _product_with_patches(x: Array, kernel: Array, window: Window) -> Array:
    return forms.forward(window._replace(form="patches"), x, kernel)


def _intercept(
    vmapped: bool,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    def quick(x: Array, kernel: Array, window: Window) -> Array:
        return convolve(x, kernel, strides=window.strides, padding=window.padding, vmapped=vmapped)

    return _replaced(method, args, kwargs, context, quick)


def _replaced(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
    convolve: Callable[[Array, Array, Window], Array],
) -> Any:
    """The layer with ``convolve`` in place of its convolution, if it is understood whole."""
    module = context.module
    if type(module) is not nn.Conv or context.method_name != "__call__" or kwargs:
        return method(*args, **kwargs)
    (x,) = args
    kernel = module.get_variable("params", "kernel")
    if kernel is None or not _plain(module, x, kernel):  # no kernel: it is being initialized
        return method(*args, **kwargs)
    strides = _pair(module.strides)
    window = Window(strides, _pads(module, x.shape, strides), "convolution")
    y = convolve(x, kernel, window)
    if module.use_bias:
        y = y + module.get_variable("params", "bias")[None, None, None]
    return y


def _plain(module: nn.Conv, x: Array, kernel: Any) -> bool:
    """Whether nothing but what :class:`Window` holds makes this convolution what it is."""
    others = (f for f in dataclasses.fields(module) if f.name not in _UNDERSTOOD)
    return (
        isinstance(kernel, jax.Array)
        and x.ndim == kernel.ndim == 4
        and x.dtype == kernel.dtype
        and module.dtype in (None, x.dtype)
        and module.padding not in ("CIRCULAR", "CAUSAL", "REFLECT")
        and all(getattr(module, field.name) == field.default for field in others)
    )


def _pair(value: Any) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return value or 1, value or 1
    first, second = value
    return first, second


def _pads(module: nn.Conv, shape: tuple[int, ...], strides: tuple[int, int]) -> forms.Pads:
    given: Any = module.padding
    if isinstance(given, str):
        size: Any = module.kernel_size
        given = lax.padtype_to_pads(shape[1:3], tuple(size), strides, given)
    elif isinstance(given, int):
        given = given, given
    return _both_sides(given[0]), _both_sides(given[1])


def _both_sides(pad: Any) -> tuple[int, int]:
    return (pad, pad) if isinstance(pad, int) else (pad[0], pad[1])


def _form(x: Array, kernel: Array, window: Window, vmapped: bool) -> forms.Form:
    """The quickest, as measured on CPU; elsewhere XLA's own library chooses."""
    if jax.default_backend() != "cpu":
        return "convolution"
    rows, columns = forms.output_size(x.shape, kernel.shape, window)
    pixels = x.shape[0] * rows * columns
    entries = pixels * kernel[..., 0].size
    many_channels = x.shape[-1] >= _MANY_CHANNELS and entries <= _SECOND_CACHE
    if vmapped or many_channels or entries <= _FIRST_CACHE:
        return "patches"
    square = kernel.shape[:2] == (3, 3) and window.strides == (1, 1)
    if (
        square
        and window.padding == ((1, 1), (1, 1))
        and pixels >= _MANY_PIXELS
        and kernel[0, 0].size >= _LARGE_KERNEL
    ):
        return "winograd"
    return "convolution"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(window: Window, x: Array, kernel: Array) -> Array:
    """Derivative of the form ``<conv(x, k), d>`` in ``d``."""
    return forms.forward(window, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_input(window: Window, shape: tuple[int, ...], d: Array, kernel: Array) -> Array:
    """Its derivative in ``x``."""
    return forms.to_input(window, shape, d, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_kernel(window: Window, shape: tuple[int, ...], d: Array, x: Array) -> Array:
    """Its derivative in ``k``."""
    return forms.to_kernel(window, shape, d, x)


def _convolve_backward(window: Window, kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return _to_input(window, x.shape, d, kernel), _to_kernel(window, kernel.shape, d, x)


def _to_input_backward(
    window: Window, shape: tuple[int, ...], kept: tuple[Array, Array], x: Array
) -> tuple[Array, Array]:
    del shape  # that of x
    d, kernel = kept
    return _convolve(window, x, kernel), _to_kernel(window, kernel.shape, d, x)


def _to_kernel_backward(
    window: Window, shape: tuple[int, ...], kept: tuple[Array, Array], kernel: Array
) -> tuple[Array, Array]:
    del shape  # that of the kernel
    d, x = kept
    return _convolve(window, x, kernel), _to_input(window, x.shape, d, kernel)


_convolve.defvjp(lambda *args: (_convolve(*args), args[1:]), _convolve_backward)
_to_input.defvjp(lambda *args: (_to_input(*args), args[2:]), _to_input_backward)
_to_kernel.defvjp(lambda *args: (_to_kernel(*args), args[2:]), _to_kernel_backward)
