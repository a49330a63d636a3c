"""Low rank and sparsity of a rectified layer's update: which directions belong to one example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_SAFETY = 4  # multiples of the expected rounding that count as zero
_SKETCH = 32
_ROUNDING = 4e-16  # of an entry by the decomposition, relative to the norm
_ANGLE = 1e-4  # sine up to which a column counts as orthogonal to a sampled direction
_SINE = 1e-6  # the same once it is the best for many columns
_EXTRA = 6  # columns that a direction must be orthogonal to beyond those that define it
_BLOCK = 4096  # samples between two attempts
_BLOCKS = 128
_PROBATION = 16  # blocks after which half of the directions must be there
_PER_BLOCK = 64  # different directions of a block, those with most zeros, that are looked at
_LARGEST_RANK = 17  # beyond it the samples are too few
_HARDLY = 1  # columns that a direction of two examples may add to those of one
_POOL = 16  # directions kept, per example
_ATTEMPTS = 24  # choices among directions that are about as sparse, after each block
_TIE = 6  # columns by which they may differ
_DEPENDENT = 1e-6


class Factors(NamedTuple):
    """``dW = U C`` with as many orthonormal columns U as the update has directions.

    With examples X and derivatives ``delta`` of their outputs, ``dW = X delta`` and
    ``C = (U^T X) delta``: the rows of ``(U^T X)^{-1}`` turn C into delta, whose rows are sparse.

    Attributes:
      basis: (d, r) U.
      columns: (r, K) C.
      noise_std: of an entry of the update, and so of C.
      full: whether the rank is that of any matrix of this shape: no direction is told apart.
    """

    basis: np.ndarray
    columns: np.ndarray
    noise_std: float
    full: bool

    @property
    def rank(self) -> int:
        """Number of directions: of examples, if those are linearly independent."""
        return self.basis.shape[1]


class Batch(NamedTuple):
    """All examples behind an update.

    Attributes:
      inputs: (r, d).
      directions: (r, r) the unit vector of each.
      deltas: (r, K) derivatives of the loss by their outputs, zero where they are off.
      noise: (r,) standard deviation of an entry of ``inputs``.
    """

    inputs: np.ndarray
    directions: np.ndarray
    deltas: np.ndarray
    noise: np.ndarray


def factor(update: np.ndarray, noise_std: float, rng: np.random.Generator) -> Factors:
    """The directions of an update (d, K) that stand above noise of its entries.

    A random sketch that is wide enough has them all; what it leaves over is noise.

    References:
      Halko, Martinsson, Tropp (SIAM Review 53, 2011, arXiv 0909.4061), algorithm 4.1.
    """
    smaller, width = min(update.shape), _SKETCH
    size = float(np.linalg.norm(update))
    noise_std = max(noise_std, _ROUNDING * size)
    while True:
        width = min(width, smaller)
        sketch = update @ rng.standard_normal((update.shape[1], width))
        basis = np.linalg.qr(sketch)[0]
        rest = float(np.linalg.norm(update - basis @ (basis.T @ update)))
        if width == smaller or rest <= _SAFETY * noise_std * math.sqrt(update.size):
            break
        width *= 4
    left, singular, right = np.linalg.svd(basis.T @ update, full_matrices=False)
    rank = int(np.count_nonzero(singular > _floor(noise_std, update.shape)))
    columns = singular[:rank, None] * right[:rank]
    return Factors(basis @ left[:, :rank], columns, noise_std, rank == smaller)


def missing(factors: Factors, chosen: np.ndarray) -> np.ndarray:
    """Orthonormal directions (q, r) that the chosen columns (K,) do not contain."""
    columns = factors.columns[:, chosen]
    padded = np.concatenate([columns, np.zeros((factors.rank, factors.rank))], axis=1)
    _, values, rows = np.linalg.svd(padded.T, full_matrices=False)
    return rows[values <= _floor(factors.noise_std, columns.shape)]


def direction(factors: Factors, chosen: np.ndarray) -> np.ndarray | None:
    """The unit vector (r,) orthogonal to the chosen columns (K,), if there is exactly one.

    If the columns are those of neurons that are off for one example, they contain every example
    but that one: the vector is its row of ``(U^T X)^{-1}``, up to scale.
    """
    vectors = missing(factors, chosen)
    return vectors[0] if len(vectors) == 1 else None


def search_batch(
    factors: Factors,
    bias_update: np.ndarray,
    accept: Callable[[Batch], bool],
    rng: np.random.Generator,
) -> Batch | None:
    """All examples behind an update, from directions that random columns give.

    r - 1 columns determine a direction. If one example is off in all of them, that direction is its
    own, and orthogonal to the columns of all other neurons which that example leaves off: far more
    than chance allows. About one sample in ``2^(r - 1)`` is such. A direction of two examples at
    once is orthogonal where both are off and hardly anywhere else, so it adds no column to those of
    either example and gives way to it.

    Args:
      factors: of the update; beyond rank 17 nothing is tried.
      bias_update: (K,).
      accept: the last word on a batch.
      rng: of the samples, ``2^(r + 8)`` and at most 2^19.

    References:
      Dimitrov et al., "SPEAR: Exact Gradient Inversion of Batches in Federated Learning"
      (NeurIPS 2024, arXiv 2403.03945).
    """
    rank = factors.rank
    if rank == 0 or factors.full:
        return None
    sizes = np.linalg.norm(factors.columns, axis=0)
    active = np.flatnonzero(sizes > _floor(factors.noise_std, (rank, 1)))
    if len(active) < rank - 1 + _EXTRA or rank > _LARGEST_RANK:
        return None
    unit = factors.columns[:, active] / sizes[active]
    pool: list[_Direction] = []
    for block in range(min(_BLOCKS, math.ceil(2 ** (rank + 8) / _BLOCK))):
        if block >= _PROBATION and 2 * len(pool) < rank:
            break
        picks = rng.integers(len(active), size=(_BLOCK, rank - 1))
        padded = np.concatenate([unit.T[picks], np.zeros((_BLOCK, 1, rank))], axis=1)
        normals = np.linalg.svd(padded, full_matrices=False)[2][:, -1]
        zeros = np.abs(normals @ unit) <= _ANGLE
        before = pool
        pool = _with_samples(factors, pool, zeros, active)
        if pool is before:
            continue
        for attempt in range(_ATTEMPTS):
            # sparsest first; then with ties and near ties broken at random
            order = np.array([-float(np.count_nonzero(each.zeros)) for each in pool])
            order = np.argsort(order + min(attempt, _TIE) * rng.random(len(pool)), kind="stable")
            chosen = _independent([pool[i].vector for i in order])
            if len(chosen) < rank:
                break
            batch = complete(factors, chosen, bias_update)
            if batch is not None and accept(batch):
                return batch
    return None


class _Direction(NamedTuple):
    """A unit vector (r,) and the columns (K,) that are orthogonal to it."""

    vector: np.ndarray
    zeros: np.ndarray

    def covers(self, zeros: np.ndarray) -> np.ndarray | np.bool_:
        """Which sets of columns (..., K) hardly add any to its own."""
        return np.count_nonzero(zeros & ~self.zeros, axis=-1) <= _HARDLY


def _with_samples(
    factors: Factors, pool: list[_Direction], zeros: np.ndarray, active: np.ndarray
) -> list[_Direction]:
    """The pool with what samples add: columns (S, A) of the active ones orthogonal to each.

    Returns the same list if they add nothing.
    """
    counts = np.count_nonzero(zeros, axis=1)
    counts[counts < factors.rank - 1 + _EXTRA] = 0

    def settle(known: _Direction) -> None:
        counts[_Direction(known.vector, known.zeros[active]).covers(zeros)] = 0

    for known in pool:
        settle(known)
    for _ in range(_PER_BLOCK):
        row = int(np.argmax(counts))
        if counts[row] == 0:
            break
        counts[row] = 0
        columns = factors.columns[:, active[zeros[row]]]
        rough = np.linalg.svd(columns.T, full_matrices=False)[2][-1]
        vector = direction(factors, _orthogonal(factors, rough))
        if vector is None:
            continue
        new = _Direction(vector, _orthogonal(factors, vector))
        settle(new)
        if not any(each.covers(new.zeros) for each in pool):
            pool = [*(each for each in pool if not new.covers(each.zeros)), new]
            pool = sorted(pool, key=lambda each: -int(np.count_nonzero(each.zeros)))
            pool = pool[: _POOL * factors.rank]
    return pool


def _orthogonal(factors: Factors, vectors: np.ndarray) -> np.ndarray:
    """Which columns (..., K) are orthogonal to unit vectors (..., r) up to noise and rounding."""
    sizes = np.linalg.norm(factors.columns, axis=0)
    limit = _SAFETY * factors.noise_std + _SINE * sizes
    return np.abs(vectors @ factors.columns) <= limit


def _independent(vectors: list[np.ndarray]) -> list[np.ndarray]:
    """Those that are not combinations of earlier ones."""
    chosen: list[np.ndarray] = []
    basis: list[np.ndarray] = []
    for vector in vectors:
        rest = vector - sum((float(vector @ unit) * unit for unit in basis), np.zeros(len(vector)))
        size = float(np.linalg.norm(rest))
        if size > _DEPENDENT:
            chosen.append(vector)
            basis.append(rest / size)
    return chosen


def complete(
    factors: Factors, directions: list[np.ndarray], bias_update: np.ndarray
) -> Batch | None:
    """All examples, from a direction of each; the bias update gives their scales.

    ``delta = diag(s) N C`` with the directions N; ``db = sum_n delta_n`` is linear in s; then
    ``dW = X delta`` is linear in X.

    Args:
      factors: of the update.
      directions: r of them.
      bias_update: (K,).

    Returns:
      ``None`` where the directions depend on each other or the bias update contradicts them.
    """
    vectors = np.stack(directions)
    signals = np.where(_orthogonal(factors, vectors), 0.0, vectors @ factors.columns)
    scales, _, rank, _ = np.linalg.lstsq(signals.T, bias_update, rcond=1e-10)
    deltas = scales[:, None] * signals
    left = np.linalg.norm(deltas.sum(axis=0) - bias_update)
    if rank < factors.rank or left > 1e-3 * np.linalg.norm(bias_update):
        return None
    inverse = np.linalg.pinv(deltas)  # (K, r)
    inputs = (factors.basis @ (factors.columns @ inverse)).T
    return Batch(inputs, vectors, deltas, factors.noise_std * np.linalg.norm(inverse, axis=0))


def _floor(noise_std: float, shape: tuple[int, ...]) -> float:
    """A bound on the largest singular value of pure noise."""
    return _SAFETY * noise_std * sum(map(math.sqrt, shape))
