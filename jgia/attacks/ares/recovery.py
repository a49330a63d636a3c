"""From one microbatch of activations to images: the numerical half of the inversion."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia.config import SparseBasis
from jgia.sparse import (
    Basis,
    BlockDCT,
    GlobalDCT,
    Identity,
    LassoOptions,
    LinearOperator,
    Wavelet,
    masked_lasso,
    masked_least_squares,
)

_DETERMINED = 1e-2  # a probe pixel within this many standard deviations is determined
_PROBE_TOLERANCE = 1e-5  # leaves determined pixels some 1e-3 off, well inside _DETERMINED
_ITERATIONS_PER_PASS = 150  # twice what a well-determined image takes
_ABANDON_RESIDUAL = 0.02  # far above any single sample's: no more digits for a mixture


class Recovered(NamedTuple):
    """Images of one microbatch and what is known of them.

    Attributes:
      x: (C, H, W, J) normalized images.
      residual: (J,) relative residual on the equations that were solved.
      determined: (C, H, W, J) which pixels the equations determine.
      iterations: (J,) solver iterations.
      status: (J,) status code of :mod:`jgia.sparse.least_squares`.
    """

    x: Array
    residual: Array
    determined: Array
    iterations: Array
    status: Array


@jax.jit
def least_squares(operator: LinearOperator, y: Array, mask: Array, probe: Array) -> Recovered:
    """Solve for the data to the last digit, and for a known image through the same mask.

    Args:
      operator: planes (C, H, W, J) to (F, H', W', J).
      y: (F, H', W', J) data of the active equations.
      mask: same shape, which equations are active.
      probe: (C, H, W, 1) the known image; pixels that come back are determined.
    """
    result = masked_least_squares(
        operator,
        y,
        mask,
        tolerance=float(jnp.finfo(y.dtype).eps) / 4,
        max_iterations=_ITERATIONS_PER_PASS,
        num_refinements=5,
        abandon_residual=_ABANDON_RESIDUAL,
    )
    known = jnp.broadcast_to(probe, (*probe.shape[:3], y.shape[-1]))
    found = masked_least_squares(
        operator,
        operator.apply(known),
        mask,
        tolerance=_PROBE_TOLERANCE,
        max_iterations=_ITERATIONS_PER_PASS,
        num_refinements=3,
    )
    determined = jnp.abs(found.x - known) < _DETERMINED
    return Recovered(
        result.x, result.relative_residual, determined, result.iterations, result.status
    )


def undetermined(y: Array, shape: tuple[int, ...]) -> Recovered:
    """What is known of images of which no equation was solved yet."""
    count = y.shape[-1]
    return Recovered(
        x=jnp.zeros((*shape, count), y.dtype),
        residual=jnp.zeros(count, y.dtype),
        determined=jnp.zeros((*shape, count), bool),
        iterations=jnp.zeros(count, jnp.int32),
        status=jnp.zeros(count, jnp.int32),
    )


class WeightedRows(NamedTuple):
    """``diag(weight) M`` with weights of each sample's own: zero leaves an equation out.

    Attributes:
      operator: M, planes (C, H, W, J) to (F, H', W', J).
      weight: (F, H', W', J).
    """

    operator: LinearOperator
    weight: Array

    def apply(self, x: Array) -> Array:
        """``weight * (M x)``."""
        return self.weight * self.operator.apply(x)

    def adjoint(self, y: Array) -> Array:
        """``M^T (weight * y)``."""
        return self.operator.adjoint(self.weight * y)


def sparse_basis(name: SparseBasis) -> Basis:
    """The basis that an option names."""
    bases: dict[str, Basis] = {
        "block_dct": BlockDCT(),
        "block_dct_gray": BlockDCT(color=False),
        "global_dct": GlobalDCT(),
        "haar": Wavelet("haar"),
        "db4": Wavelet("db4"),
        "pixel": Identity(),
    }
    return bases[name]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sparse(
    options: LassoOptions,
    basis: Basis,
    operator: LinearOperator,
    y: Array,
    mask: Array,
    bounded: Array | None = None,
) -> Array:
    """l1 recovery, then the smallest correction that restores the active equations.

    Args:
      options: of the l1 problem.
      basis: where images are sparse.
      operator: planes (C, H, W, J) to (F, H', W', J).
      y: (F, H', W', J) data of the active equations.
      mask: same shape, which equations are active.
      bounded: same shape, where ``(M x)_i <= 0`` is known to hold; all inactive equations when
        left out.
    """
    rows = operator
    if bounded is not None:
        rows = WeightedRows(operator, (mask | bounded).astype(y.dtype))
    x = masked_lasso(rows, y, mask, basis=basis, options=options).x
    remaining = jnp.where(mask, y - operator.apply(x), 0)
    correction = masked_least_squares(operator, remaining, mask, tolerance=1e-5)
    return x + correction.x


def surely_determined(determined: Array) -> Array:
    """Pixels that are determined together with all their neighbors: (1, H, W, J).

    The probe is met by chance in about 1 % of the undetermined values, but never in a whole
    neighborhood of them.
    """
    whole = jnp.all(determined, axis=0, keepdims=True)
    return lax.reduce_window(whole, True, lax.bitwise_and, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


@functools.partial(jax.jit, static_argnums=0)
def subtract_pairs(num: int, y: Array, mask: Array) -> Recovered:
    """``x = ReLU(x) - ReLU(-x)``; a pair that is on both sides proves a mixture."""
    plus, minus = y[:num], y[num : 2 * num]
    conflict = jnp.where(mask[:num] & mask[num : 2 * num], jnp.minimum(plus, minus), 0)
    norm = jnp.sqrt(jnp.sum(plus**2 + minus**2, axis=(0, 1, 2)))
    residual = jnp.sqrt(jnp.sum(conflict**2, axis=(0, 1, 2))) / jnp.where(norm > 0, norm, 1)
    zeros = jnp.zeros(y.shape[-1], jnp.int32)
    return Recovered(plus - minus, residual, jnp.ones(plus.shape, bool), zeros, zeros)
