"""The masked, weighted l1 problem: maps, objective, dual point and duality gap.

Inside the solvers a coefficient vector is a column, (n, J), and so are the measurements, (m, J):
whatever shape the operator's samples have, the batch is the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jgia.sparse._operator import matmul
from jgia.sparse.bases import Basis
from jgia.sparse.operators import DenseOperator, Domain, LinearOperator, MatrixOperator, Range

CONVERGED, MAX_ITERATIONS, NONFINITE, STALLED, INVALID = range(5)


class Shapes(NamedTuple):
    """Static shapes of one problem; the batch is not part of them."""

    domain: tuple[int, ...]
    coefficients: tuple[int, ...]
    range: tuple[int, ...]


class Maps(NamedTuple):
    """``A Psi`` and its adjoint on columns: (n, J) to (m, J) and back."""

    forward: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]


class Problem(NamedTuple):
    """One batch of problems; every array may have size 1 along an axis it does not depend on.

    Attributes:
      maps: A Psi and its adjoint.
      weight: (m, J) 1 where an equation counts, else 0.
      data: (m, J) the right-hand sides there, 0 elsewhere.
      weights: (n, J) the weight of each ``|c_i|`` apart from lam, positive.
      lam: (1, J) the l1 weights, zero or more.
      one_sided: whether a squared hinge asks for ``(A Psi c)_i <= 0`` elsewhere.
    """

    maps: Maps
    weight: Array
    data: Array
    weights: Array
    lam: Array
    one_sided: bool

    def residual(self, u: Array) -> Array:
        """Minus the gradient of the data term at the measurements u."""
        residual = self.data - self.weight * u
        if self.one_sided:
            residual -= (1 - self.weight) * jnp.maximum(u, 0)
        return residual


class Certificate(NamedTuple):
    """What is known about a point: each (1, J)."""

    objective: Array
    gap: Array
    correlation: Array  # max_i |Psi^T A^T r|_i / w_i, at most lam at a solution
    norm: Array  # sum_i w_i |c_i|


def as_operator(operator: LinearOperator | Array) -> LinearOperator:
    """The operator itself, or a matrix wrapped as one."""
    return MatrixOperator(operator) if isinstance(operator, jax.Array) else operator


def shapes_of(operator: LinearOperator, basis: Basis | None, y: Array) -> Shapes:
    """Shapes of the domain, of its coefficients and of the range.

    Raises:
      ValueError: the operator does not map to the shape of y.
    """
    if y.ndim < 2:
        raise ValueError(
            f"y must have shape (*range, J) with the batch as its last axis, got {y.shape}; "
            "for one right-hand side use y[:, None]."
        )
    if isinstance(operator, MatrixOperator) and y.shape[:-1] != operator.matrix.shape[:1]:
        raise ValueError(
            f"the matrix has shape {operator.matrix.shape}, so y must have shape "
            f"({operator.matrix.shape[0]}, J), got {y.shape}."
        )
    domain = jax.eval_shape(operator.adjoint, y)
    reached = jax.eval_shape(operator.apply, domain).shape
    if reached != y.shape:
        raise ValueError(f"the operator maps to shape {reached}, but y has shape {y.shape}.")
    coefficients = domain if basis is None else jax.eval_shape(basis.analyze, domain)
    return Shapes(domain.shape[:-1], coefficients.shape[:-1], y.shape[:-1])


def maps_of(operator: LinearOperator, basis: Basis | None, shapes: Shapes) -> Maps:
    """``A Psi`` and its adjoint between columns.

    A matrix is stored a second time, transposed: on CPU XLA's product with a transposed left
    factor is 4 times slower than the copied one (28 against 120 GFLOP/s at 512 x 1024 x 32).
    """
    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    if isinstance(operator, MatrixOperator):
        matrix, transposed = operator.matrix, lax.optimization_barrier(operator.matrix.T)
        apply, adjoint = (lambda x: matmul(matrix, x)), (lambda y: matmul(transposed, y))
    elif isinstance(operator, DenseOperator):
        rows = lax.optimization_barrier(operator.kernel.T)
        apply, adjoint = (lambda x: _dense(rows, x)), (lambda y: operator.adjoint(y))
    else:
        apply, adjoint = (lambda x: operator.apply(x)), (lambda y: operator.adjoint(y))

    def forward(c: Array) -> Array:
        c = c.reshape(*shapes.coefficients, c.shape[-1])
        u = apply(c if basis is None else basis.synthesize(c))
        return u.reshape(-1, u.shape[-1])

    def backward(r: Array) -> Array:
        x = adjoint(r.reshape(*shapes.range, r.shape[-1]))
        c = x if basis is None else basis.analyze(x)
        return c.reshape(-1, c.shape[-1])

    return Maps(forward, backward)


def _dense(rows: Array, x: Array) -> Array:
    """:meth:`DenseOperator.apply` with a kernel (m, H * W * C)."""
    flat = jnp.moveaxis(x, 0, 2).reshape(rows.shape[1], x.shape[-1])
    return matmul(rows, flat)[:, None, None, :]


def lam_max(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    weights: Domain | None = None,
    basis: Basis | None = None,
) -> Float[Array, " batch"]:
    """The smallest l1 weight whose solution is zero: ``max_i |Psi^T A^T (M y)|_i / w_i``, (J,).

    The arguments are those of :func:`jgia.sparse.lasso`. The value is the same with one-sided
    constraints, which are met with equality at zero.
    """
    operator = as_operator(operator)
    shapes = shapes_of(operator, basis, y)
    data = y if mask is None else jnp.where(mask, y, 0)
    maps = maps_of(operator, basis, shapes)
    correlation = jnp.abs(maps.adjoint(data.reshape(-1, y.shape[-1])))
    if weights is not None:
        correlation = correlation / weights.reshape(correlation.shape)
    return jnp.max(correlation, axis=0)


def certify(problem: Problem, c: Array, u: Array) -> Certificate:
    """Objective and duality gap at coefficients c with measurements ``u = A Psi c``.

    With r the residual, ``g = Psi^T A^T r`` and s the largest factor <= 1 for which s r is dual
    feasible (``s |g_i| <= lam w_i``), objective minus dual value is
    ``(1 - s)^2 ||r||^2 / 2 + sum_i (lam w_i |c_i| - s g_i c_i)``:
    no difference of large numbers is taken and no term is negative, so the gap keeps its digits
    in float32.
    """
    residual = problem.residual(u)
    return certificate(problem, c, residual, problem.maps.adjoint(residual))


def certificate(problem: Problem, c: Array, residual: Array, g: Array) -> Certificate:
    """:func:`certify` where the residual r (m, J) and ``g = Psi^T A^T r`` (n, J) are known."""
    if problem.weights.shape[0] == 1:
        correlation = jnp.max(jnp.abs(g), axis=0, keepdims=True) / problem.weights
    else:
        correlation = jnp.max(jnp.abs(g) / problem.weights, axis=0, keepdims=True)
    feasible = correlation <= problem.lam
    scale = jnp.where(feasible, 1, problem.lam / nonzero(correlation))
    square = total(residual**2)
    weighted = problem.weights * jnp.abs(c)
    norm = total(weighted)
    slack = problem.lam * weighted - scale * g * c
    # On CPU XLA fuses a maximum into the sum and takes 10 times as long over both.
    slack = jnp.where(slack > 0, slack, 0)
    return Certificate(
        objective=square / 2 + problem.lam * norm,
        gap=(1 - scale) ** 2 * square / 2 + total(slack),
        correlation=correlation,
        norm=norm,
    )


def violation(problem: Problem, u: Array) -> Array:
    """The largest positive measurement outside the mask: (1, J)."""
    return jnp.max((1 - problem.weight) * jnp.maximum(u, 0), axis=0, keepdims=True)


def soft_threshold(x: Array, threshold: Array) -> Array:
    """The proximal map of ``threshold * |x|``."""
    return x - jnp.clip(x, -threshold, threshold)


def total(a: Array) -> Array:
    """Sum over a sample: (1, J)."""
    return jnp.sum(a, axis=0, keepdims=True)


def nonzero(x: Array) -> Array:
    """x, with 1 in the place of what is not positive: a safe divisor."""
    return jnp.where(x > 0, x, 1)
