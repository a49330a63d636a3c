"""The sparsest-looking vector that meets masked equations, exactly or up to a noise level."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jgia import _checks
from jgia.sparse._cgls import cgls
from jgia.sparse.admm import AdmmOptions, AdmmState, Split, admm, mean_column_norm, prox_constraint
from jgia.sparse.bases import Basis
from jgia.sparse.lasso import prepare
from jgia.sparse.operators import Domain, LinearOperator, Range
from jgia.sparse.problem import (
    CONVERGED,
    INVALID,
    MAX_ITERATIONS,
    NONFINITE,
    as_operator,
    nonzero,
    total,
    violation,
)

_POLISH_STEPS = 100


class _Assessment(NamedTuple):
    """A point, the bound a dual point gives, and the largest relative miss of the certificate."""

    c: Array
    objective: Array
    lower: Array
    residual: Array
    outside: Array
    error: Array


class BasisPursuitResult(NamedTuple):
    """Solution and certificate, per right-hand side.

    Attributes:
      x: (*domain, J) ``Psi c``; zero where the status is ``NONFINITE`` or ``INVALID``.
      coefficients: (*coefficients, J) the sparse c.
      objective: (J,) ``sum_i w_i |c_i|``.
      lower_bound: (J,) a feasible dual value: no vector that meets the constraints has a smaller
        objective.
      residual: (J,) ``||mask * (A x - y)||``.
      violation: (J,) largest positive ``(A x)_i`` outside the mask.
      iterations: (J,) iterations until each sample stopped.
      status: (J,) ``CONVERGED``, ``MAX_ITERATIONS``, ``NONFINITE`` or ``INVALID``.
    """

    x: Domain
    coefficients: Float[Array, "*coefficients batch"]
    objective: Float[Array, " batch"]
    lower_bound: Float[Array, " batch"]
    residual: Float[Array, " batch"]
    violation: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    status: Int[Array, " batch"]


def basis_pursuit(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    weights: Domain | None = None,
    basis: Basis | None = None,
    one_sided: bool = False,
    noise: float | Float[Array, ...] = 0.0,
    options: AdmmOptions | None = None,
) -> BasisPursuitResult:
    """``min sum_i w_i |c_i|`` subject to ``||mask * (A Psi c - y)|| <= noise``.

    With ``one_sided`` also subject to ``(A Psi c)_i <= 0`` outside the mask. Alternating
    directions with one factorization for all samples (:class:`jgia.sparse.AdmmOptions`). Without
    noise every check also tries the vertex that the support points to.

    Args:
      operator: the map A, or a matrix (m, n).
      y: (*range, J) right-hand sides; entries outside the mask are ignored.
      mask: (*range, J) which equations count; all when left out.
      weights: (*coefficients, J) positive weights of the coefficients; 1 when left out.
      basis: orthonormal synthesis basis Psi; the identity when left out.
      one_sided: whether to ask for ``(A x)_i <= 0`` outside the mask.
      noise: radius, zero or more, a number or (J,).
      options: tolerance and limits; a check every 50 iterations when left out.

    Returns:
      A :class:`BasisPursuitResult`. A sample is ``CONVERGED`` when objective and lower bound
      differ by at most the tolerance times the objective, and the constraints are missed by at
      most the tolerance times ``||mask * y||``.

    Raises:
      ValueError: shapes do not fit, or the noise is negative.

    Guarantees: ``lower_bound`` is one up to rounding whatever the status, also where equations
      contradict each other: it then grows without limit, and the status is ``MAX_ITERATIONS``.

    >>> A = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> result = basis_pursuit(A, jnp.array([[2.0], [0.0]]))
    >>> result.x[:, 0].round(3).tolist(), result.status.tolist()
    ([1.0, 0.0, 0.0], [0])

    References:
      S. Chen, D. Donoho and M. Saunders, "Atomic decomposition by basis pursuit" (1998),
        equations 1.3 and 5.1.
    """
    options = options or AdmmOptions(check_every=50)
    operator = as_operator(operator)
    radius = jnp.asarray(noise, y.dtype)
    if isinstance(noise, float):
        _checks.non_negative(noise=noise)
    if radius.shape not in ((), y.shape[-1:]):
        raise ValueError(
            f"noise must be a number or have shape {y.shape[-1:]}, got {radius.shape}."
        )
    prepared = prepare(operator, y, 1.0, mask, weights, basis, one_sided)
    problem = prepared.problem
    radius = jnp.broadcast_to(radius, y.shape[-1:])[None]
    valid = prepared.valid & (radius >= 0) & jnp.isfinite(radius)
    radius = jnp.where(valid, radius, 0)
    size = nonzero(jnp.sqrt(total(problem.data**2)))

    def assess(c: Array, nu: Array) -> _Assessment:
        u = problem.maps.forward(c)
        on = problem.weight > 0
        nu = jnp.where(on, nu, jnp.minimum(nu, 0) if one_sided else 0)
        reached = jnp.max(
            jnp.abs(problem.maps.adjoint(nu)) / problem.weights, axis=0, keepdims=True
        )
        inner = total(nu * problem.data) - radius * jnp.sqrt(total(jnp.where(on, nu, 0) ** 2))
        objective = total(problem.weights * jnp.abs(c))
        # Zero is dual feasible, too.
        lower = jnp.maximum(inner, 0) / nonzero(reached)
        residual = jnp.sqrt(total((problem.weight * u - problem.data) ** 2))
        outside = violation(problem, u)
        missed = [jnp.abs(objective - lower) / nonzero(objective), (residual - radius) / size]
        if one_sided:
            missed.append(outside / size)
        error = functools.reduce(jnp.maximum, missed)
        return _Assessment(c, objective, lower, residual, outside, error)

    def polish(state: AdmmState) -> tuple[Array, Array]:
        """The vertex that the support and the active equations point to, primal and dual.

        Alternating directions find these long before the values, as in linear programming.
        """
        support = state.z != 0
        rows = problem.weight > 0
        if one_sided:
            rows = rows | (state.p > 0)
        rows = jnp.broadcast_to(rows, problem.data.shape)

        def forward(c: Array) -> Array:
            return jnp.where(rows, problem.maps.forward(jnp.where(support, c, 0)), 0)

        def adjoint(r: Array) -> Array:
            return jnp.where(support, problem.maps.adjoint(jnp.where(rows, r, 0)), 0)

        signs = problem.weights * jnp.sign(state.z)
        tiny = (4 * float(jnp.finfo(y.dtype).eps)) ** 2
        limit = _POLISH_STEPS
        c, *_ = cgls(
            forward, adjoint, state.z, problem.data, tiny * total(prepared.correlation**2), limit
        )
        nu = jnp.where(rows, -state.rho * state.p, 0)
        nu, *_ = cgls(adjoint, forward, nu, signs, tiny * total(forward(signs) ** 2), limit)
        return c, nu

    def measure(state: AdmmState) -> _Assessment:
        raw, sharp = assess(state.z, -state.rho * state.p), assess(*polish(state))
        better = (sharp.error < raw.error) & (radius == 0)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), sharp, raw)

    def done(state: AdmmState, tolerance: float) -> Array:
        return measure(state).error <= tolerance

    # A threshold of a tenth of the largest coefficient that the correlations suggest.
    correlation = prepared.correlation / problem.weights
    scale = mean_column_norm(problem.maps, correlation)
    largest = jnp.max(correlation, axis=0, keepdims=True) / scale
    rho = 10 / nonzero(options.coupling * scale * largest)
    zero = jnp.zeros_like(correlation)
    split = Split(
        maps=problem.maps,
        analysis=None,
        prox_u=prox_constraint(problem.weight, problem.data, one_sided, radius),
        penalty=problem.weights,
    )
    dense = operator if basis is None else None
    end = admm(split, dense, (zero, jnp.zeros_like(problem.data), zero), rho, done, options)
    found = measure(end)
    ok = prepared.finite & valid & jnp.isfinite(found.objective) & jnp.isfinite(found.residual)
    solved = found.error <= options.tolerance_in(y.dtype)
    status = jnp.where(solved, CONVERGED, MAX_ITERATIONS)
    status = jnp.where(ok, status, jnp.where(valid, NONFINITE, INVALID))
    c = jnp.where(ok, found.c, 0).reshape(*prepared.static.shapes.coefficients, y.shape[-1])
    return BasisPursuitResult(
        x=c if basis is None else basis.synthesize(c),
        coefficients=c,
        objective=jnp.where(ok, found.objective, jnp.inf)[0],
        lower_bound=jnp.where(ok, found.lower, 0)[0],
        residual=jnp.where(ok, found.residual, jnp.inf)[0],
        violation=jnp.where(ok, found.outside, 0)[0],
        iterations=end.iterations[0],
        status=status.astype(jnp.int32)[0],
    )
