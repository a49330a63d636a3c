"""How a search in stages went, as the result records it: scored stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jgia.metrics import PSNR_CEILING_DB, psnr
from jgia.observation import Reconstruction

_MOVED = (
    "prior",
    "stage",
    "restart",
    "why",
    "stopped_early",
    "stage_names",
    "stage_distances",
    "stage_steps",
    "stage_seconds",
    "stage_curves",
)


def staged_search(
    reconstruction: Reconstruction,
    originals: np.ndarray | None,
    scores: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The attack's statistics without those of stages, and these as ``staged_search``.

    Args:
      reconstruction: of any attack; ``stage_names`` among its statistics means that it searched in
        stages. Stages are scored where its history has one frame for each.
      originals: (N, H, W, C) true images, or ``None``.
      scores: of the images returned, whose matching every stage is scored with; ``None`` without
        true images.

    Returns:
      ``stats``, and the record; ``None`` for attacks without stages.
    """
    stats = dict(reconstruction.stats)
    if "stage_names" not in stats:
        return stats, None
    rest = {name: value for name, value in stats.items() if name not in _MOVED}
    names, history = stats["stage_names"], reconstruction.history
    frames = np.zeros(0) if history is None else np.asarray(history.frames)
    stages = []
    for k, name in enumerate(names):
        curves = stats["stage_curves"][k]
        stage = {
            "searched": name,
            "steps": stats["stage_steps"][k],
            "seconds": stats["stage_seconds"][k],
            "distances": stats["stage_distances"][k],
            "curve_steps": curves["steps"],
            "curve_losses": curves["losses"],
        }
        if originals is not None and scores is not None and len(frames) == len(names):
            stage["psnr"] = _scored(frames[k], originals, scores["matching"])
        stages.append(stage)
    settings = stats["settings"]
    return rest, {
        "prior": stats["prior"],
        "stage": stats["stage"],
        "restart": stats["restart"],
        "why": stats["why"],
        "budget_steps": _limit(settings, "budget_steps"),
        "budget_seconds": _limit(settings, "budget_seconds"),
        "stopped_early": stats["stopped_early"],
        "stages": stages,
    }


def _limit(settings: Mapping[str, Any], name: str) -> Any:
    """A setting that some attacks call ``budget_steps``, others ``gias_budget_steps``."""
    return next((value for key, value in settings.items() if key.endswith(name)), None)


def _scored(
    frame: np.ndarray, originals: np.ndarray, matching: list[int | None]
) -> list[float | None]:
    """PSNR of one stage's images, by true image; ``None`` where unmatched or not finite."""
    found: list[float | None] = [None] * len(matching)
    pairs = [(i, match) for i, match in enumerate(matching) if match is not None]
    if not pairs:
        return found
    true, matched = (np.array(side) for side in zip(*pairs, strict=True))
    values = psnr(np.asarray(frame, np.float32)[matched], np.asarray(originals, np.float32)[true])
    for i, value in zip(true.tolist(), np.asarray(values).tolist(), strict=True):
        found[i] = min(value, PSNR_CEILING_DB) if value > -np.inf else None
    return found
