"""The gradient of a fully connected first layer: what the bins behind it let one solve for.

With rows ``w_i`` and the imprint behind them, the first layer's gradient is linear in the
examples, ``dL/dW_i = sum_n C[i, n] x_n`` and ``dL/db_i = sum_n C[i, n]`` with
``C[i, n] = query_i (j_n + 1) delta_n [row i is on for n]``, j_n the bin of example n and delta_n
its signal. A bin with one example gives away delta_n and the whole on/off pattern, so the columns
of C are known, and the examples follow from least squares: exactly, without any prior.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jgia.attacks.ares.candidates import (
    Candidates,
    KnownInputs,
    active,
    join_known,
    single_example,
)
from jgia.attacks.ares.peel import explain_bins
from jgia.attacks.ares.plan import Plan
from jgia.config import FirstLayer
from jgia.observation import Observation

_EPS = float(np.finfo(np.float32).eps)
_RANGE_SLACK = 2e-3  # pixels: rounding of a ratio stays far below, most mixtures go far beyond
_SAME_INPUT = 1e-3  # relative distance of two rows' images
_CONSISTENT = 1e-3  # relative mismatch of a row's bias gradient, or of an image's activations
_RELATIVE_CUTOFF = 1e-6  # singular values below are not trusted in float32 gradients
_MAX_ROUNDS = 6


@dataclasses.dataclass
class FirstLayerGradient:
    """What is left of the first layer's gradient once known examples are subtracted.

    Attributes:
      plan: the plan.
      weights: (d, F) float64.
      biases: (F,) float64.
      scale: (F,) size of the whole bias gradient, to judge what is left by.
    """

    plan: Plan
    weights: np.ndarray
    biases: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, observation: Observation, plan: Plan) -> FirstLayerGradient | None:
        """Read it from an update; ``None`` where the layer is not visible."""
        layer = observation.update.get(plan.first_name)
        if layer is None:
            return None
        weights = np.asarray(layer["kernel"])[:, : plan.kernel.shape[-1]].astype(np.float64)
        biases = np.asarray(layer["bias"])[: plan.kernel.shape[-1]].astype(np.float64)
        return cls(plan, weights, biases, np.abs(biases))

    def coefficients(self, on: np.ndarray, bins: np.ndarray, signals: np.ndarray) -> np.ndarray:
        """C: (F, N) of examples with on/off patterns ``on`` (N, F), bins and signals (N,)."""
        query = self.plan.query.ravel().astype(np.float64)
        return query[:, None] * on.T * ((bins + 1.0) * signals)

    def subtract(self, inputs: np.ndarray, coefficients: np.ndarray) -> None:
        """Take examples (N, d) with coefficients (F, N) out, in place."""
        if len(inputs):
            self.scale = np.maximum(self.scale, np.abs(coefficients).max(axis=1))
        self.weights -= inputs.T @ coefficients.T
        self.biases -= coefficients.sum(axis=1)


def read_first_layer(
    observation: Observation, plan: Plan, candidates: Candidates, method: FirstLayer
) -> Candidates:
    """Move the examples that the first layer's gradient gives away from candidates to known.

    Args:
      observation: what the server holds.
      plan: the plan; its first layer is fully connected.
      candidates: as read out of the imprint layer.
      method: ``"joint"`` solves for all single examples at once, subtracts them, and reads single
        rows of what is left, until nothing new appears; ``"ratio"`` reads single rows only (what
        the paper describes); ``"ignore"`` does nothing.

    Returns:
      Candidates with ``known`` filled in, their bins removed. Every known example was confirmed:
      its own activations reproduce what the imprint layer measured.
    """
    gradient = None if method == "ignore" else FirstLayerGradient.of(observation, plan)
    if gradient is None:
        return candidates
    for _ in range(_MAX_ROUNDS if method == "joint" else 1):
        before = len(candidates.known.bins)
        if method == "joint":
            candidates = _solve_jointly(gradient, candidates, observation)
        suspects = isolated_inputs(gradient, observation)
        size = len(candidates.known.bins)
        candidates = explain_bins(plan, candidates, suspects)
        _subtract_known(gradient, candidates.known, size)
        if len(candidates.known.bins) == before:
            break
    return candidates


def isolated_inputs(gradient: FirstLayerGradient, observation: Observation) -> KnownInputs:
    """Every image that some row may have isolated: suspects, not yet proof.

    ``(dL/dW_i) / (dL/db_i)`` is the input itself where row i was on for one example. What leaves
    the range of pixels is dropped. The example's own signal follows from the same row: the
    imprint layer sent ``query_i (j + 1) delta`` back to it, where j is the bin of the image.
    """
    plan, biases = gradient.plan, gradient.biases
    floor = np.maximum(64 * _EPS * gradient.scale, 64 * _EPS * gradient.scale.max(initial=0.0))
    on = np.flatnonzero(np.abs(biases) > floor)
    inputs = (gradient.weights[:, on] / biases[on]).T
    images = inputs.reshape(-1, *observation.victim.input_shape)
    outside = _range_excess(images, observation)
    plausible = np.flatnonzero(outside < _RANGE_SLACK)
    largest_first = plausible[np.argsort(-np.abs(biases[on[plausible]]), kind="stable")]
    keep = _distinct(inputs, largest_first)
    query = plan.query.ravel().astype(np.float64)
    q = plan.activations(inputs[keep]) @ query
    bins = np.searchsorted(plan.thresholds, q, side="left") - 1
    seen = bins >= 0
    signals = biases[on[keep]] / query[on[keep]] / np.maximum(bins + 1.0, 1)
    return KnownInputs(
        images[keep][seen], bins[seen], signals[seen], np.full(int(seen.sum()), np.inf)
    )


def _solve_jointly(
    gradient: FirstLayerGradient, candidates: Candidates, observation: Observation
) -> Candidates:
    """Least squares for all single examples in the rows where nothing else was on."""
    plan = gradient.plan
    single = np.flatnonzero(single_example(candidates))
    if not len(single):
        return candidates
    flat = candidates.activations.reshape(len(candidates), plan.kernel.shape[-1])
    on = active(candidates.activations, candidates.noise).reshape(flat.shape)
    others = np.setdiff1d(np.arange(len(candidates)), single)
    touched = (np.abs(flat[others]) > candidates.noise[others, None]).any(axis=0)
    coefficients = gradient.coefficients(
        on[single], candidates.bins[single], candidates.signals[single]
    )
    missing = np.abs(gradient.biases - coefficients.sum(axis=1))
    consistent = missing <= _CONSISTENT * np.maximum(gradient.scale, gradient.scale.mean())
    rows = np.flatnonzero(~touched & consistent)
    if not len(rows):
        return candidates
    inputs, determined = _least_squares(coefficients[rows], gradient.weights[:, rows].T)
    measured = flat[single]
    size = np.maximum(np.linalg.norm(measured, axis=1), 1e-300)
    residual = np.linalg.norm(plan.activations(inputs) - measured, axis=1) / size
    images = inputs.reshape(-1, *observation.victim.input_shape)
    allowed = np.maximum(
        _CONSISTENT, 4 * candidates.noise[single] * np.sqrt(measured.shape[1]) / size
    )
    good = np.flatnonzero(determined & (residual < np.minimum(allowed, 15 * _CONSISTENT)))
    found = KnownInputs(
        images[good],
        candidates.bins[single[good]],
        candidates.signals[single[good]],
        residual[good],
    )
    gradient.subtract(inputs[good], coefficients[:, good])
    rest = candidates.take(np.setdiff1d(np.arange(len(candidates)), single[good]))
    return dataclasses.replace(rest, known=join_known(candidates.known, found))


def _least_squares(matrix: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``argmin ||C x - g||`` for all pixels at once, and which unknowns C determines: (N,)."""
    scale = np.linalg.norm(matrix, axis=0)
    scale = np.where(scale > 0, scale, 1)
    u, s, vt = np.linalg.svd(matrix / scale, full_matrices=False)
    keep = s > _RELATIVE_CUTOFF * s.max(initial=0.0)
    u, s, vt = u[:, keep], s[keep], vt[keep]
    x = (vt.T / s) @ (u.T @ data)
    return x / scale[:, None], np.sum(vt**2, axis=0) > 1 - 1e-6


def _subtract_known(gradient: FirstLayerGradient, known: KnownInputs, start: int) -> None:
    """Take the known examples from position ``start`` on out of the gradient."""
    if len(known.bins) == start:
        return
    inputs = known.inputs[start:].reshape(len(known.bins) - start, gradient.weights.shape[0])
    on = gradient.plan.activations(inputs) > 0
    coefficients = gradient.coefficients(on, known.bins[start:], known.signals[start:])
    gradient.subtract(inputs, coefficients)


def _distinct(inputs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One of every set of (nearly) equal inputs."""
    chosen = inputs[rows]
    squares = np.sum(chosen**2, axis=1)
    squared = squares[:, None] + squares[None, :] - 2 * chosen @ chosen.T
    same = squared < (_SAME_INPUT**2) * np.maximum(squares[:, None], 1e-300)
    return rows[[k for k in range(len(rows)) if not same[k, :k].any()]]


def _range_excess(images: np.ndarray, observation: Observation) -> np.ndarray:
    """How far the pixels of normalized images (N, H, W, C) leave [0, 1]: (N,)."""
    norm = observation.victim.normalization
    pixels = images * np.asarray(norm.std, np.float64) + np.asarray(norm.mean, np.float64)
    return np.maximum(pixels - 1, -pixels).max(axis=(1, 2, 3), initial=-np.inf)
