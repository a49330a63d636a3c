"""A linearized release with correlated noise: what a defense does, as a pair (J, C)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jaxtyping import Bool, Float

from jgia import _checks
from jgia.risk.posterior import (
    Posterior,
    posterior_from_triangular,
    without_nuisance_triangular,
)
from jgia.risk.prior import Prior


class Channel(NamedTuple):
    r"""What an attacker receives of a small change ``h`` of the image: ``J h + n``.

    ``n ~ N(0, C)`` with ``C = diag(variance) + factor factor'``: a diagonal part, which must be
    positive, and one of low rank. Every defense is a transformation of the two
    (:mod:`jgia.explain`).

    Attributes:
      jacobian: (p, d) J, rows in the order of the flattened release, columns in pixels.
      variance: (p,) noise variance of every shared entry on its own, > 0.
      factor: (p, m) correlated noise, or ``None``.
    """

    jacobian: Float[Array, "outputs inputs"]
    variance: Float[Array, " outputs"]
    factor: Float[Array, "outputs parts"] | None = None


def isotropic_channel(
    jacobian: Float[Array, "outputs inputs"], noise_std: float | Float[Array, ""]
) -> Channel:
    """Noise of one standard deviation on every entry: ``C = tau^2 I``.

    >>> isotropic_channel(jnp.eye(2, dtype="float32"), 0.5).variance.tolist()
    [0.25, 0.25]
    """
    if isinstance(noise_std, float | int):
        _checks.positive(noise_std=float(noise_std))
    variance = jnp.asarray(noise_std, jacobian.dtype) ** 2
    return Channel(jacobian, jnp.full(jacobian.shape[0], variance))


def keep_rows(channel: Channel, kept: Bool[Array, " outputs"]) -> Channel:
    """The channel without the rows of J that are not kept: pruning, sparsification, hidden layers.

    Guarantees:
      No singular value grows (Cauchy interlacing), so that InvLoss does not fall.

    >>> whole = isotropic_channel(jnp.eye(2, dtype="float32"), 1.0)
    >>> keep_rows(whole, jnp.array([True, False])).jacobian.tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    factor = channel.factor
    return Channel(
        jnp.where(kept[:, None], channel.jacobian, 0),
        channel.variance,
        None if factor is None else jnp.where(kept[:, None], factor, 0),
    )


def with_noise(
    channel: Channel,
    variance: float | Float[Array, ""] | Float[Array, " outputs"] = 0.0,
    factor: Float[Array, "outputs parts"] | None = None,
) -> Channel:
    """The channel with independent further noise of covariance ``diag(variance) + factor factor'``.

    >>> with_noise(isotropic_channel(jnp.eye(2, dtype="float32"), 1.0), 3.0).variance.tolist()
    [4.0, 4.0]
    """
    more = jnp.broadcast_to(jnp.asarray(variance, channel.variance.dtype), channel.variance.shape)
    parts = [part for part in (channel.factor, factor) if part is not None]
    return Channel(
        channel.jacobian,
        channel.variance + more,
        jnp.concatenate(parts, axis=1) if parts else None,
    )


def clipped_jacobian(
    jacobian: Float[Array, "outputs inputs"],
    value: Float[Array, " outputs"],
    clip_norm: float | Float[Array, ""],
) -> Float[Array, "outputs inputs"]:
    r"""The Jacobian of ``g min(1, c / ||g||)``: ``(c / ||g||) (I - g g' / ||g||^2) J``.

    Every singular value shrinks by ``c / ||g||`` and the direction of g itself is lost; without
    noise neither hides anything else.

    Args:
      jacobian: (p, d) J of g.
      value: (p,) g.
      clip_norm: c > 0.

    Returns:
      J as it is where ``||g|| <= c``.

    >>> value = jnp.array([0.0, 2.0], "float32")
    >>> clipped_jacobian(jnp.eye(2, dtype="float32"), value, 1.0).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    if isinstance(clip_norm, float | int):
        _checks.positive(clip_norm=float(clip_norm))
    norm = jnp.linalg.norm(value)
    bound = jnp.asarray(clip_norm, value.dtype)
    clipped = norm > bound
    direction = value / jnp.where(clipped, norm, 1)
    inside = jacobian - direction[:, None] * (direction @ jacobian)[None]
    return jnp.where(clipped, bound / jnp.where(clipped, norm, 1) * inside, jacobian)


def whitened_rows(
    channel: Channel, rows: Float[Array, "rank inputs"] | None = None
) -> Float[Array, "reduced rank"]:
    """R with ``R' R = L J' C^-1 J L'``, by orthogonal steps only: nothing is squared or inverted.

    The correlated part of the noise is a nuisance that is eliminated, ``n = F xi + D^(1/2) z``.

    Args:
      channel: J and C.
      rows: ``L``, the prior's (:meth:`jgia.risk.Prior.rows`); the unit vectors when left out.

    >>> whitened_rows(isotropic_channel(jnp.eye(2, dtype="float32"), 0.5)).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    scale = 1 / jnp.sqrt(channel.variance)[:, None]
    moved = channel.jacobian if rows is None else channel.jacobian @ rows.T
    if channel.factor is None:
        return scale * moved
    joint = jnp.concatenate([scale * channel.factor, scale * moved], axis=1)
    return without_nuisance_triangular(joint, channel.factor.shape[1])


def fisher_information(channel: Channel) -> Float[Array, "inputs inputs"]:
    """``J' C^-1 J``: what adds up over independent releases.

    >>> fisher_information(isotropic_channel(jnp.eye(2, dtype="float32"), 0.5)).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    whole = whitened_rows(channel)
    return whole.T @ whole


def channel_posterior(channel: Channel, prior: Prior) -> Posterior:
    """The Gaussian posterior of the image; its ``error`` is InvLoss for a prior of full rank.

    Raises:
      ValueError: the prior has another number of pixels, or shapes do not fit.
    """
    _check(channel, prior)
    rows = prior.rows()
    return posterior_from_triangular(whitened_rows(channel, rows), rows)


def channel_invloss(channel: Channel, prior: Prior) -> Float[Array, ""]:
    r"""``tr (Sigma^-1 + J' C^-1 J)^-1``, with all of a low-rank prior's rest counted as lost.

    Exact for Gaussian noise. For other noise of the covariance C it is the error of the best
    *linear* attack on a linear release; others may do better.

    >>> prior = Prior.isotropic(2, variance=1.0)
    >>> channel = isotropic_channel(jnp.eye(2, dtype="float32"), 1.0)
    >>> round(float(channel_invloss(channel, prior)), 5)
    1.0
    """
    return channel_posterior(channel, prior).error + prior.tail_energy


def error_at(channel: Channel, prior: Prior, x: Float[Array, " inputs"]) -> Float[Array, ""]:
    r"""What the best attack on the linear release does *at this image*, averaged over noise only.

    With ``M = I + L J' C^-1 J L'`` and ``x = mu + L' z``: the squared bias ``||L' M^-1 z||^2``
    towards the prior's mean, and the variance ``tr P - ||L' M^-1||^2``. Its mean over images from
    the prior is :func:`channel_invloss`; an image that the prior does not expect has more.

    Args:
      channel: J at ``x``, and C.
      prior: of full rank.
      x: (d,) the image.

    Raises:
      ValueError: a low-rank prior, or shapes that do not fit.
    """
    _check(channel, prior)
    if prior.rank < prior.num_inputs:
        raise ValueError(
            f"the error at an image needs a prior of full rank, got {prior.rank} of "
            f"{prior.num_inputs}; use Prior.isotropic or Prior.from_data."
        )
    rows = prior.rows()
    r = whitened_rows(channel, rows)
    eye = jnp.eye(r.shape[1], dtype=r.dtype)
    lower = jnp.linalg.qr(jnp.concatenate([r, eye]), mode="r").T
    inverse = solve_triangular(lower, eye, lower=True)
    root = inverse @ rows
    gain = root.T @ inverse
    z = jnp.linalg.solve(rows.T, x.reshape(-1) - prior.mean)
    return jnp.sum((gain @ z) ** 2) + jnp.sum(root**2) - jnp.sum(gain**2)


def _check(channel: Channel, prior: Prior) -> None:
    count, size = channel.jacobian.shape
    if size != prior.num_inputs:
        raise ValueError(
            f"the Jacobian has {size} columns, the prior {prior.num_inputs} pixels; flatten the "
            "image, or repeat the prior for a batch."
        )
    factor = channel.factor
    if channel.variance.shape != (count,) or (factor is not None and factor.shape[0] != count):
        raise ValueError(
            f"noise must have {count} entries like the rows of the Jacobian, got "
            f"{channel.variance.shape} and {None if factor is None else factor.shape}."
        )
