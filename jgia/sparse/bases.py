"""Orthonormal image bases, applied along axes and never formed at image size."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jgia import _checks
from jgia.sparse.operators import Planes


class BlockDCT(NamedTuple):
    """Color rotation followed by a block DCT-II: orthonormal for any height and width.

    Blocks are ``block`` x ``block``; a side that is no multiple ends in one shorter block with
    its own orthonormal DCT, so no padding is needed. Three channels are rotated to (luma,
    red-blue, green-magenta) first, which halves the number of coefficients that hold 99 % of a
    natural image's energy; other channel counts are left alone.

    Attributes:
      block: side of a block in pixels, at least 1.
    """

    block: int = 8

    def analyze(self, x: Planes) -> Planes:
        """Coefficients ``Psi^T x`` of planes (C, H, W, J); same shape."""
        return _blockwise(
            _blockwise(_rotate(x, inverse=False), 1, self.block, False), 2, self.block, False
        )

    def synthesize(self, coefficients: Planes) -> Planes:
        """Images ``Psi c``; the inverse and the adjoint of :meth:`analyze`."""
        x = _blockwise(_blockwise(coefficients, 1, self.block, True), 2, self.block, True)
        return _rotate(x, inverse=True)


_COLOR = np.array(
    [
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
        [1 / np.sqrt(2), 0.0, -1 / np.sqrt(2)],
        [1 / np.sqrt(6), -2 / np.sqrt(6), 1 / np.sqrt(6)],
    ]
)


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix; row k is the k-th cosine.

    >>> D = dct_matrix(8)
    >>> bool(np.allclose(D @ D.T, np.eye(8)))
    True
    """
    n = np.arange(size)
    rows = np.cos(np.pi * (n[None, :] + 0.5) * n[:, None] / size) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


def _rotate(x: Array, *, inverse: bool) -> Array:
    if x.shape[0] != 3:
        return x
    matrix = jnp.asarray(_COLOR.T if inverse else _COLOR, x.dtype)
    return _matmul(matrix, x.reshape(3, -1)).reshape(x.shape)


def _blockwise(x: Array, axis: int, block: int, inverse: bool) -> Array:
    """Apply the DCT (or its inverse) to consecutive blocks of one axis."""
    _checks.at_least(1, block=block)
    size = x.shape[axis]
    whole = size - size % block
    parts = []
    for start, stop, width in ((0, whole, block), (whole, size, size - whole)):
        if stop == start:
            continue
        part = lax.slice_in_dim(x, start, stop, axis=axis)
        matrix = dct_matrix(width)
        matrix = jnp.asarray(matrix.T if inverse else matrix, x.dtype)
        lead = int(np.prod(x.shape[:axis])) * ((stop - start) // width)
        flat = part.reshape(lead, width, -1)
        parts.append(_matmul(matrix[None], flat).reshape(part.shape))
    return jnp.concatenate(parts, axis=axis)


def _matmul(a: Array, b: Array) -> Array:
    if a.ndim < b.ndim or (a.ndim == 3 and a.shape[0] == 1):
        a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape[-2:]))
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
