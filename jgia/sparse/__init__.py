"""Sparse and least-squares recovery for many right-hand sides at once, matrix-free."""

from jgia.sparse.admm import AdmmOptions
from jgia.sparse.analysis import AnalysisResult, analysis_lasso
from jgia.sparse.bases import (
    Basis,
    BlockDCT,
    ColorRotation,
    GlobalDCT,
    Identity,
    energy_support,
)
from jgia.sparse.basis_pursuit import BasisPursuitResult, basis_pursuit
from jgia.sparse.conv import AveragePool, ConvOperator
from jgia.sparse.debias import DebiasResult, debias
from jgia.sparse.differences import FiniteDifferences, total_variation
from jgia.sparse.fista import FistaOptions
from jgia.sparse.lasso import LassoResult, lasso
from jgia.sparse.least_squares import LeastSquaresResult, masked_least_squares
from jgia.sparse.masked import LassoOptions, masked_lasso
from jgia.sparse.operators import (
    Composition,
    DenseOperator,
    LinearOperator,
    MatrixOperator,
    Scaled,
    from_planes,
    largest_eigenvalue,
    squared_norm_bound,
    to_planes,
)
from jgia.sparse.path import lasso_path
from jgia.sparse.problem import (
    CONVERGED,
    INVALID,
    MAX_ITERATIONS,
    NONFINITE,
    STALLED,
    lam_max,
)
from jgia.sparse.proximal import ProximalResult, proximal_gradient
from jgia.sparse.wavelets import Wavelet

__all__ = [
    "CONVERGED",
    "INVALID",
    "MAX_ITERATIONS",
    "NONFINITE",
    "STALLED",
    "AdmmOptions",
    "AnalysisResult",
    "AveragePool",
    "Basis",
    "BasisPursuitResult",
    "BlockDCT",
    "ColorRotation",
    "Composition",
    "ConvOperator",
    "DebiasResult",
    "DenseOperator",
    "FiniteDifferences",
    "FistaOptions",
    "GlobalDCT",
    "Identity",
    "LassoOptions",
    "LassoResult",
    "LeastSquaresResult",
    "LinearOperator",
    "MatrixOperator",
    "ProximalResult",
    "Scaled",
    "Wavelet",
    "analysis_lasso",
    "basis_pursuit",
    "debias",
    "energy_support",
    "from_planes",
    "lam_max",
    "largest_eigenvalue",
    "lasso",
    "lasso_path",
    "masked_lasso",
    "masked_least_squares",
    "proximal_gradient",
    "squared_norm_bound",
    "to_planes",
    "total_variation",
]
