"""Which reconstruction shows which true image: a rectangular assignment, for scoring only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from jgia import _checks
from jgia.metrics.pairwise import pairwise_mse

PSNR_CEILING_DB = 200.0
"""PSNR in dB that stands for a zero error, whose true value is infinite.

An RMS error of 1e-10: float32 images that differ at all stay well below it.
"""

_LARGEST = 1e200  # above any error of finite images that matters; keeps sums of costs finite


class Matching(NamedTuple):
    """One-to-one pairs of true images and reconstructions.

    Attributes:
      truth_to_reconstruction: (N,) index of the reconstruction of each true image, -1 where there
        is none. No index appears twice.
      cost: (N,) mean squared error of each pair, NaN where there is none.
    """

    truth_to_reconstruction: np.ndarray
    cost: np.ndarray


def match(
    reconstructions: Float[Array | np.ndarray, "j h w c"],
    truths: Float[Array | np.ndarray, "n h w c"],
    *,
    metric: Literal["mse", "psnr"] = "mse",
) -> Matching:
    """Pair J reconstructions with N true images so that the total cost is least.

    ``min sum_i cost(reconstruction_{s(i)}, truth_i)`` over one-to-one maps ``s`` of
    ``min(J, N)`` pairs. This uses the truth: it belongs to scoring, never to an attack.

    Args:
      reconstructions: (J, H, W, C) floating point; J may be 0, less than N, or more.
      truths: (N, H, W, C) floating point and finite, N >= 1.
      metric: the cost of a pair. ``"mse"`` is the error itself. ``"psnr"`` is its logarithm
        (minus the PSNR, at most 200 dB), so that an exact hit outweighs any rearrangement of poor
        pairs; a sum of errors can trade the exact hit away to improve a hopeless pair.

    Returns:
      The pairs. A reconstruction that is not finite is left out, whatever the others are, and so
      a true image is unmatched where finite reconstructions are too few. Both costs decrease as
      the error does: an exact hit is the best match.

    Raises:
      ValueError: different image shapes, no true image, true images that are not finite, or an
        unknown metric.

    >>> import numpy as np
    >>> truths = np.stack([np.zeros((2, 2, 1)), np.ones((2, 2, 1))])
    >>> match(truths[1:], truths).truth_to_reconstruction
    array([-1,  0])
    """
    _checks.one_of(("mse", "psnr"), metric=metric)
    num_truths = len(truths)
    if num_truths == 0:
        raise ValueError("truths must hold at least one image: there is nothing to match.")
    if not np.isfinite(np.asarray(truths)).all():
        raise ValueError("truths must be finite; check how the client's images were loaded.")
    errors = pairwise_mse(reconstructions, truths)
    finite = np.flatnonzero(~np.isnan(errors).any(axis=1))
    costs = np.minimum(errors[finite], _LARGEST)
    if metric == "psnr":
        costs = 10 * np.log10(np.maximum(costs, 10 ** (-PSNR_CEILING_DB / 10)))
    rows, columns = linear_sum_assignment(costs)
    indices = np.full(num_truths, -1)
    indices[columns] = finite[rows]
    matched = np.full(num_truths, np.nan)
    matched[columns] = errors[finite[rows], columns]
    return Matching(indices, matched)
