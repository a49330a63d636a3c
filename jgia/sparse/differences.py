"""Finite differences and total variation: images that are smooth except at edges."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jgia import _checks
from jgia.sparse.bases import sample_axes
from jgia.sparse.operators import Domain

Field = Float[Array, "directions *domain batch"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FiniteDifferences:
    """Forward differences D along every axis, the analysis operator of total variation.

    ``(D x)[d] = x[... i + 1 ...] - x[... i ...]`` along axis d and 0 at its end, where the image
    stops (no difference across the border). Not a basis: D has more rows than columns and
    constants are its kernel, so ``||D x||`` is a prior in analysis form, to be split off by ADMM
    or a primal-dual method through :meth:`project` or :meth:`shrink`.

    >>> D = FiniteDifferences()
    >>> field = D.apply(jnp.array([[1.0], [4.0], [2.0]]))
    >>> field[0, :, 0].tolist(), D.norm(field).tolist()
    ([3.0, -2.0, 0.0], [5.0])

    Attributes:
      isotropic: the norm of the field: ``sum_i sqrt(sum_d z[d, i]^2)`` (rotation invariant)
        or, if not, ``sum_i sum_d |z[d, i]|``. The differences are the same.

    References:
      L. Rudin, S. Osher and E. Fatemi (Physica D 60, 1992); A. Chambolle (Journal of
      Mathematical Imaging and Vision 20, 2004) for this discretization and its norm bound.
    """

    isotropic: bool = True

    def apply(self, x: Domain) -> Field:
        """``D x``: planes (C, H, W, J) to (2, C, H, W, J), vectors (n, J) to (1, n, J)."""
        return jnp.stack(
            [jnp.diff(x, axis=a, append=_end(x, a, x.shape[a] - 1)) for a in sample_axes(x)]
        )

    def adjoint(self, y: Field) -> Domain:
        """``D^T y``, minus the divergence: (d, *domain, J) to (*domain, J)."""
        axes = sample_axes(y[0])
        if len(axes) != y.shape[0]:
            raise ValueError(f"y has {y.shape[0]} directions, samples of this shape {len(axes)}.")
        return jnp.asarray(sum(_adjoint_difference(y[d], axis) for d, axis in enumerate(axes)))

    def squared_norm_bound(self, num_axes: int = 2) -> Float[Array, ""]:
        """Upper bound on the largest eigenvalue of ``D^T D``: 4 per axis, 8 for images."""
        _checks.at_least(1, num_axes=num_axes)
        return jnp.asarray(4 * num_axes, jnp.result_type(float))

    def norm(self, field: Field) -> Float[Array, " batch"]:
        """The norm whose value at ``D x`` is the total variation of x, per sample."""
        return jnp.sum(self._magnitude(field), axis=tuple(range(field.ndim - 1)))

    def project(self, field: Field, radius: Float[Array, ""] | float) -> Field:
        """The nearest field in the dual norm's ball: magnitudes of at most ``radius``."""
        magnitude = self._magnitude(field)
        outside = magnitude > radius
        return field * jnp.where(outside, radius / jnp.where(outside, magnitude, 1), 1)

    def shrink(self, field: Field, threshold: Float[Array, ""] | float) -> Field:
        """``argmin_z 1/2 ||z - field||^2 + threshold * norm(z)``, magnitudes made smaller.

        A threshold of zero returns the field.
        """
        magnitude = self._magnitude(field)
        kept = jnp.maximum(magnitude - threshold, 0)
        return field * (kept / jnp.where(magnitude > 0, magnitude, 1))

    def _magnitude(self, field: Array) -> Array:
        if not self.isotropic:
            return jnp.abs(field)
        square = jnp.sum(field**2, axis=0, keepdims=True)
        # The root's derivative is infinite at 0, where the field's is 0.
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def total_variation(x: Domain, *, isotropic: bool = True) -> Float[Array, " batch"]:
    """Total variation of every sample, ``||D x||`` in the norm of :class:`FiniteDifferences`.

    Channels are summed. Not normalized by the number of pixels.

    >>> total_variation(jnp.array([[0.0], [1.0], [1.0], [0.0]])).tolist()
    [2.0]
    """
    differences = FiniteDifferences(isotropic)
    return differences.norm(differences.apply(x))


def _end(x: Array, axis: int, index: int) -> Array:
    return jax.lax.slice_in_dim(x, index, index + 1, axis=axis)


def _adjoint_difference(y: Array, axis: int) -> Array:
    """``-y[0]``, ``y[i - 1] - y[i]``, ``y[n - 2]``: the last entry of y meets no difference."""
    zero = jnp.zeros_like(_end(y, axis, 0))
    inner = jax.lax.slice_in_dim(y, 0, y.shape[axis] - 1, axis=axis)
    return -jnp.diff(jnp.concatenate([zero, inner, zero], axis=axis), axis=axis)
