"""The l1 problem of a leaked, rectified layer: lam relative to lam_max, approached in stages."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jgia import _checks
from jgia.sparse.bases import Basis, BlockDCT
from jgia.sparse.fista import FistaOptions, Solution, fista
from jgia.sparse.lasso import LassoResult, finish, prepare
from jgia.sparse.operators import LinearOperator, Range
from jgia.sparse.problem import lam_max


@dataclasses.dataclass(frozen=True, kw_only=True)
class LassoOptions:
    """How hard to try; static under ``jit``.

    Attributes:
      lam_ratio: the last l1 weight as a fraction of ``lam_max`` (the smallest weight whose
        solution is zero). Small values approach the equality-constrained problem.
      num_stages: steps of the continuation from ``lam_max`` down, geometric, warm-started.
      iterations_per_stage: at most so many proximal gradient steps in each stage.
      one_sided: also ask ``(M x)_i <= 0`` of the equations outside the mask.
      tolerance: duality gap relative to the objective at which a sample's stage ends early.
    """

    lam_ratio: float = 1e-4
    num_stages: int = 8
    iterations_per_stage: int = 100
    one_sided: bool = True
    tolerance: float | None = None

    def __post_init__(self) -> None:
        _checks.fraction(lam_ratio=self.lam_ratio)
        _checks.at_least(1, num_stages=self.num_stages)
        _checks.at_least(1, iterations_per_stage=self.iterations_per_stage)
        if self.tolerance is not None:
            _checks.positive(tolerance=self.tolerance)


def masked_lasso(
    operator: LinearOperator,
    y: Range,
    mask: Bool[Array, "*range batch"],
    *,
    basis: Basis | None = None,
    options: LassoOptions | None = None,
    step_bound: Float[Array, ""] | None = None,
) -> LassoResult:
    """Minimize ``f(M Psi c) + lam ||c||_1`` for a decreasing sequence of lam; ``x = Psi c``.

    ``f(u) = 1/2 ||mask * (u - y)||^2 + 1/2 ||(1 - mask) * max(u, 0)||^2``: equations where a
    rectified measurement was active, a squared hinge where it was not. Every stage is one
    :func:`jgia.sparse.lasso` from the solution of the stage before.

    Args:
      operator: linear map M.
      y: (*range, J) data; ignored outside the mask.
      mask: (*range, J) active equations.
      basis: orthonormal synthesis basis Psi; 8x8 blocks when left out.
      options: continuation and iteration counts.
      step_bound: no longer needed; steps follow the curvature met on the way.

    Returns:
      The :class:`LassoResult` of the last stage, with the iterations of all of them.

    Raises:
      ValueError: shapes do not fit.

    Guarantees: derivatives are those of the minimizer at lam, which moves with ``lam_max``.
    """
    del step_bound
    basis, options = basis or BlockDCT(), options or LassoOptions()
    if y.shape != mask.shape:
        raise ValueError(f"y and mask must have one shape, got {y.shape} and {mask.shape}.")
    relative = prepare(operator, y, options.lam_ratio, mask, None, basis, options.one_sided)
    lam = options.lam_ratio * lam_max(
        operator, relative.parameters.data.reshape(y.shape), basis=basis
    )
    prepared = relative._replace(parameters=relative.parameters._replace(lam=lam[None]))
    largest = jnp.max(relative.correlation, axis=0, keepdims=True)
    solver = FistaOptions(
        tolerance=options.tolerance, max_iterations=options.iterations_per_stage, check_every=10
    )

    def stage(last: Solution, ratio: Array) -> tuple[Solution, None]:
        problem = prepared.problem._replace(lam=ratio * largest)
        solution = fista(problem, last.c, prepared.correlation, solver)
        return solution._replace(iterations=last.iterations + solution.iterations), None

    zero = jnp.zeros_like(largest)
    start = Solution(
        c=jnp.zeros_like(prepared.correlation),
        u=jnp.zeros_like(prepared.problem.data),
        objective=zero,
        gap=zero,
        iterations=jnp.zeros(largest.shape, jnp.int32),
        status=jnp.zeros(largest.shape, jnp.int32),
    )
    ratios = options.lam_ratio ** (jnp.arange(1, options.num_stages + 1) / options.num_stages)
    solution, _ = lax.scan(stage, start, ratios.astype(y.dtype))
    return finish(prepared, solution)
