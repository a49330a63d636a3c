"""Matrix-free linear least squares in float64, and which unknowns they determine."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from scipy.sparse.linalg import LinearOperator, lsmr

MAX_ITERATIONS = 4000

_DETERMINED = 1e-5
"""What may be left of a standard normal in an entry that the equations determine."""

_LIMIT = 7  # LSMR's code for its iteration limit


@runtime_checkable
class LinearMap(Protocol):
    """A linear map of flat vectors and its adjoint."""

    @property
    def shape(self) -> tuple[int, int]:
        """(equations, unknowns)."""
        ...

    def apply(self, x: np.ndarray) -> np.ndarray:
        """``A x``."""
        ...

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        """``A^T y``."""
        ...


class _Operator(LinearOperator):
    """A linear map as SciPy wants it."""

    def __init__(self, system: LinearMap) -> None:
        super().__init__(np.dtype(np.float64), system.shape)
        self._system = system

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._system.apply(x.reshape(-1))

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._system.adjoint(x.reshape(-1))


class Solution(NamedTuple):
    """One least-squares solution.

    Attributes:
      x: (n,) the minimizer nearest to the start.
      residual: ``|A x - y| / |y|``, computed at x.
      iterations: of LSMR.
      converged: whether it reached its tolerance before the limit.
    """

    x: np.ndarray
    residual: float
    iterations: int
    converged: bool


def least_squares(
    system: LinearMap,
    y: np.ndarray,
    *,
    tolerance: float,
    max_iterations: int = MAX_ITERATIONS,
    damping: float = 0.0,
) -> Solution:
    """``min_x |A x - y|^2 + damping^2 |x|^2``; of many minimizers the shortest.

    Args:
      system: the map.
      y: (m,) right-hand side.
      tolerance: relative, for the residual of equations that agree and for the gradient of those
        that do not.
      max_iterations: of LSMR.
      damping: Tikhonov parameter.

    References:
      D. Fong and M. Saunders, "LSMR" (SIAM J. Sci. Comput. 33, 2011, arXiv 1006.0758).
    """
    if not np.any(y):
        return Solution(np.zeros(system.shape[1]), 0.0, 0, True)
    operator = _Operator(system)

    def solve(right: np.ndarray, relative: float) -> tuple[np.ndarray, int, int]:
        limits = {"atol": relative, "btol": relative, "conlim": 0, "maxiter": max_iterations}
        return lsmr(operator, right, damp=damping, **limits)[:3]

    x, stop, iterations = solve(y, tolerance)
    left = y - system.apply(x)
    residual = float(np.linalg.norm(left) / np.linalg.norm(y))
    if tolerance < 1e-9 and residual < 1e-9:
        change, again, more = solve(left, 1e-3)
        x, stop, iterations = x + change, max(stop, again), iterations + more
        residual = float(np.linalg.norm(system.apply(x) - y) / np.linalg.norm(y))
    return Solution(x, residual, int(iterations), stop != _LIMIT)


def determined(system: LinearMap, rng: np.random.Generator) -> np.ndarray:
    """Which unknowns the equations determine, without their matrix: (n,) booleans.

    A random vector less its projection on the row space, ``d - A^+ A d``, is a random vector of
    the null space: zero in the entries that every solution agrees on, and with probability 1
    nowhere else. Directions that LSMR does not resolve within the limit count as null: they are
    not determined in floating point.

    Args:
      system: the map.
      rng: of the vector.
    """
    vector = rng.standard_normal(system.shape[1])
    found = least_squares(system, system.apply(vector), tolerance=1e-12)
    return np.abs(vector - found.x) <= _DETERMINED
