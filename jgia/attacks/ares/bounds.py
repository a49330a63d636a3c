"""Error bounds of sparse recovery and of the read-out, each with what it assumes."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from jgia import _checks

_RIP_LIMIT = math.sqrt(2) - 1
_MAX_SUBSETS = 200_000


class RecoveryBound(NamedTuple):
    """Upper bounds on the error of a solution.

    Attributes:
      l2: bound on the Euclidean norm.
      l1: bound on the sum of absolute values.
    """

    l2: float
    l1: float


def rip_constants(delta: float) -> tuple[float, float]:
    """The constants (C0, C1) of basis pursuit under the restricted isometry property.

    ``C0 = 2 (1 - (1 - sqrt 2) delta) / (1 - (1 + sqrt 2) delta)`` and
    ``C1 = 4 sqrt(1 + delta) / (1 - (1 + sqrt 2) delta)``.

    Args:
      delta: restricted isometry constant of order 2s, in [0, sqrt 2 - 1).

    Raises:
      ValueError: delta is out of range: then this theorem says nothing.

    References:
      Candes, "The restricted isometry property and its implications for compressed sensing"
      (Comptes Rendus Mathematique 2008), theorems 1.2 and 1.3.

    >>> [round(c, 2) for c in rip_constants(0.2)]
    [4.19, 8.47]
    """
    if not 0 <= delta < _RIP_LIMIT:
        raise ValueError(
            f"delta must lie in [0, sqrt(2) - 1 = {_RIP_LIMIT:.4f}), got {delta!r}: the bound "
            "holds for no larger restricted isometry constant; take more measurements."
        )
    root = math.sqrt(2)
    divisor = 1 - (1 + root) * delta
    return 2 * (1 - (1 - root) * delta) / divisor, 4 * math.sqrt(1 + delta) / divisor


def basis_pursuit_bound(
    delta: float, num_nonzero: int, *, tail_l1: float = 0.0, noise_norm: float = 0.0
) -> float:
    r"""Bound on ``||alpha_hat - alpha||_2`` of basis pursuit denoising.

    For ``y = A alpha + e`` with ``||e|| <= eps`` and ``alpha_hat`` minimizing ``||alpha||_1``
    subject to ``||y - A alpha|| <= eps``:
    ``C0 ||alpha - alpha_s||_1 / sqrt(s) + C1 eps`` (:func:`rip_constants`).

    For masked recovery A holds the active rows alone and eps is the read-out noise on them, so
    there is no floor. For the linearized layer (eq. 7 of ARES) eps is the nonlinearity itself,
    ``sigma / mu`` of :func:`~jgia.attacks.ares.nonlinearity.lasso_constants`: 1 for ReLU at
    ``||x|| = 1``, which makes the bound larger than x.

    Args:
      delta: restricted isometry constant of A of order 2s, in [0, sqrt 2 - 1). A's scale is
        part of it: rows of variance ``1 / m``.
      num_nonzero: s >= 1.
      tail_l1: ``||alpha - alpha_s||_1``, all but the s largest entries.
      noise_norm: eps.

    Guarantees:
      Holds for every alpha and e, not on average. With an orthonormal basis the same bound holds
      for the image.

    References:
      Candes 2008, theorem 1.3.
    """
    _checks.at_least(1, num_nonzero=num_nonzero)
    _checks.non_negative(tail_l1=tail_l1, noise_norm=noise_norm)
    tail, noise = rip_constants(delta)
    return tail * tail_l1 / math.sqrt(num_nonzero) + noise * noise_norm


def restricted_isometry_constant(matrix: np.ndarray, order: int) -> float:
    """The smallest delta with ``|  ||A x||^2 - ||x||^2 | <= delta ||x||^2`` for order-sparse x.

    By listing all supports: for matrices small enough to check a bound on.

    Args:
      matrix: (m, n) A.
      order: support size in [1, n].

    Raises:
      ValueError: a bad shape or order, or more than 200 000 supports (the problem is NP-hard).

    >>> restricted_isometry_constant(np.eye(4), 2)
    0.0
    """
    a = np.asarray(matrix, np.float64)
    if a.ndim != 2 or not np.all(np.isfinite(a)):
        raise ValueError(f"matrix must be two-dimensional and finite, got shape {a.shape}.")
    size = a.shape[1]
    if not 1 <= order <= size:
        raise ValueError(f"order must lie between 1 and {size}, got {order!r}.")
    if (count := math.comb(size, order)) > _MAX_SUBSETS:
        raise ValueError(
            f"{count} supports of {order} among {size} are too many to list (at most "
            f"{_MAX_SUBSETS}); use a smaller matrix or order."
        )
    gram = a.T @ a
    supports = np.array(list(itertools.combinations(range(size), order)))
    blocks = gram[supports[:, :, None], supports[:, None, :]]
    eigenvalues = np.linalg.eigvalsh(blocks)
    return float(np.abs(eigenvalues - 1).max())


def lasso_lam(
    noise_std: float, num_measurements: int, size: int, *, failure: float = 0.05
) -> float:
    r"""An l1 weight that is large enough for :func:`lasso_bound` with high probability.

    ``lam = 2 sigma (sqrt(2 log n / m) + sqrt(2 log(2 / failure) / m))``, so that
    ``lam >= 2 ||A^T e / m||_inf`` with probability at least ``1 - failure``.

    Args:
      noise_std: sigma of independent Gaussian noise.
      num_measurements: m >= 1.
      size: n >= 1 unknowns.
      failure: in (0, 1).

    Guarantees:
      For columns of A of norm at most ``sqrt(m)``.

    References:
      Wainwright, *High-Dimensional Statistics* (2019), example 7.14.
    """
    _checks.non_negative(noise_std=noise_std)
    _checks.at_least(1, num_measurements=num_measurements, size=size)
    _checks.fraction(failure=failure)
    unions, margin = math.sqrt(2 * math.log(size)), math.sqrt(2 * math.log(2 / failure))
    return 2 * noise_std * (unions + margin) / math.sqrt(num_measurements)


def lasso_bound(lam: float, num_nonzero: int, restricted_eigenvalue: float) -> RecoveryBound:
    r"""Bounds on the error of the Lasso ``min ||y - A alpha||^2 / (2 m) + lam ||alpha||_1``.

    ``||alpha_hat - alpha||_2 <= 3 lam sqrt(s) / kappa`` and
    ``||alpha_hat - alpha||_1 <= 12 lam s / kappa``.

    Args:
      lam: l1 weight, at least ``2 ||A^T e / m||_inf`` for the noise e (:func:`lasso_lam`).
      num_nonzero: s >= 1 non-zero entries of alpha, which has no others.
      restricted_eigenvalue: kappa > 0 with ``||A d||^2 / m >= kappa ||d||^2`` for every d whose
        entries off the support sum (in absolute value) to at most 3 times those on it; the
        smallest eigenvalue of ``A^T A / m`` will do.

    Guarantees:
      Deterministic, given the conditions on lam and kappa.

    References:
      Bickel, Ritov and Tsybakov, "Simultaneous analysis of Lasso and Dantzig selector" (Annals of
      Statistics 2009, arXiv 0801.1095), theorem 7.2; with these constants Wainwright (2019),
      theorem 7.13.
    """
    _checks.positive(lam=lam, restricted_eigenvalue=restricted_eigenvalue)
    _checks.at_least(1, num_nonzero=num_nonzero)
    root = math.sqrt(num_nonzero)
    l2 = 3 * lam * root / restricted_eigenvalue
    return RecoveryBound(l2, 4 * root * l2)


def readout_noise_std(
    gradient_noise: float, activation: float, signal: float, *, differenced: bool = True
) -> float:
    """Standard deviation of an activation's entry read out of a noisy gradient.

    ``sqrt(2) s sqrt(1 + h^2) / |g_j - g_{j+1}|``, without the ``sqrt(2)`` for the last neuron,
    which is read without a difference: first-order propagation through the ratio of two sums,
    each with independent noise.

    Args:
      gradient_noise: s, standard deviation of the noise on every gradient entry. A uniform
        quantizer of step D counts as ``D / sqrt(12)``.
      activation: h, the entry's true value.
      signal: the bias gradients' difference, not zero.
      differenced: whether neighboring neurons were subtracted.

    Guarantees:
      First order: for noise well below the signal. Beyond that the ratio has heavy tails and no
      finite variance.
    """
    _checks.non_negative(gradient_noise=gradient_noise)
    if not math.isfinite(activation):
        raise ValueError(f"activation must be finite, got {activation!r}.")
    if not (math.isfinite(signal) and signal != 0):
        raise ValueError(
            f"signal must be finite and not zero, got {signal!r}: an empty bin holds no activation."
        )
    terms = math.sqrt(2) if differenced else 1.0
    return terms * gradient_noise * math.hypot(1, activation) / abs(signal)
