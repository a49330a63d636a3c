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


def matrix_free(kernel: np.ndarray, height: int, width: int, active: np.ndarray) -> Matrix:
    """The active rows of the first convolution as a LinearOperator: shifts around one product."""
    kh, kw, channels, filters = kernel.shape
    taps = kernel.reshape(-1, filters).astype(np.float64)
    margin = ((kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))

    def matvec(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x.reshape(height, width, channels), margin)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(0, 1))
        patches = windows.transpose(0, 1, 3, 4, 2).reshape(height * width, -1)
        return (patches @ taps).ravel()[active]

    def rmatvec(y: np.ndarray) -> np.ndarray:
        full = np.zeros(height * width * filters)
        full[active] = y
        patches = (full.reshape(-1, filters) @ taps.T).reshape(height, width, kh, kw, channels)
        padded = np.zeros((height + kh - 1, width + kw - 1, channels))
        for a in range(kh):
            for b in range(kw):
                padded[a : a + height, b : b + width] += patches[:, :, a, b]
        return padded[kh // 2 : kh // 2 + height, kw // 2 : kw // 2 + width].ravel()

    shape = (active.size, height * width * channels)
    make: Any = spl.LinearOperator  # whose stubs know only the subclassing form
    return make(shape, matvec=matvec, rmatvec=rmatvec, dtype=np.float64)


def lsqr_loop(
    activations: np.ndarray, kernel: np.ndarray, matrix: Matrix | None = None
) -> tuple[np.ndarray, float]:
    """SciPy's LSQR, one candidate after the other, on its active rows.

    Matrix-free over a LinearOperator, or on the rows of an explicit sparse ``matrix``, which is
    faster and exists for small images only (building it is not timed).
    """
    start = time.perf_counter()
    solutions = []
    for activation in activations:
        measured = activation.ravel()
        active = np.flatnonzero(measured > 1e-6 * measured.max())
        height, width, _ = activation.shape
        rows = matrix_free(kernel, height, width, active) if matrix is None else matrix[active]
        solution = spl.lsqr(rows, measured[active], atol=1e-9, btol=1e-9, iter_lim=2000)
        solutions.append(solution[0])
    return np.stack(solutions), time.perf_counter() - start
