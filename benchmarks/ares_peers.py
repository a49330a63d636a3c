"""Peers of the ARES inversion on the same leaked activations, each given its best form."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl

Matrix = Any  # a SciPy sparse array; its stubs know too little to be of use


def first_layer_matrix(kernel: np.ndarray, height: int, width: int) -> Matrix:
    """The first convolution as an explicit sparse matrix (H*W*F, H*W*C); small images only."""
    kh, kw, channels, filters = kernel.shape
    i, j = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    rows, columns, values = [], [], []
    for a in range(kh):
        for b in range(kw):
            si, sj = i + a - kh // 2, j + b - kw // 2
            inside = (si >= 0) & (si < height) & (sj >= 0) & (sj < width)
            target, source = (i * width + j)[inside], (si * width + sj)[inside]
            for c in range(channels):
                for f in range(filters):
                    rows.append(target * filters + f)
                    columns.append(source * channels + c)
                    values.append(np.full(target.size, kernel[a, b, c, f], np.float64))
    shape = (height * width * filters, height * width * channels)
    data = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sp.csr_array(data, shape=shape)


def raster_dct_basis(height: int, width: int, channels: int) -> Matrix:
    """The release's synthesis matrix: a 64-point transform of contiguous raster runs, CHW."""
    n = np.arange(8)
    dct = np.cos(np.pi * (n[None, :] + 0.5) * n[:, None] / 8) * np.sqrt(2 / 8)
    dct[0] /= np.sqrt(2)
    size = height * width * channels
    blocks: Matrix = sp.block_diag([np.kron(dct, dct)] * (size // 64), format="csr")
    chw_to_hwc = np.arange(size).reshape(height, width, channels).transpose(2, 0, 1).ravel()
    permutation: Matrix = sp.csr_array(
        (np.ones(size), (chw_to_hwc, np.arange(size))), shape=(size, size)
    )
    return (permutation @ blocks).tocsr()


def basis_pursuit(
    activation: np.ndarray, matrix: Matrix, basis: Matrix, *, band: float
) -> tuple[np.ndarray | None, float, str]:
    """Masked basis pursuit through cvxpy, as released: returns (inputs, seconds, status).

    The release asks for exact equality, which a float32 read-out makes infeasible for an
    over-determined system; a band around the data lets the solver finish. The measurement
    matrix is sparse here (the release's is dense), which is to the peer's advantage, and
    multiplying it with the basis is not timed.
    """
    import cvxpy as cp

    measured = activation.ravel()
    active = np.flatnonzero(measured > 1e-5 * measured.max())
    rows, data = (matrix @ basis)[active], measured[active]
    start = time.perf_counter()
    alpha = cp.Variable(rows.shape[1])
    problem = cp.Problem(cp.Minimize(cp.norm1(alpha)), [cp.abs(rows @ alpha - data) <= band])
    try:
        problem.solve(solver="CLARABEL")
        status = str(problem.status)
    except cp.SolverError as error:
        status = f"failed: {str(error)[:60]}"
    seconds = time.perf_counter() - start
    value: Any = alpha.value
    return (None if value is None else basis @ value), seconds, status


def lsqr_loop(activations: np.ndarray, matrix: Matrix) -> tuple[np.ndarray, float]:
    """SciPy's LSQR, one candidate after the other, over a LinearOperator of its active rows."""
    start = time.perf_counter()
    solutions = []
    for activation in activations:
        measured = activation.ravel()
        active = np.flatnonzero(measured > 1e-6 * measured.max())
        operator = spl.aslinearoperator(matrix[active])
        solution = spl.lsqr(operator, measured[active], atol=1e-9, btol=1e-9, iter_lim=2000)
        solutions.append(solution[0])
    return np.stack(solutions), time.perf_counter() - start
