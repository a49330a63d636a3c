"""Which candidates are images, without the truth: range, activation, agreement."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jgia.attacks.imprint.readout import ReadOut
from jgia.config.imprint import ImprintOptions
from jgia.models import Victim
from jgia.observation import Reconstruction, Status

TurnedOn = Callable[[np.ndarray], np.ndarray]
"""Which neurons the images (M, H, W, C) turn on beyond doubt: (M, K)."""

SELECTED_BY_ROWS = (
    "number of neurons that give the same image; pixels in range, and the neuron is on for it"
)
SELECTED_BY_BINS = "precision of the read-out; pixels in range, and the bin is that of the image"


class Candidates(NamedTuple):
    """Images read out, before any is accepted.

    Attributes:
      pixels: (J, H, W, C) float64, not clipped.
      noise: (J,) standard deviation of a pixel's error.
      consistent: (J,) whether the neuron or bin is the one that the image itself would use.
      neurons: (J,) where it was read.
      determined: (J,) share of the pixels that the read-out determines.
    """

    pixels: np.ndarray
    noise: np.ndarray
    consistent: np.ndarray
    neurons: np.ndarray
    determined: np.ndarray


def as_candidates(read: ReadOut, victim: Victim, consistent: np.ndarray) -> Candidates:
    """Layer inputs that are normalized images, in pixel units."""
    std = np.asarray(victim.normalization.std, np.float64)
    mean = np.asarray(victim.normalization.mean, np.float64)
    pixels = read.inputs.reshape(-1, *victim.input_shape) * std + mean
    ones = np.ones(len(pixels))
    return Candidates(pixels, read.noise * std.max(), consistent, read.neurons, ones)


def judge(
    candidates: Candidates,
    options: ImprintOptions,
    *,
    method: str,
    turned_on: TurnedOn | None = None,
) -> Reconstruction:
    """Test, merge equal images, order, and wrap.

    A candidate is a mixture if a pixel leaves [0, 1] or if it contradicts its own neuron or bin.
    Convex mixtures of images pass both tests and are returned. With independent neurons
    (``turned_on``) there is more to order by: several neurons that give the same image are
    evidence for it (no proof: images of one class mix in much the same proportions everywhere),
    and a lone candidate is disputed if an image with such evidence turns its neuron on, too.

    Args:
      candidates: what was read.
      options: thresholds of the tests.
      method: for the statistics.
      turned_on: for neurons with rows of their own. The score then is the number of neurons that
        agree, one half for a disputed candidate; else the precision of the read-out.
    """
    pixels, noise = candidates.pixels, candidates.noise
    count = len(pixels)
    finite = np.isfinite(pixels).all(axis=(1, 2, 3)) & np.isfinite(noise)
    excess = np.maximum(pixels - 1, -pixels).max(axis=(1, 2, 3), initial=-np.inf)
    plausible = finite & candidates.consistent & (excess <= options.pixel_slack + 6 * noise)
    images = np.clip(np.where(np.isfinite(pixels), pixels, 0), 0, 1)

    statuses = [Status.MIXTURE if ok else Status.NONFINITE for ok in finite]
    agreeing = np.zeros(count, int)
    ordered = np.flatnonzero(plausible)[np.argsort(noise[plausible], kind="stable")]
    groups = _equal(images.reshape(count, int(np.prod(images.shape[1:]))), ordered, options)
    agreed = [group[0] for group in groups if len(group) > 1]
    disputed = np.zeros(count, bool)
    if turned_on is not None and agreed:
        disputed = np.any(turned_on(images[agreed])[:, candidates.neurons], axis=0)
    for group in groups:
        agreeing[group] = len(group)
        if turned_on is not None and len(group) < options.min_agreement:
            continue
        whole = bool(candidates.determined[group[0]] == 1)
        statuses[group[0]] = Status.EXACT if whole else Status.RANK_DEFICIENT
        for other in group[1:]:
            statuses[other] = Status.DUPLICATE

    precision = -np.log10(np.clip(np.where(np.isfinite(noise), noise, 1), 1e-12, 1e12))
    support = np.where((agreeing == 1) & disputed, 0.5, agreeing.astype(np.float64))
    scores = precision if turned_on is None else support
    accepted = [i for i in range(count) if statuses[i].accepted]
    accepted.sort(key=lambda i: (-scores[i], noise[i]))
    return Reconstruction(
        images=images[accepted].astype(np.float32),
        scores=scores[accepted],
        statuses=tuple(statuses[i] for i in accepted),
        selected_by=SELECTED_BY_BINS if turned_on is None else SELECTED_BY_ROWS,
        candidates=tuple(
            {
                "status": str(statuses[i]),
                "neuron": int(candidates.neurons[i]),
                "agreeing_neurons": int(agreeing[i]),
                "consistent": bool(candidates.consistent[i]),
                "determined": float(candidates.determined[i]),
                "range_excess": _finite(excess[i]),
                "readout_noise": _finite(noise[i]),
            }
            for i in range(count)
        ),
        stats={"method": method, "num_candidates": count},
    )


def _equal(flat: np.ndarray, ordered: np.ndarray, options: ImprintOptions) -> list[list[int]]:
    """Groups of equal images, each with its most typical one first."""
    if len(ordered) == 0:
        return []
    members = flat[ordered]
    members -= members.mean(axis=0, keepdims=True)  # keeps digits in the differences below
    squares = np.sum(members**2, axis=1)
    products = members @ members.T
    limit = flat.shape[1] * options.same_image**2
    groups: list[list[int]] = []  # of positions in the order given
    leaders = np.zeros(len(ordered), int)
    for i in range(len(ordered)):
        others = leaders[: len(groups)]
        distances = squares[others] + squares[i] - 2 * products[others, i]
        same = np.flatnonzero(distances < limit)
        if same.size:
            groups[same[0]].append(i)
        else:
            leaders[len(groups)] = i
            groups.append([i])
    return [_central_first([int(ordered[i]) for i in group], flat) for group in groups]


def _central_first(group: list[int], flat: np.ndarray) -> list[int]:
    """The group with its most typical member first: one may hold a trace of another image."""
    if len(group) < 3:
        return group
    members = flat[group]
    distance = np.mean((members - np.median(members, axis=0)[None, :]) ** 2, axis=1)
    first = group[int(np.argmin(distance))]
    return [first, *(i for i in group if i != first)]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
