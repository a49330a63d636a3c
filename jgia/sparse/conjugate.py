"""Proximal conjugate gradients for a batch of l1 problems, narrowed as its samples finish."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia.sparse.fista import FistaOptions, Solution, default_tolerance
from jgia.sparse.problem import (
    CONVERGED,
    MAX_ITERATIONS,
    STALLED,
    Problem,
    certificate,
    nonzero,
    soft_threshold,
    total,
)

_CONTINUATION, _CONTINUATION_STEPS = 0.4, 40
_PATIENCE = 50  # steps without progress, at the rounding floor, before a sample is given up
_REFRESH = 64  # steps between two products that replace the updated measurements
_NARROWEST = 8  # narrower products are hardly faster, and every width is compiled
# A best step as long as this is taken in full if coefficients vanish at its end: usually, and
# where only those are missing.
_WHOLE, _LAST = 0.9, 0.5


class _State(NamedTuple):
    """What is known of the samples at work; all (..., J)."""

    c: Array  # (n, J) the point
    u: Array  # (m, J) its measurements
    g: Array  # (n, J) minus the gradient of the data term
    last: Array  # (n, J) the direction that led there
    bent: Array  # (n, J) how much g fell by it: the Hessian times last, up to a factor
    curved: Array  # the product of the two
    length: Array  # the proximal step, one over the curvature along last
    objective: Array
    gap: Array
    error: Array  # what is compared with the tolerance
    left: Array  # whether coefficients that were to vanish are not zero yet
    best: Array
    waited: Array
    done: Array
    iterations: Array


class _Batch(NamedTuple):
    problem: Problem
    largest: Array  # lam_max, (1, J)


def conjugate(
    problem: Problem, init: Array | None, correlation: Array, options: FistaOptions
) -> Solution:
    """Minimize from ``init``, or from zero along a decreasing sequence of lam.

    A step goes from c towards ``prox(c + g / L + b d)``: g is minus the gradient of the data
    term, 1/L one over the curvature met in the last step, d the last step, and b makes the
    direction conjugate to d. Where the support and its signs stay, these are conjugate gradients
    on the support, with the quadratic's best step; elsewhere the proximal map lets coefficients
    enter and leave. A direction that does not descend is replaced by that of the proximal
    gradient step, which always does, so that the objective falls in every step at fixed lam.

    A best step shorter than the proximal one leaves coefficients that were to vanish at a fraction
    of what they were. A sample ends only once those are exactly zero, if need be by a proximal
    gradient step at the end.

    A step costs one product with A and one with its adjoint, and the gradient it ends with is the
    one at its own point: the duality gap comes without a product and is looked at in every step.
    When half of the samples are done the rest go on in arrays of half the width, and so on, since
    the slowest sample may need several times the steps of the others.

    Args:
      problem: what to minimize.
      init: (n, J) where to start; None starts from zero with lam falling from lam_max by 0.4
        per step.
      correlation: (n, J) ``|Psi^T A^T y|``.
      options: when to stop; ``check_every`` is not needed.

    Returns:
      Columns and certificates as from :func:`jgia.sparse.fista.fista`. In a batch of 16 or more
      rounding, and so the last digits, depend on which samples finish together.

    References:
      M. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems"
        (J. Res. NBS 49, 1952), section 3: the second form of b, which makes the new direction
        conjugate to the last one even where earlier steps were not exact.
      S. Wright, R. Nowak and M. Figueiredo, "Sparse reconstruction by separable approximation"
        (IEEE Trans. Signal Process. 57, 2009), section II: the proximal step whose length is one
        over the curvature along the last one, and continuation in lam.

    Departures:
      Their conjugate gradients know no penalty and their proximal steps no conjugacy; putting one
      into the other is ours, and so is the fallback. Convergence is therefore not taken from
      either but judged by the gap.
    """
    tolerance = options.tolerance or default_tolerance(problem.data.dtype)
    largest = jnp.max(correlation / problem.weights, axis=0, keepdims=True)
    whole = _Batch(problem, largest)
    state = _assess(whole, _start(problem, init, correlation), tolerance)
    continued, limit = init is None, options.max_iterations

    def advance(batch: _Batch, state: _State, steps: Array, narrow: int) -> tuple[_State, Array]:
        """Until at most ``narrow`` samples are left, or none may go on."""

        def live(carry: tuple[_State, Array]) -> Array:
            return (carry[1] < limit) & (jnp.sum(~carry[0].done) > narrow)

        def one(carry: tuple[_State, Array]) -> tuple[_State, Array]:
            state, steps = carry
            lam = batch.problem.lam
            if continued:
                early = batch.largest * _CONTINUATION ** (steps + 1).astype(lam.dtype)
                lam = jnp.where(steps < _CONTINUATION_STEPS, jnp.maximum(lam, early), lam)
            state = _assess(batch, _step(batch.problem, state, lam, tolerance), tolerance)
            return state, steps + 1

        def several(carry: tuple[_State, Array]) -> tuple[_State, Array]:
            end = carry[1] + _REFRESH
            carry = lax.while_loop(lambda c: live(c) & (c[1] < end), one, carry)
            state, steps = carry
            state = lax.cond(live(carry), lambda s: _refresh(batch.problem, s), lambda s: s, state)
            return state, steps

        return lax.while_loop(live, several, (state, steps))

    steps, width, held = jnp.zeros((), jnp.int32), largest.shape[1], []
    batch = whole
    while True:
        narrow = width // 2 if width // 2 >= _NARROWEST else 0
        state, steps = advance(batch, state, steps, narrow)
        if not narrow:
            break
        # Those not done come first; done ones fill up.
        chosen = jnp.argsort(state.done[0], stable=True)[:narrow]
        held.append((state, chosen))
        batch, state = _narrowed(batch, state, chosen)
        width = narrow
    for wide, chosen in reversed(held):
        state = jax.tree.map(lambda all_, some, at=chosen: all_.at[:, at].set(some), wide, state)

    status = jnp.where(state.done, STALLED, MAX_ITERATIONS)
    return Solution(
        c=state.c,
        u=state.u,
        objective=state.objective,
        gap=state.gap,
        iterations=state.iterations,
        status=jnp.where(state.error <= tolerance, CONVERGED, status).astype(jnp.int32),
    )


def _start(problem: Problem, init: Array | None, correlation: Array) -> _State:
    """The first point, with a step below one over ``max_i |A_i^T y|^2 / ||y||^2``."""
    zero = jnp.zeros_like(correlation)
    if init is None:
        c, u = zero, jnp.zeros_like(problem.data)
        g = problem.maps.adjoint(problem.data)
    else:
        c, u = init, problem.maps.forward(init)
        g = problem.maps.adjoint(problem.residual(u))
    curvature = jnp.max(correlation, axis=0, keepdims=True) ** 2 / nonzero(total(problem.data**2))
    unknown = jnp.full(curvature.shape, jnp.inf, curvature.dtype)
    none = jnp.full(curvature.shape, -1, jnp.int32)
    return _State(
        c=c,
        u=u,
        g=g,
        last=zero,
        bent=zero,
        curved=jnp.zeros_like(curvature),
        length=1 / nonzero(curvature),
        objective=unknown,
        gap=unknown,
        error=unknown,
        left=none >= 0,
        best=unknown,
        waited=none,
        done=none >= 0,
        iterations=none,
    )


def _step(problem: Problem, state: _State, lam: Array, tolerance: float) -> _State:
    eps = float(jnp.finfo(lam.dtype).eps)
    c, g, penalty = state.c, state.g, lam * problem.weights
    # Where only zeros are missing, a proximal gradient step, short enough to be taken in full.
    closing = state.error <= tolerance
    length = jnp.where(closing, state.length / 2, state.length)

    def towards(point: Array) -> Array:
        return soft_threshold(point, length * penalty) - c

    ahead = c + length * g
    plain = towards(ahead)
    # The share that makes it conjugate to the last one (Hestenes and Stiefel, section 3).
    share = jnp.maximum(-total(plain * state.bent), 0) / nonzero(state.curved)
    d = towards(ahead + jnp.where((state.curved > 0) & ~closing, share, 0) * state.last)
    # Term by term, since the sums are large and nearly cancel.
    change = penalty * (jnp.abs(c + d) - jnp.abs(c)) - g * d
    down = total(jnp.where(d == 0, 0, change))  # the selection keeps XLA from a slow fusion on CPU
    descends = down < 0
    d = jnp.where(descends, d, plain)
    size = total(d**2)
    down = jnp.where(descends, down, -size / length)

    q = problem.maps.forward(d)
    # The penalty is at most linear along d up to the first change of a sign, and at least up to 1.
    falls = jnp.where(c == 0, 0, -d / jnp.where(c == 0, 1, c))
    first = 1 / jnp.minimum(jnp.max(falls, axis=0, keepdims=True), 1)
    first = jnp.where(first > 0, first, jnp.inf)
    step, curvature = _best_step(problem, state.u, q, down, first)
    step = jnp.where((first <= 1) & (step > jnp.where(closing, _LAST, _WHOLE)), 1, step)
    step = jnp.where(state.done, 0, step)
    moved = c + step * d
    u = state.u + step * q
    following = problem.maps.adjoint(problem.residual(u))
    return state._replace(
        # What was to vanish does, in spite of rounding.
        c=jnp.where(jnp.abs(moved) <= 4 * eps * jnp.abs(c), 0, moved),
        u=u,
        g=following,
        last=d,
        bent=g - following,
        curved=step * curvature,
        left=(first <= 1) & (step < 1),
        length=jnp.where((curvature > 0) & (size > 0), size / nonzero(curvature), length),
    )


def _best_step(
    problem: Problem, u: Array, q: Array, down: Array, reach: Array
) -> tuple[Array, Array]:
    """The step to the minimum of an upper bound of the objective, and the curvature along it.

    With a squared hinge the rows that count change along the way. Those that count at one of the
    ends bound the others in between.
    """
    weighted = problem.weight * q**2
    if problem.one_sided:
        weighted += jnp.where(u > 0, (1 - problem.weight) * q**2, 0)
    curvature = total(weighted)
    step = jnp.where(curvature > 0, jnp.maximum(-down, 0) / nonzero(curvature), 1)
    step = jnp.minimum(step, reach)
    if not problem.one_sided:
        return step, curvature
    rows = jnp.where((u > 0) | (u + step * q > 0), 1, problem.weight)
    curvature = total(rows * q**2)
    return jnp.minimum(step, jnp.maximum(-down, 0) / nonzero(curvature)), curvature


def _refresh(problem: Problem, state: _State) -> _State:
    """Measurements as one product, without the rounding of many updates."""
    u = problem.maps.forward(state.c)
    return state._replace(u=jnp.where(state.done, state.u, u))


def _assess(batch: _Batch, state: _State, tolerance: float) -> _State:
    """Objective and gap at the new point, and whether a sample ends there."""
    problem, largest = batch
    eps = float(jnp.finfo(state.c.dtype).eps)
    residual = problem.residual(state.u)
    objective, gap, correlation, norm = certificate(problem, state.c, residual, state.g)
    free = problem.lam == 0
    error = jnp.where(free, correlation / nonzero(largest), gap / nonzero(objective))
    # Rounding of the measurements perturbs every correlation by about eps lam_max.
    floor = 4 * eps * (1 + jnp.where(free, 0, largest * norm / nonzero(objective)))
    waited = jnp.where((error < 0.9 * state.best) | state.done, 0, state.waited + 1)
    stuck = (waited >= _PATIENCE) & (error <= floor)
    return state._replace(
        objective=jnp.where(state.done, state.objective, objective),
        gap=jnp.where(state.done, state.gap, gap),
        error=jnp.where(state.done, state.error, error),
        best=jnp.minimum(error, state.best),
        waited=waited,
        done=state.done | ((error <= tolerance) & ~state.left) | stuck | ~jnp.isfinite(objective),
        iterations=jnp.where(state.done, state.iterations, state.iterations + 1),
    )


def _narrowed(batch: _Batch, state: _State, chosen: Array) -> tuple[_Batch, _State]:
    """The chosen samples of every array that has one column for each."""

    def take(a: Array) -> Array:
        return a[:, chosen] if a.shape[1] > 1 else a

    problem = batch.problem
    fewer = problem._replace(
        weight=take(problem.weight),
        data=take(problem.data),
        weights=take(problem.weights),
        lam=take(problem.lam),
    )
    return _Batch(fewer, take(batch.largest)), jax.tree.map(take, state)
