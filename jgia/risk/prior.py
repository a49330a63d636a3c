"""What an attacker expects of an image before seeing anything of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jgia import _checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prior:
    r"""A Gaussian prior ``N(mean, Sigma)`` on a flattened image, in the units of the image.

    ``Sigma = factor' factor + tail_variance (I - P)`` with P the projection on the rows of
    ``factor``. Make one with :meth:`isotropic`, :meth:`gaussian`, :meth:`from_data` or
    :meth:`low_rank`.

    Attributes:
      mean: (d,) the expected image.
      factor: (k, d) rows ``l_i``: what an attacker's uncertainty is made of. ``None`` for an
        isotropic prior, where it would be ``sqrt(variance) I``.
      variance: () of every pixel of an isotropic prior; otherwise the mean over pixels.
      tail_variance: () along every direction that the rows leave out, 0 for a prior of full rank.
    """

    mean: Float[Array, " inputs"]
    factor: Float[Array, "rank inputs"] | None
    variance: Float[Array, ""]
    tail_variance: Float[Array, ""]

    @classmethod
    def isotropic(
        cls, num_inputs: int, *, variance: float, mean: float = 0.5, dtype: str = "float32"
    ) -> Prior:
        """Independent pixels of one variance.

        Raises:
          ValueError: the variance is not positive.

        >>> float(Prior.isotropic(4, variance=0.25).energy)
        1.0
        """
        _checks.at_least(1, num_inputs=num_inputs)
        _checks.positive(variance=variance)
        return cls(
            mean=jnp.full(num_inputs, mean, dtype),
            factor=None,
            variance=jnp.asarray(variance, dtype),
            tail_variance=jnp.zeros((), dtype),
        )

    @classmethod
    def gaussian(cls, covariance: ArrayLike, mean: ArrayLike | None = None) -> Prior:
        """A full covariance.

        Args:
          covariance: (d, d) symmetric, positive definite.
          mean: (d,); 0.5 when left out.

        Raises:
          ValueError: it is not square, not symmetric, not finite or not positive definite, or the
            mean has another size.
        """
        sigma = np.asarray(covariance)
        if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1]:
            raise ValueError(f"the prior covariance must be square, got shape {sigma.shape}.")
        if not np.isfinite(sigma).all() or not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-7):
            raise ValueError("the prior covariance must be finite and symmetric.")
        center = np.full(len(sigma), 0.5) if mean is None else np.asarray(mean).reshape(-1)
        if center.shape != (len(sigma),):
            raise ValueError(f"the prior mean must have {len(sigma)} entries, got {center.size}.")
        symmetric = (sigma.astype("float64") + sigma.T) / 2
        try:
            root = np.linalg.cholesky(symmetric)
        except np.linalg.LinAlgError as error:
            raise ValueError(
                "the prior covariance must be positive definite; add shrinkage: Prior.from_data "
                "mixes in a multiple of the identity."
            ) from error
        dtype = jnp.result_type(float) if sigma.dtype == np.float64 else jnp.float32
        return cls(
            mean=jnp.asarray(center, dtype),
            factor=jnp.asarray(root.T, dtype),
            variance=jnp.asarray(np.trace(symmetric) / len(sigma), dtype),
            tail_variance=jnp.zeros((), dtype),
        )

    @classmethod
    def from_data(cls, images: ArrayLike, *, shrinkage: float = 1e-3) -> Prior:
        """Mean and covariance of public images, shrunk towards a multiple of the identity.

        ``Sigma = (1 - rho) S + rho tr(S) / d I`` (Ledoit and Wolf, 2004, equation 3).

        Args:
          images: (N, ...) at least 2, in [0, 1].
          shrinkage: rho, in (0, 1).

        Raises:
          ValueError: fewer than two images, or all are equal.
        """
        _checks.fraction(shrinkage=shrinkage)
        rows, center, centered = _centered(images)
        covariance = centered.T @ centered / (len(rows) - 1)
        scale = np.trace(covariance) / covariance.shape[0]
        mixed = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))
        return cls.gaussian(mixed.astype(_wide(images)), center)

    @classmethod
    def low_rank(cls, images: ArrayLike, *, rank: int) -> Prior:
        """The leading principal components of public images, and one variance for the rest.

        For images whose covariance does not fit in memory. Everything that takes such a prior
        brackets what the rest can change (:func:`jgia.risk.invre`).

        Args:
          images: (N, ...) more than ``rank``, in [0, 1].
          rank: components kept, below the number of pixels.

        Raises:
          ValueError: not enough images or pixels for the rank.
        """
        _checks.at_least(1, rank=rank)
        rows, center, centered = _centered(images)
        if rank >= min(rows.shape):
            raise ValueError(
                f"rank={rank} needs more than {rank} images of more than {rank} pixels, got "
                f"{rows.shape[0]} of {rows.shape[1]}."
            )
        _, values, directions = np.linalg.svd(centered, full_matrices=False)
        variances = values**2 / (len(rows) - 1)
        dtype = _wide(images)
        rest = variances[rank:].sum() / (rows.shape[1] - rank)
        return cls(
            mean=jnp.asarray(center, dtype),
            factor=jnp.asarray(np.sqrt(variances[:rank, None]) * directions[:rank], dtype),
            variance=jnp.asarray(variances.sum() / rows.shape[1], dtype),
            tail_variance=jnp.asarray(rest, dtype),
        )

    @property
    def num_inputs(self) -> int:
        """Pixels of one image, d."""
        return self.mean.shape[-1]

    @property
    def rank(self) -> int:
        """Directions of uncertainty, k."""
        return self.num_inputs if self.factor is None else self.factor.shape[0]

    @property
    def tail_energy(self) -> Array:
        """``tr Sigma`` of what the rows of ``factor`` leave out."""
        return self.tail_variance * (self.num_inputs - self.rank)

    @property
    def tail_pixels(self) -> Float[Array, " inputs"]:
        """The variances of single pixels that the rows of ``factor`` leave out."""
        if self.factor is None or self.rank == self.num_inputs:
            return jnp.zeros_like(self.mean)
        lengths = jnp.linalg.norm(self.factor, axis=1, keepdims=True)
        basis = self.factor / jnp.maximum(lengths, jnp.finfo(lengths.dtype).tiny)
        return self.tail_variance * (1 - jnp.sum(basis**2, axis=0))

    @property
    def energy(self) -> Array:
        """``tr Sigma``: the error of an attacker who only knows the prior, E0."""
        return self.variance * self.num_inputs

    def rows(self) -> Float[Array, "rank inputs"]:
        """``factor``, written out for an isotropic prior."""
        if self.factor is not None:
            return self.factor
        return jnp.sqrt(self.variance) * jnp.eye(self.num_inputs, dtype=self.mean.dtype)

    def repeat(self, count: int) -> Prior:
        """The prior of ``count`` independent images, one after the other."""
        _checks.at_least(1, count=count)
        factor = self.factor
        if factor is not None:
            factor = jnp.kron(jnp.eye(count, dtype=factor.dtype), factor)
        return dataclasses.replace(self, mean=jnp.tile(self.mean, count), factor=factor)

    def astype(self, dtype: str) -> Prior:
        """The same prior in float32 or float64."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self)


def _wide(images: ArrayLike) -> str:
    return "float64" if np.asarray(images).dtype == np.float64 else "float32"


def _centered(images: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.asarray(images, "float64")
    rows = rows.reshape(len(rows), -1) if rows.ndim > 1 else rows.reshape(-1, 1)
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"a prior from data needs at least two finite images, got shape {rows.shape}."
        )
    center = rows.mean(0)
    centered = rows - center
    if not centered.any():
        raise ValueError("a prior from data needs images that differ from each other.")
    return rows, center, centered
