"""Solutions along a decreasing sequence of l1 weights, each started from the one before."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jgia import _checks
from jgia.sparse.bases import Basis
from jgia.sparse.conjugate import conjugate
from jgia.sparse.fista import FistaOptions
from jgia.sparse.lasso import LassoResult, finish, prepare
from jgia.sparse.operators import Domain, LinearOperator, Range


def lasso_path(
    operator: LinearOperator | Float[Array, "rows columns"],
    y: Range,
    lam_ratios: Sequence[float] | Float[Array, " path"],
    *,
    mask: Bool[Array, "*range batch"] | None = None,
    weights: Domain | None = None,
    basis: Basis | None = None,
    one_sided: bool = False,
    options: FistaOptions | None = None,
) -> LassoResult:
    """:func:`jgia.sparse.lasso` at ``lam = ratio * lam_max`` for every ratio, warm-started.

    Args:
      operator: the map A, or a matrix (m, n).
      y: (*range, J) right-hand sides.
      lam_ratios: (L,) fractions of each sample's own ``lam_max``, best in decreasing order.
      mask: as in :func:`jgia.sparse.lasso`, like everything that follows.
      weights: as there.
      basis: as there.
      one_sided: as there.
      options: as there, for each point of the path.

    Returns:
      A :class:`LassoResult` with a leading axis of length L in every field.

    Raises:
      ValueError: there is no ratio, a ratio is negative or not finite, or shapes do not fit.

    Guarantees: derivatives with respect to y, weights and the operator are those of the
      minimizers with lam held.
    """
    ratios = jnp.asarray(lam_ratios, y.dtype)
    if ratios.ndim != 1 or not ratios.shape[0]:
        raise ValueError(f"lam_ratios must have shape (L,) with L >= 1, got {ratios.shape}.")
    if isinstance(lam_ratios, Sequence):
        for ratio in lam_ratios:
            _checks.non_negative(lam_ratios=ratio)
    options = options or FistaOptions()
    relative = prepare(operator, y, 1.0, mask, weights, basis, one_sided)
    largest = jnp.max(relative.correlation / relative.problem.weights, axis=0, keepdims=True)

    def point(c: Array, ratio: Array) -> tuple[Array, LassoResult]:
        lam = ratio * largest
        prepared = relative._replace(
            parameters=relative.parameters._replace(lam=lam),
            problem=relative.problem._replace(lam=lax.stop_gradient(lam)),
        )
        solution = conjugate(prepared.problem, c, prepared.correlation, options)
        return solution.c, finish(prepared, solution)

    start = jnp.zeros_like(lax.stop_gradient(relative.correlation))
    return lax.scan(point, start, ratios)[1]
