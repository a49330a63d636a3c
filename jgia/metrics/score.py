"""Everything the report says about a set of reconstructions, in one JSON-ready mapping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jgia.metrics._pixels import checked_pixels
from jgia.metrics.baselines import baseline_scores, decibels, success_rates
from jgia.metrics.image import PSNR_CAP_DB, ssim
from jgia.metrics.lpips import SMALLEST_SIDE, load_evaluator
from jgia.metrics.lpips import lpips as lpips_distance
from jgia.metrics.matching import Matching, match

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of PSNR that are reported."""

_SSIM_SIDE = 11  # window of Wang et al. 2004
_BATCH = 16


def score(
    reconstructions: Float[Array | np.ndarray, "j h w c"],
    truths: Float[Array | np.ndarray, "n h w c"],
    *,
    pool: Float[Array | np.ndarray, "p h w c"] | None = None,
    seed: int = 0,
    num_recovered_threshold_db: float = 18.0,
    lpips: bool = False,
) -> dict[str, Any]:
    """Compare J reconstructions with N true images: the ``scores`` block of the result.

    Each true image is paired with at most one reconstruction (:func:`jgia.metrics.match` with
    ``metric="psnr"``); lists run over the true images in the order given, with ``None`` where no
    reconstruction was left.

    - Over *matched* images: ``mse`` and, in ``psnr``, ``median``, ``mean_capped`` (each image
      limited to 60 dB), ``of_mean_mse`` and ``quantiles``; in ``ssim``, ``median``. ``None`` if
      nothing was matched. Missing images are never replaced by blank ones.
    - Over *all* true images: ``psnr["median_all"]`` counts an unmatched one as 0 dB, which no
      image with pixels in [0, 1] falls short of; ``success_rate`` and ``num_recovered`` count it
      as a failure.

    PSNR has a ceiling of 200 dB, which stands for a zero error, so that every number is finite.

    Args:
      reconstructions: (J, H, W, C) pixels in [0, 1]; J may be 0. An image with a NaN is counted in
        ``num_reconstructed`` and never matched.
      truths: (N, H, W, C) pixels in [0, 1], N >= 1.
      pool: (P, H, W, C) public pixels in [0, 1] for the baselines ``dataset_mean`` and
        ``nearest_neighbor``, which are left out without it.
      seed: of the ``random`` baseline.
      num_recovered_threshold_db: PSNR from which a matched image counts in ``num_recovered``.
      lpips: also compute LPIPS (needs the ``lpips`` extra).

    Returns:
      ``num_true, num_reconstructed, num_recovered, recovered_threshold_db, mse, psnr{per_image,
      median, mean_capped, of_mean_mse, median_all, quantiles{"5", "25", "50", "75", "95"}},
      ssim{per_image, median}, success_rate{"18", "25", "30", "40": {rate, low, high}},
      baselines{name: {median, mean_capped, success_rate}}, matching``, and with ``lpips`` also
      ``lpips{per_image, median}``. Where the images are too small for SSIM (11 pixels) or LPIPS
      (31), its values are ``None`` and a ``note`` says so.

    Raises:
      ImportError: ``lpips`` without the extra.
      ValueError: no true image, different image shapes, pixels outside [0, 1] (clip first), true
        or pool images that are not finite, or a threshold that is not finite.

    >>> import numpy as np
    >>> truths = np.stack([np.zeros((4, 4, 1)), np.ones((4, 4, 1))])
    >>> result = score(truths[1:], truths)
    >>> result["matching"], result["psnr"]["per_image"], result["success_rate"]["18"]["rate"]
    ([None, 0], [None, 200.0], 0.5)
    """
    true = checked_pixels("truths", truths, at_least=1)
    guesses = checked_pixels("reconstructions", reconstructions, at_least=0, allow_nan=True)
    if guesses.shape[1:] != true.shape[1:]:
        raise ValueError(
            f"reconstructions and truths must hold images of one shape, got {guesses.shape[1:]} "
            f"and {true.shape[1:]}."
        )
    if not np.isfinite(num_recovered_threshold_db):
        raise ValueError(
            f"num_recovered_threshold_db must be finite, got {num_recovered_threshold_db}."
        )
    if lpips:
        load_evaluator()  # a missing extra should not cost a run
    baselines = baseline_scores(true, seed=seed, pool=pool)
    matching = match(guesses, true, metric="psnr")
    psnr = decibels(matching.cost)  # NaN where unmatched
    matched = matching.truth_to_reconstruction >= 0
    result = {
        "num_true": len(true),
        "num_reconstructed": len(guesses),
        "num_recovered": int(np.count_nonzero(psnr >= num_recovered_threshold_db)),
        "recovered_threshold_db": float(num_recovered_threshold_db),
        "mse": float(np.mean(matching.cost[matched])) if matched.any() else None,
        "psnr": _psnr_block(psnr, matching.cost, matched),
        "ssim": _paired(_ssim, guesses, true, matching, "SSIM", _SSIM_SIDE),
        "success_rate": success_rates(psnr),
        "baselines": baselines,
        "matching": [int(j) if j >= 0 else None for j in matching.truth_to_reconstruction],
    }
    if lpips:
        side = SMALLEST_SIDE["alexnet"]
        result["lpips"] = _paired(lpips_distance, guesses, true, matching, "LPIPS", side)
    return result


def _psnr_block(psnr: np.ndarray, error: np.ndarray, matched: np.ndarray) -> dict[str, Any]:
    block: dict[str, Any] = {"per_image": _per_image(psnr)}
    block |= {"median": None, "mean_capped": None, "of_mean_mse": None}
    block["median_all"] = float(np.median(np.where(matched, psnr, 0.0)))
    block["quantiles"] = {str(level): None for level in QUANTILES}
    if matched.any():
        values = psnr[matched]
        block["median"] = float(np.median(values))
        block["mean_capped"] = float(np.mean(np.minimum(values, PSNR_CAP_DB)))
        block["of_mean_mse"] = decibels(error[matched].mean(keepdims=True)).item()
        levels = np.percentile(values, QUANTILES)
        block["quantiles"] = {str(q): float(v) for q, v in zip(QUANTILES, levels, strict=True)}
    return block


def _paired(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray],
    guesses: np.ndarray,
    true: np.ndarray,
    matching: Matching,
    name: str,
    smallest: int,
) -> dict[str, Any]:
    """A metric of the matched pairs, in the order of the true images, with its median."""
    height, width = true.shape[1:3]
    if min(height, width) < smallest:
        note = f"{name} needs {smallest} x {smallest} pixels; the images are {height} x {width}."
        return {"per_image": [None] * len(true), "median": None, "note": note}
    values = np.full(len(true), np.nan)
    matched = np.flatnonzero(matching.truth_to_reconstruction >= 0)
    if matched.size:
        pairs = guesses[matching.truth_to_reconstruction[matched]]
        values[matched] = metric(pairs, true[matched])
    median = float(np.median(values[matched])) if matched.size else None
    return {"per_image": _per_image(values), "median": median}


def _ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """SSIM in float32, in blocks of one size so that memory is bounded and XLA compiles once."""
    blocks = []
    for start in range(0, len(images), _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), len(images) - 1)
        x, y = (jnp.asarray(batch[rows], jnp.float32) for batch in (images, reference))
        blocks.append(np.asarray(ssim(x, y)))
    return np.concatenate(blocks)[: len(images)]


def _per_image(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
