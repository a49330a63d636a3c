"""The Gaussian posterior of a linearized release: all that InvLoss and InvRE are read from."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks


class Posterior(NamedTuple):
    r"""What is left of the prior after the observation ``o = J x + n``, ``n ~ N(0, tau^2 I)``.

    In the prior's own coordinates ``x = mean + L' z`` with ``z ~ N(0, I)`` the posterior precision
    is ``M = I + K`` with ``K = L J' J L' / tau^2``, and the posterior covariance of the image is
    ``P = L' M^-1 L = W' W``.

    Attributes:
      root: (k, d) ``W``.
      information: () ``log det(M) / 2``: nats that the observation tells of the image.
      dimensions: () ``tr(K M^-1)``: recoverable dimensions, the ridge regression's effective ones.
    """

    root: Float[Array, "rank inputs"]
    information: Float[Array, ""]
    dimensions: Float[Array, ""]

    @property
    def error(self) -> Float[Array, ""]:
        """``tr P``: the smallest expected squared error that any attack can have."""
        return jnp.sum(self.root**2)

    @property
    def pixel_errors(self) -> Float[Array, " inputs"]:
        """The diagonal of P: expected squared error of every pixel."""
        return jnp.sum(self.root**2, axis=0)


def posterior_from_gram(
    information: Float[Array, "rank rank"], rows: Float[Array, "rank inputs"]
) -> Posterior:
    """The posterior by a Cholesky factor of ``I + K``.

    Args:
      information: K, the Gram matrix in the prior's coordinates over the noise variance.
      rows: (k, d) of the prior (:meth:`jgia.risk.Prior.rows`).

    Guarantees:
      Finite first and second derivatives, also where K has repeated or zero eigenvalues. In
      float32, K above about 1e7 leaves the factor NaN: :func:`posterior_from_triangular` does not
      square.
    """
    count = information.shape[0]
    return _posterior(
        jnp.linalg.cholesky(information + jnp.eye(count, dtype=information.dtype)), rows
    )


def posterior_from_triangular(
    r: Float[Array, "outputs rank"], rows: Float[Array, "rank inputs"]
) -> Posterior:
    """The posterior from R with ``R' R = K`` by the factor of ``[R; I]``: nothing is squared.

    Args:
      r: any matrix with ``R' R = K``: the Jacobian itself, or its triangular factor.
      rows: (k, d) of the prior.
    """
    count = r.shape[1]
    upper = jnp.linalg.qr(jnp.concatenate([r, jnp.eye(count, dtype=r.dtype)]), mode="r")
    return _posterior(upper.T, rows)


def _posterior(lower: Array, rows: Array) -> Posterior:
    count = lower.shape[0]
    inverse = solve_triangular(lower, jnp.eye(count, dtype=lower.dtype), lower=True)
    diagonal = jnp.abs(jnp.diagonal(lower))
    return Posterior(
        root=inverse @ rows,
        information=jnp.sum(jnp.log(diagonal)),
        dimensions=count - jnp.sum(inverse**2),
    )


def without_nuisance(
    information: Float[Array, "joint joint"], num_nuisance: int
) -> Float[Array, "rank rank"]:
    """K of the image alone when the first ``num_nuisance`` coordinates are not known either.

    The Schur complement of the joint posterior precision ``I + K``.
    """
    n = num_nuisance
    kept, cross = information[n:, n:], information[:n, n:]
    eye = jnp.eye(n, dtype=information.dtype)
    lower = jnp.linalg.cholesky(information[:n, :n] + eye)
    half = solve_triangular(lower, cross, lower=True)
    return kept - half.T @ half


def without_nuisance_triangular(
    r: Float[Array, "outputs joint"], num_nuisance: int
) -> Float[Array, "rows rank"]:
    """:func:`without_nuisance` for R with ``R' R = K``, without squaring."""
    n, count = num_nuisance, r.shape[1]
    prior = jnp.eye(n, count, dtype=r.dtype)
    return jnp.linalg.qr(jnp.concatenate([r, prior]), mode="r")[n:, n:]


def success_rates(
    key: PRNGKeyArray,
    posterior: Posterior,
    thresholds: Float[Array, " thresholds"],
    *,
    num_draws: int = 2000,
) -> Float[Array, " thresholds"]:
    """How often the best attack's squared error is at most a threshold.

    ``P(||W' xi||^2 <= t)`` with ``xi ~ N(0, I)`` by Monte Carlo. The posterior mean is the best
    center of a ball (Anderson 1955), so this is the curve of reconstruction robustness of the
    linear-Gaussian model.

    Args:
      key: random key.
      posterior: of one image.
      thresholds: squared Euclidean errors.
      num_draws: the standard error of a rate is at most ``1 / (2 sqrt(num_draws))``.

    References:
      Balle, Cherubin and Hayes, "Reconstructing Training Data with Informed Adversaries"
      (IEEE S&P 2022, arXiv 2201.04845), definition 2 (reconstruction robustness).
    """
    _checks.at_least(1, num_draws=num_draws)
    root = posterior.root

    noise = jax.random.normal(key, (num_draws, root.shape[0]), root.dtype)
    errors = jnp.sum((noise @ root) ** 2, axis=1)
    return jnp.mean(errors[:, None] <= thresholds[None], axis=0, dtype=root.dtype)
