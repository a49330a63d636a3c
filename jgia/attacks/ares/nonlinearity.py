"""A nonlinearity as a scale and noise: the constants of the generalized Lasso, and its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jgia import _checks

_REACH = 12.0  # the normal density is 2e-32 there
_TAIL = 1e-6
_MAX_PANELS = 1 << 15
_MAX_ROUNDS = 60


class LassoConstants(NamedTuple):
    """What a nonlinearity does to a linear measurement.

    Attributes:
      mu: the scale: ``f(xi + b) ~ mu xi`` for standard normal xi.
      sigma: standard deviation of what is left, seen as noise.
      eta: root mean square of what is left times xi.
      intercept: mean over rows of what was subtracted first; 0 without an intercept.
    """

    mu: float
    sigma: float
    eta: float
    intercept: float


def lasso_constants(
    activation: Callable[[Any], Any],
    bias: float | np.ndarray = 0.0,
    *,
    intercept: bool = False,
) -> LassoConstants:
    r"""The constants (mu, sigma, eta) of a layer ``f(Wx + b)`` with Gaussian rows, ``||x|| = 1``.

    With ``xi ~ N(0, 1)`` and means over the rows i,

    ``mu = mean_i E[f(xi + b_i) xi]``, ``sigma^2 = mean_i E[(f(xi + b_i) - c_i - mu xi)^2]``,
    ``eta^2 = mean_i E[(f(xi + b_i) - c_i - mu xi)^2 xi^2]``,

    where ``c_i = 0``, or ``E[f(xi + b_i)]`` with an intercept: the mean of the residual is known
    to whoever knows f and b, and subtracting it can only lower sigma.

    Args:
      activation: f, applied to float64 NumPy arrays of any shape, elementwise. Kinks and jumps
        are found by bisection. A JAX function computes in float32 unless 64 bits are enabled.
      bias: b, one number or one per row, in units of ``||x||``.
      intercept: whether ``E[f]`` is subtracted.

    Returns:
      :class:`LassoConstants`.

    Raises:
      ValueError: the bias or a value of f is not finite, f does not keep the shape, or f grows
        so fast that the expectations are not reached within 12 standard deviations.

    Guarantees:
      Deterministic adaptive quadrature, to about ``100 eps`` of the dtype that f returns.

    >>> from scipy import special
    >>> relu = lasso_constants(lambda t: np.maximum(t, 0.0))
    >>> [round(v, 6) for v in (relu.mu, relu.sigma**2, relu.eta**2)]
    [0.5, 0.25, 0.75]
    >>> round(lasso_constants(lambda t: np.maximum(t, 0.0), intercept=True).sigma ** 2, 4)
    0.0908

    References:
      ARES (IEEE S&P 2026, arXiv 2603.17623), eq. 5-6; Plan and Vershynin, "The generalized Lasso
      with non-linear observations" (IEEE Trans. Inf. Theory 2016, arXiv 1502.04071).
    """
    biases, counts = np.unique(np.asarray(bias, np.float64).reshape(-1), return_counts=True)
    if biases.size == 0 or not np.all(np.isfinite(biases)):
        raise ValueError(f"bias must be one or more finite numbers, got {bias!r}.")
    weights = counts / counts.sum()

    def value(xi: np.ndarray, b: float) -> np.ndarray:
        return _checked(np.asarray(activation(xi + b)), xi)

    def moments(xi: np.ndarray, b: float) -> np.ndarray:
        f = value(xi, b)
        return np.stack([f, (f * xi).astype(f.dtype), f**2])

    first = np.array([_expectations(lambda xi, b=b: moments(xi, b)) for b in biases])
    mu = float(weights @ first[:, 1])
    means = first[:, 0] if intercept else np.zeros(len(biases))

    def residuals(xi: np.ndarray, b: float, mean: float) -> np.ndarray:
        f = value(xi, b)
        squares = (f - mean - mu * xi) ** 2
        return np.stack([squares, squares * xi**2]).astype(f.dtype)  # as exact as f is

    second = np.array(
        [
            _expectations(lambda xi, b=b, c=c: residuals(xi, b, c), size=float(square))
            for b, c, square in zip(biases, means, first[:, 2], strict=True)
        ]
    )
    sigma, eta = np.sqrt(weights @ second)
    return LassoConstants(mu, float(sigma), float(eta), float(weights @ means))


def generalized_lasso_rate(
    constants: LassoConstants, width: float, num_measurements: int, *, factor: float = 1.0
) -> float:
    """The Plan-Vershynin bound on ``E ||x_hat - mu x||``, ``C (w sigma + eta) / sqrt(m)``.

    For ``x_hat`` minimizing ``||y - A x||`` over a set whose descent cone at ``mu x`` has Gaussian
    width w, A with m independent standard normal rows, ``||x|| = 1``. It decays with m but is
    never zero: the nonlinearity is treated as noise.

    Args:
      constants: from :func:`lasso_constants`.
      width: w >= 0; ``sqrt(statistical_dimension(s, n))`` for the l1 ball at an s-sparse vector,
        at most about ``sqrt(2 s log(n / s) + 5 s / 4)``.
      num_measurements: m >= 1.
      factor: the absolute constant C, which the theorem does not give.

    Returns:
      The bound, in units of ``||x||``; divide by ``constants.mu`` for a relative error.

    References:
      Plan and Vershynin (arXiv 1502.04071).
    """
    _checks.non_negative(width=width)
    _checks.positive(factor=factor)
    _checks.at_least(1, num_measurements=num_measurements)
    return factor * (width * constants.sigma + constants.eta) / math.sqrt(num_measurements)


def constrained_lasso_error(
    constants: LassoConstants, dimension: float, num_measurements: int
) -> float:
    """The asymptotic value of ``||x_hat - mu x||``, ``sigma sqrt(D / (m - D))``.

    For the program of :func:`generalized_lasso_rate` with the radius ``||mu x||_1`` known, D the
    statistical dimension of the descent cone. Without an unknown constant: sharp where the error
    is small against every non-zero entry of ``mu x``, an upper bound elsewhere.

    Args:
      constants: from :func:`lasso_constants`.
      dimension: D >= 0, from :func:`~jgia.attacks.ares.phase.statistical_dimension`.
      num_measurements: m.

    Returns:
      The error in units of ``||x||``; infinite where ``m <= D``, where nothing is bounded.

    References:
      Oymak, Thrampoulidis and Hassibi, "The Squared-Error of Generalized LASSO: A Precise
      Analysis" (2013, arXiv 1311.0830) for linear measurements; Thrampoulidis, Abbasi and
      Hassibi, "LASSO with Non-linear Measurements is Equivalent to One With Linear Measurements"
      (NeurIPS 2015, arXiv 1506.02181) for sigma as the noise.
    """
    _checks.non_negative(dimension=dimension)
    _checks.at_least(1, num_measurements=num_measurements)
    if num_measurements <= dimension:
        return math.inf
    return constants.sigma * math.sqrt(dimension / (num_measurements - dimension))


def _checked(values: np.ndarray, xi: np.ndarray) -> np.ndarray:
    if values.shape != xi.shape:
        raise ValueError(
            f"activation must act elementwise: for inputs of shape {xi.shape} it returned "
            f"{values.shape}."
        )
    if not np.all(np.isfinite(values)):
        raise ValueError("activation must return finite values, got NaN or infinity.")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def _expectations(integrand: Callable[[np.ndarray], np.ndarray], size: float = 0.0) -> np.ndarray:
    """Normal expectations of k functions at once: Gauss-Legendre panels, halved until they agree.

    ``integrand`` maps (P, N) points to (k, P, N) values. Where it is the square of a difference of
    terms, ``size`` is their mean square: rounding leaves about ``eps^2 size`` of them.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    resolution = float(np.finfo(np.float64).eps)

    def panels(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal resolution
        half = (high - low)[:, None] / 2
        xi = low[:, None] + half * (1 + nodes)
        values = integrand(xi)
        resolution = float(np.finfo(values.dtype).eps)
        density = np.exp(-(xi**2) / 2) / math.sqrt(2 * math.pi)
        weighted = values.astype(np.float64) * (density * half * weights)
        return weighted.sum(-1), np.abs(weighted).sum(-1)

    edges = np.linspace(-_REACH, _REACH, 49)
    low, high = edges[:-1], edges[1:]
    whole, absolute = panels(low, high)
    scale = absolute.sum(-1)
    floor = (64 * resolution) ** 2 * size
    if np.any(absolute[:, [0, -1]].max(-1) > _TAIL * scale + floor):
        raise ValueError(
            "activation grows too fast: its expectation under a standard normal is not reached "
            f"within {_REACH:g} standard deviations; clip it."
        )
    total = np.zeros(len(scale))
    for _ in range(_MAX_ROUNDS):
        middle = (low + high) / 2
        left, _ = panels(low, middle)
        right, _ = panels(middle, high)
        settled = np.all(
            np.abs(whole - left - right) <= (16 * resolution * scale + floor)[:, None], axis=0
        ) | (high - low <= 1e-15)
        total += (left + right)[:, settled].sum(-1)
        open_ = ~settled
        if not open_.any():
            return total
        low, middle, high = low[open_], middle[open_], high[open_]
        whole = np.concatenate([left[:, open_], right[:, open_]], axis=1)
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        if len(low) > _MAX_PANELS:
            break
    raise ValueError(
        "activation could not be integrated: it jumps or oscillates almost everywhere; expected "
        "a piecewise smooth function."
    )
