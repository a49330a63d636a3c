"""Proportions of recovered images, with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from jgia import _checks

SUCCESS_THRESHOLDS_DB = (18, 25, 30, 40)
"""PSNR thresholds in dB at which success rates are reported.

18 dB is the rule of Scale-MIA (Shi et al., NDSS 2025): the sample is recognizable. The others are
this library's grid up to 40 dB, an RMS error of 2.55 of 255 levels.
"""


class Rate(NamedTuple):
    """A proportion and its confidence interval.

    Attributes:
      rate: ``successes / total``.
      low: lower end of the interval, in [0, rate].
      high: upper end, in [rate, 1].
      successes: true images at or above the threshold.
      total: all true images, matched or not.
    """

    rate: float
    low: float
    high: float
    successes: int
    total: int


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion.

    With ``p = successes / total`` and ``z`` the normal quantile of ``(1 + confidence) / 2``, the
    two roots of ``(p - q)^2 = z^2 q (1 - q) / total`` in ``q``.

    Args:
      successes: in 0..total.
      total: number of trials, at least 1.
      confidence: nominal coverage, strictly between 0 and 1.

    Returns:
      ``(low, high)`` with ``0 <= low <= p <= high <= 1``; never of zero width, unlike the textbook
      interval at 0 or all successes.

    Raises:
      ValueError: counts or confidence out of range.

    References:
      Wilson: "Probable inference, the law of succession, and statistical inference", JASA 22,
      1927. Brown, Cai, DasGupta: "Interval estimation for a binomial proportion", Statistical
      Science 16(2), 2001.

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    _checks.at_least(1, total=total)
    _checks.fraction(confidence=confidence)
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..{total}, got {successes}.")
    z = float(ndtri((1 + confidence) / 2))
    share, squared = successes / total, z * z / total
    center = (share + squared / 2) / (1 + squared)
    half = z * np.sqrt(share * (1 - share) / total + squared / (4 * total)) / (1 + squared)
    low = 0.0 if successes == 0 else min(float(center - half), share)  # exact at the ends
    high = 1.0 if successes == total else max(float(center + half), share)
    return low, high


def success_rate(
    psnr_per_truth: Sequence[float | None] | np.ndarray,
    threshold: float,
    *,
    confidence: float = 0.95,
) -> Rate:
    """Share of *all* true images whose reconstruction reaches ``threshold`` dB.

    Args:
      psnr_per_truth: (N,) decibels, one per true image, N >= 1. ``None`` or NaN (no usable
        reconstruction) is a failure and stays in the denominator; ``inf`` is a success.
      threshold: decibels; a value equal to it succeeds.
      confidence: nominal coverage of the interval.

    Returns:
      The rate with its Wilson interval. The interval is for images drawn from where these were.

    Raises:
      ValueError: no images, or a threshold that is NaN.

    >>> success_rate([50.0, 12.0, None, 18.0], 18.0)[:1]
    (0.5,)
    """
    values = np.asarray(psnr_per_truth, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"psnr_per_truth must have one value per true image, at least one; "
            f"got shape {values.shape}."
        )
    if np.isnan(threshold):
        raise ValueError("threshold must be a number of decibels, got NaN.")
    successes, total = int(np.count_nonzero(values >= threshold)), values.size
    low, high = wilson_interval(successes, total, confidence=confidence)
    return Rate(successes / total, low, high, successes, total)
