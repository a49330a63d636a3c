"""Where the thresholds of the imprint go: a distribution fitted to public images."""

from __future__ import annotations

import numpy as np
from scipy import special

from jgia.models import Victim

MIN_CALIBRATION = 16


def fit_thresholds(features: np.ndarray, num_bins: int, *, widening: float = 1.15) -> np.ndarray:
    """Thresholds at the quantiles ``(j + 1/2) / K`` of a fitted distribution, increasing.

    A log-normal where all features are positive (rectified front ends), else a normal; the
    fitted standard deviation is multiplied by ``widening``. The first threshold is lowered to
    the smallest feature seen if that lies below it, so that calibration images are never lost.

    Args:
      features: (N,) query features of public images.
      num_bins: K >= 2.
      widening: factor on the standard deviation.

    Raises:
      ValueError: all features are equal, so that no threshold separates anything.

    >>> t = fit_thresholds(np.exp(np.random.default_rng(0).normal(size=200)), 8)
    >>> bool(np.all(np.diff(t) > 0))
    True
    """
    features = np.asarray(features, np.float64)
    logarithmic = bool(np.all(features > 0))
    values = np.log(features) if logarithmic else features
    spread = values.std()
    if not spread > 1e-9 * max(1.0, float(np.abs(values).max())):
        raise ValueError(
            "the public calibration images all give the same query feature, so no threshold can "
            "separate them; use varied images (one-colour or identical images do not calibrate)."
        )
    levels = (np.arange(num_bins) + 0.5) / num_bins
    thresholds = values.mean() + spread * widening * special.ndtri(levels)
    if logarithmic:
        thresholds = np.exp(thresholds)
    lowest = features.min()
    if lowest <= thresholds[0]:
        thresholds[0] = lowest - 1e-3 * abs(lowest) - 1e-9
    return thresholds


def smoothed_bin_masses(features: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Bin probabilities from a kernel density estimate of the calibration features.

    Raw counts of a few hundred features over a thousand bins would pretend that most bins are
    empty. Gaussian kernels with Silverman's bandwidth; mass below the first threshold is lost.
    """
    features = np.asarray(features, np.float64)
    logarithmic = bool(np.all(features > 0) and np.all(thresholds > 0))
    values = np.log(features) if logarithmic else features
    edges = np.log(thresholds) if logarithmic else thresholds
    quartiles = np.subtract(*np.percentile(values, [75, 25])) / 1.349
    scale = min(values.std(), quartiles) if quartiles > 0 else values.std()
    bandwidth = 0.9 * scale * len(values) ** -0.2  # Silverman 1986, eq. 3.31
    cdf = special.ndtr((edges[:, None] - values[None, :]) / bandwidth).mean(axis=1)
    return np.clip(np.diff(np.append(cdf, 1.0)), 0.0, 1.0)


def check_calibration(calibration: np.ndarray, victim: Victim) -> np.ndarray:
    """The public images as an array, once shape, number and range fit; else ``ValueError``."""
    images = np.asarray(calibration)
    if images.ndim != 4 or images.shape[1:] != victim.input_shape:
        raise ValueError(
            f"calibration images must have shape (N, {', '.join(map(str, victim.input_shape))}), "
            f"got {images.shape}."
        )
    if len(images) < MIN_CALIBRATION:
        raise ValueError(
            f"thresholds need at least {MIN_CALIBRATION} public calibration images, "
            f"got {len(images)}."
        )
    if not np.issubdtype(images.dtype, np.floating) or not np.all((images >= 0) & (images <= 1)):
        raise ValueError("calibration images must be finite floats in [0, 1].")
    return images
