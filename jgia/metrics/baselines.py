"""What guesses that never saw the update would score: the floor under every attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float

from jgia.metrics._pixels import checked_pixels
from jgia.metrics.image import PSNR_CAP_DB
from jgia.metrics.matching import PSNR_CEILING_DB
from jgia.metrics.pairwise import pairwise_mse
from jgia.metrics.rates import SUCCESS_THRESHOLDS_DB, success_rate


def baseline_scores(
    truths: Float[Array | np.ndarray, "n h w c"],
    *,
    seed: int,
    pool: Float[Array | np.ndarray, "p h w c"] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score three guesses for each true image, none of which uses the client's update.

    - ``dataset_mean``: the mean image of the public pool, for every true image;
    - ``nearest_neighbor``: the pool image with the least error to that true image. It is chosen
      by the truth, and one pool image may serve many: the best that looking could do;
    - ``random``: an image of independent uniform pixels per true image.

    Args:
      truths: (N, H, W, C) pixels in [0, 1], N >= 1.
      seed: of the random images.
      pool: (P, H, W, C) public pixels in [0, 1], P >= 1, disjoint from the client's images; without
        it only ``random`` is returned.

    Returns:
      ``{name: {"median", "mean_capped", "success_rate": {"18": {"rate", "low", "high"}, ...}}}``
      over all true images, JSON-ready.

    Raises:
      ValueError: pixels outside [0, 1] or not finite, no image, or different image shapes.

    >>> import numpy as np
    >>> list(baseline_scores(np.zeros((1, 2, 2, 1)), seed=0, pool=np.ones((3, 2, 2, 1))))
    ['dataset_mean', 'nearest_neighbor', 'random']
    """
    true = checked_pixels("truths", truths, at_least=1)
    noise = np.random.default_rng(seed).random(true.shape, np.float32)
    errors = {"random": _mse(noise, true)}
    if pool is not None:
        public = checked_pixels("pool", pool, at_least=1)
        if public.shape[1:] != true.shape[1:]:
            raise ValueError(
                f"pool and truths must hold images of one shape, got {public.shape[1:]} and "
                f"{true.shape[1:]}."
            )
        mean = np.asarray(public.mean(axis=0, keepdims=True, dtype=np.float64))
        errors = {
            "dataset_mean": pairwise_mse(mean, true)[0],
            "nearest_neighbor": pairwise_mse(public, true).min(axis=0),
            **errors,
        }
    return {name: _summary(decibels(error)) for name, error in errors.items()}


def decibels(error: np.ndarray) -> np.ndarray:
    """PSNR of mean squared errors of pixels in [0, 1], at most 200 dB; NaN stays NaN."""
    floor = 10 ** (-PSNR_CEILING_DB / 10)
    return np.minimum(-10 * np.log10(np.maximum(error, floor)), PSNR_CEILING_DB)


def success_rates(psnr_per_truth: Sequence[float | None] | np.ndarray) -> dict[str, Any]:
    """``{"18": {"rate", "low", "high"}, ...}`` over all true images, at the standard thresholds."""
    rates = {}
    for threshold in SUCCESS_THRESHOLDS_DB:
        rate = success_rate(psnr_per_truth, float(threshold))
        rates[str(threshold)] = {"rate": rate.rate, "low": rate.low, "high": rate.high}
    return rates


def _mse(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    pairs = zip(images, reference, strict=True)
    return np.array([pairwise_mse(a[None], b[None])[0, 0] for a, b in pairs])


def _summary(psnr: np.ndarray) -> dict[str, Any]:
    return {
        "median": float(np.median(psnr)),
        "mean_capped": float(np.mean(np.minimum(psnr, PSNR_CAP_DB))),
        "success_rate": success_rates(psnr),
    }
