"""Invert leaked activations: least squares where determined, sparse recovery where not."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jgia.attacks.ares.leak import Candidates
from jgia.attacks.ares.plan import Plan
from jgia.attacks.ares.verdict import Inversion, judge, mark_duplicates
from jgia.config import AresOptions, PerformanceFlags
from jgia.models import Victim
from jgia.observation import Reconstruction
from jgia.sparse import (
    ConvOperator,
    LassoOptions,
    from_planes,
    largest_eigenvalue,
    masked_lasso,
    masked_least_squares,
    to_planes,
)
from jgia.sparse.least_squares import CONVERGED

SELECTED_BY = "least-squares residual on the active measurements"
_DETERMINED = 1e-2  # a probe pixel within this many standard deviations is determined
_PROBE_TOLERANCE = 1e-5  # leaves determined pixels some 1e-3 off, well inside _DETERMINED
_ITERATIONS_PER_PASS = 150  # twice what a well-determined image takes
_ABANDON_RESIDUAL = 0.02  # far above any single sample's: no more digits for a mixture
_CACHE_BYTES = 2 << 20  # patches of one microbatch on CPU: stay inside the caches
_DEVICE_BYTES = 512 << 20


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
    through the same mask), the l1 problem in a block-DCT and colour basis with the one-sided
    constraints of the inactive measurements fills them in, and a last least-squares correction
    restores the determined ones.

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
    statuses = judge(candidates, inversion, options)
    images = np.clip(np.where(np.isfinite(inversion.images), inversion.images, 0), 0, 1)
    mark_duplicates(statuses, images, inversion.residual)

    accepted = [i for i, status in enumerate(statuses) if status.accepted]
    accepted.sort(key=lambda i: inversion.residual[i])
    return Reconstruction(
        images=images[accepted].astype(np.float32),
        scores=-np.log10(np.maximum(inversion.residual[accepted], 1e-12)),
        statuses=tuple(statuses[i] for i in accepted),
        selected_by=SELECTED_BY,
        candidates=tuple(
            {
                "status": str(statuses[i]),
                "bin": int(candidates.bins[i]),
                "residual": _finite(inversion.residual[i]),
                "determined": float(inversion.determined[i]),
                "equations_per_unknown": float(inversion.equations_per_unknown[i]),
                "iterations": int(inversion.iterations[i]),
                "readout_noise": _finite(candidates.noise[i]),
            }
            for i in range(len(candidates))
        ),
        stats={"num_candidates": len(candidates), "front_end": plan.front_end},
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
    workers = _num_workers()
    # What the read-out already shows to be a mixture is not solved.
    todo = np.flatnonzero(candidates.in_bracket & candidates.non_negative)
    size = performance.microbatch or min(
        default_microbatch(victim.input_shape, plan.kernel.shape),
        _next_power_of_two(-(-len(todo) // workers)),
    )
    operator = ConvOperator(jnp.asarray(plan.kernel, dtype))
    key_probe, key_norm = jax.random.split(key)
    height, width, num_in = victim.input_shape
    probe = jax.random.normal(key_probe, (num_in, height, width, 1), dtype)
    solver = _Solver(operator, probe, key_norm, plan, options)

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
    height, width, channels = image_shape
    patch_bytes = 4 * height * width * channels * kernel_shape[0] * kernel_shape[1]
    budget = _CACHE_BYTES if jax.default_backend() == "cpu" else _DEVICE_BYTES
    return int(2 ** np.clip(np.floor(np.log2(max(1, budget / patch_bytes))), 0, 10))


@dataclasses.dataclass(frozen=True)
class _Solver:
    """One microbatch: candidates to images, residuals and rank."""

    operator: ConvOperator
    probe: Array
    key_norm: Array
    plan: Plan
    options: AresOptions

    def compile(self, size: int, dtype: np.dtype) -> None:
        """Solve a microbatch of zeros, so that threads do not all compile the same program."""
        _, height, width, _ = self.probe.shape
        zeros = jnp.zeros((self.operator.kernel.shape[-1], height, width, size), dtype)
        _least_squares(self.operator, zeros, zeros > 0, self.probe)

    def __call__(
        self, candidates: Candidates, part: np.ndarray, size: int, victim: Victim, dtype: np.dtype
    ) -> Inversion:
        raw = candidates.activations[part]
        count = len(raw)
        noise = candidates.noise[part][:, None, None, None]
        active = raw > np.maximum(6 * noise, 1e-6 * raw.max(axis=(1, 2, 3), keepdims=True))
        measured = np.where(active, raw - self.plan.bias, 0)
        pad = ((0, size - count), (0, 0), (0, 0), (0, 0))
        y = to_planes(jnp.asarray(np.pad(measured, pad), dtype))
        mask = to_planes(jnp.asarray(np.pad(active, pad), dtype)) > 0

        pairs = self.plan.front_end == "signed"
        if pairs:
            x, residual, determined = _subtract_pairs(self.probe.shape[0], y, mask)
            iterations, status = jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.int32)
        else:
            x, residual, determined, iterations, status = _least_squares(
                self.operator, y, mask, self.probe
            )
        undetermined = np.asarray(jnp.any(~determined, axis=(0, 1, 2)))[:count]
        # A candidate that is provably a mixture is not worth the sparse recovery.
        worth = undetermined & (np.asarray(residual)[:count] < 10 * self.options.mixture_residual)
        if not pairs and worth.any():
            lasso = LassoOptions(lam_ratio=self.options.lam_ratio, num_stages=10)
            # Every microbatch takes the same step: the answer must not depend on its place.
            key = jax.random.clone(self.key_norm)
            x_sparse = _sparse(lasso, key, self.operator, y, mask)
            x = jnp.where(jnp.asarray(np.pad(worth, (0, size - count))), x_sparse, x)

        pixels = victim.normalization.denormalize(from_planes(x))
        surely = from_planes(_surely_determined(determined).astype(dtype)) > 0
        excess = jnp.where(surely, jnp.maximum(pixels - 1, -pixels), 0)
        unknowns = np.prod(self.probe.shape)
        return Inversion(
            images=np.asarray(pixels)[:count],
            residual=np.asarray(residual, np.float64)[:count],
            determined=np.asarray(determined.mean(axis=(0, 1, 2)))[:count],
            equations_per_unknown=active.sum(axis=(1, 2, 3)) / unknowns,
            range_excess=np.asarray(excess.max(axis=(1, 2, 3)))[:count],
            iterations=np.asarray(iterations)[:count],
            status=np.asarray(status)[:count],
        )


@jax.jit
def _least_squares(
    operator: ConvOperator, y: Array, mask: Array, probe: Array
) -> tuple[Array, ...]:
    """Solve for the data to the last digit, and for a known image through the same mask."""
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
    return result.x, result.relative_residual, determined, result.iterations, result.status


@functools.partial(jax.jit, static_argnums=0)
def _sparse(
    lasso: LassoOptions, key: Array, operator: ConvOperator, y: Array, mask: Array
) -> Array:
    """l1 recovery, then the smallest correction that restores the active equations."""
    shape = (operator.kernel.shape[2], y.shape[1], y.shape[2])
    # The estimate approaches from below, hence the margin.
    bound = 1.05 * largest_eigenvalue(key, operator, shape)
    x = masked_lasso(operator, y, mask, options=lasso, step_bound=bound).x
    remaining = jnp.where(mask, y - operator.apply(x), 0)
    correction = masked_least_squares(operator, remaining, mask, tolerance=1e-5)
    return x + correction.x


def _surely_determined(determined: Array) -> Array:
    """Pixels that are determined together with all their neighbours: (1, H, W, J).

    The probe is met by chance in about 1 % of the undetermined values, but never in a whole
    neighbourhood of them.
    """
    whole = jnp.all(determined, axis=0, keepdims=True)
    return lax.reduce_window(whole, True, lax.bitwise_and, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


@functools.partial(jax.jit, static_argnums=0)
def _subtract_pairs(num: int, y: Array, mask: Array) -> tuple[Array, Array, Array]:
    """``x = ReLU(x) - ReLU(-x)``; a pair that is on both sides proves a mixture."""
    plus, minus = y[:num], y[num : 2 * num]
    conflict = jnp.where(mask[:num] & mask[num : 2 * num], jnp.minimum(plus, minus), 0)
    norm = jnp.sqrt(jnp.sum(plus**2 + minus**2, axis=(0, 1, 2)))
    residual = jnp.sqrt(jnp.sum(conflict**2, axis=(0, 1, 2))) / jnp.where(norm > 0, norm, 1)
    return plus - minus, residual, jnp.ones(plus.shape, bool)


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
