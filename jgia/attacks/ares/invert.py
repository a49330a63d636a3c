"""Invert leaked activations: least squares where determined, sparse recovery where not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares import modes
from jgia.attacks.ares.candidates import Candidates, active, single_example
from jgia.attacks.ares.measurement import Measurement
from jgia.attacks.ares.plan import Plan, dense_operator
from jgia.attacks.ares.predict import misprediction
from jgia.attacks.ares.recovery import (
    Recovered,
    least_squares,
    sparse,
    sparse_basis,
    subtract_pairs,
    surely_determined,
    undetermined,
)
from jgia.attacks.ares.verdict import Inversion, judge, mark_duplicates
from jgia.config import AresOptions, PerformanceFlags
from jgia.models import Victim
from jgia.observation import Reconstruction, Status
from jgia.sparse import (
    LassoOptions,
    LinearOperator,
    from_planes,
    to_planes,
)
from jgia.sparse.least_squares import CONVERGED

SELECTED_BY = "residual on the active measurements"
_CACHE_BYTES = 2 << 20  # patches of one microbatch on CPU: stay inside the caches
_DEVICE_BYTES = 512 << 20
_DENSE_MICROBATCH = 256  # one product with a large matrix: the more columns the better


def invert(
    key: Array,
    candidates: Candidates,
    plan: Plan,
    victim: Victim,
    *,
    options: AresOptions | None = None,
    performance: PerformanceFlags | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Solve for the image behind every candidate and keep those that are one image.

    Over-determined candidates are solved to the precision of the dtype by masked least squares.
    Where the active equations leave pixels open (found by solving for a known random probe
    through the same mask), the l1 problem in ``options.basis`` with the one-sided constraints of
    the inactive measurements fills them in, and a last least-squares correction restores the
    determined ones.

    Args:
      key: PRNG key of the rank probe.
      candidates: from :func:`leak`.
      plan: the measurement.
      victim: for image shape and normalization.
      options: see :class:`AresOptions`.
      performance: see :class:`PerformanceFlags`.
      progress: called with the number of candidates finished after each microbatch.

    Returns:
      A :class:`Reconstruction`: accepted images in [0, 1], best residual first, and one record
      per candidate, accepted or not.
    """
    options = options or AresOptions()
    performance = performance or PerformanceFlags()
    inversion = solve_candidates(
        key, candidates, plan, victim, options=options, performance=performance, progress=progress
    )
    mispredicted = misprediction(candidates, inversion.images, plan, victim)
    statuses = judge(candidates, inversion, options, mispredicted=mispredicted)
    inversion, statuses, bins = _with_known(candidates, inversion, statuses, victim)
    images = np.clip(np.where(np.isfinite(inversion.images), inversion.images, 0), 0, 1)
    mark_duplicates(statuses, images, inversion.residual)

    accepted = [i for i, status in enumerate(statuses) if status.accepted]
    accepted.sort(key=lambda i: inversion.residual[i])
    noise = np.concatenate([candidates.noise, np.zeros(len(statuses) - len(candidates))])
    return Reconstruction(
        images=images[accepted].astype(np.float32),
        scores=-np.log10(np.maximum(inversion.residual[accepted], 1e-12)),
        statuses=tuple(statuses[i] for i in accepted),
        selected_by=SELECTED_BY,
        candidates=tuple(
            {
                "status": str(statuses[i]),
                "bin": int(bins[i]),
                "residual": _finite(inversion.residual[i]),
                "determined": float(inversion.determined[i]),
                "equations_per_unknown": float(inversion.equations_per_unknown[i]),
                "iterations": int(inversion.iterations[i]),
                "readout_noise": _finite(noise[i]),
            }
            for i in range(len(statuses))
        ),
        stats={
            "num_candidates": len(statuses),
            "num_from_first_layer": len(candidates.known.bins),
            "front_end": plan.front_end,
            "inversion": options.inversion,
        },
    )


def _with_known(
    candidates: Candidates, inversion: Inversion, statuses: list[Status], victim: Victim
) -> tuple[Inversion, list[Status], np.ndarray]:
    """Append the images that the first layer gave away: nothing is left to solve for them."""
    known = candidates.known
    count = len(known.bins)
    if not count:
        return inversion, statuses, candidates.bins
    norm = victim.normalization
    pixels = known.inputs * np.asarray(norm.std, float) + np.asarray(norm.mean, float)
    ones = np.ones(count)
    found = Inversion(pixels, known.residual, ones, ones, ones * 0, ones * 0, ones * CONVERGED)
    both = (np.concatenate([a, b.astype(a.dtype)]) for a, b in zip(inversion, found, strict=True))
    return (
        Inversion(*both),
        [*statuses, *[Status.EXACT] * count],
        np.concatenate([candidates.bins, known.bins]),
    )


def solve_candidates(
    key: Array,
    candidates: Candidates,
    plan: Plan,
    victim: Victim,
    *,
    options: AresOptions,
    performance: PerformanceFlags,
    progress: Callable[[int], None] | None = None,
) -> Inversion:
    """Run the solvers over all candidates in microbatches of one fixed shape.

    Raises:
      ValueError: float64 was asked for and is not enabled.
    """
    dtype = solver_dtype(performance)
    workers = 1 if plan.dense else _num_workers()
    # What the read-out already shows to be a mixture is not solved.
    todo = np.flatnonzero(single_example(candidates))
    size = performance.microbatch or min(
        default_microbatch(victim.input_shape, plan.kernel.shape),
        _next_power_of_two(-(-len(todo) // workers)),
    )
    height, width, num_in = victim.input_shape
    solver = _Solver.build(key, plan, victim, dtype, options)

    count = len(candidates)
    total = Inversion(
        images=np.zeros((count, height, width, num_in), dtype),
        residual=np.full(count, np.inf),
        determined=np.zeros(count),
        equations_per_unknown=np.zeros(count),
        range_excess=np.zeros(count),
        iterations=np.zeros(count, int),
        status=np.full(count, CONVERGED),
    )

    def solve(part: np.ndarray) -> Inversion:
        return solver(candidates, part, size, victim, dtype)

    if workers > 1 and len(todo) > size:
        solver.compile(size, dtype)
    parts = [todo[start : start + size] for start in range(0, len(todo), size)]
    done = count - len(todo)
    for part, solved in zip(parts, _in_threads(solve, parts, workers), strict=True):
        for whole, piece in zip(total, solved, strict=True):
            whole[part] = piece
        done += len(part)
        if progress is not None:
            progress(done)
    return total


def solver_dtype(performance: PerformanceFlags) -> np.dtype:
    """The arithmetic asked for, once it is known to be available.

    Raises:
      ValueError: float64 was asked for and is not enabled.
    """
    dtype = np.dtype(performance.dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("dtype='float64' needs float64 enabled: set JAX_ENABLE_X64=1.")
    return dtype


def _in_threads(
    solve: Callable[[np.ndarray], Inversion], parts: list[np.ndarray], workers: int
) -> Iterator[Inversion]:
    """Results in order, several microbatches at a time if there are workers for them."""
    if workers == 1 or len(parts) <= 1:
        yield from map(solve, parts)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(solve, parts)


def _num_workers() -> int:
    """A small microbatch keeps one core busy; an accelerator takes one at a time."""
    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def default_microbatch(image_shape: tuple[int, int, int], kernel_shape: tuple[int, ...]) -> int:
    """Candidates solved at once: a power of two that keeps the patches in cache or memory."""
    if len(kernel_shape) == 2:
        return _DENSE_MICROBATCH
    height, width, channels = image_shape
    patch_bytes = 4 * height * width * channels * kernel_shape[0] * kernel_shape[1]
    budget = _CACHE_BYTES if jax.default_backend() == "cpu" else _DEVICE_BYTES
    return int(2 ** np.clip(np.floor(np.log2(max(1, budget / patch_bytes))), 0, 10))


@dataclasses.dataclass(frozen=True)
class _Solver:
    """One microbatch: candidates to images, residuals and rank.

    Attributes:
      measured: the whole measurement.
      operator: what is solved; of pairs of rows only the positive half.
      probe: (C, H, W, 1) known image.
      plan: the plan.
      options: the options.
    """

    measured: Measurement
    operator: LinearOperator
    probe: Array
    plan: Plan
    options: AresOptions

    @classmethod
    def build(
        cls, key: Array, plan: Plan, victim: Victim, dtype: np.dtype, options: AresOptions
    ) -> _Solver:
        key_probe, _ = jax.random.split(key)
        height, width, num_in = victim.input_shape
        probe = jax.random.normal(key_probe, (num_in, height, width, 1), dtype)
        measured = plan.measurement(victim, dtype)
        operator = measured.operator
        if _halves(plan):
            operator = dense_operator(plan.kernel[:, plan.pairs[:, 0]].astype(dtype), victim)
        return cls(measured, operator, probe, plan, options)

    def compile(self, size: int, dtype: np.dtype) -> None:
        """Solve a microbatch of zeros, so that threads do not all compile the same program."""
        zeros = jnp.zeros((*self.measured.exact.shape, size), dtype)
        least_squares(self.operator, zeros, zeros > 0, self.probe)

    def __call__(
        self, candidates: Candidates, part: np.ndarray, size: int, victim: Victim, dtype: np.dtype
    ) -> Inversion:
        raw = candidates.activations[part]
        count = len(raw)
        on = active(raw, candidates.noise[part])
        recovered, equations = self._recover(raw, on, size, dtype)

        pixels = victim.normalization.denormalize(from_planes(recovered.x))
        surely = from_planes(surely_determined(recovered.determined).astype(dtype)) > 0
        excess = jnp.where(surely, jnp.maximum(pixels - 1, -pixels), 0)
        return Inversion(
            images=np.asarray(pixels)[:count],
            residual=np.asarray(recovered.residual, np.float64)[:count],
            determined=np.asarray(recovered.determined.mean(axis=(0, 1, 2)))[:count],
            equations_per_unknown=equations / self.probe.size,
            range_excess=np.asarray(excess.max(axis=(1, 2, 3)))[:count],
            iterations=np.asarray(recovered.iterations)[:count],
            status=np.asarray(recovered.status)[:count],
        )

    def _recover(
        self, raw: np.ndarray, on: np.ndarray, size: int, dtype: np.dtype
    ) -> tuple[Recovered, np.ndarray]:
        """Images, and how many equations each had."""
        exact, bias = (np.moveaxis(a, 0, -1) for a in (self.measured.exact, self.measured.bias))
        solved = on & exact
        equations = solved.sum(axis=(1, 2, 3))
        mode = self.options.inversion
        if mode not in modes.MASKED:
            h = _planes(raw, size, dtype)
            return modes.baseline(
                mode, self.measured, h, self.probe, sparse_basis(self.options.basis)
            ), equations
        if _halves(self.plan):
            first, second = self.plan.pairs.T
            difference = np.where(on[..., first], raw[..., first], 0) - np.where(
                on[..., second], raw[..., second], 0
            )
            y = _planes(difference, size, dtype)
            equations = np.full(len(raw), len(first))
            return self._masked(y, jnp.ones(y.shape, bool), equations, None), equations
        y = _planes(np.where(solved, raw - bias, 0), size, dtype)
        mask = _planes(solved, size, dtype) > 0
        if self.plan.front_end == "signed" and y.shape[1:3] == self.probe.shape[1:3]:
            return subtract_pairs(self.probe.shape[0], y, mask), equations
        bounded = None
        if not exact.all() or bias.any():  # where off, the entry is at most -bias, not 0
            bounded = _planes(~on & exact & (bias == 0), size, dtype) > 0
        return self._masked(y, mask, equations, bounded), equations

    def _masked(
        self, y: Array, mask: Array, equations: np.ndarray, bounded: Array | None
    ) -> Recovered:
        """Least squares, and the sparse prior for whatever it leaves open."""
        count = len(equations)
        if equations.max(initial=0) >= self.probe.size:
            recovered = least_squares(self.operator, y, mask, self.probe)
        else:
            recovered = undetermined(y, self.probe.shape[:3])
        unclear = np.asarray(jnp.any(~recovered.determined, axis=(0, 1, 2)))[:count]
        # A candidate that is provably a mixture is not worth the sparse recovery.
        limit = 10 * self.options.mixture_residual
        worth = unclear & (np.asarray(recovered.residual)[:count] < limit)
        if not worth.any():
            return recovered
        lasso = LassoOptions(
            lam_ratio=self.options.lam_ratio,
            num_stages=10,
            one_sided=self.options.inversion == "masked_onesided",
        )
        x_sparse = sparse(lasso, sparse_basis(self.options.basis), self.operator, y, mask, bounded)
        chosen = jnp.asarray(np.pad(worth, (0, y.shape[-1] - count)))
        return recovered._replace(x=jnp.where(chosen, x_sparse, recovered.x))


def _halves(plan: Plan) -> bool:
    """Whether pairs of rows leave one linear equation each, free of any mask."""
    return plan.dense and len(plan.pairs) > 0 and bool(np.all(plan.bias[plan.pairs] == 0))


def _planes(values: np.ndarray, size: int, dtype: np.dtype) -> Array:
    """(J, H', W', F) padded to ``size`` samples, as planes (F, H', W', size)."""
    pad = ((0, size - len(values)), (0, 0), (0, 0), (0, 0))
    return to_planes(jnp.asarray(np.pad(values, pad), dtype))


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
