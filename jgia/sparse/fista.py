"""Accelerated proximal gradient for a batch of l1 problems, each with its own step and stop."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia import _checks
from jgia.sparse.problem import (
    CONVERGED,
    MAX_ITERATIONS,
    STALLED,
    Problem,
    certify,
    nonzero,
    soft_threshold,
    total,
)

_CONTINUATION, _CONTINUATION_STEPS = 0.7, 40
_SHRINK, _GROW = 0.9, 1.2
_PATIENCE = 10  # checks without progress, at the rounding floor, before a sample is given up


@dataclasses.dataclass(frozen=True, kw_only=True)
class FistaOptions:
    """When to stop, for every solver but ADMM; static under ``jit``.

    Attributes:
      tolerance: largest duality gap relative to the objective at which a sample counts as
        solved; 1e-4 in float32 and 1e-9 in float64 when left out.
      max_iterations: at most so many steps.
      check_every: steps of FISTA between two evaluations of the gap, each half a step's work;
        conjugate gradients know it after every step.
    """

    tolerance: float | None = None
    max_iterations: int = 10_000
    check_every: int = 5

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            _checks.positive(tolerance=self.tolerance)
        _checks.at_least(1, max_iterations=self.max_iterations, check_every=self.check_every)


class Solution(NamedTuple):
    """Coefficients (n, J), their measurements (m, J), and certificate and account, (1, J)."""

    c: Array
    u: Array
    objective: Array
    gap: Array
    iterations: Array
    status: Array


class _State(NamedTuple):
    c: Array  # the point
    u: Array  # its measurements
    v: Array  # the extrapolated point
    uv: Array  # its measurements, by linearity
    fit: Array  # the data term at c
    norm: Array  # the penalty at c
    momentum: Array
    curvature: Array


class _Progress(NamedTuple):
    state: _State
    objective: Array
    gap: Array
    error: Array  # what is compared with the tolerance
    best: Array
    waited: Array
    done: Array
    iterations: Array
    steps: Array
    fresh: Array  # no check yet


def default_tolerance(dtype: jax.typing.DTypeLike) -> float:
    """1e-4 in single, where rounding may not allow less, 1e-9 in double precision."""
    return 1e-9 if jnp.finfo(dtype).eps < 1e-10 else 1e-4


def fista(
    problem: Problem, init: Array | None, correlation: Array, options: FistaOptions
) -> Solution:
    """Minimize from ``init``, or from zero along a decreasing sequence of lam.

    FISTA with the gradient-based restart. A step of length 1/L is taken if the data term's
    curvature along it is at most L, or if the objective falls; L then shrinks by a tenth, and
    grows to 1.2 times a curvature it was found below. Along sparse steps the curvature is
    several times lower than the largest eigenvalue of ``A^T A``, whose inverse is the usual
    step, and no bound on that eigenvalue is needed. Measurements of the extrapolated point follow
    by linearity, so that a step costs one product with A and one with its adjoint.

    Args:
      problem: what to minimize.
      init: (n, J) where to start; None starts from zero with lam falling from lam_max by 0.7
        per step.
      correlation: (n, J) ``|Psi^T A^T y|``.
      options: when to stop.

    References:
      A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear
        inverse problems" (SIAM J. Imaging Sci. 2, 2009), equations 4.1 to 4.3.
      B. O'Donoghue and E. Candes, "Adaptive restart for accelerated gradient schemes" (2012,
        arXiv 1204.3982), equation 13.
    """
    tolerance = options.tolerance or default_tolerance(problem.data.dtype)
    largest = jnp.max(correlation / problem.weights, axis=0, keepdims=True)
    start = _start(problem, init, correlation)
    lowest = 1e-3 * start.curvature

    def round_(progress: _Progress) -> _Progress:
        steps = jnp.minimum(options.check_every, options.max_iterations - progress.steps)
        steps = jnp.where(progress.fresh, 0, steps)  # the start may be a solution

        def one(k: Array, state: _State) -> _State:
            lam = problem.lam
            if init is None:
                count = progress.steps + k
                early = jnp.maximum(lam, largest * _CONTINUATION ** (count + 1).astype(lam.dtype))
                lam = jnp.where(count < _CONTINUATION_STEPS, early, lam)
            return _step(problem, state, lam, lowest, progress.done)

        state = lax.fori_loop(0, steps, one, progress.state)
        return _check(problem, progress, state, steps, largest, tolerance)

    none = jnp.zeros(start.fit.shape, jnp.int32)
    unknown = jnp.full(start.fit.shape, jnp.inf, start.fit.dtype)
    first = _Progress(
        state=start,
        objective=unknown,
        gap=unknown,
        error=unknown,
        best=unknown,
        waited=none,
        done=none > 0,
        iterations=none,
        steps=jnp.zeros((), jnp.int32),
        fresh=jnp.ones((), bool),
    )
    end = lax.while_loop(
        lambda p: (p.steps < options.max_iterations) & ~jnp.all(p.done), round_, first
    )
    status = jnp.where(end.done, STALLED, MAX_ITERATIONS)
    return Solution(
        c=end.state.c,
        u=end.state.u,
        objective=end.objective,
        gap=end.gap,
        iterations=end.iterations,
        status=jnp.where(end.error <= tolerance, CONVERGED, status).astype(jnp.int32),
    )


def _start(problem: Problem, init: Array | None, correlation: Array) -> _State:
    """The first point, and a lower bound on the largest curvature for its first step.

    ``(max_i |A_i^T y| / ||y||)^2 <= max_i ||A_i||^2``, at most the largest eigenvalue.
    """
    if init is None:
        c, u = jnp.zeros_like(correlation), jnp.zeros_like(problem.data)
    else:
        c, u = init, problem.maps.forward(init)
    square = total(problem.data**2)
    curvature = jnp.max(correlation, axis=0, keepdims=True) ** 2 / nonzero(square)
    return _State(
        c=c,
        u=u,
        v=c,
        uv=u,
        fit=total(problem.residual(u) ** 2) / 2,
        norm=total(problem.weights * jnp.abs(c)),
        momentum=jnp.ones_like(curvature),
        curvature=jnp.where(curvature > 0, curvature, 1),
    )


def _step(problem: Problem, state: _State, lam: Array, lowest: Array, done: Array) -> _State:
    eps = float(jnp.finfo(lam.dtype).eps)
    v, length = state.v, 1 / state.curvature
    moved = v + length * problem.maps.adjoint(problem.residual(state.uv))
    c = soft_threshold(moved, length * lam * problem.weights)
    u = problem.maps.forward(c)
    fit, norm = total(problem.residual(u) ** 2) / 2, total(problem.weights * jnp.abs(c))

    size, curved = total((c - v) ** 2), _curved(problem, u, state.uv)
    found = curved / nonzero(size)
    # A difference of measurements that is rounding says nothing about the curvature.
    above = (found > state.curvature) & (curved > (64 * eps) ** 2 * total(u**2))
    falls = fit + lam * norm <= state.fit + lam * state.norm
    take = (~above | falls) & ~done
    slower = jnp.where(size > 0, jnp.maximum(_SHRINK * state.curvature, lowest), state.curvature)
    curvature = jnp.where(above, _GROW * found, slower)

    # Restart when the momentum points uphill (arXiv 1204.3982, equation 13).
    uphill = total((v - c) * (c - state.c)) > 0
    last = jnp.where(uphill, 1, state.momentum)
    momentum = (1 + jnp.sqrt(1 + 4 * last**2)) / 2
    ahead = (last - 1) / momentum
    following = _State(
        c=c,
        u=u,
        v=c + ahead * (c - state.c),
        uv=u + ahead * (u - state.u),
        fit=fit,
        norm=norm,
        momentum=momentum,
        curvature=curvature,
    )
    chosen = jax.tree.map(lambda new, old: jnp.where(take, new, old), following, state)
    return chosen._replace(curvature=jnp.where(done, state.curvature, curvature))


def _curved(problem: Problem, u: Array, uv: Array) -> Array:
    """``d^T H d`` for the step between two points, H the largest Hessian of the data term there."""
    rows = problem.weight
    if problem.one_sided:
        rows = jnp.where((u > 0) | (uv > 0), 1, rows)
    return total(rows * (u - uv) ** 2)


def _check(
    problem: Problem,
    progress: _Progress,
    state: _State,
    steps: Array,
    largest: Array,
    tolerance: float,
) -> _Progress:
    eps = float(jnp.finfo(state.c.dtype).eps)
    objective, gap, correlation, _ = certify(problem, state.c, state.u)
    free = problem.lam == 0
    error = jnp.where(free, correlation / nonzero(largest), gap / nonzero(objective))
    # Rounding of the measurements perturbs every correlation by about eps lam_max.
    floor = 4 * eps * (1 + jnp.where(free, 0, largest * state.norm / nonzero(objective)))
    waited = jnp.where((error < 0.9 * progress.best) | progress.done, 0, progress.waited + 1)
    stuck = (waited >= _PATIENCE) & (error <= floor)
    return _Progress(
        state=state,
        objective=objective,
        gap=gap,
        error=error,
        best=jnp.minimum(error, progress.best),
        waited=waited,
        done=progress.done | (error <= tolerance) | stuck | ~jnp.isfinite(objective),
        iterations=jnp.where(progress.done, progress.iterations, progress.steps + steps),
        steps=progress.steps + steps,
        fresh=jnp.zeros((), bool),
    )
