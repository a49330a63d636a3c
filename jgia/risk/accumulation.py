"""What several releases of the same images tell together, and how much noise the next one needs."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular
from jaxtyping import Float, Int

from jgia import _checks
from jgia.risk import _spectra
from jgia.risk.prior import Prior


class AccumulatedInformation(NamedTuple):
    """What independent releases of the same input have told: their Fisher information adds.

    Make one with :func:`no_information`, add with :func:`add_round`. A pytree: it passes through
    compiled functions, and can be saved between rounds.

    Attributes:
      fisher: (d, d) ``sum_t J_t' C_t^-1 J_t`` in pixels.
      num_rounds: releases so far.
    """

    fisher: Float[Array, "inputs inputs"]
    num_rounds: Int[Array, ""]


class BudgetStatus(enum.IntEnum):
    """Whether the next round may release anything; the values are codes in compiled functions."""

    NOISE = 0
    """Yes, with noise of the scale given."""

    FREE = 1
    """Yes, and without noise: this release tells nothing of the input."""

    EXHAUSTED = 2
    """No: what was released so far leaves the target or less. The scale is infinite."""


class NextRound(NamedTuple):
    """What the next round needs.

    Attributes:
      scale: factor on the noise's standard deviation, ``C -> scale^2 C``; the standard deviation
        itself where the Fisher information that was given is a Gram matrix ``J' J``. 0 where no
        noise is needed, infinite where nothing may be released.
      status: a :class:`BudgetStatus` as an integer.
      error: InvLoss after this round with this noise.
    """

    scale: Float[Array, ""]
    status: Int[Array, ""]
    error: Float[Array, ""]


def no_information(num_inputs: int, *, dtype: str = "float32") -> AccumulatedInformation:
    """Before the first round.

    >>> no_information(2).fisher.tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    _checks.at_least(1, num_inputs=num_inputs)
    return AccumulatedInformation(
        jnp.zeros((num_inputs, num_inputs), dtype), jnp.zeros((), jnp.int32)
    )


def add_round(
    state: AccumulatedInformation, fisher: Float[Array, "inputs inputs"]
) -> AccumulatedInformation:
    """After one more release.

    Args:
      state: what was there.
      fisher: ``J' C^-1 J`` of the release (:func:`jgia.risk.fisher_information`), or the Gram
        matrix ``J' J`` over the noise variance.

    Guarantees:
      The order of rounds does not matter, up to rounding. A NaN stays: every error after it is
      NaN, and :func:`next_round` says exhausted.

    Raises:
      ValueError: another number of pixels.

    >>> state = add_round(no_information(1), jnp.array([[4.0]], "float32"))
    >>> round(float(remaining_error(state, Prior.isotropic(1, variance=1.0))), 5)
    0.2
    """
    _check_square(state, fisher)
    return AccumulatedInformation(state.fisher + _spectra.symmetrized(fisher), state.num_rounds + 1)


def remaining_error(state: AccumulatedInformation, prior: Prior) -> Float[Array, ""]:
    r"""InvLoss after all rounds: ``tr (Sigma^-1 + sum_t J_t' C_t^-1 J_t)^-1``.

    With all of a low-rank prior's rest counted as lost. T equal rounds are one with noise of the
    standard deviation ``tau / sqrt(T)``.

    Raises:
      ValueError: the prior has another number of pixels.
    """
    _check_square(state, None, prior)
    root = _posterior_root(state, prior)
    return jnp.sum(root**2) + prior.tail_energy


def spent_share(
    state: AccumulatedInformation, prior: Prior, target: float | Float[Array, ""]
) -> Float[Array, ""]:
    """Share of the budget that is spent: 0 before any round, 1 where the target is reached.

    ``(E0 - InvLoss) / (E0 - target)``; above 1 where more was told than the target allows.

    Raises:
      ValueError: the target is not between 0 and the prior's energy.
    """
    _check_target(target, prior)
    return (prior.energy - remaining_error(state, prior)) / (prior.energy - target)


def next_round(
    state: AccumulatedInformation,
    fisher: Float[Array, "inputs inputs"],
    prior: Prior,
    target: float | Float[Array, ""],
    *,
    rounds_left: int = 1,
) -> NextRound:
    r"""The least noise with which the next release keeps InvLoss at the target or above.

    The scale s at which ``tr (Sigma^-1 + Phi + R K / s^2)^-1 = target``, with Phi what was told
    so far, K the Fisher information of the next release at scale 1, and R rounds to come that are
    taken to be like it. Found by bisection of ``log s^2``: the error increases with s.

    Args:
      state: what was told so far.
      fisher: K: ``J' C^-1 J``, or the Gram matrix ``J' J`` for isotropic noise of standard
        deviation ``scale``.
      prior: of the flattened input.
      target: error to keep, summed over pixels, in (0, E0).
      rounds_left: R >= 1: this round and those after it. With 1, everything that is left of the
        budget is spent now.

    Returns:
      A :class:`NextRound`. Inside compiled functions too, an exhausted budget is a status and an
      infinite scale, never a NaN.

    Raises:
      ValueError: shapes do not fit, or the target is out of range (where it is known).

    Guarantees:
      After R such rounds :func:`remaining_error` is the target up to rounding. The scale does not
      decrease when earlier rounds told more.

    Edge cases:
      Directions of K that rounding hides count as seen with the size of the rounding, so that the
      noise errs on the large side. NaN in ``state`` or ``fisher`` counts as exhausted. **Not
      differential privacy**: the scale is a function of private data, the error linearized and an
      average over the prior.

    >>> prior = Prior.isotropic(1, variance=1.0)
    >>> plan = next_round(no_information(1), jnp.eye(1, dtype="float32"), prior, 0.5, rounds_left=4)
    >>> round(float(plan.scale), 4), BudgetStatus(int(plan.status)).name
    (2.0, 'NOISE')

    References:
      Derived here. Fisher information of independent observations adds; the idea of a budget of
      it for every example is that of Hannun, Guo and van der Maaten (UAI 2021, arXiv 2102.11673).
    """
    _check_square(state, fisher, prior)
    _check_target(target, prior)
    _checks.at_least(1, rounds_left=rounds_left)
    root = _posterior_root(state, prior)
    now = jnp.sum(root**2)
    aim = jnp.asarray(target, root.dtype) - prior.tail_energy
    # With M = I + L Phi L' = G G' and root = G^-1 L, what is left after the round is
    # root' (I + R root K root' / s^2)^-1 root.
    turned = root @ _spectra.symmetrized(fisher.astype(root.dtype)) @ root.T
    clean = jnp.isfinite(turned).all() & jnp.isfinite(now)
    values, basis = jnp.linalg.eigh(jnp.where(clean, _spectra.symmetrized(turned), 0))
    top = jnp.max(values)
    least = _spectra.rank_tolerance(values.dtype, values.size) * top
    values = jnp.maximum(values, least)
    weights = jnp.sum((basis.T @ jnp.where(clean, root, 0)) ** 2, axis=1)
    slack = jnp.sqrt(jnp.finfo(root.dtype).eps) * prior.energy
    exhausted = ~clean | ~(now - aim > slack)
    free = ~exhausted & ((top <= 0) | (aim <= 0))
    solvable = ~exhausted & ~free
    values, weights = jnp.where(solvable, values, 1), jnp.where(solvable, weights, 1)
    whole = jnp.sum(weights)
    aim = jnp.where(solvable, aim, whole / 2)
    high = rounds_left * jnp.max(values) * aim / (whole - aim)
    variance = _spectra.root_in_log_scale(
        lambda v: jnp.sum(weights * v / (v + rounds_left * values)) - aim, high
    )
    scale = jnp.where(exhausted, jnp.inf, jnp.where(free, 0, jnp.sqrt(variance)))
    told = jnp.sum(weights * variance / (variance + values))
    kept = jnp.where(free & (top > 0), 0, now)
    status = jnp.where(
        exhausted,
        int(BudgetStatus.EXHAUSTED),
        jnp.where(free, int(BudgetStatus.FREE), int(BudgetStatus.NOISE)),
    ).astype(jnp.int32)
    return NextRound(scale, status, jnp.where(solvable, told, kept) + prior.tail_energy)


def _posterior_root(state: AccumulatedInformation, prior: Prior) -> Array:
    """W with ``W' W`` the posterior covariance in the span of the prior's rows."""
    rows = prior.rows().astype(state.fisher.dtype)
    inner = _spectra.symmetrized(rows @ state.fisher @ rows.T)
    lower = jnp.linalg.cholesky(inner + jnp.eye(len(inner), dtype=inner.dtype))
    return solve_triangular(lower, rows, lower=True)


def _check_square(
    state: AccumulatedInformation, fisher: Any = None, prior: Prior | None = None
) -> None:
    size = state.fisher.shape[0]
    if fisher is not None and jnp.shape(fisher) != (size, size):
        raise ValueError(
            f"fisher must have shape ({size}, {size}), one row per pixel, got "
            f"{jnp.shape(fisher)}; pass J' C^-1 J with respect to the flattened input."
        )
    if prior is not None and prior.num_inputs != size:
        raise ValueError(
            f"the prior describes {prior.num_inputs} pixels, what accumulated {size}; use the "
            "prior of the same input, repeated for a batch."
        )


def _check_target(target: Any, prior: Prior) -> None:
    if isinstance(target, Tracer) or isinstance(prior.variance, Tracer):
        return
    energy = float(prior.energy)
    if not 0 < float(target) < energy:
        raise ValueError(
            f"target must be an error between 0 and the prior's energy {energy:.6g}, summed over "
            f"pixels, got {float(target):.6g}."
        )
