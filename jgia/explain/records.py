"""Explanations of several inputs as rows of a table and of ``risk.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jgia.explain.explain import Explanation


def explanation_rows(found: Sequence[Sequence[Explanation]]) -> list[dict[str, Any]]:
    """One row for each defense: means over the inputs, beside those without a defense.

    Args:
      found: for each defense, the explanations of all inputs; the first without a defense.

    Returns:
      JSON without NaN. ``realized`` has the standard error over the draws for these inputs;
      ``ratio`` is realized over expected, 1 for a linear release and Gaussian noise. An estimate
      that is not finite is ``None``.

    Raises:
      ValueError: no explanation, or not as many for every defense.
    """
    counts = {len(parts) for parts in found}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"every defense needs an explanation of each input, got {sorted(counts)} of them."
        )
    before = found[0]
    return [_row(parts, before) for parts in found]


def _row(parts: Sequence[Explanation], before: Sequence[Explanation]) -> dict[str, Any]:
    one = parts[0]
    realized, expected = _mean(parts, "realized"), _mean(parts, "expected")
    spread = math.sqrt(sum(part.standard_error**2 for part in parts)) / len(parts)
    return {
        "defense": one.name,
        "options": one.options,
        "jacobian": one.effect.jacobian,
        "covariance": one.effect.covariance,
        "caveat": one.effect.caveat,
        "kept_share": _mean(parts, "kept_share"),
        "noise_std": _number(_mean(parts, "noise_std")),
        "energy": one.energy,
        "invloss_before": _number(_mean(before, "invloss")),
        "invloss": _number(_mean(parts, "invloss")),
        "invloss_least": _number(_mean(parts, "invloss_least")),
        "risk_before": _number(_mean(before, "risk")),
        "risk": _number(_mean(parts, "risk")),
        "expected": _number(expected),
        "realized_before": _number(_mean(before, "realized")),
        "realized": _number(realized),
        "standard_error": _number(spread),
        "ratio": _number(realized / expected if expected else math.nan),
        "linearization_ratio": _number(_mean(parts, "linearization_ratio")),
        "converged": float(np.mean([np.mean(part.converged) for part in parts])),
        "draws": len(one.errors),
        "layer_risk_before": _layers(before),
        "layer_risk": _layers(parts),
        "inputs": [
            {
                "invloss": _number(part.invloss),
                "expected": _number(part.expected),
                "realized": _number(part.realized),
                "standard_error": _number(part.standard_error),
                "linearization_ratio": _number(part.linearization_ratio),
                "converged": float(np.mean(part.converged)),
            }
            for part in parts
        ],
    }


def _layers(parts: Sequence[Explanation]) -> dict[str, float | None]:
    return {
        layer: _number(float(np.mean([part.layer_risk[layer] for part in parts])))
        for layer in parts[0].layer_risk
    }


def _mean(parts: Sequence[Explanation], name: str) -> float:
    return float(np.mean([getattr(part, name) for part in parts]))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
