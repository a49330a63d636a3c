"""Per-image error, signal-to-noise ratio and structural similarity: pure, differentiable JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jgia import _checks

PSNR_CAP_DB = 60.0
"""Ceiling of a single image inside a *mean* of PSNRs, in dB.

An 8-bit image is its own original within ``10 log10(12 * 255**2) = 58.9`` dB (rounding error is
uniform, of variance ``1 / (12 * 255**2)``). Beyond that, decibels measure arithmetic, not leakage.
"""

Images = Float[Array | np.ndarray, "n h w c"]


def mse(images: Images, reference: Images) -> Float[Array, " n"]:
    """Mean squared error of each image: ``mean_hwc (images - reference)**2``.

    Args:
      images: (N, H, W, C) floating point.
      reference: the images to compare with, of the same shape; row i goes with row i.

    Returns:
      (N,) one value per image, in float32 or wider; exactly 0 for identical images. A NaN stays
      in its own image.

    Raises:
      ValueError: different shapes, not NHWC, no pixels, or not floating point.

    >>> import jax.numpy as jnp
    >>> mse(jnp.full((1, 2, 2, 1), 0.5), jnp.zeros((1, 2, 2, 1))).tolist()
    [0.25]
    """
    x, y = _pair(images, reference)
    return jnp.mean(jnp.square(x - y), axis=(1, 2, 3))


def psnr(images: Images, reference: Images, *, data_range: float = 1.0) -> Float[Array, " n"]:
    """Peak signal-to-noise ratio of each image: ``10 log10(data_range**2 / mse)`` in dB.

    Args:
      images: (N, H, W, C) floating point, in a range of width ``data_range``.
      reference: the images to compare with, of the same shape.
      data_range: largest minus smallest possible pixel value, positive.

    Returns:
      (N,) decibels. An exact image gets ``inf`` and a NaN image ``nan``; neither touches another
      image's value. Average them with :func:`capped_mean_psnr`, never with a plain mean.

    Raises:
      ValueError: as :func:`mse`, or ``data_range`` is not positive.

    Edge cases: the derivative is infinite at an exact image; minimize :func:`mse` instead.

    >>> import jax.numpy as jnp
    >>> psnr(jnp.full((1, 2, 2, 1), 0.1), jnp.zeros((1, 2, 2, 1))).round(3).tolist()
    [20.0]
    """
    _checks.positive(data_range=data_range)
    return _decibel(mse(images, reference), data_range)


def capped_mean_psnr(
    psnr: Float[Array | np.ndarray, " n"], cap: float = PSNR_CAP_DB
) -> Float[Array, ""]:
    """Mean of PSNRs after limiting each to ``cap``: ``mean_i min(psnr_i, cap)``.

    Without the cap a few exact hits hide every failure: 26 images at 133 dB and 6 at 10 dB
    average to 110 dB.

    Args:
      psnr: (N,) decibels, ``inf`` allowed; N >= 1.
      cap: positive ceiling in dB.

    Returns:
      The mean, at most ``cap``; NaN if any value is NaN.

    Raises:
      ValueError: no values, or a cap that is not positive.

    >>> import jax.numpy as jnp
    >>> float(capped_mean_psnr(jnp.array([jnp.inf, 20.0])))
    40.0
    """
    _checks.positive(cap=cap)
    values = _vector("psnr", psnr)
    return jnp.mean(jnp.minimum(values, jnp.asarray(cap, values.dtype)))


def psnr_of_mean_mse(
    mse: Float[Array | np.ndarray, " n"], *, data_range: float = 1.0
) -> Float[Array, ""]:
    """PSNR of the average error: ``10 log10(data_range**2 / mean_i mse_i)``.

    The worst images dominate it, as the best ones dominate a mean of PSNRs.

    Args:
      mse: (N,) mean squared error per image, N >= 1; *not* PSNRs.
      data_range: largest minus smallest possible pixel value, positive.

    Returns:
      Decibels; ``inf`` only if every image is exact.

    Raises:
      ValueError: no values, or ``data_range`` is not positive.

    >>> import jax.numpy as jnp
    >>> float(psnr_of_mean_mse(jnp.array([0.0, 0.02])).round(3))
    20.0
    """
    _checks.positive(data_range=data_range)
    return _decibel(jnp.mean(_vector("mse", mse)), data_range)


def ssim(
    images: Images,
    reference: Images,
    *,
    data_range: float = 1.0,
    window_size: int = 11,  # these four: Wang et al. 2004, section III.C
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Float[Array, " n"]:
    """Structural similarity of each image, with a Gaussian window.

    At every window that lies inside the image, with Gaussian-weighted means ``m``, population
    variances ``v`` and covariance ``v_xy``::

        SSIM = (2 m_x m_y + c1)(2 v_xy + c2) / ((m_x^2 + m_y^2 + c1)(v_x + v_y + c2))

    ``c1 = (k1 data_range)^2``, ``c2 = (k2 data_range)^2``; then the mean over windows and
    channels. The same number as scikit-image's ``structural_similarity(gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=1)``.

    Args:
      images: (N, H, W, C) floating point, in a range of width ``data_range``; H, W >=
        ``window_size``.
      reference: the images to compare with, of the same shape.
      data_range: largest minus smallest possible pixel value, positive.
      window_size: odd side of the window, in pixels.
      sigma: standard deviation of the window, in pixels.
      k1: positive stabilizer of the means.
      k2: positive stabilizer of the variances.

    Returns:
      (N,) values in [-1, 1] up to rounding, 1 for identical images; a NaN stays in its own image.

    Raises:
      ValueError: as :func:`mse`; images smaller than the window; an even window; or a constant
        that is not positive.

    Guarantees: images are centered before second moments are taken, and differences are formed
    before squares, so that bright flat images do not cancel in float32; exactly 1 for identical
    images; smooth everywhere.

    References:
      Wang, Bovik, Sheikh, Simoncelli: "Image quality assessment: from error visibility to
      structural similarity", IEEE TIP 13(4), 2004, eqs. 13-17.

    >>> import jax.numpy as jnp
    >>> flat = jnp.full((1, 11, 11, 3), 0.5)
    >>> ssim(flat, flat).tolist()
    [1.0]
    """
    _checks.positive(data_range=data_range, sigma=sigma, k1=k1, k2=k2)
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size must be odd and positive, got {window_size}.")
    x, y = _pair(images, reference)
    if min(x.shape[1:3]) < window_size:
        raise ValueError(
            f"ssim needs images of at least {window_size} x {window_size} pixels, got "
            f"{x.shape[1]} x {x.shape[2]}; report psnr for images this small, or choose a smaller "
            "odd window_size (its values do not compare with published ones)."
        )
    weights = tuple(float(w) for w in _gaussian(window_size, sigma))
    return _ssim(x, y, weights, (k1 * data_range) ** 2, (k2 * data_range) ** 2)


@functools.partial(jax.jit, static_argnames=("weights", "c1", "c2"))
def _ssim(x: Array, y: Array, weights: tuple[float, ...], c1: float, c2: float) -> Array:
    center_x, center_y = (
        lax.stop_gradient(jnp.mean(image, axis=(1, 2), keepdims=True)) for image in (x, y)
    )
    u, v = x - center_x, y - center_y  # variances do not see a shift; rounding does
    moments = _blur(jnp.stack([u, v, u * u + v * v, jnp.square(u - v)]), weights)
    mean_u, mean_v = moments[0], moments[1]
    variances = moments[2] - mean_u * mean_u - mean_v * mean_v
    variance_of_difference = moments[3] - jnp.square(mean_u - mean_v)
    mean_x, mean_y = mean_u + center_x, mean_v + center_y
    # Wang et al. 2004, eq. 13, with 2ab = a^2 + b^2 - (a - b)^2 in both factors: 1 minus each.
    luminance = jnp.square(mean_x - mean_y) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = variance_of_difference / (variances + c2)
    deficit = luminance + structure - luminance * structure
    return 1 - jnp.mean(deficit, axis=(1, 2, 3))  # eq. 17


def _blur(x: Array, weights: tuple[float, ...]) -> Array:
    """Weighted windows over H and W of (..., H, W, C), only those inside the image.

    A sum of shifts rather than a convolution: elementwise, so a GPU does not round to TF32.
    """
    for axis in (-3, -2):
        size = x.shape[axis] - len(weights) + 1
        x = functools.reduce(
            jnp.add,
            [w * lax.slice_in_dim(x, k, k + size, axis=axis) for k, w in enumerate(weights)],
        )
    return x


def _gaussian(size: int, sigma: float) -> np.ndarray:
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _decibel(error: Array, data_range: float) -> Array:
    return 20 * np.log10(data_range).item() - 10 * jnp.log10(error)


def _pair(images: Images, reference: Images) -> tuple[Array, Array]:
    """Both batches in one dtype of at least 32 bits, once their shapes are known to agree."""
    x, y = jnp.asarray(images), jnp.asarray(reference)
    if x.shape != y.shape:
        raise ValueError(
            f"images and reference must have the same shape, got {x.shape} and {y.shape}; "
            "pair a different number of reconstructions with match() first."
        )
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"images must have shape (N, H, W, C) with at least one pixel, got {x.shape}; "
            "add a leading axis for a single image."
        )
    for name, value in (("images", x), ("reference", y)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point, got {value.dtype}; divide 8-bit pixels by 255."
            )
    wide = jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32
    return x.astype(wide), y.astype(wide)


def _vector(name: str, values: Array | np.ndarray) -> Array:
    vector = jnp.asarray(values)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(
            f"{name} must be a vector with one value per image, at least one; "
            f"got shape {vector.shape}."
        )
    return vector
