"""Sparse and least-squares recovery for many right-hand sides at once, matrix-free."""

from jgia.sparse.bases import BlockDCT
from jgia.sparse.fista import LassoOptions, LassoResult, masked_lasso
from jgia.sparse.least_squares import LeastSquaresResult, masked_least_squares
from jgia.sparse.operators import (
    ConvOperator,
    from_planes,
    largest_eigenvalue,
    to_planes,
)

__all__ = [
    "BlockDCT",
    "ConvOperator",
    "LassoOptions",
    "LassoResult",
    "LeastSquaresResult",
    "from_planes",
    "largest_eigenvalue",
    "masked_lasso",
    "masked_least_squares",
    "to_planes",
]
