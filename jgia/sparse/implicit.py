"""Derivatives of a solution with respect to the data, lam, weights and operator."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia.sparse.bases import Basis
from jgia.sparse.operators import LinearOperator
from jgia.sparse.problem import Problem, Shapes, maps_of, nonzero, total


class Parameters(NamedTuple):
    """What a solution depends on, in the solvers' columns."""

    operator: LinearOperator
    weight: Array
    data: Array
    weights: Array
    lam: Array


class Static(NamedTuple):
    """What it depends on without a derivative."""

    basis: Basis | None
    shapes: Shapes
    one_sided: bool


def problem_of(static: Static, parameters: Parameters) -> Problem:
    """The problem the parameters describe."""
    operator, weight, data, weights, lam = parameters
    maps = maps_of(operator, static.basis, static.shapes)
    return Problem(maps, weight, data, weights, lam, static.one_sided)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def differentiable(
    static: Static, parameters: Parameters, c: Array, objective: Array
) -> tuple[Array, Array]:
    """``c`` and ``objective`` as they are, with the derivatives of a minimizer and its minimum.

    On the support S of c, where the signs are fixed, ``grad_S P(c, parameters) = 0`` with P the
    objective; hence ``H_SS dc_S = -d(grad_S P)`` with H the Hessian of the data term, and
    ``dP`` is the derivative with c held fixed. Valid where the support is locally constant:
    almost everywhere.
    """
    del static, parameters
    return c, objective


@differentiable.defjvp
def _differentiable_jvp(
    static: Static, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    parameters, c, objective = primals
    support = (c != 0).astype(c.dtype)
    held = lax.stop_gradient(c)

    def downhill(p: Parameters) -> tuple[Array, Array]:
        problem = problem_of(static, p)
        u = problem.maps.forward(held)
        residual = problem.residual(u)
        penalty = p.lam * p.weights
        slope = support * (problem.maps.adjoint(residual) - penalty * jnp.sign(held))
        value = total(residual**2) / 2 + total(penalty * jnp.abs(held))
        return slope, value

    _, (slope, value) = jax.jvp(downhill, (parameters,), (tangents[0],))

    problem = problem_of(static, parameters)
    rows = problem.weight
    if static.one_sided:
        rows = jnp.where(problem.maps.forward(held) > 0, 1, rows)

    def hessian(x: Array) -> Array:
        inside = problem.maps.adjoint(rows * problem.maps.forward(support * x))
        return support * inside + (1 - support) * x

    limit = 2 * c.shape[0]
    tangent = lax.custom_linear_solve(
        hessian, slope, lambda matvec, b: _conjugate_gradients(matvec, b, limit), symmetric=True
    )
    return (c, objective), (tangent, value)


def _conjugate_gradients(matvec: Any, b: Array, limit: int) -> Array:
    """Solve for all columns, each until its residual is rounding."""
    floor = (16 * float(jnp.finfo(b.dtype).eps)) ** 2 * total(b**2)

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, r, p, square, k = carry
        q = matvec(p)
        curvature = total(p * q)
        live = (square > floor) & (curvature > 0)
        step = jnp.where(live, square / nonzero(curvature), 0)
        x, r = x + step * p, r - step * q
        following = jnp.where(live, total(r**2), 0)
        return x, r, r + following / nonzero(square) * p, following, k + 1

    start = (jnp.zeros_like(b), b, b, total(b**2), jnp.zeros((), jnp.int32))
    end = lax.while_loop(lambda s: (s[4] < limit) & jnp.any(s[3] > floor), body, start)
    return end[0]
