"""How many active neurons determine a sparse example: where recovery sets in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from jgia import _checks


def statistical_dimension(num_nonzero: int, size: int) -> float:
    r"""Statistical dimension of the descent cone of the l1 norm at an s-sparse vector.

    ``D = min_tau s (1 + tau^2) + (n - s) E[(|xi| - tau)_+^2]``, xi standard normal. Minimizing
    ``||x||_1`` over the solutions of m Gaussian equations finds x with probability near 1 for
    ``m > D`` and near 0 for ``m < D``, within a few ``sqrt(n)`` of it.

    Args:
      num_nonzero: s in [0, n], the non-zero entries.
      size: n >= 1, the entries in all.

    Returns:
      D in [0, n]; above the cone's true dimension by at most ``2 sqrt(n / s)``.

    References:
      Amelunxen, Lotz, McCoy and Tropp, "Living on the edge: phase transitions in convex programs
      with random data" (Information and Inference 2014, arXiv 1303.6672), proposition 4.5;
      Donoho and Tanner (PNAS 2005) for the transition itself.

    >>> round(statistical_dimension(10, 100), 1)
    32.9
    """
    _sparse(num_nonzero, size)
    s, rest = num_nonzero, size - num_nonzero
    if s == 0 or rest == 0:
        return float(s)

    def slope(tau: float) -> float:
        return s * tau - 2 * rest * (_density(tau) - tau * _upper(tau))

    root: Any = optimize.brentq(slope, 0.0, 40.0, xtol=1e-13)
    tau = float(root)
    beyond = 2 * ((1 + tau**2) * _upper(tau) - tau * _density(tau))
    return float(s * (1 + tau**2) + rest * beyond)


def sufficient_equations(num_nonzero: int, size: int) -> float:
    """The rule of thumb for the equations that s-sparse recovery needs, ``2 s log(n / s)``.

    The leading term of the sufficient ``2 s log(n / s) + 5 s / 4``. Recovery sets in earlier, at
    :func:`statistical_dimension`: at 0.67 of this rule for (s, n) = (10, 1000), at 0.89 of it for
    (300, 1000), and beyond it where s nears n. A layer with zero biases has about half of its m
    neurons on, hence ``m >= 4 s log(n / s)`` neurons.

    References:
      Chandrasekaran, Recht, Parrilo and Willsky, "The convex geometry of linear inverse problems"
      (2012, arXiv 1012.0621), proposition 3.10.
    """
    _sparse(num_nonzero, size)
    s = num_nonzero
    return 2 * s * math.log(size / s) if s else 0.0


def active_probability(bias: float, norm: float = 1.0) -> float:
    """Chance that a neuron with a standard Gaussian row is on, ``Phi(b / ||x||)``.

    Args:
      bias: b.
      norm: ``||x|| > 0`` of the input.
    """
    _checks.positive(norm=norm)
    _finite_bias(bias)
    return float(special.ndtr(bias / norm))


def active_second_moment(bias: float, norm: float = 1.0) -> float:
    r"""How a row's second moment along x changes once the neuron is known to be on.

    ``E[a a^T | a.x + b > 0] = I + c x x^T / ||x||^2`` with
    ``c = -t phi(t) / Phi(t)`` and ``t = b / ||x||``.

    Only the direction of x is affected: stretched for negative biases (``c > 0``, about ``t^2``
    far out), compressed for positive ones, by at most 0.295, at ``t = 0.84``. At ``b = 0`` it
    vanishes: ``a`` and ``-a`` are equally likely and ``a a^T`` is even, so ``a a^T`` is
    independent of whether the neuron is on. The active rows then are, up to their signs, an
    unconditioned Gaussian matrix, and everything known for Gaussian matrices holds for masked
    recovery.

    Args:
      bias: b.
      norm: ``||x|| > 0`` of the input.

    >>> active_second_moment(0.0)
    0.0
    >>> round(active_second_moment(-1.0), 3)
    1.525
    """
    _checks.positive(norm=norm)
    _finite_bias(bias)
    t = bias / norm
    log_density = -t * t / 2 - math.log(2 * math.pi) / 2
    return -t * math.exp(log_density - float(special.log_ndtr(t))) + 0.0


def masked_recovery_probability(
    num_neurons: int, num_nonzero: int, size: int, *, bias: float = 0.0, norm: float = 1.0
) -> float:
    """Chance that a Gaussian ReLU layer determines an s-sparse x through its active neurons.

    ``P(|T| >= D)`` with ``|T| ~ Binomial(m, Phi(b / ||x||))`` active neurons and D the
    :func:`statistical_dimension`. On the active set T the layer is exactly linear,
    ``(Wx + b)_T = h_T``, and x is the minimizer of ``||x||_1`` subject to that.

    Args:
      num_neurons: m >= 0.
      num_nonzero: s in [0, n].
      size: n.
      bias: b of every neuron.
      norm: ``||x|| > 0``.

    Guarantees:
      Asymptotic in n for independent standard Gaussian rows, x independent of them, b = 0 and
      no noise: the transition at D is taken to be a step, so the slope in m is that of the
      binomial and the true one is flatter. For ``b != 0`` the active rows are not Gaussian along
      x (:func:`active_second_moment`), and the figure is an approximation.

    >>> [round(masked_recovery_probability(m, 4, 128), 2) for m in (24, 38, 80)]
    [0.0, 0.56, 1.0]
    """
    _checks.at_least(0, num_neurons=num_neurons)
    needed = math.ceil(statistical_dimension(num_nonzero, size))
    probability = active_probability(bias, norm)
    return float(stats.binom.sf(needed - 1, num_neurons, probability))


def needed_neurons(
    num_nonzero: int, size: int, *, probability: float = 0.5, bias: float = 0.0, norm: float = 1.0
) -> int:
    """The smallest m at which :func:`masked_recovery_probability` reaches ``probability``.

    Args:
      num_nonzero: s in [1, n].
      size: n.
      probability: in (0, 1).
      bias: b of every neuron.
      norm: ``||x|| > 0``.

    Raises:
      ValueError: an argument out of range, or more than ``2^53`` neurons would be needed.
    """
    _checks.fraction(probability=probability)
    _checks.at_least(1, num_nonzero=num_nonzero)

    def reached(m: int) -> bool:
        given = masked_recovery_probability(m, num_nonzero, size, bias=bias, norm=norm)
        return given >= probability

    high = 1
    while not reached(high):
        high *= 2
        if high > 1 << 53:
            raise ValueError(
                f"bias={bias!r} at norm {norm!r} leaves practically no neuron on; no number of "
                "neurons determines the example. Raise the bias."
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _upper(t: float) -> float:
    return float(special.ndtr(-t))


def _sparse(num_nonzero: int, size: int) -> None:
    _checks.at_least(1, size=size)
    if not 0 <= num_nonzero <= size:
        raise ValueError(f"num_nonzero must lie between 0 and size={size}, got {num_nonzero!r}.")


def _finite_bias(bias: float) -> None:
    if not np.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias!r}.")
