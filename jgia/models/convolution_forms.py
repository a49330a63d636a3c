"""Three ways to compute a convolution and its two partial derivatives, from plain operations."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Form = Literal["convolution", "patches", "winograd"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Window(NamedTuple):
    """What is static of a convolution.

    Attributes:
      strides: down and right.
      padding: before and after, for rows and columns.
      form: ``"convolution"``, XLA's own; ``"patches"``, a product with the matrix of what each
        output pixel sees; ``"winograd"``, the minimal filtering F(2x2, 3x3), for strides of 1, an
        output as large as the input and kernels of 3 x 3 only.
    """

    strides: tuple[int, int]
    padding: Pads
    form: Form


def forward(window: Window, x: Array, kernel: Array) -> Array:
    """(B, rows, columns, F) from (B, H, W, C) and (h, w, C, F)."""
    if window.form == "winograd":
        tiles = _product(_tiles(x), _transformed(kernel))
        return _assembled(tiles, x.shape)
    if window.form == "patches":
        patches = _patches(window, x, kernel.shape)
        product = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
        return product.reshape(*patches.shape[:3], -1)
    return lax.conv_general_dilated(
        x, kernel, window.strides, window.padding, dimension_numbers=_LAYOUT
    )


def to_input(window: Window, shape: tuple[int, ...], d: Array, kernel: Array) -> Array:
    """Derivative of ``<forward(x, kernel), d>`` in ``x`` of a shape."""
    if window.form == "winograd":
        turned = [part.T for part in _turned(_transformed(kernel))]
        return _assembled(_product(_tiles(d), turned), shape)
    like = jax.ShapeDtypeStruct(shape, d.dtype)
    return jax.linear_transpose(lambda x: forward(window, x, kernel), like)(d)[0]


def to_kernel(window: Window, shape: tuple[int, ...], d: Array, x: Array) -> Array:
    """Derivative of ``<forward(x, kernel), d>`` in ``kernel`` of a shape."""
    if window.form == "winograd":
        return _restored(_product([part.T for part in _tiles(x)], _spread(d)), shape)
    like = jax.ShapeDtypeStruct(shape, d.dtype)
    return jax.linear_transpose(lambda kernel: forward(window, x, kernel), like)(d)[0]


def output_size(shape: tuple[int, ...], kernel: tuple[int, ...], window: Window) -> tuple[int, int]:
    """Rows and columns of the output."""
    rows, columns = (
        (shape[1 + i] + sum(window.padding[i]) - kernel[i]) // window.strides[i] + 1 for i in (0, 1)
    )
    return rows, columns


def _patches(window: Window, x: Array, kernel: tuple[int, ...]) -> Array:
    """(B, rows, columns, entries of a kernel): what each output pixel sees."""
    rows, columns = output_size(x.shape, kernel, window)
    down, right = window.strides
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    shifted = [
        x[:, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return jnp.concatenate(shifted, axis=-1)


# F(2x2, 3x3) of Lavin and Gray (CVPR 2016, arXiv 1509.09308): y = A'[(G k G') * (B' x B)]A on tiles
# of 4 x 4 input and 2 x 2 output pixels; "*" is a product of matrices over the channels, one for
# each of the 16 entries of a tile. Matrices are written out as sums.


def _product(left: list[Array], right: list[Array]) -> list[Array]:
    return [a @ b for a, b in zip(left, right, strict=True)]


def _tiles(x: Array) -> list[Array]:
    """``B' x B``: 16 matrices (B * tiles, C)."""
    pads = [(1, 1 + size % 2) for size in x.shape[1:3]]
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *pads, (0, 0))))

    def along(a: Array, axis: int) -> tuple[Array, ...]:
        count = a.shape[axis] // 2 - 1
        a0, a1, a2, a3 = (lax.slice_in_dim(a, i, i + 2 * count - 1, 2, axis) for i in range(4))
        return a0 - a2, a1 + a2, a2 - a1, a1 - a3

    return [part.reshape(-1, x.shape[-1]) for row in along(x, 1) for part in along(row, 2)]


def _spread(d: Array) -> list[Array]:
    """``A d A'``: 16 matrices (B * tiles, F)."""
    d = lax.optimization_barrier(d)
    d = jnp.pad(d, ((0, 0), *((0, size % 2) for size in d.shape[1:3]), (0, 0)))

    def along(a: Array, axis: int) -> tuple[Array, ...]:
        first, second = (lax.slice_in_dim(a, i, a.shape[axis], 2, axis) for i in (0, 1))
        return first, first + second, first - second, -second

    return [part.reshape(-1, d.shape[-1]) for row in along(d, 1) for part in along(row, 2)]


def _transformed(kernel: Array) -> list[Array]:
    """``G k G'``: 16 matrices (C, F)."""
    kernel = lax.optimization_barrier(kernel)

    def along(a: Array) -> tuple[Array, ...]:
        ends, middle = (a[0] + a[2]) / 2, a[1] / 2
        return a[0], ends + middle, ends - middle, a[2]

    return [part for row in along(kernel) for part in along(row)]


def _turned(parts: list[Array]) -> list[Array]:
    """Of the kernel turned by half a circle, from those of the kernel."""
    order = (3, 1, 2, 0)
    return [parts[4 * i + j] for i in order for j in order]


def _restored(parts: list[Array], shape: tuple[int, ...]) -> Array:
    """``G' m G``: a kernel from 16 matrices (C, F)."""

    def along(a: list[Array]) -> list[Array]:
        plus, minus = (a[1] + a[2]) / 2, (a[1] - a[2]) / 2
        return [a[0] + plus, minus, plus + a[3]]

    columns = [along(parts[4 * i : 4 * i + 4]) for i in range(4)]
    rows = [along([column[j] for column in columns]) for j in range(3)]
    return jnp.stack([rows[j][i] for i in range(3) for j in range(3)]).reshape(shape)


def _assembled(parts: list[Array], shape: tuple[int, ...]) -> Array:
    """``A' m A``: an image (B, H, W, F) from 16 matrices (B * tiles, F)."""
    batch, height, width, _ = shape
    down, right = -(-height // 2), -(-width // 2)
    parts = [part.reshape(batch, down, right, -1) for part in parts]

    def along(a: list[Array]) -> tuple[Array, Array]:
        return a[0] + a[1] + a[2], a[1] - a[2] - a[3]

    columns = [along(parts[4 * i : 4 * i + 4]) for i in range(4)]
    first, second = (along([column[j] for column in columns]) for j in range(2))
    rows = [jnp.stack([first[i], second[i]], axis=3) for i in range(2)]
    whole = jnp.stack(rows, axis=2).reshape(batch, 2 * down, 2 * right, -1)
    return whole[:, :height, :width]
