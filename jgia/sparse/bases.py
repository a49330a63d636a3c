"""Orthonormal bases of images, signals and vectors, applied along axes and never formed whole.

A sample is planes (C, H, W) or a vector (n); the batch is the last axis. Every basis is exactly
orthonormal for every size, so that ``synthesize`` is inverse and adjoint of ``analyze`` and a
gradient step in coefficients is one in pixels. A recording is planes (1, T, 1) or (1, 1, T).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from jgia import _checks
from jgia.sparse._operator import matmul
from jgia.sparse.operators import Domain

_MATRIX_SIDE = 512  # longer axes are transformed by FFT: a matrix would cost more, and memory


@runtime_checkable
class Basis(Protocol):
    """An orthonormal basis Psi of the samples; ``Psi^T Psi = Psi Psi^T = I``.

    Static, not an argument to trace: it holds sizes and options only, or constant arrays.
    """

    def analyze(self, x: Domain, /) -> Domain:
        """Coefficients ``Psi^T x``."""
        ...

    def synthesize(self, coefficients: Domain, /) -> Domain:
        """Samples ``Psi c``."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Identity:
    """The samples themselves: sparsity in pixels, as digits on black or token counts have it."""

    def analyze(self, x: Domain) -> Domain:
        """``x``."""
        return x

    def synthesize(self, coefficients: Domain) -> Domain:
        """``c``."""
        return coefficients


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ColorRotation:
    """Three channels rotated to (luma, red-blue, green-magenta), pixel by pixel.

    The first coefficient is ``(r + g + b) / sqrt(3)``. Channels of natural images differ little,
    so almost all energy is in it. Samples without exactly three channels are left alone.
    """

    def analyze(self, x: Domain) -> Domain:
        """Rotated planes (C, H, W, J); same shape."""
        return _rotate(x, _COLOR)

    def synthesize(self, coefficients: Domain) -> Domain:
        """The inverse and adjoint of :meth:`analyze`."""
        return _rotate(coefficients, _COLOR.T)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockDCT:
    """Color rotation followed by a block DCT-II: orthonormal for any height and width.

    Blocks are ``block`` x ``block``; a side that is no multiple ends in one shorter block with
    its own orthonormal DCT, so no padding is needed. A vector has blocks of ``block`` entries.

    >>> basis = BlockDCT(4)
    >>> c = basis.analyze(jnp.ones((1, 4, 6, 1)))
    >>> [round(float(v), 3) for v in c[0, 0, :, 0]]  # one block of 4 x 4 and one of 4 x 2
    [4.0, 0.0, 0.0, 0.0, 2.828, 0.0]

    Attributes:
      block: side of a block in pixels, at least 1.
      color: rotate three channels first (:class:`ColorRotation`), which halves the number of
        coefficients that hold 99 % of a natural image's energy.
    """

    block: int = 8
    color: bool = True

    def __post_init__(self) -> None:
        _checks.at_least(1, block=self.block)

    def analyze(self, x: Domain) -> Domain:
        """Coefficients ``Psi^T x`` of planes (C, H, W, J) or vectors (n, J); same shape."""
        x = ColorRotation().analyze(x) if self.color else x
        for axis in sample_axes(x):
            x = _blockwise(x, axis, self.block, False)
        return x

    def synthesize(self, coefficients: Domain) -> Domain:
        """Samples ``Psi c``; the inverse and the adjoint of :meth:`analyze`."""
        x = coefficients
        for axis in sample_axes(x):
            x = _blockwise(x, axis, self.block, True)
        return ColorRotation().synthesize(x) if self.color else x


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GlobalDCT:
    """Color rotation followed by one DCT-II over every whole axis.

    Sparser than :class:`BlockDCT` where the content is stationary, such as tones and textures;
    less so for edges. Axes of up to 512 entries are multiplied by the matrix, longer ones
    transformed by FFT, whose error grows with the logarithm of the length.

    Attributes:
      color: rotate three channels first (:class:`ColorRotation`).
    """

    color: bool = True

    def analyze(self, x: Domain) -> Domain:
        """Coefficients ``Psi^T x`` of planes (C, H, W, J) or vectors (n, J); same shape."""
        x = ColorRotation().analyze(x) if self.color else x
        for axis in sample_axes(x):
            if x.shape[axis] > _MATRIX_SIDE:
                x = jax.scipy.fft.dct(x, norm="ortho", axis=axis)
            else:
                x = _blockwise(x, axis, x.shape[axis], False)
        return x

    def synthesize(self, coefficients: Domain) -> Domain:
        """Samples ``Psi c``; the inverse and the adjoint of :meth:`analyze`."""
        x = coefficients
        for axis in sample_axes(x):
            if x.shape[axis] > _MATRIX_SIDE:
                x = jax.scipy.fft.idct(x, norm="ortho", axis=axis)
            else:
                x = _blockwise(x, axis, x.shape[axis], True)
        return ColorRotation().synthesize(x) if self.color else x


def energy_support(basis: Basis, x: Domain, fraction: float) -> Int[Array, " batch"]:
    """How many coefficients hold a fraction of each sample's energy, ``||x||^2``.

    The fewest: the largest magnitudes are counted first. It says how sparse a basis makes
    samples, hence how many equations recovery needs.

    >>> int(energy_support(BlockDCT(), jnp.ones((1, 8, 8, 1)), 0.999)[0])
    1

    Args:
      basis: an orthonormal basis.
      x: (*domain, J) samples.
      fraction: of the energy, in (0, 1).

    Returns:
      (J,) counts; 0 for a sample of zeros.

    Raises:
      ValueError: ``fraction`` is out of range.
    """
    _checks.fraction(fraction=fraction)
    coefficients = basis.analyze(x)
    energy = jnp.sort(coefficients.reshape(-1, x.shape[-1]) ** 2, axis=0, descending=True)
    held = jnp.cumsum(energy, axis=0)
    enough = held >= fraction * held[-1:]
    return jnp.where(held[-1] > 0, 1 + jnp.argmax(enough, axis=0), 0)


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


def sample_axes(x: Array) -> tuple[int, ...]:
    """The axes along which a signal extends: (1, 2) of planes (C, H, W, J), (0,) of (n, J)."""
    return (0,) if x.ndim == 2 else tuple(range(1, x.ndim - 1))


_COLOR = np.array(
    [
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
        [1 / np.sqrt(2), 0.0, -1 / np.sqrt(2)],
        [1 / np.sqrt(6), -2 / np.sqrt(6), 1 / np.sqrt(6)],
    ]
)


def _rotate(x: Array, rotation: np.ndarray) -> Array:
    if x.ndim != 4 or x.shape[0] != 3:
        return x
    return matmul(jnp.asarray(rotation, x.dtype), x.reshape(3, -1)).reshape(x.shape)


def _blockwise(x: Array, axis: int, block: int, inverse: bool) -> Array:
    """Apply the DCT (or its inverse) to consecutive blocks of one axis."""
    size = x.shape[axis]
    whole = size - size % block
    parts = []
    for start, stop, width in ((0, whole, block), (whole, size, size - whole)):
        if stop == start:
            continue
        part = lax.slice_in_dim(x, start, stop, axis=axis)
        if width > 1:  # the DCT of one entry is the entry
            matrix = dct_matrix(width)
            matrix = jnp.asarray(matrix.T if inverse else matrix, x.dtype)
            lead = int(np.prod(x.shape[:axis])) * ((stop - start) // width)
            part = _batched(matrix, part.reshape(lead, width, -1)).reshape(part.shape)
        parts.append(part)
    return jnp.concatenate(parts, axis=axis)


def _batched(a: Array, b: Array) -> Array:
    return matmul(jnp.broadcast_to(a[None], (b.shape[0], *a.shape)), b)
