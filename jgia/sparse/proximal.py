"""Proximal gradient descent for any smooth function and proximal map, through jaxopt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jgia import _checks
from jgia.sparse.fista import FistaOptions, Solution, default_tolerance
from jgia.sparse.problem import CONVERGED, MAX_ITERATIONS, Problem, certify, soft_threshold


class ProximalResult(NamedTuple):
    """Where the iteration ended.

    Attributes:
      x: the last point, shaped like the start.
      error: how far it is from a fixed point, as jaxopt measures it.
      iterations: iterations done.
    """

    x: Any
    error: Float[Array, ""]
    iterations: Int[Array, ""]


def proximal_gradient(
    fun: Callable[[Any], Array],
    prox: Callable[[Any, Any, Any], Any],
    init: Any,
    *,
    hyperparams_prox: Any = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> ProximalResult:
    """``min fun(x) + g(x)`` for one x, by accelerated proximal gradient with a line search.

    For penalties that the solvers of this package do not know, and as their oracle: it calls
    ``jaxopt.ProximalGradient``, which is no longer developed, and is several times slower than
    :func:`jgia.sparse.lasso` on a batch. Use ``jax.vmap`` for many.

    Args:
      fun: a differentiable function of x to a scalar.
      prox: ``prox(x, hyperparams_prox, scaling)``, the proximal map of ``scaling * g``.
      init: a pytree, the start.
      hyperparams_prox: passed on to ``prox``.
      tolerance: of the fixed-point residual.
      max_iterations: at most so many iterations.

    Returns:
      A :class:`ProximalResult`; check its error.

    Raises:
      ValueError: an option is out of range.
    """
    _checks.positive(tolerance=tolerance)
    _checks.at_least(1, max_iterations=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
    solver = jaxopt.ProximalGradient(fun=fun, prox=prox, maxiter=max_iterations, tol=tolerance)
    # jaxopt mixes dtypes and ranks that the strict modes of JAX refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, state = solver.run(init, hyperparams_prox=hyperparams_prox)
    return ProximalResult(params, jnp.asarray(state.error), jnp.asarray(state.iter_num))


def proximal_lasso(problem: Problem, init: Array | None, options: FistaOptions) -> Solution:
    """The l1 problem as one function of all samples, certified by each sample's duality gap."""
    first = jnp.zeros_like(problem.maps.adjoint(problem.data)) if init is None else init
    tolerance = options.tolerance or default_tolerance(first.dtype)

    def fit(c: Array) -> Array:
        return jnp.sum(problem.residual(problem.maps.forward(c)) ** 2) / 2

    def prox(c: Array, penalty: Array, scaling: float | Array = 1.0) -> Array:
        return soft_threshold(c, scaling * penalty)

    penalty = jnp.broadcast_to(problem.lam * problem.weights, first.shape)
    # The fixed-point residual is of the order of the root of the gap.
    end = proximal_gradient(
        fit,
        prox,
        first,
        hyperparams_prox=penalty,
        tolerance=min(tolerance, 1e-2),
        max_iterations=options.max_iterations,
    )
    u = problem.maps.forward(end.x)
    certificate = certify(problem, end.x, u)
    solved = certificate.gap <= tolerance * certificate.objective
    return Solution(
        c=end.x,
        u=u,
        objective=certificate.objective,
        gap=certificate.gap,
        iterations=jnp.broadcast_to(end.iterations, problem.lam.shape).astype(jnp.int32),
        status=jnp.where(solved, CONVERGED, MAX_ITERATIONS).astype(jnp.int32),
    )
