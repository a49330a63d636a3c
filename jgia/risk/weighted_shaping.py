"""The cheapest noise for any Gaussian prior and any quadratic form of the error."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jaxtyping import Bool, Float

from jgia.risk import _spectra

_ROUNDS = 14  # secant steps on the multiplier
_STEPS = 100  # at most so many scaled projected gradient steps in each
_HALVINGS = 12


class OptimalNoise(NamedTuple):
    """Result of :func:`optimal_noise`.

    Attributes:
      covariance: Xi in input space; zero on directions that are not seen.
      energy: ``tr(K Xi)``.
      bound: no covariance that meets the target has less energy; equal to ``energy`` up to
        rounding where ``closed_form``.
      closed_form: whether the formula applied; otherwise the covariance was iterated for.
    """

    covariance: Float[Array, "d d"]
    energy: Float[Array, ""]
    bound: Float[Array, ""]
    closed_form: Bool[Array, ""]


def geometric_mean(a: Float[Array, "d d"], b: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""Matrix geometric mean ``A # B = A^{1/2} (A^{-1/2} B A^{-1/2})^{1/2} A^{1/2}``.

    The only positive semidefinite solution X of ``X A^{-1} X = B``.

    Args:
      a: symmetric positive definite.
      b: symmetric positive semidefinite.

    Returns:
      Symmetric positive semidefinite; ``sqrt(A B)`` when they commute.

    Raises:
      ValueError: shapes do not fit.

    Guarantees:
      ``A # B = B # A`` for two positive definite matrices, ``(T A T^T) # (T B T^T) = T (A # B)
      T^T`` for invertible T, ``(s A) # (t B) = sqrt(s t) (A # B)``.

    Edge cases:
      Computed through a Cholesky factor L of A, ``L (L^{-1} B L^{-T})^{1/2} L^T``, which is the
      same matrix by the second property. An A that is not positive definite gives NaN; negative
      eigenvalues of B, from rounding, count as zero.

    >>> geometric_mean(jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([1.0, 9.0]))).tolist()
    [[2.0, 0.0], [0.0, 3.0]]

    References:
      Bhatia, "Positive Definite Matrices" (2007), chapter 4.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    _spectra.check_square(a=a, b=b)
    lower = jnp.linalg.cholesky(_spectra.symmetrized(a))
    root = _square_root(_conjugated_inverse(lower, b))
    return _spectra.symmetrized(lower @ root @ lower.T)


def optimal_noise(
    gram: Float[Array, "d d"],
    prior: Float[Array, ""] | Float[Array, "d d"] | float,
    target: Float[Array, ""] | float,
    *,
    weight: Float[Array, "d d"] | None = None,
) -> OptimalNoise:
    r"""Noise of least energy that leaves a target (weighted) error, for any Gaussian prior.

    .. code-block:: text

        min tr(K Xi)  s.t.  tr(Q P) >= target,  Xi >= 0,   P = S - S (S + Xi)^{-1} S

    With ``X = S + Xi``, ``B = S Q S`` and ``R = tr(Q S) - target`` the constraint is ``tr(B
    X^{-1}) <= R``: convex. Stationarity, ``X K X = nu B``, gives

    .. code-block:: text

        Xi = sqrt(nu) (K^{-1} # B) - S,    sqrt(nu) = tr (K^{1/2} B K^{1/2})^{1/2} / R

    whenever that is positive semidefinite; no search for nu is needed. Otherwise some direction
    gets no noise, and projected gradient steps on ``Xi >= 0`` are taken in the metric ``X #
    G^{-1}``, ``G = nu X^{-1} B X^{-1}``, in which the curvature is that of the identity where the
    matrices commute, with nu by the secant rule. The result is scaled so that the target is met,
    and comes with a lower bound of the energy from Lagrangian duality: any ``0 <= M <= K`` gives
    ``tr(K Xi) >= (tr (M^{1/2} B M^{1/2})^{1/2})^2 / R - tr(M S)``.

    Args:
      gram: ``K = J^T J``.
      prior: variance or covariance S, positive definite.
      target: (weighted) error to reach.
      weight: Q, positive semidefinite; the identity when left out.

    Returns:
      :class:`OptimalNoise`.

    Raises:
      ValueError: shapes do not fit.

    Guarantees:
      The target is met up to rounding. ``energy - bound`` bounds what a better covariance could
      save. For ``S = s^2 I`` and no weight this is :func:`jgia.risk.shaping.water_filling`.

    Edge cases:
      Directions that are not seen (eigenvalues below ``8 sqrt(d) eps`` of the largest) are taken
      out of the problem exactly, not by a floor: what the prior says of them given the seen ones
      stays, noise is added to none of them. Targets outside the reachable range are clipped to
      it. Where the formula does not apply, up to some 1600 steps of a few O(d^3) factorizations
      (seconds for d = 64 on one core; minutes to hours for d in the thousands: take a scalar prior
      or ``"maxmin"`` there). Under ``vmap`` both branches are computed. Derivatives only through
      the formula. In float32 the covariance is good to about 1e-4 of the energy and the bound may
      be far below it: certify in float64.

    >>> result = optimal_noise(jnp.diag(jnp.array([4.0, 1.0])), 1.0, 1.25)
    >>> [round(float(x), 3) for x in jnp.diag(result.covariance)], bool(result.closed_form)
    ([1.0, 3.0], True)

    References:
      Derived here; the dual bound from the closed form with M in place of K.
    """
    gram = jnp.asarray(gram)
    _spectra.check_square(gram=gram, **({} if weight is None else {"weight": weight}))
    return _optimal_noise(gram, prior, target, weight)


@jax.jit
def _optimal_noise(
    gram: Array, prior: Array | float, target: Array | float, weight: Array | None
) -> OptimalNoise:
    seen = _spectra.seen_through(gram, prior)
    error = jnp.eye(len(gram), dtype=gram.dtype)
    if weight is not None:
        error = _spectra.symmetrized(seen.basis.T @ weight @ seen.basis)
    # The problem on the seen directions: S becomes V^T S V, B becomes V^T S Q S V.
    pull = _spectra.symmetrized(seen.cross @ error @ seen.cross.T)
    energy = jnp.sum(error * seen.prior)
    own = _spectra.block(seen, seen.prior, jnp.trace(seen.prior) / len(gram))
    lower = jnp.linalg.cholesky(own)
    whitened = _conjugated_inverse(lower, pull)  # B with S = I
    least = energy - jnp.trace(whitened)
    aim = _spectra.reachable(jnp.asarray(target, gram.dtype), least, energy)
    left = energy - aim
    # In whitened coordinates: min tr(C E), tr(B (I + E)^{-1}) <= R.
    cost = _spectra.symmetrized(lower.T @ (seen.eigenvalues[:, None] * lower))
    needed = jnp.trace(whitened) > left
    budget = jnp.where(needed, left, 1)
    total, root = _closed_form(cost, whitened, budget)
    excess = total - jnp.diag(jnp.where(seen.mask, 1, 0).astype(gram.dtype))
    slack = 64 * float(jnp.finfo(gram.dtype).eps)
    closed = jnp.linalg.eigvalsh(excess)[0] >= -slack * jnp.max(jnp.abs(total))
    inner, bound = jax.lax.cond(
        closed,
        lambda *_: (
            excess,
            root * root / budget - jnp.sum(jnp.where(seen.mask, jnp.diag(cost), 0)),
        ),
        _iterated,
        cost,
        whitened,
        budget,
    )
    inner = jnp.where(needed, _scaled_to(whitened, inner, budget), 0)
    mapped = _spectra.block(seen, lower @ inner @ lower.T)
    spent = jnp.sum(seen.eigenvalues * jnp.diag(mapped))
    return OptimalNoise(
        covariance=_spectra.symmetrized(seen.basis @ mapped @ seen.basis.T),
        energy=spent,
        bound=jnp.where(needed, jnp.maximum(bound, 0), 0),
        closed_form=closed | ~needed,
    )


def _conjugated_inverse(lower: Array, matrix: Array) -> Array:
    """``L^{-1} matrix L^{-T}``."""
    half = solve_triangular(lower, matrix, lower=True)
    return _spectra.symmetrized(solve_triangular(lower, half.T, lower=True))


def _square_root(matrix: Array) -> Array:
    values, basis = jnp.linalg.eigh(matrix)
    return (basis * jnp.sqrt(jnp.maximum(values, 0))[None, :]) @ basis.T


def _nuclear(cost: Array, pull: Array) -> Array:
    """``tr (M^{1/2} B M^{1/2})^{1/2}`` without the roots of rounding errors."""
    root = _square_root(cost)
    inner = jnp.linalg.eigvalsh(_spectra.symmetrized(root @ pull @ root))
    noise = _spectra.rank_tolerance(inner.dtype, inner.size) * jnp.max(inner)
    return jnp.sum(jnp.where(inner > noise, jnp.sqrt(jnp.maximum(inner, 0)), 0))


def _closed_form(cost: Array, pull: Array, budget: Array) -> tuple[Array, Array]:
    """``sqrt(nu) (C^{-1} # B)`` and the trace in nu; zero where B is."""
    lower = jnp.linalg.cholesky(cost)
    values, basis = jnp.linalg.eigh(_spectra.symmetrized(lower.T @ pull @ lower))
    roots = jnp.sqrt(jnp.maximum(values, 0))
    trace = jnp.sum(roots)
    # C^{-1} = L^{-T} L^{-1}: its mean with B is L^{-T} (L^T B L)^{1/2} L^{-1}.
    half = solve_triangular(lower.T, basis * jnp.sqrt(roots)[None, :], lower=False)
    return trace / budget * (half @ half.T), trace


def _scaled_to(pull: Array, noise: Array, budget: Array) -> Array:
    """The multiple of ``noise`` whose error is the target: ``tr(B (I + c E)^{-1}) = R``."""
    values, basis = jnp.linalg.eigh(_spectra.symmetrized(noise))
    top = jnp.max(jnp.abs(values))
    values = jnp.where(values > _spectra.rank_tolerance(values.dtype, values.size) * top, values, 0)
    shares = jnp.sum(basis * (pull @ basis), axis=0)
    # Never so, unless the iteration was cut short: too few directions have noise.
    short = jnp.sum(jnp.where(values > 0, 0, shares)) >= budget
    values = values + jnp.where(short, jnp.maximum(top, 1), 0)
    counted = values > 0
    room = budget - jnp.sum(jnp.where(counted, 0, shares))
    high = jnp.sum(jnp.where(counted, shares / jnp.where(counted, values, 1), 0)) / room
    scale = _spectra.root_in_log_scale(
        lambda c: budget - jnp.sum(shares / (1 + c * values)), jnp.maximum(high, 1)
    )
    return scale * ((basis * values[None, :]) @ basis.T)


def _iterated(cost: Array, pull: Array, budget: Array) -> tuple[Array, Array]:
    """Scaled projected gradient on ``E >= 0``, nu by the secant rule; and the dual bound."""
    identity = jnp.eye(len(cost), dtype=cost.dtype)

    def error_left(noise: Array) -> Array:
        return jnp.trace(jnp.linalg.solve(identity + noise, pull))

    def descend(multiplier: Array, start: Array) -> Array:
        def going(carry: tuple[Array, Array, Array]) -> Array:
            return carry[2] & (carry[0] < _STEPS)

        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            count, noise, _ = carry
            noise, gained = _projected_step(cost, pull, multiplier, noise)
            return count + 1, noise, gained

        carry = (jnp.zeros((), "int32"), start, jnp.ones((), bool))
        return jax.lax.while_loop(going, step, carry)[1]

    # The error that is left is nearly linear in u = 1 / sqrt(nu), and equals tr B at u = infinity.
    def secant(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        u, left, u_before, left_before, noise = carry
        run = u - u_before
        slope = (left - left_before) / jnp.where(run == 0, 1, run)
        usable = (run != 0) & (slope > 0)
        move = (budget - left) / jnp.where(usable, slope, 1)
        u_next = jnp.where(usable, u + move, u * budget / left)
        u_next = jnp.clip(u_next, u / 4, 4 * u)
        noise = descend(1 / jnp.square(u_next), noise)
        return u_next, error_left(noise), u, left, noise

    u = budget / _nuclear(cost, pull)
    total, _ = _closed_form(cost, pull, budget)
    values, basis = jnp.linalg.eigh(_spectra.symmetrized(total - identity))
    noise = descend(1 / jnp.square(u), (basis * jnp.maximum(values, 0)[None, :]) @ basis.T)
    carry = (u, error_left(noise), u, error_left(noise), noise)
    u, _, _, _, noise = jax.lax.fori_loop(0, _ROUNDS, secant, carry)
    noise = descend(1 / jnp.square(u), noise)
    marginal = _marginal(pull, 1 / jnp.square(u), noise)
    worst = jnp.linalg.eigvalsh(_conjugated_inverse(jnp.linalg.cholesky(cost), marginal))[-1]
    inside = marginal / jnp.maximum(worst, 1)
    return noise, jnp.square(_nuclear(inside, pull)) / budget - jnp.trace(inside)


def _marginal(pull: Array, multiplier: Array, noise: Array) -> Array:
    """``G = nu Y^{-1} B Y^{-1}``, ``Y = I + E``: what a little more noise gains."""
    total = jnp.eye(len(noise), dtype=noise.dtype) + noise
    half = jnp.linalg.solve(total, pull)
    return multiplier * _spectra.symmetrized(jnp.linalg.solve(total, half.T))


def _projected_step(
    cost: Array, pull: Array, multiplier: Array, noise: Array
) -> tuple[Array, Array]:
    """A step down ``tr(C E) + nu tr(B (I + E)^{-1})`` over ``E >= 0``, and whether it gained."""
    identity = jnp.eye(len(cost), dtype=cost.dtype)
    total = identity + noise
    marginal = _marginal(pull, multiplier, noise)
    # P = (G + C)^{-1} # Y; E = T F T^T with T T^T = P. C keeps P finite where G vanishes.
    lower = jnp.linalg.cholesky(marginal + cost)
    inner = _square_root(_spectra.symmetrized(lower.T @ total @ lower))
    half = solve_triangular(lower.T, jnp.linalg.cholesky(inner), lower=False)
    gradient = half.T @ (cost - marginal) @ half
    place = _conjugated_inverse_general(half, noise)

    def value(candidate: Array) -> Array:
        return jnp.sum(cost * candidate) + multiplier * jnp.trace(
            jnp.linalg.solve(identity + candidate, pull)
        )

    def moved(length: Array) -> Array:
        values, basis = jnp.linalg.eigh(_spectra.symmetrized(place - length * gradient))
        reached = half @ (basis * jnp.sqrt(jnp.maximum(values, 0))[None, :])
        return reached @ reached.T

    start = value(noise)

    def uphill(carry: tuple[Array, Array, Array]) -> Array:
        count, _, candidate = carry
        return (value(candidate) > start) & (count < _HALVINGS)

    def shorter(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, length, _ = carry
        return count + 1, length / 2, moved(length / 2)

    first = jnp.asarray(0.5, cost.dtype)
    carry = (jnp.zeros((), "int32"), first, moved(first))
    _, _, candidate = jax.lax.while_loop(uphill, shorter, carry)
    gain = start - value(candidate)
    slack = 4 * float(jnp.finfo(cost.dtype).eps)
    return jnp.where(gain >= 0, candidate, noise), gain > slack * jnp.abs(start)


def _conjugated_inverse_general(factor: Array, matrix: Array) -> Array:
    """``T^{-1} matrix T^{-T}`` for any invertible T."""
    half = jnp.linalg.solve(factor, matrix)
    return _spectra.symmetrized(jnp.linalg.solve(factor, half.T))
