"""What the shaping functions share: spectra of Gram matrices, priors, a root in log scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Seen(NamedTuple):
    """A linear observation of a Gaussian input, in the eigenbasis of its Gram matrix.

    Attributes:
      eigenvalues: of the Gram matrix, ascending, 1 where ``mask`` is off.
      basis: its eigenvectors in columns.
      mask: which directions the release sees at all.
      prior: prior covariance in that basis.
      cross: rows of ``prior`` of the seen directions, zeros elsewhere.
    """

    eigenvalues: Array
    basis: Array
    mask: Array
    prior: Array
    cross: Array


def symmetrized(matrix: Array) -> Array:
    """The symmetric part."""
    return (matrix + matrix.T) / 2


def rank_tolerance(dtype: object, size: int) -> float:
    """Eigenvalues of a Gram matrix below this times the largest are rounding errors."""
    return 8.0 * math.sqrt(size) * float(jnp.finfo(dtype).eps)


def check_square(**matrices: Array) -> None:
    """Raise ``ValueError`` unless every named array is a square matrix of one size."""
    size = None
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise ValueError(
                f"{name} must be a square matrix with one row per input coordinate, got shape "
                f"{matrix.shape}; flatten the input and pass J^T J or a covariance."
            )
        if size is not None and matrix.shape[0] != size:
            raise ValueError(
                f"{name} must have {size} rows like the matrices before it, got "
                f"{matrix.shape[0]}; all of them live in input space."
            )
        size = matrix.shape[0]


def prior_matrix(prior: Array | float, like: Array) -> Array:
    """A prior variance or covariance as a matrix of the size and dtype of ``like``.

    Raises:
      ValueError: it is neither a scalar nor a matrix of that shape.
    """
    array = jnp.asarray(prior, like.dtype)
    if array.ndim == 0:
        return array * jnp.eye(like.shape[0], dtype=like.dtype)
    if array.shape != like.shape:
        raise ValueError(
            f"prior must be a variance (a scalar) or a covariance of shape {like.shape}, got shape "
            f"{array.shape}; use one variance per pixel as a diagonal matrix."
        )
    return symmetrized(array)


def seen_through(gram: Array, prior: Array | float) -> Seen:
    """The prior in the eigenbasis of a Gram matrix, and which of its directions are seen."""
    values, basis = jnp.linalg.eigh(symmetrized(gram))
    mask = values > rank_tolerance(gram.dtype, gram.shape[0]) * jnp.max(jnp.abs(values))
    rotated = symmetrized(basis.T @ prior_matrix(prior, gram) @ basis)
    return Seen(
        eigenvalues=jnp.where(mask, values, 1),
        basis=basis,
        mask=mask,
        prior=rotated,
        cross=jnp.where(mask[:, None], rotated, 0),
    )


def block(seen: Seen, matrix: Array, elsewhere: float | Array = 0.0) -> Array:
    """The block of the seen directions; ``elsewhere`` on the rest of the diagonal."""
    both = seen.mask[:, None] & seen.mask[None, :]
    rest = jnp.where(seen.mask, 0, jnp.asarray(elsewhere, matrix.dtype))
    return jnp.where(both, matrix, 0) + jnp.diag(rest)


def reachable(target: Array, least: Array, energy: Array) -> Array:
    """A target clipped to what finite noise can reach, ``[least, (1 - sqrt(eps)) energy]``."""
    top = 1 - math.sqrt(float(jnp.finfo(energy.dtype).eps))
    return jnp.clip(target, least, jnp.maximum(least, top * energy))


def root_in_log_scale(fn: Callable[[Array], Array], high: Array) -> Array:
    """Root of an increasing ``fn`` in ``(0, high]``, ``fn(high) >= 0``, by bisection of the log.

    64 halvings of ``[eps^2 high, high]`` and one Newton step, which also carries the derivatives
    with respect to whatever ``fn`` closes over.
    """
    top = jax.lax.stop_gradient(jnp.log(high))
    bottom = top + 2 * math.log(float(jnp.finfo(high.dtype).eps))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, up = ends
        middle = (low + up) / 2
        below = fn(jnp.exp(middle)) < 0
        return jnp.where(below, middle, low), jnp.where(below, up, middle)

    low, up = jax.lax.fori_loop(0, 64, halve, (bottom, top))
    root = jax.lax.stop_gradient(jnp.exp((low + up) / 2))
    value, slope = jax.jvp(fn, (root,), (jnp.ones_like(root),))
    slope = jax.lax.stop_gradient(slope)
    usable = slope * root > jnp.abs(jax.lax.stop_gradient(value))  # a step of less than the root
    return root - jnp.where(usable, value / jnp.where(usable, slope, 1), 0)
