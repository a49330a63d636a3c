"""Which candidates are one image: the tests of a single sample, and duplicates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jgia.attacks.ares.candidates import Candidates, single_example
from jgia.attacks.ares.predict import LARGEST_MISPREDICTION
from jgia.config import AresOptions
from jgia.observation import Status
from jgia.sparse.least_squares import CONVERGED, NONFINITE

_PIXEL_SLACK = 0.02  # a recovered pixel may leave [0, 1] by this much before it is a mixture
_DUPLICATE_RMSE = 1e-3  # in pixel units
# Mixtures of images leave relative residuals from about 0.02 up (benchmarks/ares_cnn.py), so
# noise can excuse no more than that.
_LARGEST_SINGLE_RESIDUAL = 0.015


class Inversion(NamedTuple):
    """What the solvers say about every candidate, on the host.

    Attributes:
      images: (J, H, W, C) pixels, not clipped.
      residual: (J,) relative residual on the active equations.
      determined: (J,) fraction of pixels that the active equations determine.
      equations_per_unknown: (J,) active equations over unknown pixels.
      range_excess: (J,) how far surely determined pixels leave [0, 1].
      iterations: (J,) solver iterations.
      status: (J,) solver status code.
    """

    images: np.ndarray
    residual: np.ndarray
    determined: np.ndarray
    equations_per_unknown: np.ndarray
    range_excess: np.ndarray
    iterations: np.ndarray
    status: np.ndarray


def judge(
    candidates: Candidates,
    inversion: Inversion,
    options: AresOptions,
    *,
    mispredicted: np.ndarray | None = None,
) -> list[Status]:
    """The single-sample tests, one verdict per candidate.

    Args:
      candidates: what was read.
      inversion: what it was solved to.
      options: see :class:`~jgia.config.AresOptions`.
      mispredicted: (J,) from :func:`~jgia.attacks.ares.predict.misprediction`; zeros if left out.
    """
    if mispredicted is None:
        mispredicted = np.zeros(len(candidates))
    activations = candidates.activations
    flat = activations.reshape(len(activations), int(np.prod(activations.shape[1:])))
    scale = np.sqrt(np.mean(flat**2, axis=1)) if len(candidates) else np.zeros(0)
    single = single_example(candidates)
    statuses = []
    for i in range(len(candidates)):
        relative_noise = candidates.noise[i] / max(scale[i], 1e-300)
        noise_limit = min(4 * relative_noise, _LARGEST_SINGLE_RESIDUAL)
        limit = max(options.mixture_residual, noise_limit)
        # An image that is determined has no error of the sparse prior to excuse.
        exact = inversion.determined[i] == 1
        prediction_limit = limit if exact else LARGEST_MISPREDICTION
        if (
            inversion.status[i] == NONFINITE
            or not np.all(np.isfinite(flat[i]))
            or not np.all(np.isfinite(inversion.images[i]))
        ):
            statuses.append(Status.NONFINITE)
        elif (
            not single[i]
            or mispredicted[i] > prediction_limit
            or inversion.residual[i] > limit
            or inversion.range_excess[i]
            > _PIXEL_SLACK + 10 * candidates.noise[i] + 3 * candidates.scale_error[i]
        ):
            statuses.append(Status.MIXTURE)
        elif inversion.equations_per_unknown[i] < 1 and inversion.determined[i] < 1:
            statuses.append(Status.REGULARIZED)
        elif inversion.determined[i] < 1:
            statuses.append(Status.RANK_DEFICIENT)
        elif inversion.status[i] != CONVERGED:
            statuses.append(Status.NOT_CONVERGED)
        elif inversion.residual[i] > options.mixture_residual:
            statuses.append(Status.NOISY)
        else:
            statuses.append(Status.EXACT)
    return statuses


def mark_duplicates(statuses: list[Status], images: np.ndarray, residual: np.ndarray) -> None:
    """Keep the candidate with the smallest residual of every set of equal images, in place."""
    accepted = sorted(
        (i for i, status in enumerate(statuses) if status.accepted), key=lambda i: residual[i]
    )
    kept: list[int] = []
    for i in accepted:
        others = images[kept].reshape(len(kept), images[i].size)
        distance = np.sqrt(np.mean((others - images[i].ravel()) ** 2, axis=1))
        if np.any(distance < _DUPLICATE_RMSE):
            statuses[i] = Status.DUPLICATE
        else:
            kept.append(i)
