"""Approximate inverses of ``M^T diag(mask) M``, from the cheapest description M gives of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jgia.sparse.conv import ConvOperator
from jgia.sparse.operators import Domain, LinearOperator, Planes, Scaled


def preconditioner(operator: LinearOperator, weight: Array) -> Any:
    """A positive definite linear map of the domain, per sample.

    Convolutions: the inverse C x C blocks of every pixel. Operators with ``normal_diagonal``:
    its inverse. Others: a multiple of the identity, in units of the squared norm, so that the
    preconditioned gradient does not change with the scale of the operator.
    """
    if isinstance(operator, Scaled):
        inner = preconditioner(operator.operator, weight)
        square = jnp.asarray(operator.scale, weight.dtype) ** 2
        return ScaledPreconditioner(inner, 1 / jnp.where(square > 0, square, 1))
    if isinstance(operator, ConvOperator):
        return block_preconditioner(operator, weight)
    if hasattr(operator, "normal_diagonal"):
        return diagonal_preconditioner(operator, weight)
    return scalar_preconditioner(operator, weight)


class BlockPreconditioner(NamedTuple):
    """Inverse pixel blocks (C, C, H, W, J), applied as a C x C product at every pixel."""

    inverse: Float[Array, "channels channels height width batch"]

    def __call__(self, x: Planes) -> Planes:
        """The product at every pixel."""
        # Unrolled: a reduction over this short middle axis is 100x slower on XLA:CPU.
        num = x.shape[0]
        return jnp.stack([sum(self.inverse[i, j] * x[j] for j in range(num)) for i in range(num)])


class DiagonalPreconditioner(NamedTuple):
    """Factors that broadcast against the domain (*domain, J)."""

    inverse: Domain

    def __call__(self, x: Domain) -> Domain:
        """The product, entry by entry."""
        return self.inverse * x


class ScaledPreconditioner(NamedTuple):
    """A multiple of another preconditioner."""

    inner: Any
    scale: Float[Array, ""]

    def __call__(self, x: Domain) -> Domain:
        """The scaled product."""
        return self.scale * self.inner(x)


def block_preconditioner(operator: ConvOperator, weight: Planes) -> BlockPreconditioner:
    """Invert the C x C diagonal blocks of ``M^T diag(weight) M`` at every pixel.

    A relative ridge keeps pixels that no equation touches, or that fewer than C equations
    touch, finite; it changes the path of the iteration, never its limit.
    """
    blocks = operator.pixel_blocks(weight)
    num = blocks.shape[0]
    trace = sum(blocks[c, c] for c in range(num))
    scale = jnp.max(trace, axis=(0, 1), keepdims=True)
    ridge = 1e-3 * trace / num + 1e-6 * jnp.where(scale > 0, scale, 1)
    if num > 4:  # many channels: the diagonal alone, rather than unrolled factorizations
        diagonal = jnp.stack([blocks[c, c] + ridge for c in range(num)])
        eye = jnp.eye(num, dtype=blocks.dtype)[:, :, None, None, None]
        return BlockPreconditioner(eye / diagonal[None])
    rows = [[blocks[i, j] + (ridge if i == j else 0) for j in range(num)] for i in range(num)]
    inverse = _invert_unrolled(rows)
    return BlockPreconditioner(jnp.stack([jnp.stack(row) for row in inverse]))


def diagonal_preconditioner(operator: Any, weight: Array) -> DiagonalPreconditioner:
    """Invert the diagonal of ``M^T diag(weight) M``, finite where no equation is."""
    diagonal = operator.normal_diagonal(weight)
    scale = jnp.max(diagonal, axis=tuple(range(diagonal.ndim - 1)), keepdims=True)
    return DiagonalPreconditioner(1 / (diagonal + 1e-6 * jnp.where(scale > 0, scale, 1)))


def scalar_preconditioner(
    operator: LinearOperator, weight: Array, *, num_iterations: int = 4
) -> DiagonalPreconditioner:
    """``1 / lambda`` per sample, lambda a few power iterations' estimate of the squared norm."""

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(x.ndim - 1)), keepdims=True))

    # A fixed pseudo-random start has a part of every eigenvector, whatever the data.
    shape = jax.eval_shape(operator.adjoint, weight).shape
    start = jax.random.normal(jax.random.key(0), (*shape[:-1], 1), weight.dtype)
    v = jnp.broadcast_to(start, shape)
    estimate = norm(v)
    for _ in range(num_iterations):
        v = v / jnp.where(estimate > 0, estimate, 1)
        v = operator.adjoint(weight * operator.apply(v))
        estimate = norm(v)
    return DiagonalPreconditioner(1 / jnp.where(estimate > 0, estimate, 1))


def _invert_unrolled(a: list[list[Array]]) -> list[list[Array]]:
    """Gauss-Jordan on a small symmetric positive definite matrix of arrays, no pivoting."""
    num = len(a)
    one = jnp.ones_like(a[0][0])
    inverse = [[one if i == j else jnp.zeros_like(one) for j in range(num)] for i in range(num)]
    for i in range(num):
        pivot = 1 / a[i][i]
        a[i] = [v * pivot for v in a[i]]
        inverse[i] = [v * pivot for v in inverse[i]]
        for k in range(num):
            if k != i:
                factor = a[k][i]
                a[k] = [u - factor * v for u, v in zip(a[k], a[i], strict=True)]
                inverse[k] = [u - factor * v for u, v in zip(inverse[k], inverse[i], strict=True)]
    return [[(inverse[i][j] + inverse[j][i]) / 2 for j in range(num)] for i in range(num)]
