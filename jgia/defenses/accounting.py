"""What clipping and Gaussian noise amount to as (epsilon, delta)-differential privacy."""

from __future__ import annotations

import math
from typing import Any

from scipy import optimize, special

from jgia import _checks


def gaussian_delta(*, epsilon: float, noise_multiplier: float, num_releases: int = 1) -> float:
    r"""Smallest delta at which Gaussian releases are ``(epsilon, delta)``-differentially private.

    .. code-block:: text

        delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

    with ``mu = sqrt(num_releases) / noise_multiplier``: independent Gaussian releases compose to
    one with less noise, exactly.

    Args:
      epsilon: >= 0.
      noise_multiplier: noise standard deviation over l2 sensitivity, > 0.
      num_releases: releases that one example (or client) takes part in, >= 1.

    Returns:
      Delta in [0, 1].

    Raises:
      ValueError: an argument is out of range.

    >>> round(gaussian_delta(epsilon=1.0, noise_multiplier=1.0), 6)
    0.126937

    References:
      Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (ICML 2018,
      arXiv 1805.06530), theorem 8; composition: Dong, Roth and Su, "Gaussian Differential Privacy"
      (JRSS B 2022, arXiv 1905.02383), corollary 3.3.
    """
    _checks.non_negative(epsilon=epsilon)
    _checks.positive(noise_multiplier=noise_multiplier)
    _checks.at_least(1, num_releases=num_releases)
    mu = math.sqrt(num_releases) / noise_multiplier
    # In logarithms: exp(epsilon) alone overflows where the product is small.
    first = float(special.log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    if second >= first:  # equal up to rounding
        return 0.0
    return min(1.0, -math.exp(first) * math.expm1(second - first))


def gaussian_epsilon(*, delta: float, noise_multiplier: float, num_releases: int = 1) -> float:
    r"""Smallest epsilon at which Gaussian releases are ``(epsilon, delta)``-private.

    The inverse of :func:`gaussian_delta`. For DP-SGD without subsampling, where every example
    takes part in ``num_releases`` steps: a client that makes E epochs over fixed minibatches has
    ``num_releases = E`` per round, since one example is in one minibatch of an epoch.

    Args:
      delta: in (0, 1); customarily below one over the number of examples.
      noise_multiplier: noise standard deviation over l2 sensitivity, > 0.
      num_releases: releases that one example takes part in, over all rounds, >= 1.

    Returns:
      Epsilon >= 0, to about ten digits.

    Raises:
      ValueError: an argument is out of range.

    >>> round(gaussian_epsilon(delta=1e-5, noise_multiplier=1.0), 3)
    4.377
    """
    _checks.fraction(delta=delta)
    _checks.positive(noise_multiplier=noise_multiplier)

    def excess(epsilon: float) -> float:
        found = gaussian_delta(
            epsilon=epsilon, noise_multiplier=noise_multiplier, num_releases=num_releases
        )
        return math.log(max(found, 1e-320)) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    found: Any = optimize.root_scalar(excess, bracket=(0.0, high), method="brentq", xtol=1e-12)
    return float(found.root)


def dp_sgd_epsilon(
    *, delta: float, noise_multiplier: float, sampling_rate: float, num_steps: int
) -> float:
    r"""Epsilon of DP-SGD with Poisson sampling, by privacy loss distributions.

    Each of ``num_steps`` steps takes every example with probability ``sampling_rate``,
    independently. The relation is adding or removing one example.

    Args:
      delta: in (0, 1).
      noise_multiplier: noise standard deviation over the clip norm, > 0.
      sampling_rate: in (0, 1]; at 1 there is no subsampling and :func:`gaussian_epsilon` is exact.
      num_steps: >= 1, over all rounds.

    Returns:
      An upper bound on epsilon: the accountant rounds pessimistically.

    Raises:
      ValueError: an argument is out of range.
      ImportError: dp-accounting is not installed.

    Edge cases:
      Shuffling is not Poisson sampling. A figure for a client that shuffles and cuts minibatches
      must come from :func:`gaussian_epsilon`; the one here would be too good.

    References:
      Koskela, Jälkö and Honkela, "Computing Tight Differential Privacy Guarantees Using FFT"
      (AISTATS 2020, arXiv 1906.03049); computed by Google's dp-accounting.
    """
    _checks.fraction(delta=delta)
    _checks.positive(noise_multiplier=noise_multiplier)
    _checks.at_least(1, num_steps=num_steps)
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must lie in (0, 1], got {sampling_rate!r}.")
    accounting = _dp_accounting()
    step = accounting.PoissonSampledDpEvent(
        sampling_rate, accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant = accounting.pld.PLDAccountant()
    accountant.compose(accounting.SelfComposedDpEvent(step, num_steps))
    return float(accountant.get_epsilon(delta))


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "privacy accounting with subsampling needs dp-accounting, which is not installed: "
            'python -m pip install "jgia[dp]". Without subsampling use gaussian_epsilon.'
        ) from error
    return dp_accounting
