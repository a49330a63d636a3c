"""Convolution and average pooling as linear maps of image planes."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jgia import _checks
from jgia.sparse._operator import matmul, pair, pytree_dataclass, transposed_matmul
from jgia.sparse.operators import Planes

ConvRange = Float[Array, "out_channels out_height out_width batch"]
PoolRange = Float[Array, "channels out_height out_width batch"]
Padding = Literal["SAME", "VALID"]


@pytree_dataclass
class ConvOperator:
    """Convolution with zero padding (SAME), as a linear map with an adjoint.

    ``(M x)[f, i, j] = sum_{a, b, c} kernel[a, b, c, f] * x[c, s i + a - p, s j + b - q]`` with
    ``p, q`` the rows and columns of zeros in front: the cross-correlation of ``flax.linen.Conv``
    with ``strides=s``, for any kernel and image sides. At stride 1 and odd sides, p and q are
    half the kernel's sides; in general ``p = max((ceil(H / s) - 1) s + kh - H, 0) // 2``.

    Attributes:
      kernel: (kh, kw, C, F) as flax stores it.
      stride: of both axes, or (vertical, horizontal).
      size: (H, W) of the domain. Several sizes have the same range when the stride is not 1, so
        the adjoint needs it then.
    """

    kernel: Float[Array, "kh kw in_channels out_channels"]
    stride: int | tuple[int, int] = dataclasses.field(default=1, metadata={"static": True})
    size: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.kernel.ndim != 4:
            raise ValueError(
                f"the kernel must have shape (kh, kw, C, F), got {self.kernel.shape}; for a "
                "fully connected layer use DenseOperator."
            )
        pair(stride=self.stride)
        if self.size is not None:
            pair(size=self.size)

    def apply(self, x: Planes) -> ConvRange:
        """``M x``: planes (C, H, W, J) to (F, ceil(H / s), ceil(W / s), J)."""
        num_in, num_out = self.kernel.shape[2:]
        if x.shape[0] != num_in:
            raise ValueError(f"x has {x.shape[0]} channels, the operator takes {num_in}.")
        window = self._window(_domain_of(x, self.size))
        patches = window.patches(x)
        matrix = self.kernel.reshape(-1, num_out)
        product = transposed_matmul(matrix, patches.reshape(matrix.shape[0], -1))
        return product.reshape(num_out, *patches.shape[2:])

    def adjoint(self, y: ConvRange) -> Float[Array, "in_channels height width batch"]:
        """``M^T y``: planes (F, ceil(H / s), ceil(W / s), J) to (C, H, W, J)."""
        kh, kw, num_in, num_out = self.kernel.shape
        if y.shape[0] != num_out:
            raise ValueError(f"y has {y.shape[0]} channels, the operator maps to {num_out}.")
        if self.size is None and pair(stride=self.stride) != (1, 1):
            raise _needs_size(f"stride {self.stride}")
        window = self._window(self.size or (y.shape[1], y.shape[2]))
        _check_range(y, window)
        matrix = self.kernel.reshape(-1, num_out)
        patches = matmul(matrix, y.reshape(num_out, -1))
        return window.add_patches(patches.reshape(kh, kw, num_in, *y.shape[1:]))

    def pixel_blocks(
        self, mask: ConvRange
    ) -> Float[Array, "in_channels in_channels height width batch"]:
        """Diagonal C x C block of ``M^T diag(mask) M`` at every pixel: (C, C, H, W, J)."""
        kh, kw, num_in, num_out = self.kernel.shape
        squares = self.kernel[:, :, :, None, :] * self.kernel[:, :, None, :, :]
        squares = squares.reshape(kh, kw, num_in**2, num_out)
        blocks = ConvOperator(squares, self.stride, self.size).adjoint(mask)
        return blocks.reshape(num_in, num_in, *blocks.shape[1:])

    def squared_norm_bound(self) -> Float[Array, ""]:
        """Upper bound on the largest eigenvalue of ``M^T M``, for any image size and stride.

        Zero padding cuts a larger periodic image and a stride drops rows of M, so ``||M||^2`` is
        at most the maximum over all frequencies of ``||K(w)||_2^2``, K the Fourier transform of
        the kernel. Along one axis
        ``||K(w)^T v||^2`` is a trigonometric polynomial of degree ``k - 1``, whose maximum is at
        most ``1 / cos(pi (k - 1) / n)`` times that over n equidistant points. With
        ``n = 16 (k - 1)`` the bound is 4 % above the supremum over image sizes at stride 1.

        References:
          H. Ehlich and K. Zeller, "Schwankung von Polynomen zwischen Gitterpunkten"
          (Mathematische Zeitschrift 86, 1964).
        """
        kh, kw, num_in, num_out = self.kernel.shape
        points = [max(1, 16 * (side - 1)) for side in (kh, kw)]
        # Real arithmetic, with K(w) = R + i S as [[R, -S], [S, R]]; K(-w) is its conjugate.
        v, w, a, b = np.ix_(
            np.arange(points[0]) / points[0],
            np.arange(points[1] // 2 + 1) / points[1],
            np.arange(kh),
            np.arange(kw),
        )
        phase = (2 * np.pi * (v * a + w * b)).reshape(-1, kh * kw)
        taps = self.kernel.reshape(kh * kw, num_in * num_out)
        real, imaginary = (
            matmul(jnp.asarray(part, taps.dtype), taps).reshape(-1, num_in, num_out)
            for part in (np.cos(phase), np.sin(phase))
        )
        response = jnp.block([[real, -imaginary], [imaginary, real]])
        if num_in > num_out:
            response = jnp.swapaxes(response, -1, -2)
        gram = matmul(response, jnp.swapaxes(response, -1, -2))
        slack = [math.cos(math.pi * (k - 1) / n) for k, n in zip((kh, kw), points, strict=True)]
        return jnp.max(jnp.linalg.eigvalsh(gram)) / math.prod(slack)

    def _window(self, size: tuple[int, int]) -> _Window:
        kh, kw = self.kernel.shape[:2]
        return _Window((kh, kw), pair(stride=self.stride), "SAME", size)


@pytree_dataclass
class AveragePool:
    """Average over windows, channel by channel, as ``flax.linen.avg_pool``.

    With SAME padding the zeros around the image count, as they do in flax.

    Attributes:
      window: sides of a window, one for both axes or (vertical, horizontal).
      stride: of the windows; their sides when left out.
      padding: ``"VALID"`` or ``"SAME"``.
      size: (H, W) of the domain; the adjoint needs it, since several sizes have the same range.
    """

    window: int | tuple[int, int] = dataclasses.field(metadata={"static": True})
    stride: int | tuple[int, int] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    padding: Padding = dataclasses.field(default="VALID", metadata={"static": True})
    size: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        pair(window=self.window)
        if self.stride is not None:
            pair(stride=self.stride)
        _checks.one_of(("VALID", "SAME"), padding=self.padding)
        if self.size is not None:
            pair(size=self.size)

    def apply(self, x: Planes) -> PoolRange:
        """Averages of planes (C, H, W, J): one pixel per window."""
        return jnp.mean(self._window(_domain_of(x, self.size)).patches(x), axis=0)

    def adjoint(self, y: PoolRange) -> Planes:
        """Every average spread evenly over its window: (C, H, W, J)."""
        if self.size is None:
            raise _needs_size("this pooling")
        window = self._window(self.size)
        _check_range(y, window)
        share = y / math.prod(window.sides)
        return window.add_patches(jnp.broadcast_to(share, (*window.sides, *y.shape)))

    def squared_norm_bound(self) -> Float[Array, ""]:
        """Upper bound on the largest eigenvalue of ``M^T M``: ``||M||_1 ||M||_inf`` per axis.

        Exact for windows that do not overlap.
        """
        sides, strides = pair(window=self.window), self._strides()
        bound = math.prod(-(-k // s) / k for k, s in zip(sides, strides, strict=True))
        return jnp.asarray(bound, jnp.result_type(float))

    def _strides(self) -> tuple[int, int]:
        return pair(stride=self.window if self.stride is None else self.stride)

    def _window(self, size: tuple[int, int]) -> _Window:
        return _Window(pair(window=self.window), self._strides(), self.padding, size)


@dataclasses.dataclass(frozen=True)
class _Window:
    """Where a moving window goes over planes of one size."""

    sides: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding
    size: tuple[int, int]

    def axes(self) -> list[tuple[int, int, int]]:
        """Of each axis: windows, zeros in front, zeros behind (XLA's rules)."""
        result = []
        for n, k, s in zip(self.size, self.sides, self.strides, strict=True):
            if self.padding == "VALID":
                if k > n:
                    raise ValueError(f"a window of {k} does not fit into {n} pixels.")
                result.append(((n - k) // s + 1, 0, 0))
            else:
                num = -(-n // s)
                zeros = max((num - 1) * s + k - n, 0)
                result.append((num, zeros // 2, zeros - zeros // 2))
        return result

    def patches(self, x: Array) -> Array:
        """(C, H, W, J) to (kh * kw, C, H', W', J): what each place of the window sees."""
        (rows, *pad_rows), (columns, *pad_columns) = self.axes()
        padded = jnp.pad(x, ((0, 0), pad_rows, pad_columns, (0, 0)))
        down, right = self.strides
        return jnp.stack(
            [
                padded[:, a : a + rows * down : down, b : b + columns * right : right]
                for a in range(self.sides[0])
                for b in range(self.sides[1])
            ]
        )

    def add_patches(self, patches: Array) -> Array:
        """The adjoint of :meth:`patches`: (kh, kw, C, H', W', J) to (C, H, W, J)."""
        (rows, top, bottom), (columns, left, right) = self.axes()
        height, width = self.size
        zero = jnp.zeros((), patches.dtype)

        def place(num: int, start: int, stride: int, total: int) -> tuple[int, int, int]:
            return start, total - start - (num - 1) * stride - 1, stride - 1

        total = sum(
            lax.pad(
                patches[a, b],
                zero,
                (
                    (0, 0, 0),
                    place(rows, a, self.strides[0], top + height + bottom),
                    place(columns, b, self.strides[1], left + width + right),
                    (0, 0, 0),
                ),
            )
            for a in range(self.sides[0])
            for b in range(self.sides[1])
        )
        return jnp.asarray(total)[:, top : top + height, left : left + width]


def _domain_of(x: Array, size: tuple[int, int] | None) -> tuple[int, int]:
    found = (x.shape[1], x.shape[2])
    if size is not None and found != size:
        raise ValueError(f"x has images of {found} pixels, the operator's size is {size}.")
    return found


def _check_range(y: Array, window: _Window) -> None:
    expected = tuple(num for num, _, _ in window.axes())
    if y.shape[1:3] != expected:
        raise ValueError(
            f"y has images of {y.shape[1:3]} pixels, the operator maps {window.size} to {expected}."
        )


def _needs_size(what: str) -> ValueError:
    return ValueError(
        f"several image sizes have the same range under {what}: "
        "give the operator size=(H, W) of the domain."
    )
