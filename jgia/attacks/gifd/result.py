"""What a run's stages amount to for one client: its images, and the record of how they came."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jgia.attacks.gifd.matching import Matching
from jgia.attacks.gifd.run import StageResult
from jgia.attacks.gifd.settings import Settings
from jgia.generators.protocol import Side
from jgia.observation import History, Reconstruction, Status

_CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Client:
    """What is searched for one client, from where, and how that was found out.

    Attributes:
      matching: its update, and labels.
      side: side inputs where restarts start.
      labels_by: how its labels were found.
      generator_labels: classes that a conditional generator is given, else ``None``.
      transform: what was found of a defense.
    """

    matching: Matching
    side: Side
    labels_by: str
    generator_labels: np.ndarray | None
    transform: dict[str, Any]


def reconstruction(
    client: Client,
    results: Sequence[StageResult],
    rows: range,
    chosen: Settings,
    prior_name: str,
) -> Reconstruction:
    """The images of the stage and restart with the smallest distance."""
    own = np.stack([result.distances[rows.start : rows.stop] for result in results])
    table = np.where(np.isfinite(own), own, np.inf)  # (stages, restarts)
    if chosen.selection == "last":
        stage, restart = len(results) - 1, int(np.argmin(table[-1]))
    else:
        stage, restart = (int(i) for i in np.unravel_index(np.argmin(table), table.shape))
    row, value = rows.start + restart, float(table[stage, restart])
    finite = math.isfinite(value)
    status = Status.MATCHED if finite else Status.NONFINITE
    labels = np.asarray(client.matching.labels)
    kept = len(labels) if finite else 0
    frozen = sorted(
        {r for result in results for r in range(len(rows)) if not result.alive[rows.start + r]}
    )
    return Reconstruction(
        images=results[stage].images[row][:kept],
        scores=np.full(kept, -value),
        statuses=(status,) * kept,
        selected_by="gradient distance",
        labels=labels[:kept],
        candidates=tuple(
            {"status": str(status), "label": int(label), "distance": value if finite else None}
            for label in labels
        ),
        stats={
            "settings": dataclasses.asdict(chosen),
            "prior": prior_name,
            "labels_by": client.labels_by,
            "generator_labels": None
            if client.generator_labels is None
            else client.generator_labels.tolist(),
            "transform": client.transform,
            "stage": stage,
            "restart": restart,
            "why": _why(results, stage, restart, table, chosen),
            "stage_names": [result.name() for result in results],
            "stage_distances": [[_number(d) for d in line] for line in own.tolist()],
            "stage_steps": [result.losses.shape[1] for result in results],
            "stage_seconds": [result.seconds for result in results],
            "stopped_early": any(
                result.losses.shape[1] < chosen.steps_of(k) for k, result in enumerate(results)
            ),
            "stage_curves": [_curves(result, rows) for result in results],
            "nonfinite_restarts": frozen,
        },
        history=_history(results, row),
    )


def _why(
    results: Sequence[StageResult],
    stage: int,
    restart: int,
    table: np.ndarray,
    chosen: Settings,
) -> str:
    if not np.isfinite(table[stage, restart]):
        return "no search has a finite gradient distance"
    among = f"all {table.size} of {table.shape[0]} stages and {table.shape[1]} restarts"
    if chosen.selection == "last":
        among = f"the {table.shape[1]} restarts of the last stage"
    return (
        f"stage {stage} ({results[stage].name()}) of restart {restart} has the smallest gradient "
        f"distance, {table[stage, restart]:.4g}, of {among}"
    )


def _curves(result: StageResult, rows: range) -> dict[str, Any]:
    """Losses of every restart, thinned out."""
    steps = _thinned(result.losses.shape[1])
    losses = result.losses[rows.start : rows.stop, steps]
    return {
        "steps": (steps + 1).tolist(),
        "losses": [[_number(v) for v in line] for line in losses.tolist()],
    }


def _history(results: Sequence[StageResult], row: int) -> History:
    """One restart's losses through all stages, and its image after each."""
    losses = np.concatenate([result.losses[row] for result in results])
    kept = _thinned(len(losses))
    ends = np.cumsum([result.losses.shape[1] for result in results])
    return History(
        steps=kept + 1,
        losses=losses[kept],
        frame_steps=ends,
        frames=np.stack([result.images[row] for result in results]),
    )


def _thinned(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, _CURVE_POINTS)).round().astype(int))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
