"""Orthogonal wavelets of Daubechies, periodic, for samples of any size."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jgia import _checks
from jgia.sparse.bases import ColorRotation, sample_axes
from jgia.sparse.operators import Domain

NAMES = ("haar", *(f"db{moments}" for moments in range(1, 9)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wavelet:
    """Color rotation followed by an orthogonal wavelet transform: orthonormal for any size.

    Each level splits the approximation along every axis into averages (first half) and details
    (second half), periodically. Along an axis of odd length the last entry is passed on among
    the averages, so nothing is padded and the basis stays exactly orthonormal; an axis of one
    entry is left alone. Filters longer than an axis wrap around it.

    >>> c = Wavelet("haar", levels=1).analyze(jnp.array([[1.0], [1.0], [2.0], [0.0], [5.0]]))
    >>> [round(float(v), 3) for v in c[:, 0]]  # averages, the fifth entry, details
    [1.414, 1.414, 5.0, 0.0, 1.414]

    Attributes:
      name: ``"haar"``, or ``"db1"`` to ``"db8"``: Daubechies' filters with that many vanishing
        moments and twice as many taps, named as PyWavelets does. ``"db1"`` is ``"haar"``.
      levels: number of levels; as many as there are while the longest side of the approximation
        is not shorter than the filter, when left out.
      color: rotate three channels first (:class:`~jgia.sparse.bases.ColorRotation`).

    References:
      I. Daubechies, "Orthonormal bases of compactly supported wavelets" (Communications on Pure
      and Applied Mathematics 41, 1988); S. Mallat (IEEE PAMI 11, 1989) for the pyramid.
    """

    name: str = "haar"
    levels: int | None = None
    color: bool = True

    def __post_init__(self) -> None:
        _checks.one_of(NAMES, name=self.name)
        if self.levels is not None:
            _checks.at_least(1, levels=self.levels)

    def analyze(self, x: Domain) -> Domain:
        """Coefficients ``Psi^T x`` of planes (C, H, W, J) or vectors (n, J); same shape."""
        x = ColorRotation().analyze(x) if self.color else x
        for sides in self._pyramid(x):
            corner = _corner(x, sides)
            for axis in sides:
                corner = _split(corner, axis, self.name)
            x = _put(x, corner)
        return x

    def synthesize(self, coefficients: Domain) -> Domain:
        """Samples ``Psi c``; the inverse and the adjoint of :meth:`analyze`."""
        x = coefficients
        for sides in reversed(self._pyramid(x)):
            corner = _corner(x, sides)
            for axis in sides:
                corner = _merge(corner, axis, self.name)
            x = _put(x, corner)
        return ColorRotation().synthesize(x) if self.color else x

    def _pyramid(self, x: Array) -> list[dict[int, int]]:
        """Of each level: the sides of the approximation it splits, by axis."""
        sides = {axis: x.shape[axis] for axis in sample_axes(x)}
        taps = len(scaling_filter(self.name))
        result = []
        while max(sides.values()) >= 2 and (
            max(sides.values()) >= taps if self.levels is None else len(result) < self.levels
        ):
            result.append(sides)
            sides = {axis: -(-side // 2) for axis, side in sides.items()}
        return result


@functools.cache
def scaling_filter(name: str) -> np.ndarray:
    """The low-pass filter h of a Daubechies wavelet: (2 N,), of unit norm and sum sqrt(2).

    Spectral factorization: with ``P(y) = sum_k binom(N - 1 + k, k) y^k``, every root y of P gives
    a pair of zeros ``z, 1 / z`` by ``z + 1 / z = 2 - 4 y``, of which the one inside the unit
    circle is taken, besides N zeros at -1 (the filter of minimal phase).

    >>> [round(float(v), 4) for v in scaling_filter("db2")]
    [0.483, 0.8365, 0.2241, -0.1294]

    Args:
      name: one of :data:`NAMES`.

    Raises:
      ValueError: the name is none of them.
    """
    _checks.one_of(NAMES, name=name)
    moments = 1 if name == "haar" else int(name[2:])
    binomials = [math.comb(moments - 1 + k, k) for k in range(moments)]
    half = 1 - 2 * np.roots(binomials[::-1])  # (z + 1 / z) / 2
    root = np.sqrt(half**2 - 1 + 0j)
    zeros = np.where(np.abs(half - root) < 1, half - root, half + root)
    taps = np.real(np.poly(np.concatenate([zeros, -np.ones(moments)])))
    taps = taps * (math.sqrt(2) / taps.sum())
    taps.flags.writeable = False
    return taps


def _filters(name: str) -> tuple[np.ndarray, np.ndarray]:
    low = scaling_filter(name)
    return low, low[::-1] * (-1.0) ** np.arange(len(low))


def _split(x: Array, axis: int, name: str) -> Array:
    """One level along one axis: averages, the odd last entry, details."""
    pairs, last = _pairs(x, axis)
    if pairs == 0:
        return x
    even, odd = (lax.slice_in_dim(x, s, 2 * pairs, stride=2, axis=axis) for s in (0, 1))
    bands = [
        sum(
            float(taps[2 * j]) * jnp.roll(even, -j, axis)
            + float(taps[2 * j + 1]) * jnp.roll(odd, -j, axis)
            for j in range(len(taps) // 2)
        )
        for taps in _filters(name)
    ]
    return jnp.concatenate([bands[0], *last, bands[1]], axis=axis)


def _merge(x: Array, axis: int, name: str) -> Array:
    """The inverse and adjoint of :func:`_split`."""
    size = x.shape[axis]
    pairs = size // 2
    if pairs == 0:
        return x
    bands = [lax.slice_in_dim(x, s, s + pairs, axis=axis) for s in (0, size - pairs)]
    last = [lax.slice_in_dim(x, pairs, size - pairs, axis=axis)]
    even, odd = (
        sum(
            float(taps[2 * j + parity]) * jnp.roll(band, j, axis)
            for band, taps in zip(bands, _filters(name), strict=True)
            for j in range(len(taps) // 2)
        )
        for parity in (0, 1)
    )
    woven = jnp.stack([jnp.asarray(even), jnp.asarray(odd)], axis=axis + 1)
    shape = (*x.shape[:axis], 2 * pairs, *x.shape[axis + 1 :])
    return jnp.concatenate([woven.reshape(shape), *last], axis=axis)


def _pairs(x: Array, axis: int) -> tuple[int, list[Array]]:
    size = x.shape[axis]
    pairs = size // 2
    return pairs, [lax.slice_in_dim(x, 2 * pairs, size, axis=axis)]


def _corner(x: Array, sides: dict[int, int]) -> Array:
    for axis, side in sides.items():
        x = lax.slice_in_dim(x, 0, side, axis=axis)
    return x


def _put(x: Array, corner: Array) -> Array:
    return lax.dynamic_update_slice(x, corner, (0,) * x.ndim)
