"""Least squares with an l1 penalty on an analysis operator: total variation and its like."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jgia.sparse.admm import AdmmOptions, AdmmState, Split, admm, prox_fit
from jgia.sparse.lasso import Lam, prepare
from jgia.sparse.operators import Domain, LinearOperator, Range
from jgia.sparse.problem import (
    CONVERGED,
    INVALID,
    MAX_ITERATIONS,
    NONFINITE,
    Maps,
    total,
    violation,
)


class AnalysisResult(NamedTuple):
    """Solution and residuals, per right-hand side.

    Attributes:
      x: (*domain, J) minimizers; zero where the status is ``NONFINITE`` or ``INVALID``.
      lam: (J,) the l1 weight.
      objective: (J,) objective at x.
      primal_residual: (J,) how far ``u = A x`` and ``z = D x`` are from holding, relative.
      dual_residual: (J,) the last change of u and z relative to their multipliers.
      violation: (J,) largest positive ``(A x)_i`` outside the mask.
      iterations: (J,) iterations until each sample stopped.
      status: (J,) ``CONVERGED``, ``MAX_ITERATIONS``, ``NONFINITE`` or ``INVALID``.
    """

    x: Domain
    lam: Float[Array, " batch"]
    objective: Float[Array, " batch"]
    primal_residual: Float[Array, " batch"]
    dual_residual: Float[Array, " batch"]
    violation: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    status: Int[Array, " batch"]


def analysis_lasso(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    lam: Lam,
    analysis: LinearOperator,
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    one_sided: bool = False,
    options: AdmmOptions | None = None,
) -> AnalysisResult:
    """``min 1/2 ||mask * (A x - y)||^2 + lam ||D x||_1``, D an analysis operator.

    With :class:`jgia.sparse.FiniteDifferences` as D the penalty is the anisotropic total
    variation. Alternating directions; the equations in x are solved by conjugate gradients from
    the iterate before.

    Args:
      operator: the map A, or a matrix (m, n).
      y: (*range, J) right-hand sides; entries outside the mask are ignored.
      lam: l1 weight, a number or (J,), zero or more.
      analysis: D, any map from the domain of A.
      mask: (*range, J) which equations count; all when left out.
      one_sided: also ask ``(A x)_i <= 0`` outside the mask, as a squared hinge.
      options: tolerance of both residuals, and limits.

    Returns:
      An :class:`AnalysisResult`. No dual point is feasible to the last digit here, so the status
      rests on the residuals, not on a gap.

    Raises:
      ValueError: shapes do not fit, or lam is negative or not finite and can be seen.

    References:
      S. Boyd et al., "Distributed optimization and statistical learning via the alternating
        direction method of multipliers" (2011), section 6.4.1.
    """
    options = options or AdmmOptions()
    prepared = prepare(operator, y, lam, mask, None, None, one_sided)
    problem, shapes, num = prepared.problem, prepared.static.shapes, y.shape[-1]

    def analyze(x: Array) -> Array:
        z = analysis.apply(x.reshape(*shapes.domain, x.shape[-1]))
        return z.reshape(-1, z.shape[-1])

    x = jnp.zeros_like(prepared.correlation)
    shape = analysis.apply(x.reshape(*shapes.domain, num)).shape[:-1]

    def adjoint(z: Array) -> Array:
        x = analysis.adjoint(z.reshape(*shape, z.shape[-1]))
        return x.reshape(-1, x.shape[-1])

    z = jnp.zeros_like(analyze(x))
    split = Split(
        maps=problem.maps,
        analysis=Maps(analyze, adjoint),
        prox_u=prox_fit(problem.weight, problem.data, one_sided),
        penalty=jnp.broadcast_to(problem.lam, z.shape),
    )

    def done(state: AdmmState, tolerance: float) -> Array:
        return (state.primal <= tolerance) & (state.dual <= tolerance)

    start = (x, jnp.zeros_like(problem.data), z)
    end = admm(split, None, start, jnp.ones_like(problem.lam), done, options)
    u = problem.maps.forward(end.x)
    objective = total(problem.residual(u) ** 2) / 2 + problem.lam * total(jnp.abs(analyze(end.x)))
    ok = prepared.finite & prepared.valid & jnp.isfinite(objective) & jnp.isfinite(end.primal)
    solved = done(end, options.tolerance_in(y.dtype))
    status = jnp.where(solved, CONVERGED, MAX_ITERATIONS)
    status = jnp.where(ok, status, jnp.where(prepared.valid, NONFINITE, INVALID))
    return AnalysisResult(
        x=jnp.where(ok, end.x, 0).reshape(*shapes.domain, num),
        lam=problem.lam[0],
        objective=jnp.where(ok, objective, jnp.inf)[0],
        primal_residual=jnp.where(ok, end.primal, jnp.inf)[0],
        dual_residual=jnp.where(ok, end.dual, jnp.inf)[0],
        violation=jnp.where(ok, violation(problem, u), 0)[0],
        iterations=end.iterations[0],
        status=status.astype(jnp.int32)[0],
    )
