"""How many examples end up alone in a bin, before any attack is run."""

from __future__ import annotations

import numpy as np

from jgia import _checks


def expected_singletons(bin_masses: np.ndarray, num_examples: int) -> float:
    """Expected number of examples alone in their bin, ``n sum_j p_j (1 - p_j)^(n-1)``.

    Args:
      bin_masses: (K,) probabilities p_j of the bins; may sum to less than 1, the rest being
        examples that fall below the first threshold and are never seen.
      num_examples: n, drawn independently.

    Returns:
      A number in [0, n].

    Raises:
      ValueError: a mass outside [0, 1], or masses that sum to more than 1.

    >>> round(expected_singletons(np.full(1024, 1 / 1024), 32), 2)
    31.05
    """
    _checks.at_least(1, num_examples=num_examples)
    p = np.asarray(bin_masses, np.float64)
    if p.ndim != 1 or not np.all(p >= 0) or p.sum() > 1 + 1e-9:
        raise ValueError(
            "bin_masses must be one-dimensional probabilities with sum at most 1, "
            f"got shape {p.shape}, minimum {p.min()}, sum {p.sum()}."
        )
    return float(num_examples * np.sum(p * (1 - p) ** (num_examples - 1)))


def singleton_standard_deviation(bin_masses: np.ndarray, num_examples: int) -> float:
    """Standard deviation of the number of examples alone in their bin.

    From ``E[U (U - 1)] = n (n - 1) sum_{j != k} p_j p_k (1 - p_j - p_k)^(n - 2)``.
    """
    _checks.at_least(1, num_examples=num_examples)
    n = num_examples
    p = np.asarray(bin_masses, np.float64)
    mean = expected_singletons(p, n)
    if n < 2:
        return float(np.sqrt(max(mean * (1 - mean), 0.0)))
    values, counts = np.unique(p, return_counts=True)
    remaining = np.clip(1 - values[:, None] - values[None, :], 0, None)
    pairs = counts[:, None] * counts[None, :] - np.diag(counts)
    pairs = pairs * values[:, None] * values[None, :] * remaining ** (n - 2)
    second = n * (n - 1) * pairs.sum()
    return float(np.sqrt(max(second + mean - mean**2, 0.0)))


def rtf_bound(num_bins: int, num_examples: int) -> float:
    """The "RtF bound": expected singletons if every occupancy vector were equally likely.

    Bose-Einstein statistics, ``n k (k - 1) / ((n + k - 1)(n + k - 2))``, as in Fowl et al.,
    "Robbing the Fed" (ICLR 2022, arXiv 2110.13057). It under-states the expectation for
    independent examples (:func:`expected_singletons`) and is given for comparison only.

    >>> round(rtf_bound(128, 64), 1)
    28.7
    """
    _checks.at_least(1, num_examples=num_examples, num_bins=num_bins)
    n, k = num_examples, num_bins
    if n + k < 3:
        return float(n)
    return n * k * (k - 1) / ((n + k - 1) * (n + k - 2))
