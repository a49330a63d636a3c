"""Least squares on a support: the l1 solution without its shrinkage."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jgia import _checks
from jgia.sparse._cgls import cgls
from jgia.sparse.bases import Basis
from jgia.sparse.lasso import prepare
from jgia.sparse.operators import Domain, LinearOperator, Range
from jgia.sparse.problem import CONVERGED, MAX_ITERATIONS, NONFINITE, nonzero, total


class DebiasResult(NamedTuple):
    """Refitted coefficients, per right-hand side.

    Attributes:
      x: (*domain, J) ``Psi c``; zero where the status is ``NONFINITE``.
      coefficients: (*coefficients, J) c, zero off the support.
      relative_residual: (J,) ``||mask * (A x - y)|| / ||mask * y||``.
      iterations: (J,) iterations until each sample stopped.
      status: (J,) ``CONVERGED``, ``MAX_ITERATIONS`` or ``NONFINITE``.
    """

    x: Domain
    coefficients: Float[Array, "*coefficients batch"]
    relative_residual: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    status: Int[Array, " batch"]


def debias(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    coefficients: Domain,
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    basis: Basis | None = None,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> DebiasResult:
    """``min 1/2 ||mask * (A Psi c - y)||^2`` over c with the support of ``coefficients``.

    An l1 solution is shrunk towards zero by about lam; refitting on its support removes that
    where the support is right. Conjugate gradients on the normal equations in CGLS form, from
    ``coefficients``.

    Args:
      operator: the map A, or a matrix (m, n).
      y: (*range, J) right-hand sides; entries outside the mask are ignored.
      coefficients: (*coefficients, J) whose non-zeros are the support, and the start.
      mask: (*range, J) which equations count; all when left out.
      basis: orthonormal synthesis basis Psi; the identity when left out.
      tolerance: size of the gradient on the support, relative to that at zero, at which a sample
        stops; 64 eps of the dtype when left out.
      max_iterations: at most so many iterations.

    Returns:
      A :class:`DebiasResult`. With dependent columns in the support, the minimizer nearest to
      ``coefficients``.

    Raises:
      ValueError: shapes do not fit or an option is out of range.
    """
    _checks.at_least(1, max_iterations=max_iterations)
    if tolerance is not None:
        _checks.positive(tolerance=tolerance)
    prepared = prepare(operator, y, 0.0, mask, None, basis, False)
    problem = prepared.problem
    c = prepared.columns("coefficients", coefficients)
    support = (c != 0).astype(c.dtype)
    relative = tolerance or 64 * float(jnp.finfo(c.dtype).eps)
    goal = relative**2 * total((support * prepared.correlation) ** 2)

    c, square, used = cgls(
        lambda c: problem.weight * problem.maps.forward(support * c),
        lambda r: support * problem.maps.adjoint(problem.weight * r),
        c,
        problem.data,
        goal,
        max_iterations,
    )
    size, left = total(problem.data**2), total(problem.residual(problem.maps.forward(c)) ** 2)
    ok = prepared.finite & jnp.isfinite(left)
    status = jnp.where(square <= goal, CONVERGED, MAX_ITERATIONS)
    c = jnp.where(ok, c, 0).reshape(*prepared.static.shapes.coefficients, y.shape[-1])
    return DebiasResult(
        x=c if basis is None else basis.synthesize(c),
        coefficients=c,
        relative_residual=jnp.where(ok, jnp.sqrt(left / nonzero(size)), jnp.inf)[0],
        iterations=used[0],
        status=jnp.where(ok, status, NONFINITE).astype(jnp.int32)[0],
    )
