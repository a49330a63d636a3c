"""Masked l1 recovery with one-sided constraints, for many right-hand sides at once."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jgia import _checks
from jgia.sparse.bases import BlockDCT
from jgia.sparse.operators import ConvOperator, Planes

_SAMPLE = (0, 1, 2)  # the axes of one sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class LassoOptions:
    """How hard to try; static under ``jit``.

    Attributes:
      lam_ratio: the last l1 weight as a fraction of ``lam_max`` (the smallest weight whose
        solution is zero). Small values approach the equality-constrained problem.
      num_stages: steps of the continuation from ``lam_max`` down, geometric, warm-started.
      iterations_per_stage: accelerated proximal gradient steps of each stage.
      one_sided: also ask ``(M x)_i <= 0`` of the equations outside the mask.
    """

    lam_ratio: float = 1e-4
    num_stages: int = 8
    iterations_per_stage: int = 100
    one_sided: bool = True

    def __post_init__(self) -> None:
        _checks.fraction(lam_ratio=self.lam_ratio)
        _checks.at_least(1, num_stages=self.num_stages)
        _checks.at_least(1, iterations_per_stage=self.iterations_per_stage)


class LassoResult(NamedTuple):
    """Solution and certificate, per right-hand side.

    Attributes:
      x: (C, H, W, J) images.
      lam: (J,) the last l1 weight.
      objective: (J,) objective at x and lam.
      duality_gap: (J,) objective minus a feasible dual value at the returned point: an upper
        bound on how far the objective is from its minimum.
      violation: (J,) largest positive ``(M x)_i`` outside the mask.
      iterations: (J,) iterations done.
      finite: (J,) whether the data and the result were finite; x is zero where not.
    """

    x: Planes
    lam: Float[Array, " batch"]
    objective: Float[Array, " batch"]
    duality_gap: Float[Array, " batch"]
    violation: Float[Array, " batch"]
    iterations: Int[Array, " batch"]
    finite: Bool[Array, " batch"]


def masked_lasso(
    operator: ConvOperator,
    y: Planes,
    mask: Bool[Array, "channels height width batch"],
    *,
    basis: BlockDCT | None = None,
    options: LassoOptions | None = None,
    step_bound: Float[Array, ""] | None = None,
) -> LassoResult:
    """Minimize ``f(M Psi c) + lam ||c||_1`` for a decreasing sequence of lam; ``x = Psi c``.

    ``f(u) = 1/2 ||mask * (u - y)||^2 + 1/2 ||(1 - mask) * max(u, 0)||^2``: equations where a
    rectified measurement was active, a squared hinge where it was not. FISTA (Beck and Teboulle
    2009) with the gradient-based restart of O'Donoghue and Candes (2015, arXiv 1204.3982),
    continuation in lam, all samples in one batch with their own lam.

    Args:
      operator: linear map M.
      y: (F, H, W, J) data; ignored outside the mask.
      mask: (F, H, W, J) active equations.
      basis: orthonormal synthesis basis Psi; 8x8 blocks when left out.
      options: continuation and iteration counts.
      step_bound: upper bound on the largest eigenvalue of ``M^T M``; computed from the kernel
        when left out.

    Returns:
      A :class:`LassoResult`.

    Raises:
      ValueError: shapes do not fit.

    Guarantees: a fixed number of steps, so ``jit``, ``vmap`` and ``grad`` pass through (the
      derivative is that of the unrolled iteration).
    """
    basis, options = basis or BlockDCT(), options or LassoOptions()
    if y.shape != mask.shape:
        raise ValueError(f"y and mask must have one shape, got {y.shape} and {mask.shape}.")
    if y.shape[0] != operator.kernel.shape[-1]:
        raise ValueError(
            f"y has {y.shape[0]} channels, the operator maps to {operator.kernel.shape[-1]}."
        )
    finite = jnp.all(jnp.isfinite(y) | ~mask, axis=_SAMPLE, keepdims=True)
    weight = mask.astype(y.dtype)
    data = jnp.where(mask & finite, y, 0)
    bound = operator.squared_norm_bound() if step_bound is None else step_bound
    step = 1 / bound

    def residual(u: Array) -> Array:
        """The gradient of f at u."""
        outside = (1 - weight) * jnp.maximum(u, 0) if options.one_sided else 0
        return weight * u - data + outside

    def gradient(c: Array) -> Array:
        u = operator.apply(basis.synthesize(c))
        return basis.analyze(operator.adjoint(residual(u)))

    correlation = basis.analyze(operator.adjoint(data))
    lam_max = jnp.max(jnp.abs(correlation), axis=_SAMPLE, keepdims=True)

    def iterate(carry: tuple[Array, ...], lam: Array) -> tuple[tuple[Array, ...], None]:
        c, v, t = carry
        moved = v - step * gradient(v)
        c_next = _soft_threshold(moved, step * lam)
        # Restart when the momentum points uphill (arXiv 1204.3982, eq. 13).
        uphill = _total((v - c_next) * (c_next - c)) > 0
        t = jnp.where(uphill, 1, t)
        t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        v_next = c_next + (t - 1) / t_next * (c_next - c)
        return (c_next, v_next, t_next), None

    num = options.num_stages
    ratios = options.lam_ratio ** (jnp.arange(1, num + 1, dtype=y.dtype) / num)
    per_step = jnp.repeat(ratios, options.iterations_per_stage)
    lams = per_step[:, None, None, None, None] * lam_max[None]
    start = (jnp.zeros_like(correlation), jnp.zeros_like(correlation), jnp.ones_like(lam_max))
    (c, _, _), _ = lax.scan(iterate, start, lams)

    lam = lams[-1]
    x = basis.synthesize(c)
    u = operator.apply(x)
    objective, gap = _certificate(
        c, u, residual(u), data, weight, lam, basis, operator, options.one_sided
    )
    ok = finite & jnp.all(jnp.isfinite(x), axis=_SAMPLE, keepdims=True)
    return LassoResult(
        x=jnp.where(ok, x, 0),
        lam=lam[0, 0, 0],
        objective=jnp.where(ok, objective, jnp.inf)[0, 0, 0],
        duality_gap=jnp.where(ok, gap, jnp.inf)[0, 0, 0],
        violation=jnp.max((1 - weight) * jnp.maximum(u, 0), axis=_SAMPLE),
        iterations=jnp.full(y.shape[-1], per_step.shape[0], jnp.int32),
        finite=ok[0, 0, 0],
    )


def _certificate(
    c: Array,
    u: Array,
    residual: Array,
    data: Array,
    weight: Array,
    lam: Array,
    basis: BlockDCT,
    operator: ConvOperator,
    one_sided: bool,
) -> tuple[Array, Array]:
    """Objective and duality gap ``f(u) + lam |c|_1 + f*(nu)``, nu a scaled, feasible residual.

    With ``nu = s * grad f(u)``, ``f*(nu) = sum_mask (nu^2 / 2 + nu y) + sum_outside nu^2 / 2``
    (outside the mask nu >= 0 by construction), and s is the largest factor <= 1 for which
    ``|Psi^T M^T nu|_inf <= lam``.
    """
    hinge = _total(((1 - weight) * jnp.maximum(u, 0)) ** 2) if one_sided else 0
    fit = _total((weight * u - data) ** 2)
    objective = (fit + hinge) / 2 + lam * _total(jnp.abs(c))
    correlation = jnp.max(
        jnp.abs(basis.analyze(operator.adjoint(residual))), axis=_SAMPLE, keepdims=True
    )
    scale = jnp.minimum(1, lam / jnp.where(correlation > 0, correlation, 1))
    nu = scale * residual
    conjugate = _total(nu**2) / 2 + _total(weight * nu * data)
    return objective, objective + conjugate


def _total(a: Array) -> Array:
    """Sum over everything but the batch: (1, 1, 1, J)."""
    return jnp.sum(a, axis=_SAMPLE, keepdims=True)


def _soft_threshold(x: Array, lam: Array) -> Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - lam, 0)
