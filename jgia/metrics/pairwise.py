"""Errors of every reconstruction against every true image, on the host in float64."""

from __future__ import annotations

import numpy as np
from jax import Array
from jaxtyping import Float

_BLOCK_BYTES = 32 * 2**20
_RELATIVE_FLOOR = 1e-4
"""Errors below this share of the mean squared pixels are recomputed by subtraction."""


def pairwise_mse(
    a: Float[Array | np.ndarray, "j ..."], b: Float[Array | np.ndarray, "n ..."]
) -> Float[np.ndarray, "j n"]:
    """Mean squared error of every pair: ``out[j, n] = mean (a[j] - b[n])**2``.

    Computed by matrix products, ``|a|^2 + |b|^2 - 2 <a, b>``, over blocks of pixels; where that
    would cancel (close pairs), the images are subtracted instead.

    Args:
      a: (J, ...) floating point images.
      b: (N, ...) floating point images of the same shape each.

    Returns:
      (J, N) float64. Exactly 0 for identical images, relative error below 1e-9 otherwise; a row
      or column is NaN if its image is not finite, and no other value is touched by that.

    Raises:
      ValueError: different image shapes, no pixels, or not floating point.

    Guarantees: no (J, N, H, W, C) array is made; beyond the inputs and arrays of size (J, N),
    memory stays near 64 MiB (or a few images in float64 if that is more).

    >>> import numpy as np
    >>> pairwise_mse(np.zeros((1, 2, 2, 1)), np.stack([np.zeros((2, 2, 1)), np.ones((2, 2, 1))]))
    array([[0., 1.]])
    """
    left, right = _flat("a", a), _flat("b", b)
    if np.shape(a)[1:] != np.shape(b)[1:]:
        raise ValueError(
            f"a and b must hold images of one shape, got {np.shape(a)[1:]} and {np.shape(b)[1:]}."
        )
    num_left, num_pixels = left.shape
    num_right = len(right)
    left_finite, right_finite = _finite_rows(left), _finite_rows(right)
    inner = np.zeros((num_left, num_right))
    left_power, right_power = np.zeros(num_left), np.zeros(num_right)
    width = max(1, _BLOCK_BYTES // (8 * max(1, num_left + num_right)))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, num_pixels, width):
            columns = slice(start, start + width)
            x = np.where(left_finite[:, None], left[:, columns], 0).astype(np.float64)
            y = np.where(right_finite[:, None], right[:, columns], 0).astype(np.float64)
            inner += x @ y.T
            left_power += np.einsum("jp,jp->j", x, x)
            right_power += np.einsum("np,np->n", y, y)
        power = left_power[:, None] + right_power[None, :]
        out = (power - 2 * inner) / num_pixels
        usable = left_finite[:, None] & right_finite[None, :]
        close = usable & ~(out > _RELATIVE_FLOOR * power / num_pixels)  # NaN of overflow included
        for j, n in np.argwhere(close):
            difference = left[j].astype(np.float64) - right[n].astype(np.float64)
            out[j, n] = np.mean(np.square(difference))
    out[~usable] = np.nan
    return out


def _flat(name: str, images: Array | np.ndarray) -> np.ndarray:
    array = np.asarray(images)
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(
            f"{name} must be a stack of images with at least one pixel each, "
            f"got shape {array.shape}."
        )
    if array.dtype.kind in "biuc":
        raise ValueError(
            f"{name} must be floating point, got {array.dtype}; divide 8-bit pixels by 255."
        )
    return array.reshape(len(array), int(np.prod(array.shape[1:])))


def _finite_rows(rows: np.ndarray) -> np.ndarray:
    return np.fromiter((bool(np.isfinite(row).all()) for row in rows), bool, len(rows))
