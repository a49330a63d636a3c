"""How many examples end up alone in a bin, before any attack is run."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

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


def rtf_one_shot_bound(num_bins: int, num_examples: int) -> float:
    """Probability that one given bin holds exactly one example, counted as in the RtF bound.

    ``C(n + k - 3, k - 2) / C(n + k - 1, k - 1) = n (k - 1) / ((n + k - 1)(n + k - 2))``: every
    occupancy vector is taken to be equally likely, so ``k`` times this is :func:`rtf_bound`. For
    independent examples and a bin of mass p the probability is :func:`row_isolation_rate`.

    Args:
      num_bins: k >= 2, the narrow bin included.
      num_examples: n >= 1.

    References:
      Fowl et al., "Robbing the Fed" (ICLR 2022, arXiv 2110.13057), the one-shot variant.

    >>> math.isclose(128 * rtf_one_shot_bound(128, 64), rtf_bound(128, 64))
    True
    """
    _checks.at_least(2, num_bins=num_bins)
    _checks.at_least(1, num_examples=num_examples)
    n, k = num_examples, num_bins
    return n * (k - 1) / ((n + k - 1) * (n + k - 2))


def row_isolation_rate(probability: float, num_examples: int) -> float:
    """Probability that a neuron is on for exactly one example, ``n p (1 - p)^(n - 1)``.

    Largest at ``p = 1 / n``, where it is ``(1 - 1/n)^(n - 1)`` and falls to 1/e.

    Args:
      probability: p in [0, 1], the chance that the neuron is on for one example.
      num_examples: n >= 1, whose activations are taken to be independent.

    Guarantees:
      Exact for Gaussian rows on orthogonal examples of one norm. Examples that resemble one
      another switch on together, which makes the rate smaller than this.

    >>> round(row_isolation_rate(1 / 1000, 1000), 3)
    0.368
    """
    _probability(probability=probability)
    _checks.at_least(1, num_examples=num_examples)
    return float(num_examples * probability * (1 - probability) ** (num_examples - 1))


def example_isolation_rate(probability: float, num_rows: int, num_examples: int) -> float:
    """Share of examples that at least one of K independent rows isolates.

    ``r1 = 1 - (1 - p (1 - p)^(n - 1))^K``.

    Args:
      probability: p in [0, 1], the chance that a row is on for one example.
      num_rows: K >= 0 rows with independent weights and one exceedance probability.
      num_examples: n >= 1.

    Guarantees:
      Rows are independent given the examples, so the power of K is exact; that a row isolates an
      example with probability ``p (1 - p)^(n - 1)`` is :func:`row_isolation_rate`'s assumption.
      Where that probability differs between examples the mean share is lower (the function is
      concave in it).

    >>> round(example_isolation_rate(1 / 128, 512, 128), 3)
    0.772
    """
    _checks.at_least(0, num_rows=num_rows)
    one = row_isolation_rate(probability, num_examples) / num_examples
    return float(-np.expm1(num_rows * np.log1p(-one))) if one < 1 else float(num_rows > 0)


def qbi_bias(num_inputs: int, num_examples: int) -> float:
    """The bias at which a standard Gaussian row isolates most often.

    ``b = Phi^{-1}(1 / n) sqrt(d)``: for ``w ~ N(0, I_d)`` and inputs of squared norm d (standard
    normal pixels), ``w.x + b > 0`` has probability ``1 / n``, the maximum of
    :func:`row_isolation_rate`.

    Args:
      num_inputs: d >= 1.
      num_examples: n >= 2.

    References:
      Nowak et al., "QBI: Quantile-Based Bias Initialization for Efficient Private Data
      Reconstruction in Federated Learning" (2024, arXiv 2406.18745).

    >>> round(qbi_bias(3072, 64), 1)
    -119.4
    """
    _checks.at_least(1, num_inputs=num_inputs)
    _checks.at_least(2, num_examples=num_examples)
    return float(special.ndtri(1 / num_examples)) * math.sqrt(num_inputs)


def two_layer_rate(first: float, second: float) -> float:
    """Share of examples isolated in a first or a second layer, ``1 - (1 - r1)(1 - r2)``.

    Args:
      first: r1 in [0, 1], for example :func:`example_isolation_rate` of the first layer's rows.
      second: r2 in [0, 1], for example ``expected_singletons(masses, n) / n`` of the second.

    Guarantees:
      Exact if the layers miss an example independently. In any case the share lies between
      ``max(r1, r2)`` and ``min(1, r1 + r2)``.

    >>> first = example_isolation_rate(1 / 128, 512, 128)
    >>> second = expected_singletons(np.full(256, 1 / 256), 128) / 128
    >>> round(two_layer_rate(first, second), 3)
    0.911
    """
    _probability(first=first, second=second)
    return 1 - (1 - first) * (1 - second)


def _probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value!r}.")
