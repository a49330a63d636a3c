"""The l1 problem for many right-hand sides at once: one front door, several solvers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from jgia import _checks
from jgia.sparse.admm import AdmmOptions, admm_lasso
from jgia.sparse.bases import Basis
from jgia.sparse.conjugate import conjugate
from jgia.sparse.fista import FistaOptions, Solution, fista
from jgia.sparse.implicit import Parameters, Static, differentiable, problem_of
from jgia.sparse.operators import Domain, LinearOperator, Range
from jgia.sparse.problem import (
    INVALID,
    NONFINITE,
    Problem,
    as_operator,
    shapes_of,
    violation,
)
from jgia.sparse.proximal import proximal_lasso

Lam = float | Float[Array, "..."]  # a number, or one for each sample


class LassoResult(NamedTuple):
    """Solution and certificate, per right-hand side.

    Attributes:
      x: (*domain, J) ``Psi c``; zero where the status is ``NONFINITE`` or ``INVALID``.
      coefficients: (*coefficients, J) the sparse c; x itself without a basis.
      lam: (J,) the l1 weight.
      lam_max: (J,) the smallest l1 weight with solution zero.
      objective: (J,) objective at c.
      duality_gap: (J,) objective minus a feasible dual value at the returned point: an upper
        bound on how far the objective is from its minimum.
      violation: (J,) largest positive ``(A x)_i`` outside the mask.
      iterations: (J,) iterations until each sample stopped.
      status: (J,) ``CONVERGED``, ``MAX_ITERATIONS``, ``NONFINITE``, ``STALLED`` or ``INVALID``.
    """

    x: Domain
    coefficients: Float[Array, "*coefficients batch"]
    lam: Float[Array, " batch"]
    lam_max: Float[Array, " batch"]
    objective: Float[Array, " batch"]
    duality_gap: Float[Array, " batch"]
    violation: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    status: Int[Array, " batch"]

    @property
    def finite(self) -> Bool[Array, " batch"]:
        """Whether the data and the result were finite and lam valid."""
        return (self.status != NONFINITE) & (self.status != INVALID)


def lasso(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    lam: Lam,
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    weights: Domain | None = None,
    basis: Basis | None = None,
    one_sided: bool = False,
    solver: Literal["conjugate", "fista", "admm", "jaxopt"] = "conjugate",
    init: Domain | None = None,
    options: FistaOptions | AdmmOptions | None = None,
) -> LassoResult:
    """Minimize an l1-penalized least-squares objective for every right-hand side of a batch.

    ``P(c) = 1/2 ||mask * (A Psi c - y)||^2 + lam sum_i w_i |c_i|``, and with ``one_sided`` also
    ``+ 1/2 ||(1 - mask) * max(A Psi c, 0)||^2``: equations where a rectified measurement was
    active, a squared hinge where it was not. All samples share A; mask, weights and lam are each
    sample's own. A sample stops when the duality gap at its own point is at most the tolerance
    times its objective, and does not change any more.

    Args:
      operator: the map A, or a matrix (m, n). Any object with ``apply`` and ``adjoint`` that is a
        pytree will do.
      y: (*range, J) right-hand sides; entries outside the mask are ignored.
      lam: l1 weight, a number or (J,), zero or more. See :func:`jgia.sparse.lam_max`.
      mask: (*range, J) which equations count; all when left out.
      weights: (*coefficients, J) positive weights w of the coefficients; 1 when left out.
      basis: orthonormal synthesis basis Psi of the domain; the identity when left out.
      one_sided: also ask ``(A x)_i <= 0`` outside the mask, as the squared hinge above.
      solver: ``"conjugate"``, proximal conjugate gradients; ``"fista"``, accelerated proximal
        gradient, which needs more steps; ``"admm"``, alternating directions with
        one factorization for all samples, for few samples and ill-conditioned matrices; or
        ``"jaxopt"``, the reference (:func:`jgia.sparse.proximal_gradient`).
      init: (*coefficients, J) where to start. Without it lam falls from ``lam_max`` by a factor
        per step, 0.4, or 0.7 in FISTA.
      options: tolerance and limits, :class:`FistaOptions` or, for ADMM, :class:`AdmmOptions`.

    Returns:
      A :class:`LassoResult`.

    Raises:
      ValueError: shapes do not fit; lam or a weight is out of range and can be seen (is not
        traced).

    Guarantees:
      ``duality_gap`` bounds ``P(c) - min P`` from above up to rounding, whatever the status.
      Derivatives with respect to y, lam, weights and the arrays of the operator, forward and
      reverse, are those of the minimizer, by implicit differentiation on the support; they need
      a support that is locally constant and columns of the support that are linearly
      independent, and come from conjugate gradients, accurate where the solution is.

    Edge cases:
      =====================================  =====================================================
      zero column of A                       its coefficient is exactly 0
      duplicate columns                      one of the minimizers; the objective is unique
      ``lam >= lam_max``                     exactly 0, after 0 iterations
      ``lam = 0``                            least squares; the dual has no interior and the gap is
                                             the objective (0 where the gradient is exactly 0), so
                                             a sample stops when the gradient is at most the
                                             tolerance times ``lam_max``
      negative or non-finite lam             ``ValueError``; under tracing ``INVALID`` and zeros
      NaN or infinity in y, in the mask      ``NONFINITE``, zeros and an infinite objective, for
                                             this sample only
      no equation in the mask, or y = 0      exactly 0, ``CONVERGED``
      ill-conditioned A                      ``MAX_ITERATIONS`` with the gap reached, or
      float32 and a small tolerance          ``STALLED`` with the gap at its rounding floor, about
                                             ``eps lam_max / lam`` times the objective
      =====================================  =====================================================

    >>> A = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> result = lasso(A, jnp.array([[2.0], [0.0]]), 0.5)
    >>> result.x[:, 0].round(2).tolist()[1:], abs(float(result.x[0, 0]) - 0.875) < 0.02
    ([0.0, 0.0], True)
    >>> bool(result.duality_gap[0] <= 1e-4 * result.objective[0])
    True

    References:
      M. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems"
        (1952), section 3, the second form of b.
      A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear
        inverse problems" (2009), equations 4.1 to 4.3.
      S.-J. Kim et al., "An interior-point method for large-scale l1-regularized least squares"
        (2007), equations 10 to 12: the dual point.
      Q. Bertrand et al., "Implicit differentiation for fast hyperparameter selection in
        non-smooth convex learning" (2021, arXiv 2105.01637), theorem 9.
    """
    _checks.one_of(("conjugate", "fista", "admm", "jaxopt"), solver=solver)
    expected = AdmmOptions if solver == "admm" else FistaOptions
    options = expected() if options is None else options
    if not isinstance(options, expected):
        raise ValueError(
            f"solver={solver!r} takes {expected.__name__}, got {type(options).__name__}."
        )
    prepared = prepare(operator, y, lam, mask, weights, basis, one_sided)
    problem = prepared.problem
    first = None if init is None else prepared.columns("init", init)
    if isinstance(options, AdmmOptions):
        dense = None if basis is not None else lax.stop_gradient(prepared.parameters.operator)
        solution = admm_lasso(problem, dense, first, options)
    elif solver == "jaxopt":
        solution = proximal_lasso(problem, first, options)
    elif solver == "fista":
        solution = fista(problem, first, prepared.correlation, options)
    else:
        solution = conjugate(problem, first, prepared.correlation, options)
    return finish(prepared, solution)


class Prepared(NamedTuple):
    """Checked arguments in the solvers' columns; every array is (..., J)."""

    static: Static
    parameters: Parameters
    finite: Array
    valid: Array
    problem: Problem  # cut off from differentiation
    correlation: Array  # |Psi^T A^T y|

    def columns(self, name: str, coefficients: Array) -> Array:
        """A start as columns, zero for samples that cannot be solved."""
        _check_shape(name, coefficients, (*self.static.shapes.coefficients, self.finite.shape[1]))
        flat = coefficients.reshape(-1, coefficients.shape[-1])
        return lax.stop_gradient(jnp.where(self.finite & self.valid, flat, 0))


def prepare(
    operator: LinearOperator | Array,
    y: Array,
    lam: float | Array,
    mask: Array | None,
    weights: Array | None,
    basis: Basis | None,
    one_sided: bool,
) -> Prepared:
    """Check the arguments of :func:`lasso` and bring them into columns."""
    operator = as_operator(operator)
    shapes = shapes_of(operator, basis, y)
    num, dtype = y.shape[-1], y.dtype
    lam = _lam(lam, num, dtype)
    _check_shape("mask", mask, y.shape)
    _check_shape("weights", weights, (*shapes.coefficients, num))
    _check_weights(weights)
    data = y.reshape(-1, num)
    active = jnp.ones((1, 1), bool) if mask is None else mask.reshape(-1, num)
    scale = jnp.ones((1, 1), dtype) if weights is None else weights.reshape(-1, num)
    finite = _all(jnp.isfinite(data) | ~active)
    valid = (lam >= 0) & jnp.isfinite(lam) & _all((scale > 0) & jnp.isfinite(scale))
    parameters = Parameters(
        operator=operator,
        weight=active.astype(dtype),
        data=jnp.where(active & finite & valid, data, 0),
        weights=jnp.where(valid, scale, 1),
        lam=jnp.where(valid, lam, 0),
    )
    static = Static(basis, shapes, one_sided)
    problem = problem_of(static, lax.stop_gradient(parameters))
    correlation = jnp.abs(problem.maps.adjoint(problem.data))
    return Prepared(static, parameters, finite, valid, problem, correlation)


def finish(prepared: Prepared, solution: Solution) -> LassoResult:
    """A solver's columns as a result with derivatives, blank where there is none."""
    static, parameters, finite, valid, problem, correlation = prepared
    c, objective = differentiable(static, parameters, solution.c, solution.objective)
    ok = finite & valid & _all(jnp.isfinite(c)) & jnp.isfinite(objective)
    c = jnp.where(ok, c, 0).reshape(*static.shapes.coefficients, c.shape[1])
    status = jnp.where(ok, solution.status, jnp.where(valid, NONFINITE, INVALID))
    return LassoResult(
        x=c if static.basis is None else static.basis.synthesize(c),
        coefficients=c,
        lam=parameters.lam[0],
        lam_max=jnp.max(correlation / problem.weights, axis=0),
        objective=jnp.where(ok, objective, jnp.inf)[0],
        duality_gap=jnp.where(ok, solution.gap, jnp.inf)[0],
        violation=jnp.where(ok, violation(problem, solution.u), 0)[0],
        iterations=solution.iterations[0],
        status=status.astype(jnp.int32)[0],
    )


def _lam(lam: float | Array, num: int, dtype: jax.typing.DTypeLike) -> Array:
    """(1, J) weights; negative and non-finite values are refused where they can be seen."""
    value = jnp.asarray(lam, dtype)
    if value.shape not in ((), (num,)):
        raise ValueError(f"lam must be a number or have shape ({num},), got {value.shape}.")
    if not isinstance(value, Tracer):
        seen = np.asarray(value)
        if not np.all(np.isfinite(seen) & (seen >= 0)):
            raise ValueError(f"lam must be zero or more and finite, got {lam!r}.")
    return jnp.broadcast_to(value, (num,))[None]


def _all(a: Array) -> Array:
    """Whether all of a sample is true: (1, J)."""
    return jnp.all(a, axis=0, keepdims=True)


def _check_shape(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}.")


def _check_weights(weights: Array | None) -> None:
    if weights is None or isinstance(weights, Tracer):
        return
    seen = np.asarray(weights)
    if not np.all(np.isfinite(seen) & (seen > 0)):
        raise ValueError(
            "weights must be positive and finite; a column that should not be used "
            "can be left out of the operator."
        )
