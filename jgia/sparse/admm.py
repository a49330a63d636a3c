"""Alternating directions for a batch of l1 problems with one shared factorization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia import _checks
from jgia.sparse._operator import matmul
from jgia.sparse.fista import Solution
from jgia.sparse.operators import LinearOperator, MatrixOperator
from jgia.sparse.problem import (
    CONVERGED,
    MAX_ITERATIONS,
    Maps,
    Problem,
    certify,
    nonzero,
    soft_threshold,
    total,
)

_RELAXATION = 1.6
_IMBALANCE, _RESCALE = 4.0, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdmmOptions:
    """When to stop, and how to weigh the two splits; static under ``jit``.

    Attributes:
      tolerance: of the certificate, as the solver's documentation says; 1e-4 in float32 and 1e-6
        in float64 when left out.
      max_iterations: at most so many iterations.
      check_every: iterations between two evaluations of the certificate, after each of which
        the step of every sample is doubled or halved where one residual lags.
      coupling: how much ``z = K x`` weighs against ``u = A x``, in units of the mean squared
        norm of the columns of A.
      num_inner: most conjugate gradient steps per iteration where A is no matrix.
    """

    tolerance: float | None = None
    max_iterations: int = 5000
    check_every: int = 10
    coupling: float = 0.3
    num_inner: int = 30

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            _checks.positive(tolerance=self.tolerance)
        _checks.positive(coupling=self.coupling)
        _checks.at_least(1, max_iterations=self.max_iterations, check_every=self.check_every)
        _checks.at_least(1, num_inner=self.num_inner)

    def tolerance_in(self, dtype: jax.typing.DTypeLike) -> float:
        """The tolerance, or its default for a dtype."""
        return self.tolerance or (1e-6 if jnp.finfo(dtype).eps < 1e-10 else 1e-4)


class Split(NamedTuple):
    """``min g(u) + h(z)`` subject to ``u = A x`` and ``z = K x``.

    Attributes:
      maps: A and its adjoint on columns.
      analysis: K and its adjoint; None for the identity.
      prox_u: ``(s, rho) -> argmin_u g(u) + rho/2 ||u - s||^2``.
      penalty: (k, J) h is the sum of ``penalty |z|``.
    """

    maps: Maps
    analysis: Maps | None
    prox_u: Callable[[Array, Array], Array]
    penalty: Array

    def analyze(self, x: Array) -> Array:
        """``K x``."""
        return x if self.analysis is None else self.analysis.forward(x)

    def synthesize(self, z: Array) -> Array:
        """``K^T z``."""
        return z if self.analysis is None else self.analysis.adjoint(z)


class AdmmState(NamedTuple):
    """Variables, scaled duals p of ``u = A x`` and q of ``z = K x``, per-sample step, residuals."""

    x: Array
    u: Array
    z: Array
    p: Array
    q: Array
    rho: Array
    primal: Array
    dual: Array
    done: Array
    iterations: Array
    steps: Array


def admm(
    split: Split,
    operator: LinearOperator | None,
    start: tuple[Array, Array, Array],
    rho: Array,
    done: Callable[[AdmmState, float], Array],
    options: AdmmOptions,
) -> AdmmState:
    """Alternate until ``done`` says so for every sample; a done sample does not change.

    ``x`` solves ``(A^T A + r K^T K) x = A^T (u - p) + r K^T (z - q)``: one matrix for all samples
    and steps, since the steps ``rho_j`` scale both sides. Masks and constraints are in the
    proximal map of u, so they do not enter it either. Over-relaxed by 1.6.

    Args:
      split: the problem.
      operator: a matrix operator behind ``split.maps``, to factorize; None for any other.
      start: first x, u and z.
      rho: (1, J) first step.
      done: whether a state is a solution, (1, J), given the tolerance.
      options: limits.

    References:
      S. Boyd et al., "Distributed optimization and statistical learning via the alternating
        direction method of multipliers" (2011), sections 3.3, 3.4 and 6.4.
    """
    x, u, z = start
    ratio = options.coupling * mean_column_norm(split.maps, x)
    solve = _normal_solver(split, operator, ratio, options)
    tolerance = options.tolerance_in(x.dtype)

    def step(state: AdmmState) -> AdmmState:
        b = split.maps.adjoint(state.u - state.p)
        b = b + ratio * split.synthesize(state.z - state.q)
        x = solve(b, state.x)
        ax, kx = split.maps.forward(x), split.analyze(x)
        s_u = _RELAXATION * ax + (1 - _RELAXATION) * state.u + state.p
        s_z = _RELAXATION * kx + (1 - _RELAXATION) * state.z + state.q
        u = split.prox_u(s_u, state.rho)
        z = soft_threshold(s_z, split.penalty / (state.rho * ratio))
        p, q = s_u - u, s_z - z
        apart = total((ax - u) ** 2) + ratio * total((kx - z) ** 2)
        scale = total(u**2) + ratio * total(z**2)
        moved = total((u - state.u) ** 2) + ratio * total((z - state.z) ** 2)
        force = total(p**2) + ratio * total(q**2)
        new = state._replace(
            x=x,
            u=u,
            z=z,
            p=p,
            q=q,
            primal=jnp.sqrt(apart / nonzero(scale)),
            dual=jnp.sqrt(moved / nonzero(force)),
        )
        return jax.tree.map(lambda a, b: jnp.where(state.done, b, a), new, state)._replace(
            steps=state.steps
        )

    def round_(state: AdmmState) -> AdmmState:
        steps = jnp.minimum(options.check_every, options.max_iterations - state.steps)
        was_done = state.done
        state = lax.fori_loop(0, steps, lambda _, s: step(s), state)
        solved = done(state, tolerance) | ~jnp.isfinite(state.primal)
        # Balance the residuals, at ever longer intervals so that the step settles.
        count = state.steps // options.check_every + 1
        turn = (count & (count - 1) == 0) | (count < 20)
        up = (state.primal > _IMBALANCE * state.dual) & turn & ~solved & ~was_done
        down = (state.dual > _IMBALANCE * state.primal) & turn & ~solved & ~was_done
        factor = jnp.where(up, _RESCALE, jnp.where(down, 1 / _RESCALE, 1)).astype(x.dtype)
        return state._replace(
            p=state.p / factor,
            q=state.q / factor,
            rho=state.rho * factor,
            done=was_done | solved,
            iterations=jnp.where(was_done, state.iterations, state.steps + steps),
            steps=state.steps + steps,
        )

    unknown = jnp.full(rho.shape, jnp.inf, x.dtype)
    first = AdmmState(
        x=x,
        u=u,
        z=z,
        p=jnp.zeros_like(u),
        q=jnp.zeros_like(z),
        rho=rho,
        primal=unknown,
        dual=unknown,
        done=jnp.zeros(rho.shape, bool),
        iterations=jnp.zeros(rho.shape, jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(
        lambda s: (s.steps < options.max_iterations) & ~jnp.all(s.done), round_, first
    )


def admm_lasso(
    problem: Problem, operator: LinearOperator | None, init: Array | None, options: AdmmOptions
) -> Solution:
    """The l1 problem, certified by its duality gap at z."""
    first = jnp.zeros_like(problem.maps.adjoint(problem.data)) if init is None else init
    split = Split(
        maps=problem.maps,
        analysis=None,
        prox_u=prox_fit(problem.weight, problem.data, problem.one_sided),
        penalty=problem.lam * problem.weights,
    )

    def relative(state: AdmmState) -> Array:
        certificate = certify(problem, state.z, problem.maps.forward(state.z))
        largest = certify(problem, jnp.zeros_like(first), jnp.zeros_like(problem.data)).correlation
        return jnp.where(
            problem.lam == 0,
            certificate.correlation / nonzero(largest),
            certificate.gap / nonzero(certificate.objective),
        )

    def done(state: AdmmState, tolerance: float) -> Array:
        return relative(state) <= tolerance

    start = (first, problem.maps.forward(first), first)
    end = admm(split, operator, start, jnp.ones_like(problem.lam), done, options)
    u = problem.maps.forward(end.z)
    certificate = certify(problem, end.z, u)
    solved = relative(end) <= options.tolerance_in(first.dtype)
    return Solution(
        c=end.z,
        u=u,
        objective=certificate.objective,
        gap=certificate.gap,
        iterations=end.iterations,
        status=jnp.where(solved, CONVERGED, MAX_ITERATIONS).astype(jnp.int32),
    )


def prox_fit(weight: Array, data: Array, one_sided: bool) -> Callable[[Array, Array], Array]:
    """Of ``1/2 ||weight (u - data)||^2``, plus the squared hinge outside the mask."""

    def prox(s: Array, rho: Array) -> Array:
        pull = weight
        if one_sided:
            pull = jnp.where(s > 0, 1, pull)
        return (data + rho * s) / (pull + rho)

    return prox


def prox_constraint(
    weight: Array, data: Array, one_sided: bool, noise: Array
) -> Callable[[Array, Array], Array]:
    """Of ``||weight (u - data)|| <= noise``, and of ``u <= 0`` outside the mask."""

    def prox(s: Array, rho: Array) -> Array:
        del rho
        away = weight * (s - data)
        size = jnp.sqrt(total(away**2))
        inside = data + away * jnp.minimum(1, noise / nonzero(size))
        outside = jnp.minimum(s, 0) if one_sided else s
        return jnp.where(weight > 0, inside, outside)

    return prox


def mean_column_norm(maps: Maps, x: Array) -> Array:
    """About the mean squared column norm of A, ``||A s||^2 / n`` for fixed signs s."""
    k = jnp.arange(x.shape[0], dtype=x.dtype)
    # The signs of a quadratic chirp are as good as random ones, and the same every time.
    signs = jnp.where(jnp.sin(0.7 * k * k + 0.3 * k) > 0, 1, -1).astype(x.dtype)
    size = total(maps.forward(jnp.broadcast_to(signs[:, None], (x.shape[0], 1))) ** 2)
    return nonzero(size[0, 0] / x.shape[0])


def _normal_solver(
    split: Split, operator: LinearOperator | None, ratio: Array, options: AdmmOptions
) -> Callable[[Array, Array], Array]:
    """``(b, guess) -> (A^T A + ratio K^T K)^{-1} b``."""
    if isinstance(operator, MatrixOperator) and split.analysis is None:
        return _factorized(operator.matrix, split.maps, ratio)
    floor = 4 * float(jnp.finfo(ratio.dtype).eps)

    def normal(x: Array) -> Array:
        smooth = split.synthesize(split.analyze(x))
        return split.maps.adjoint(split.maps.forward(x)) + ratio * smooth

    def solve(b: Array, guess: Array) -> Array:
        r = b - normal(guess)
        goal = floor**2 * total(b**2)

        def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
            x, r, p, square, k = carry
            q = normal(p)
            curvature = total(p * q)
            live = (square > goal) & (curvature > 0)
            length = jnp.where(live, square / nonzero(curvature), 0)
            x, r = x + length * p, r - length * q
            following = jnp.where(live, total(r**2), 0)
            return x, r, r + following / nonzero(square) * p, following, k + 1

        start = (guess, r, r, total(r**2), jnp.zeros((), jnp.int32))
        return lax.while_loop(
            lambda s: (s[4] < options.num_inner) & jnp.any(s[3] > goal), body, start
        )[0]

    return solve


def _factorized(matrix: Array, maps: Maps, ratio: Array) -> Callable[[Array, Array], Array]:
    """Cholesky of the smaller side, by Woodbury's identity for wide matrices."""
    rows, columns = matrix.shape
    gram = matmul(matrix, matrix.T) if rows < columns else matmul(matrix.T, matrix)
    lower = jnp.linalg.cholesky(gram + ratio * jnp.eye(len(gram), dtype=matrix.dtype))

    def inverse(b: Array) -> Array:
        return jax.scipy.linalg.cho_solve((lower, True), b)

    if rows < columns:
        return lambda b, _: (b - maps.adjoint(inverse(maps.forward(b)))) / ratio
    return lambda b, _: inverse(b)
