"""Several examples behind one rectified layer: what its update tells apart, with the proof."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jgia.attacks.analytic.arrays import noise
from jgia.attacks.analytic.chain import NAME, Stage
from jgia.attacks.analytic.directions import (
    Batch,
    Factors,
    direction,
    factor,
    missing,
    search_batch,
)
from jgia.attacks.imprint.plan import image_matrix
from jgia.attacks.imprint.readout import ReadOut, read_rows
from jgia.attacks.imprint.verdict import Candidates, as_candidates, judge
from jgia.config.imprint import ImprintOptions
from jgia.observation import Observation, Reconstruction, Status

SELECTED_BY_BATCH = (
    "precision; all examples at once, the neurons that each turns off determine its direction"
)
SELECTED_BY_ROWS = (
    "number of neurons that give the same image, at least two; it is outside of what the neurons "
    "that it turns off span"
)

_MARGIN = 1e-4  # of a row's output scale: float32 may see it on either side of zero
_APART = 1e-3  # share of an image that must lie outside of what the others span
_SAME_DIRECTION = 1 - 1e-6  # cosine
_EXACT_ERROR = 0.01  # standard deviation of a pixel, 40 dB


def attack_batch(
    observation: Observation, stage: Stage, rng: np.random.Generator
) -> Reconstruction:
    """The examples behind the update of a first layer with ReLU.

    ``dW = sum_n x_n delta_n^T`` with ``delta_{n,i} = 0`` unless example n turns neuron i on. Of a
    neuron that one example alone turns on, ``dW_i / db_i`` is the example; of others it is a
    mixture, which can look like an image. What tells them apart: the columns of all neurons that an
    example turns off do not contain it, so it is outside of their span. A mixture is inside, since
    neurons that are off for it and on for one of its parts show that part. If those columns contain
    every other example, the one direction that they lack belongs to the example alone. Where
    random columns give such a direction for each example, all examples follow at once.

    Args:
      observation: of a model whose first layer is fully connected with ReLU.
      stage: that layer.
      rng: of the random columns.

    Returns:
      All examples, if the neurons that each one turns off determine the direction it came from.
      Else candidates of single neurons that are outside of the span, and that two neurons or more
      agree on to rounding. All others have status ``mixture``. Nothing passes where the examples
      span as many dimensions as there are pixels or neurons, or where noise does.

    References:
      Boenisch et al. (2023, arXiv 2112.02918), eq. 4, for the ratio; Dimitrov et al., "SPEAR"
      (NeurIPS 2024, arXiv 2403.03945), for rank and sparsity of the update.

    Departures: SPEAR chooses among directions by a greedy search; here the sparsest independent
    ones are taken, and all neurons check the answer. The fallback to single rows is not in it.
    """
    name, victim = stage.layer.name, observation.victim
    params = observation.params[name]
    kernel = np.asarray(params["kernel"], np.float64)
    bias = np.asarray(params["bias"], np.float64)
    update = observation.layer(name)
    noise_std = noise(observation)[f"{name}/kernel"]
    factors = factor(np.asarray(update["kernel"], np.float64), noise_std, rng)
    stats: dict[str, object] = {"layer": name, "rank": factors.rank}
    batch = search_batch(
        factors,
        np.asarray(update["bias"], np.float64),
        lambda batch: _is_proven(factors, batch, kernel, bias),
        rng,
    )
    if batch is not None:
        return _all(observation, batch, stats)
    read = read_rows(observation, name, noise_std=observation.threat_model.noise_std)
    outputs = read.inputs @ kernel + bias[None, :]
    slack = _slack(read.inputs, read.noise, kernel)
    own = np.arange(len(read.neurons)), read.neurons
    consistent = outputs[own] > -slack[own]
    proven = consistent & _proven(factors, read.inputs, outputs < -slack)
    stats["proven_neurons"] = int(np.count_nonzero(proven))
    result = judge(
        as_candidates(read, victim, proven),
        ImprintOptions(min_agreement=2, same_image=_resolution(read)),
        method=NAME,
        turned_on=lambda images: image_matrix(victim, images) @ kernel + bias[None, :] > 0,
    )
    return dataclasses.replace(
        result, selected_by=SELECTED_BY_ROWS, stats={**result.stats, **stats}
    )


def _slack(inputs: np.ndarray, noise: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(J, K) outputs that are zero up to rounding and noise of the inputs."""
    norms = np.linalg.norm(kernel, axis=0)
    size = _MARGIN * np.linalg.norm(inputs, axis=1) + 6 * noise
    return size[:, None] * norms[None, :]


def _resolution(read: ReadOut) -> float:
    """Up to which difference two rows give the same image."""
    typical = float(np.median(read.noise)) if len(read.noise) else 0.0
    return min(max(6 * typical, 1e-6), 1e-3)


def _proven(factors: Factors, inputs: np.ndarray, off: np.ndarray) -> np.ndarray:
    """Which inputs (J, d) are outside of what neurons off for them (J, K) span: (J,).

    An input that turns off too few neurons proves nothing: they must span three quarters of the
    directions, or all but one.
    """
    proven = np.zeros(len(inputs), bool)
    if factors.full or factors.rank == 0:
        return proven
    inside = inputs @ factors.basis
    sizes = np.linalg.norm(inputs, axis=1)
    outside = np.linalg.norm(inputs - inside @ factors.basis.T, axis=1)
    for j in np.flatnonzero(outside <= _APART * sizes):
        vectors = missing(factors, off[j])
        enough = len(vectors) <= max(1, factors.rank // 4)
        proven[j] = enough and float(np.linalg.norm(vectors @ inside[j])) > _APART * sizes[j]
    return proven


def _is_proven(factors: Factors, batch: Batch, kernel: np.ndarray, bias: np.ndarray) -> bool:
    """Whether the neurons that each example leaves off determine the direction it came from."""
    outputs = batch.inputs @ kernel + bias[None, :]
    off = outputs < -_slack(batch.inputs, batch.noise, kernel)
    for given, silent in zip(batch.directions, off, strict=True):
        vector = direction(factors, silent)
        if vector is None or abs(float(vector @ given)) < _SAME_DIRECTION:
            return False
    return True


def _all(observation: Observation, batch: Batch, stats: dict[str, object]) -> Reconstruction:
    """Every example of a batch that was found as a whole."""
    read = ReadOut(batch.inputs, np.zeros(len(batch.inputs), int), batch.noise)
    found: Candidates = as_candidates(read, observation.victim, np.ones(len(read.inputs), bool))
    statuses = [Status.EXACT if n <= _EXACT_ERROR else Status.NOISY for n in found.noise]
    scores = -np.log10(np.clip(found.noise, 1e-16, 1e16))
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    return Reconstruction(
        images=np.clip(found.pixels[order], 0, 1).astype(np.float32),
        scores=scores[order],
        statuses=tuple(statuses[j] for j in order),
        selected_by=SELECTED_BY_BATCH,
        candidates=tuple(
            {
                "status": str(statuses[j]),
                "readout_noise": float(found.noise[j]),
                "neurons_on": int(np.count_nonzero(batch.deltas[j])),
                "expected_psnr": -20 * math.log10(max(float(found.noise[j]), 1e-15)),
            }
            for j in order
        ),
        stats={"method": NAME, "num_candidates": len(order), **stats},
    )
