"""Agreement of predicted and realized errors: rank correlations, ratios, intervals, a figure."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import scipy.stats

ATTACKS = ("dlg", "inverting_gradients", "gauss_newton")
GOALS = {
    "spearman_pooled": "at least 0.95",
    "spearman_within_noise": "at least 0.8 at every level",
    "median_ratio": "0.9 to 1.1",
    "mean_error_over_energy": "below 0.05 for noise up to 3e-2",
}
SIGNS = {
    "invloss": 1,
    "noise_std": 1,
    "noise_over_norm": 1,
    "release_norm": -1,
    "fil": -1,
    "dfil": -1,
    "dfil_bound": 1,
    "i2f_bound": 1,
}
"""What each predictor should do to the error of the best attack."""


def columns(cells: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """One entry per cell: predictors, and the errors of the best attack by two rules."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        tried = [cell["attacks"][name] for name in ATTACKS]
        tried = [each for each in tried if each["error"] is not None]
        known = [each for each in tried if each["objective"] is not None] or tried
        chosen = min(known, key=lambda each: each["objective"] or 0.0)
        norm = cell["predicted"]["release_norm"]
        row = {
            "image": cell["image"],
            "noise_std": cell["noise"],
            "noise_over_norm": cell["noise"] / norm,
            "energy": cell["energy"],
            "by_objective": chosen["error"],
            "by_true_error": min(each["error"] for each in tried),
        }
        row |= {name: cell["attacks"][name]["error"] or math.nan for name in ATTACKS}
        row |= cell["predicted"]
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: np.asarray(values, float) for name, values in found.items()}


def table(cells: list[dict[str, Any]], *, draws: int) -> dict[str, Any]:
    """Everything pooled, and by model."""
    if not cells:
        return {}
    models = np.asarray([cell["model"] for cell in cells])
    data = columns(cells)
    rows = {"all": _rows(data, draws)}
    for model in dict.fromkeys(models):
        rows[model] = _rows({k: v[models == model] for k, v in data.items()}, draws)
    return {"goals": GOALS, "rows": rows}


def _rows(data: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    levels = [float(v) for v in np.unique(data["noise_std"])]
    found: dict[str, Any] = {"cells": len(data["image"]), "images": len(np.unique(data["image"]))}
    for rule in ("by_objective", "by_true_error"):
        found[rule] = {
            "median_ratio": _interval(lambda d, r=rule: _ratio(d, r), data, draws),
            "mean_error_over_energy": {
                f"{tau:g}": _interval(lambda d, r=rule: _away(d, r), _at(data, tau), draws)
                for tau in levels
            },
            "median_ratio_by_noise": {f"{tau:g}": _ratio(_at(data, tau), rule) for tau in levels},
        }
    found["spearman_pooled"] = {
        name: _interval(lambda d, n=name: _spearman(d, n), data, draws) for name in SIGNS
    }
    found["spearman_within_noise"] = {
        f"{tau:g}": {
            name: _interval(lambda d, n=name: _spearman(d, n), _at(data, tau), draws)
            for name in SIGNS
            if name != "noise_std"
        }
        for tau in levels
    }
    found["oracle_spearman_pooled"] = _spearman(data, "invloss", "by_true_error")
    found["chosen"] = {
        name: float(np.mean(np.isclose(data[name], data["by_objective"]))) for name in ATTACKS
    }
    found["linearization_ratio_median"] = float(np.median(data["linearization"]))
    return found


def _at(data: dict[str, np.ndarray], tau: float) -> dict[str, np.ndarray]:
    return {name: values[data["noise_std"] == tau] for name, values in data.items()}


def _ratio(data: dict[str, np.ndarray], rule: str) -> float:
    return float(np.median(data[rule] / data["invloss"]))


def _away(data: dict[str, np.ndarray], rule: str) -> float:
    return float(np.mean(np.abs(data[rule] - data["invloss"]) / data["energy"]))


def _spearman(data: dict[str, np.ndarray], name: str, rule: str = "by_objective") -> float:
    if len(data[rule]) < 3 or np.ptp(data[name]) == 0 or np.ptp(data[rule]) == 0:
        return 0.0
    ranks = [scipy.stats.rankdata(column) for column in (SIGNS[name] * data[name], data[rule])]
    value = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return value if math.isfinite(value) else 0.0


def _interval(statistic: Any, data: dict[str, np.ndarray], draws: int) -> dict[str, float]:
    """A statistic with its 95 % bootstrap interval over images: all cells of one go together."""
    images, places = np.unique(data["image"], return_inverse=True)
    groups = [np.flatnonzero(places == i) for i in range(len(images))]
    rng = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        chosen = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        values.append(statistic({name: column[chosen] for name, column in data.items()}))
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": statistic(data), "low": float(low), "high": float(high)}


def lines(found: dict[str, Any]) -> list[str]:
    """The tables in words."""
    out = []
    for name, row in found["agreement"].get("rows", {}).items():
        out.append(f"B2 {name}: {row['cells']} cells of {row['images']} images")
        for rule in ("by_objective", "by_true_error"):
            best = row[rule]
            out.append(f"  best {rule}: median actual / predicted {_words(best['median_ratio'])}")
            out += [
                f"    noise {tau}: mean |error| / E0 {_words(value)}, median ratio "
                f"{best['median_ratio_by_noise'][tau]:.3f}"
                for tau, value in best["mean_error_over_energy"].items()
            ]
        out.append("  Spearman pooled, then within each noise level:")
        for predictor in SIGNS:
            within = [
                f"{tau}: {values[predictor]['value']:.3f}"
                for tau, values in row["spearman_within_noise"].items()
                if predictor in values
            ]
            pooled = _words(row["spearman_pooled"][predictor])
            out.append(f"    {predictor:16s} {pooled}; {', '.join(within)}")
        out.append(f"  chosen by objective: {row['chosen']}")
    whole = found["bracket"].get("all")
    if whole:
        out.append(
            f"B3 bracket: lower <= best attack <= upper in {whole['inside']:.3f} of "
            f"{whole['configurations']} configurations ({whole['above_lower']:.3f} above lower, "
            f"{whole['below_upper']:.3f} below upper, upper = E0 in "
            f"{whole['upper_is_trivial']:.3f}); within 2 standard errors "
            f"{whole['inside_within_2_standard_errors']:.3f}"
        )
    return out


def _words(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def figure(cells: list[dict[str, Any]]) -> bytes:
    """Predicted against realized PSNR of the best attack by objective, one color per model."""
    from matplotlib.figure import Figure

    data, models = columns(cells), np.asarray([cell["model"] for cell in cells])
    size = _pixels(cells)
    predicted, actual = (
        np.clip(-10 * np.log10(np.maximum(data[name], 1e-12) / size), 0, 60)
        for name in ("invloss", "by_objective")
    )
    drawing = Figure(figsize=(5.2, 4.8), layout="constrained")
    axis = drawing.subplots()
    for model in dict.fromkeys(models):
        here = models == model
        axis.plot(predicted[here], actual[here], ".", ms=3, alpha=0.5, label=model)
    ends = [min(predicted.min(), actual.min()), max(predicted.max(), actual.max())]
    axis.plot(ends, ends, "k--", lw=0.8)
    axis.set_xlabel("predicted PSNR, dB")
    axis.set_ylabel("PSNR of the best attack by objective, dB")
    axis.legend(fontsize=8, markerscale=3)
    content = io.BytesIO()
    drawing.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _pixels(cells: list[dict[str, Any]]) -> int:
    return 3 * cells[0]["plan"]["side"] ** 2
