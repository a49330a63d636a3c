"""Masked least squares for many right-hand sides at once: preconditioned CGLS, matrix-free."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jgia import _checks
from jgia.sparse.operators import Domain, LinearOperator, Range
from jgia.sparse.preconditioners import preconditioner

CONVERGED, MAX_ITERATIONS, NONFINITE = 0, 1, 2


class LeastSquaresResult(NamedTuple):
    """Solution and its certificate, per right-hand side.

    Attributes:
      x: (*domain, J) minimizers; all-zero where the status is ``NONFINITE``.
      relative_residual: (J,) ``||mask * (M x - y)|| / ||mask * y||`` at the returned point (0 for
        a zero right-hand side).
      gradient: (J,) normalized norm of the normal equations' residual at the returned point,
        ``||M^T mask (y - M x)||_P / ||M^T mask y||_P`` in the preconditioner's norm.
      iterations: (J,) iterations until each right-hand side stopped.
      status: (J,) ``CONVERGED``, ``MAX_ITERATIONS`` or ``NONFINITE``.
    """

    x: Domain
    relative_residual: Float[Array, " batch"]
    gradient: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    status: Int[Array, " batch"]


def masked_least_squares(
    operator: LinearOperator,
    y: Range,
    mask: Bool[Array, "*range batch"],
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
    num_refinements: int = 1,
    abandon_residual: float = math.inf,
) -> LeastSquaresResult:
    """Solve ``min_x 1/2 || mask * (M x - y) ||^2`` for every sample of a batch at once.

    Conjugate gradients on the normal equations in CGLS form (the residual is kept in data space,
    so accuracy follows cond(M), not its square), preconditioned by what the operator tells of
    ``M^T diag(mask) M``: a convolution its exact C x C pixel blocks, a matrix or a fully connected
    layer its exact diagonal, others nothing. Each sample has its own step lengths and stops on
    its own; a stopped sample no longer changes. ``num_refinements`` restarts from the true
    residual remove the drift of the recursion.

    Args:
      operator: the linear map M, a pytree with the methods of
        :class:`~jgia.sparse.operators.LinearOperator`.
      y: (*range, J) data; (F, H, W, J) for a convolution, (m, J) for a matrix.
      mask: (*range, J) which equations count.
      tolerance: relative size of the gradient at which a sample stops; default ``8 eps`` of the
        dtype.
      max_iterations: per pass.
      num_refinements: extra passes on the true residual.
      abandon_residual: samples whose relative residual is larger after the first pass are left
        as they are: an inconsistent system gains nothing from more digits.

    Returns:
      A :class:`LeastSquaresResult`. Where the system does not determine x, the result is the
      solution of least norm in the preconditioner's metric.

    Raises:
      ValueError: shapes do not fit or an option is out of range.

    Guarantees: ``x`` is differentiable in ``y``, and where the system determines it also in
      ``operator.kernel``, by the implicit function theorem (reverse mode); mask and certificate
      are constant. The scale of ``y`` does not matter: every sample is solved in units of its
      largest entry. Works under ``jit`` and ``vmap``.

    References:
      A. Bjorck, "Numerical Methods for Least Squares Problems" (SIAM, 1996), algorithm 7.4.1.
    """
    _checks.at_least(1, max_iterations=max_iterations)
    _checks.at_least(0, num_refinements=num_refinements)
    if y.shape != mask.shape:
        raise ValueError(f"y and mask must have one shape, got {y.shape} and {mask.shape}.")
    domain = jax.eval_shape(operator.adjoint, y)
    if (expected := jax.eval_shape(operator.apply, domain).shape) != y.shape:
        raise ValueError(f"y has shape {y.shape}, the operator maps to {expected}.")
    if tolerance is None:
        tolerance = 8 * float(jnp.finfo(y.dtype).eps)
    _checks.positive(tolerance=tolerance)
    if not abandon_residual > 0:
        raise ValueError(
            f"abandon_residual must be positive, or infinite to keep all; got {abandon_residual!r}."
        )
    limits = _Limits(tolerance, max_iterations, num_refinements, abandon_residual)
    return _solve(limits, operator, y, mask)


class _Limits(NamedTuple):
    tolerance: float
    max_iterations: int
    num_refinements: int
    abandon_residual: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(limits: _Limits, operator: LinearOperator, y: Array, mask: Array) -> LeastSquaresResult:
    weight = mask.astype(y.dtype)
    precondition = preconditioner(operator, weight)
    finite = jnp.all(jnp.isfinite(y) | ~mask, axis=_sample_axes(y))
    data, unit = _in_units(jnp.where(mask & _each(finite, y), y, 0))

    def gradient_of(residual: Array) -> tuple[Array, Array]:
        s = operator.adjoint(residual)
        return s, _inner(s, precondition(s))

    _, gamma_data = gradient_of(data)
    goal = limits.tolerance**2 * gamma_data
    norm_squared = _inner(data, data)

    def one_pass(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, iterations = carry
        residual = data - weight * operator.apply(x)
        too_large = _inner(residual, residual) > limits.abandon_residual**2 * norm_squared
        goal_now = jnp.where((number > 0) & too_large, jnp.inf, goal)
        dx, used = _cgls(operator, precondition, weight, residual, goal_now, limits.max_iterations)
        return x + dx, iterations + used

    x = jnp.zeros(jax.eval_shape(operator.adjoint, y).shape, y.dtype)
    iterations = jnp.zeros(y.shape[-1], jnp.int32)
    x, iterations = lax.fori_loop(0, 1 + limits.num_refinements, one_pass, (x, iterations))

    residual = data - weight * operator.apply(x)
    _, gamma = gradient_of(residual)
    result = _certify(x, data, residual, gamma, gamma_data, iterations, finite, limits.tolerance)
    return result._replace(x=_each(unit, x) * result.x)


def _solve_forward(
    limits: _Limits, operator: LinearOperator, y: Array, mask: Array
) -> tuple[LeastSquaresResult, tuple[LinearOperator, Array, Array, LeastSquaresResult]]:
    result: LeastSquaresResult = _solve(limits, operator, y, mask)  # pyright: ignore[reportAssignmentType]
    return result, (operator, y, mask, result)


def _solve_backward(
    limits: _Limits,
    saved: tuple[LinearOperator, Array, Array, LeastSquaresResult],
    cotangent: LeastSquaresResult,
) -> tuple[LinearOperator, Array, None]:
    operator, y, mask, result = saved
    weight = mask.astype(y.dtype)
    precondition = preconditioner(operator, weight)
    ok = result.status != NONFINITE
    data = jnp.where(mask & _each(ok, y), y, 0)
    # lam solves (M^T mask M) lam = x_bar; then <x_bar, dx> is the differential of
    # <mask * M lam, y - M x> with lam and x held fixed.
    b, unit = _in_units(jnp.where(_each(ok, cotangent.x), cotangent.x, 0))
    lam = _each(unit, b) * _solve_normal(operator, precondition, weight, b, limits)

    def linearized(operator: LinearOperator, data: Array) -> Array:
        residual = data - weight * operator.apply(result.x)
        return jnp.sum(weight * operator.apply(lam) * residual)

    operator_bar, y_bar = jax.grad(linearized, argnums=(0, 1), allow_int=True)(operator, data)
    return operator_bar, y_bar, None


_solve.defvjp(_solve_forward, _solve_backward)


def _cgls(
    operator: LinearOperator,
    precondition: Callable[[Array], Array],
    weight: Array,
    residual: Array,
    goal: Array,
    max_iterations: int,
) -> tuple[Array, Array]:
    """CGLS from zero; returns the correction and the iterations used, per sample.

    A sample also stops once its gradient is what rounding makes of its residual
    (``|s|_P <= 8 eps |r|``): going on would divide noise by noise and diverge.
    """
    s = operator.adjoint(residual)
    z = precondition(s)
    gamma = _inner(s, z)
    floor = (8 * float(jnp.finfo(residual.dtype).eps)) ** 2
    gamma = jnp.where(gamma > floor * _inner(residual, residual), gamma, 0)
    start = (jnp.zeros_like(s), residual, z, gamma, jnp.zeros(gamma.shape, jnp.int32))

    def running(gamma: Array) -> Array:
        return (gamma > goal) & jnp.isfinite(gamma)

    def cond(carry: tuple[tuple[Array, ...], Array]) -> Array:
        state, k = carry
        return (k < max_iterations) & jnp.any(running(state[3]))

    def body(carry: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
        (x, r, p, gamma, used), k = carry
        q = weight * operator.apply(p)
        curvature = _inner(q, q)
        live = running(gamma) & (curvature > 0)
        alpha = jnp.where(live, gamma / jnp.where(live, curvature, 1), 0)
        x = x + _each(alpha, p) * p
        r = r - _each(alpha, q) * q
        s = operator.adjoint(r)
        z = precondition(s)
        gamma_next = _inner(s, z)
        gamma_next = jnp.where(gamma_next > floor * _inner(r, r), gamma_next, 0)
        gamma_next = jnp.where(live, gamma_next, 0)
        beta = jnp.where(live, gamma_next / jnp.where(live, gamma, 1), 0)
        p = jnp.where(_each(live, p), z + _each(beta, p) * p, p)
        return (x, r, p, gamma_next, used + live.astype(jnp.int32)), k + 1

    (x, _, _, _, used), _ = lax.while_loop(cond, body, (start, jnp.zeros((), jnp.int32)))
    return x, used


def _solve_normal(
    operator: LinearOperator,
    precondition: Callable[[Array], Array],
    weight: Array,
    b: Array,
    limits: _Limits,
) -> Array:
    """``(M^T diag(weight) M) lam = b`` per sample, as far as the operator reaches b.

    CGLS on ``min_u ||M^T u - b||_P`` with ``u = diag(weight) M lam``, which, unlike conjugate
    gradients, stays bounded where no lam solves the equation.
    """
    floor = (8 * float(jnp.finfo(b.dtype).eps)) ** 2

    def gradient_of(r: Array) -> tuple[Array, Array, Array]:
        z = precondition(r)
        s = weight * operator.apply(z)
        gamma = _inner(s, s)
        return z, s, jnp.where(gamma > floor * _inner(r, z), gamma, 0)

    goal = limits.tolerance**2 * gradient_of(b)[2]

    def cond(carry: tuple[Array, ...]) -> Array:
        *_, gamma, k = carry
        return (k < limits.max_iterations) & jnp.any(gamma > goal)

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        lam, r, direction, p, gamma, k = carry
        q = operator.adjoint(p)
        curvature = _inner(q, precondition(q))
        live = (gamma > goal) & (curvature > 0)
        alpha = jnp.where(live, gamma / jnp.where(live, curvature, 1), 0)
        lam, r = lam + _each(alpha, lam) * direction, r - _each(alpha, r) * q
        z, s, gamma_next = gradient_of(r)
        gamma_next = jnp.where(live, gamma_next, 0)
        beta = jnp.where(live, gamma_next / jnp.where(live, gamma, 1), 0)
        direction, p = z + _each(beta, z) * direction, s + _each(beta, s) * p
        return lam, r, direction, p, gamma_next, k + 1

    def one_pass(_: Array, lam: Array) -> Array:
        r = b - operator.adjoint(weight * operator.apply(lam))
        start = (lam, r, *gradient_of(r), jnp.zeros((), jnp.int32))
        return lax.while_loop(cond, body, start)[0]

    return lax.fori_loop(0, 1 + limits.num_refinements, one_pass, jnp.zeros_like(b))


def _certify(
    x: Array,
    data: Array,
    residual: Array,
    gamma: Array,
    gamma_data: Array,
    iterations: Array,
    finite: Array,
    tolerance: float,
) -> LeastSquaresResult:
    norm = jnp.sqrt(_inner(data, data))
    relative = jnp.where(norm > 0, jnp.sqrt(_inner(residual, residual)) / _nonzero(norm), 0)
    gradient = jnp.sqrt(jnp.maximum(gamma, 0) / _nonzero(gamma_data))
    gradient = jnp.where(gamma_data == 0, 0, gradient)
    # The recomputed gradient carries the rounding of its own evaluation, hence the wider limit.
    eps = float(jnp.finfo(x.dtype).eps)
    limit = 16 * jnp.maximum(tolerance, eps * jnp.maximum(relative, 1))
    status = jnp.where(gradient <= limit, CONVERGED, MAX_ITERATIONS)
    ok = finite & jnp.isfinite(gradient) & jnp.all(jnp.isfinite(x), axis=_sample_axes(x))
    return LeastSquaresResult(
        x=jnp.where(_each(ok, x), x, 0),
        relative_residual=jnp.where(ok, relative, jnp.inf),
        gradient=jnp.where(ok, gradient, jnp.inf),
        iterations=iterations,
        status=jnp.where(ok, status, NONFINITE).astype(jnp.int32),
    )


def _inner(a: Array, b: Array) -> Array:
    """Inner product over everything but the batch: (J,)."""
    return jnp.sum(a * b, axis=_sample_axes(a))


def _sample_axes(a: Array) -> tuple[int, ...]:
    return tuple(range(a.ndim - 1))


def _each(value: Array, a: Array) -> Array:
    """One value per sample, (J,), shaped to broadcast against samples (..., J)."""
    return value.reshape((1,) * (a.ndim - 1) + value.shape)


def _in_units(a: Array) -> tuple[Array, Array]:
    """Each sample divided by its largest magnitude, so that no square leaves the float range."""
    unit = _nonzero(jnp.max(jnp.abs(a), axis=_sample_axes(a)))
    return a / _each(unit, a), unit


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
