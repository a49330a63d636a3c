"""Bins of several examples, taken apart with the help of examples that are known elsewhere."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from jgia.attacks.ares.candidates import (
    Candidates,
    KnownInputs,
    concatenate,
    join_known,
    measured_candidates,
    single_example,
)
from jgia.attacks.ares.plan import Plan

_EPS = float(np.finfo(np.float32).eps)
_EXPLAINED = 1e-3  # part of a bin's gradient that may stay unexplained
_SIGNIFICANT = 0.05  # part of a bin that both a suspect and the remainder must make up
_MAX_SUSPECTS = 6  # of one bin
_MAX_SUBSET = 3
_MIN_PAIRS = 16  # fewer would not prove that a remainder is one example


def explain_bins(plan: Plan, candidates: Candidates, suspects: KnownInputs) -> Candidates:
    """Keep the suspects that explain a bin; what they leave of it may be one more example.

    A bin holds ``sum_n delta_n h_n`` over its examples. Suspects are accepted if they add up to
    the whole of it, or if what remains after subtracting them passes the single-example tests,
    in which case the remainder takes the bin's place among the candidates. A mixture that looks
    like an image predicts activations that are not part of any bin's sum, so it fails.

    Args:
      plan: the measurement.
      candidates: as read out of the imprint layer.
      suspects: images that some row of the first layer may have isolated.

    Returns:
      Candidates without the explained bins, the accepted suspects added to ``known``.
    """
    position = {int(b): i for i, b in enumerate(candidates.bins)}
    taken: list[int] = []
    residuals: list[float] = []
    gone = np.zeros(len(candidates), bool)
    parts = []
    for b in np.unique(suspects.bins):
        i = position.get(int(b))
        if i is None:
            continue
        members = np.flatnonzero(suspects.bins == b)[:_MAX_SUSPECTS]
        explanation = _explanation(plan, candidates, i, suspects, members)
        if explanation is None:
            continue
        subset, residual, remainder = explanation
        gone[i] = True
        taken += subset
        residuals += [residual] * len(subset)
        if remainder is not None:
            parts.append(remainder)
    found = KnownInputs(
        suspects.inputs[taken],
        suspects.bins[taken],
        suspects.signals[taken],
        np.asarray(residuals),
    )
    kept = concatenate([candidates.take(np.flatnonzero(~gone)), *parts])
    return dataclasses.replace(kept, known=join_known(candidates.known, found))


def _explanation(
    plan: Plan, candidates: Candidates, i: int, suspects: KnownInputs, members: np.ndarray
) -> tuple[list[int], float, Candidates | None] | None:
    """The suspects that explain candidate i, the residual, and the single example left."""
    signal = candidates.signals[i]
    total = signal * candidates.activations[i].ravel()
    parts = suspects.signals[members, None] * plan.activations(suspects.inputs[members])
    testable = len(plan.pairs) >= _MIN_PAIRS or bool(np.any(candidates.active_excess))
    remaining = None
    for count in range(1, min(_MAX_SUBSET, len(members)) + 1):
        for subset in map(list, itertools.combinations(range(len(members)), count)):
            left = total - parts[subset].sum(axis=0)
            size = max(np.linalg.norm(total), np.linalg.norm(parts[subset], axis=1).max())
            residual = float(np.linalg.norm(left) / size)
            if residual < _EXPLAINED:
                return members[subset].tolist(), residual, None
            rest = float(signal - suspects.signals[members[subset]].sum())
            smallest = np.linalg.norm(parts[subset], axis=1).min() / size
            # A remainder of little weight inherits its pattern from the errors of the others.
            telling = min(residual, smallest, abs(rest / signal)) > _SIGNIFICANT
            if remaining is None and testable and telling:
                single = _measured(plan, candidates, i, rest, left / rest)
                if single_example(single)[0] and _precise(single):
                    # Nothing measures these suspects apart from the rest: claim no more digits
                    # than the confirmation asks for.
                    remaining = members[subset].tolist(), _EXPLAINED, single
    return remaining


def _precise(candidate: Candidates) -> bool:
    """Whether noise is too small to hide the on/off pattern of a second example."""
    typical = np.sqrt(np.mean(candidate.activations**2))
    return bool(candidate.noise[0] < _SIGNIFICANT / 10 * typical)


def _measured(
    plan: Plan, candidates: Candidates, i: int, signal: float, activation: np.ndarray
) -> Candidates:
    """Candidate i with another signal and activation."""
    grown = max(1.0, abs(float(candidates.signals[i] / signal)))
    rounding = _EPS * np.abs(activation).max()
    return measured_candidates(
        plan,
        activation.reshape(1, *plan.query.shape),
        bins=candidates.bins[i : i + 1],
        signals=np.array([signal]),
        noise=grown * (candidates.noise[i : i + 1] + rounding),
        scale_error=candidates.scale_error[i : i + 1],
        signal_floor=candidates.signal_floor,
    )
