"""Activations read out of one update, and what their values say about being one example."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jgia.attacks.ares.plan import Plan

LARGEST_CONFLICT = 0.01
"""Of one example no opposite pair is on twice; of two mixed examples, the angle between them over
pi: 0.01 are two images 2 degrees apart, practically one."""
LARGEST_EXCESS = 4.0
"""Standard deviations by which the number of active random rows may exceed one half."""
_MIN_UNPAIRED = 64  # unpaired zero-bias rows below which their active fraction says too little


class KnownInputs(NamedTuple):
    """Network inputs that the first layer's own gradient gave away.

    Attributes:
      inputs: (N, H, W, C) normalized images.
      bins: (N,) the bin each falls into.
      signals: (N,) the part of that bin's signal that is its own.
      residual: (N,) relative mismatch between the bin's gradient and what explains it.
    """

    inputs: np.ndarray
    bins: np.ndarray
    signals: np.ndarray
    residual: np.ndarray


NO_INPUTS = KnownInputs(np.zeros((0, 1, 1, 1)), np.zeros(0, int), np.zeros(0), np.zeros(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Activations read out of one update, one per occupied bin, in order of bins.

    Attributes:
      activations: (J, H', W', F) float64; exact up to read-out noise where one example sits alone
        in the bin, a signed mixture of several otherwise.
      bins: (J,) bin index j: the difference of neurons ``order[j]`` and ``order[j + 1]``.
      signals: (J,) bias-gradient difference, the denominator of the read-out.
      noise: (J,) estimated standard deviation of an activation's entries.
      scale_error: (J,) estimated relative error that all entries share, because parameters were
        rounded during local training; 0 for a gradient.
      in_bracket: (J,) whether ``thresholds[j] < q <= thresholds[j + 1]`` up to noise: a convex
        mixture passes, most signed ones do not.
      non_negative: (J,) whether no entry is negative beyond noise, as a rectified activation
        must be.
      conflict: (J,) of the pairs of opposite filters that are on at all, the part with both on:
        zero for one example, about one half for several; 0 without pairs.
      active_excess: (J,) standard deviations by which more neurons are on than one example turns
        on; 0 where that is not known.
      signal_floor: differences at or below this were taken for noise.
      known: images that the first layer's own gradient gave away and the bins confirmed.
    """

    activations: np.ndarray
    bins: np.ndarray
    signals: np.ndarray
    noise: np.ndarray
    scale_error: np.ndarray
    in_bracket: np.ndarray
    non_negative: np.ndarray
    conflict: np.ndarray
    active_excess: np.ndarray
    signal_floor: float
    known: KnownInputs = dataclasses.field(default_factory=lambda: NO_INPUTS)

    def __len__(self) -> int:
        return len(self.bins)

    def take(self, indices: np.ndarray) -> Candidates:
        """The candidates at the given positions."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rows = {name: v[indices] for name, v in values.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **rows)


def join_known(first: KnownInputs, second: KnownInputs) -> KnownInputs:
    """Both, one after the other."""
    if not len(first.bins):
        return second
    return KnownInputs(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def concatenate(parts: list[Candidates]) -> Candidates:
    """All candidates in order of bins; what is known is that of the first part."""
    first = parts[0]
    names = [
        f.name
        for f in dataclasses.fields(Candidates)
        if isinstance(getattr(first, f.name), np.ndarray)
    ]
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    joined = dataclasses.replace(first, **rows)
    return joined.take(np.argsort(joined.bins, kind="stable"))


def single_example(candidates: Candidates) -> np.ndarray:
    """Which candidates pass every test that needs nothing but their values: (J,)."""
    return (
        candidates.in_bracket
        & candidates.non_negative
        & (candidates.conflict <= LARGEST_CONFLICT)
        & (candidates.active_excess <= LARGEST_EXCESS)
    )


def measured_candidates(
    plan: Plan,
    activations: np.ndarray,
    *,
    bins: np.ndarray,
    signals: np.ndarray,
    noise: np.ndarray,
    scale_error: np.ndarray,
    signal_floor: float,
) -> Candidates:
    """Wrap activations (J, H', W', F) with the tests that need nothing but their values.

    Where rounding left the scale of an activation open, it is corrected (in a copy) to the bin
    that the activation fell into.
    """
    q = np.einsum("jhwf,hwf->j", activations, plan.query.astype(float))
    edges = np.append(plan.thresholds, np.inf)
    slack = (1e-4 + 6 * scale_error) * np.abs(q) + 6 * noise * np.linalg.norm(plan.query)
    in_bracket = (q > edges[bins] - slack) & (q <= edges[bins + 1] + slack)
    rescaled = in_bracket & (scale_error > 0) & (q > 0)
    if rescaled.any():
        factor = np.ones(len(q))
        factor[rescaled] = np.clip(q, edges[bins], edges[bins + 1])[rescaled] / q[rescaled]
        activations = activations * factor[:, None, None, None]
    lowest = activations.min(axis=(1, 2, 3), initial=0.0)
    on = active(activations, noise)
    return Candidates(
        activations=activations,
        bins=bins,
        signals=signals,
        noise=noise,
        scale_error=scale_error,
        in_bracket=in_bracket,
        non_negative=lowest >= -10 * noise,
        conflict=pair_conflict(on, plan.pairs),
        active_excess=active_excess(on, plan),
        signal_floor=signal_floor,
    )


def active(activations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Which entries (J, H', W', F) are positive beyond doubt."""
    largest = activations.max(axis=(1, 2, 3), keepdims=True, initial=0.0)
    return activations > np.maximum(6 * noise[:, None, None, None], 1e-6 * largest)


def pair_conflict(on: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Of the opposite pairs with at least one side on, the part with both on: (J,)."""
    count = np.zeros((2, len(on)))
    for i, k in pairs:
        count[0] += (on[..., i] & on[..., k]).sum(axis=(1, 2))
        count[1] += (on[..., i] | on[..., k]).sum(axis=(1, 2))
    return count[0] / np.maximum(count[1], 1)


def active_excess(on: np.ndarray, plan: Plan) -> np.ndarray:
    """Standard deviations by which more than half of the unpaired random rows are on: (J,).

    For one example every Gaussian row without bias is on with probability 1/2, independently;
    for a sum of k with probability ``1 - 2^-k``. Zero where the plan has too few such rows.
    """
    unpaired = np.setdiff1d(np.flatnonzero(plan.bias == 0), plan.pairs)
    if not plan.dense or plan.front_end not in ("random", "unknown"):
        return np.zeros(len(on))
    if len(unpaired) < _MIN_UNPAIRED:
        return np.zeros(len(on))
    count = on[..., unpaired].sum(axis=(1, 2, 3))
    return (count - len(unpaired) / 2) / (np.sqrt(len(unpaired)) / 2)
