"""A bracket around InvLoss of the release as it is, not linearized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.risk.jacobian import CHUNK, push, rows_of
from jgia.risk.posterior import posterior_from_triangular
from jgia.risk.prior import Prior

Fn = Callable[[Array], Any]


class InvLossBracket(NamedTuple):
    """InvLoss between two bounds.

    Attributes:
      lower: () no attack has a smaller expected squared error (:func:`lower_bound`). The only one
        of the three to be quoted as protection.
      linear: () the closed form at the image, as if the release were linear.
      upper: () an attack exists with at most this error (:func:`upper_bound`).
    """

    lower: Float[Array, ""]
    linear: Float[Array, ""]
    upper: Float[Array, ""]


def invloss_bracket(
    key: PRNGKeyArray,
    fn: Fn,
    x: Float[Array, "*shape"],
    prior: Prior,
    *,
    noise_std: float | Float[Array, ""],
    num_draws: int = 32,
    chunk_size: int = CHUNK,
) -> InvLossBracket:
    """:func:`lower_bound`, the closed form at ``x``, and :func:`upper_bound`, of one prior.

    Args:
      key: random key of the draws.
      fn: the release.
      x: where it is linearized.
      prior: of the flattened input; of full rank.
      noise_std: tau > 0.
      num_draws: images over which each bound averages.
      chunk_size: directions at a time.
    """
    key_low, key_high = jax.random.split(key)
    rows = prior.rows()
    moved = rows_of(push(fn, x, rows, chunk_size=chunk_size))
    whitened = moved.T / jnp.asarray(noise_std, rows.dtype)
    low = lower_bound(
        key_low, fn, x.shape, prior, noise_std=noise_std, num_draws=num_draws, chunk_size=chunk_size
    )
    high = upper_bound(
        key_high, fn, x, prior, noise_std=noise_std, num_draws=num_draws, chunk_size=chunk_size
    )
    return InvLossBracket(low, posterior_from_triangular(whitened, rows).error, high)


def prior_draws(
    key: PRNGKeyArray, prior: Prior, count: int, center: Float[Array, " inputs"] | None = None
) -> Float[Array, "count inputs"]:
    """Images drawn from the prior, around ``center`` in place of its mean if that is given."""
    _checks.at_least(1, count=count)
    mean = prior.mean if center is None else center
    low, high = jax.random.split(key)
    if prior.factor is None:
        noise = jax.random.normal(low, (count, prior.num_inputs), mean.dtype)
        return mean[None] + jnp.sqrt(prior.variance) * noise
    rows = prior.factor
    draws = jax.random.normal(low, (count, rows.shape[0]), mean.dtype) @ rows
    tail = jax.random.normal(high, (count, prior.num_inputs), mean.dtype)
    basis = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    rest = tail - (tail @ basis.T) @ basis
    return mean[None] + draws + jnp.sqrt(prior.tail_variance) * rest


def lower_bound(
    key: PRNGKeyArray,
    fn: Fn,
    shape: tuple[int, ...],
    prior: Prior,
    *,
    noise_std: float | Float[Array, ""],
    num_draws: int = 16,
    center: Float[Array, " inputs"] | None = None,
    chunk_size: int = CHUNK,
) -> Float[Array, ""]:
    r"""No attack's expected squared error is smaller: van Trees' inequality.

    ``InvLoss >= tr[(Sigma^-1 + E J(x)' J(x) / tau^2)^-1]``, the expectation over the prior taken by
    Monte Carlo. It asks for a differentiable release, Gaussian noise of a fixed covariance and a
    Gaussian prior, but not for linearity.

    Args:
      key: random key of the draws.
      fn: the release, a function of one array of ``shape``.
      shape: of its input.
      prior: of the flattened input. With a low-rank one the rest of the image is given to the
        attacker: the bound stays below the truth.
      noise_std: tau > 0.
      num_draws: images over which the information is averaged.
      center: mean of the prior, if not its own.
      chunk_size: directions at a time.

    Returns:
      In squared units, summed over pixels. Estimated from draws: its own error falls with their
      square root, and is towards too much protection where information is rare and large.

    References:
      Van Trees, "Detection, Estimation, and Modulation Theory" (1968), section 2.4.2.
      Maeng et al., "Bounding the Invertibility of Privacy-preserving Instance Encoding using
      Fisher Information" (NeurIPS 2023, arXiv 2305.04146), for its scalar form.
    """
    rows = prior.rows()
    scale = 1 / (jnp.asarray(noise_std, rows.dtype) * num_draws**0.5)

    def add(r: Array, image: Array) -> tuple[Array, None]:
        moved = rows_of(push(fn, image.reshape(shape), rows, chunk_size=chunk_size)) * scale
        return jnp.linalg.qr(jnp.concatenate([r, moved.T]), mode="r"), None

    draws = prior_draws(key, prior, num_draws, center)
    r, _ = lax.scan(add, jnp.zeros((prior.rank, prior.rank), rows.dtype), draws)
    return posterior_from_triangular(r, rows).error


def upper_bound(
    key: PRNGKeyArray,
    fn: Fn,
    x: Float[Array, "*shape"],
    prior: Prior,
    *,
    noise_std: float | Float[Array, ""],
    num_draws: int = 32,
    center: Float[Array, " inputs"] | None = None,
    chunk_size: int = CHUNK,
) -> Float[Array, ""]:
    r"""An attack exists whose expected squared error is at most this.

    The affine attack ``mean + A (o - c - J mean)`` with the gain ``A = Sigma J' (J Sigma J' +
    tau^2 I)^-1`` of the release linearized at ``x`` has at most ``(a + b)^2``: ``a^2`` its error if
    the release were linear, ``b = ||A|| sqrt(E ||rem||^2)`` what the remainder ``rem(x') = G(x') -
    G(x) - J (x' - x)`` adds. The offset c is chosen such that the remainder's mean is no error.

    Args:
      key: random key of the draws.
      fn: the release.
      x: where it is linearized.
      prior: of the flattened input; of full rank.
      noise_std: tau > 0.
      num_draws: images over which the remainder is averaged.
      center: mean of the prior, if not its own.
      chunk_size: directions at a time.

    Returns:
      In squared units, summed over pixels, never above the prior's energy (an attack may ignore the
      observation). Estimated from draws.

    Raises:
      ValueError: fewer than two draws, or a low-rank prior.
    """
    _checks.at_least(2, num_draws=num_draws)
    if prior.rank < prior.num_inputs:
        raise ValueError(
            f"the upper bound needs a prior of full rank, got {prior.rank} of {prior.num_inputs}; "
            "use Prior.isotropic or Prior.from_data."
        )
    rows = prior.rows()
    tau = jnp.asarray(noise_std, rows.dtype)
    moved = rows_of(push(fn, x, rows, chunk_size=chunk_size)) / tau
    posterior = posterior_from_triangular(moved.T, rows)
    gain = _gain_norm(moved, rows) / tau

    value, derivative = jax.linearize(fn, x)
    draws = prior_draws(key, prior, num_draws, center)

    def remainder(image: Array) -> Any:
        there = image.reshape(x.shape)
        moved = derivative(there - x)
        return jax.tree.map(lambda a, b, c: a - b - c, fn(there), value, moved)

    left = lax.map(remainder, draws)
    energy = sum(jnp.sum(jnp.var(leaf, axis=0, ddof=1)) for leaf in jax.tree.leaves(left))
    bound = (jnp.sqrt(posterior.error) + gain * jnp.sqrt(energy)) ** 2
    return jnp.minimum(bound, prior.energy)


def _gain_norm(moved: Array, rows: Array) -> Array:
    """The largest singular value of ``L' M^-1 T`` with ``M = I + T T'``."""
    eye = jnp.eye(moved.shape[0], dtype=moved.dtype)
    inverse = jnp.linalg.inv(moved @ moved.T + eye)
    middle = inverse - inverse @ inverse  # M^-1 T T' M^-1
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(rows.T @ middle @ rows)[-1], 0))
