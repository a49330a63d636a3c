"""Pictures of what the JSON files hold: one for each section and tag."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jgia._io import atomic_write_bytes

_COLORS = {"IG": "C7", "latent only": "C0", "GIFD": "C3", "GIAS": "C2", "GGL": "C4"}


def draw(folder: Path) -> None:
    """A PNG beside every ``gifd_*.json``."""
    kinds = {"ladder": _ladder, "ablation": _points, "batch": _grouped, "ood": _grouped}
    kinds |= {"defenses": _grouped, "mapping": _points, "speed": _speed}
    for path in sorted(folder.glob("gifd_*.json")):
        found = json.loads(path.read_text())
        section = path.stem.split("_")[1]
        enough = found.get("summary") if section != "speed" else found.get("rows")
        if section not in kinds or not enough:
            continue
        figure = kinds[section](found)
        content = io.BytesIO()
        figure.savefig(content, dpi=120)
        plt.close(figure)
        target = path.with_suffix(".png")
        atomic_write_bytes(target, content.getvalue())
        print(f"wrote {target}")


def _title(found: dict[str, Any]) -> str:
    plan = found["plan"]
    victim = plan["victim"] + (", trained" if plan["trained"] else "")
    return f"prior {plan['prior']}, {plan['data']}, {victim}"


def _family(name: str) -> str:
    """The method behind a case's name."""
    first = name.split(" | ")[0].split(",")[0]
    return first if first in _COLORS else "GIFD"


def _order(name: str) -> tuple[int, str]:
    return list(_COLORS).index(_family(name)), name


def _bar(axes: Any, names: list[str], summary: dict[str, Any], metric: str) -> None:
    entries = [summary[name][metric] for name in names]
    means = [entry["mean"] for entry in entries]
    errors = [
        [entry["mean"] - entry.get("low", entry["mean"]) for entry in entries],
        [entry.get("high", entry["mean"]) - entry["mean"] for entry in entries],
    ]
    colors = [_COLORS[_family(name)] for name in names]
    places = range(len(names))[::-1]
    bars = axes.barh(places, means, xerr=errors, color=colors, capsize=2, alpha=0.85)
    axes.bar_label(bars, fmt="%.2f", fontsize=7, label_type="center", color="white")
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_xlabel("PSNR (dB), mean and 95 % interval" if metric == "psnr" else metric.upper())


def _named(summary: dict[str, Any], metric: str = "psnr") -> list[str]:
    return [name for name, entry in summary.items() if metric in entry]


def _ladder(found: dict[str, Any]) -> Any:
    """PSNR and SSIM of all cases; PSNR after each stage."""
    summary = found["summary"]
    names = _named(summary)
    figure, axes = plt.subplots(1, 3, figsize=(14, 1.6 + 0.32 * len(names)), width_ratios=(3, 2, 2))
    _bar(axes[0], names, summary, "psnr")
    if _named(summary, "ssim") == names:
        _bar(axes[1], names, summary, "ssim")
        axes[1].set_yticks([])
    for name in names:
        if "stage_psnr" in summary[name] and _family(name) == "GIFD":
            curve = summary[name]["stage_psnr"]
            axes[2].plot(range(len(curve)), curve, "o-", label=name)
            axes[2].set_xticks(range(len(curve)))
    axes[2].set(xlabel="stage", ylabel="PSNR (dB), single restarts")
    if axes[2].lines:
        axes[2].legend(fontsize=8)
    return _finished(figure, found)


def _points(found: dict[str, Any]) -> Any:
    """One point per case, so that small differences show."""
    summary = found["summary"]
    names = _named(summary)
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.3 * len(names)))
    for place, name in zip(range(len(names))[::-1], names, strict=True):
        psnr = summary[name]["psnr"]
        mean = psnr["mean"]
        reach = [[mean - psnr.get("low", mean)], [psnr.get("high", mean) - mean]]
        axes.errorbar(mean, place, xerr=reach, fmt="o", color="C3", capsize=3)
        axes.annotate(f"{mean:.2f}", (mean, place), (0, 5), textcoords="offset points", fontsize=7)
    axes.axvline(summary[names[0]]["psnr"]["mean"], color="C7", linestyle=":")
    axes.set_yticks(list(range(len(names))[::-1]), names, fontsize=8)
    axes.set_xlabel("PSNR (dB), mean and 95 % interval over clients")
    return _finished(figure, found)


def _grouped(found: dict[str, Any]) -> Any:
    """A group of bars for each kind of client: by batch, data or defense."""
    summary = found["summary"]
    names = _named(summary)
    groups = list(dict.fromkeys(name.partition(" | ")[2] for name in names))
    methods = sorted({name.split(" | ")[0] for name in names}, key=_order)
    width = 0.8 / len(methods)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.2 * len(groups) + 2), 4))
    for i, method in enumerate(methods):
        xs, means, errors = [], [], []
        for j, group in enumerate(groups):
            entry = summary.get(f"{method} | {group}" if group else method)
            if entry and "psnr" in entry:
                psnr = entry["psnr"]
                xs.append(j + (i - (len(methods) - 1) / 2) * width)
                means.append(psnr["mean"])
                errors.append(psnr.get("high", psnr["mean"]) - psnr["mean"])
        color, plain = _COLORS[_family(method)], method in _COLORS
        hatch = None if plain else "//"
        axes.bar(xs, means, width, yerr=errors, label=method, color=color, hatch=hatch, capsize=2)
    labels = [_label(found, group) for group in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8, rotation=20 if len(groups) > 5 else 0)
    axes.set_ylabel("PSNR (dB), mean and 95 % interval")
    axes.margins(y=0.2)
    axes.legend(fontsize=8, ncols=len(methods), loc="upper center")
    return _finished(figure, found)


def _label(found: dict[str, Any], group: str) -> str:
    if group:
        return group.removeprefix("npz:").removesuffix(".npz")
    records = found["cases"].values()
    if any(record["defense"] != "none" for record in records):
        return "no defense"
    return "B=1" if any(record["batch"] > 1 for record in records) else found["plan"]["data"]


def _speed(found: dict[str, Any]) -> Any:
    """Milliseconds a step of all contenders, and clients an hour."""
    rows = [row for row in found["rows"] if "ms_per_step" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.6 + 0.35 * len(rows)))
    places = range(len(rows))[::-1]
    colors = ["C3" if row["contender"].startswith("jgia") else "C7" for row in rows]
    bars = left.barh(places, [row["ms_per_step"] for row in rows], color=colors)
    left.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    left.margins(x=0.12)
    left.set_yticks(list(places), [row["contender"] for row in rows], fontsize=8)
    left.set_xlabel("ms a step and restart (best of the repeats)")
    clients = [row for row in found["clients"] if "clients_per_hour" in row]
    bars = right.bar(
        [str(row["clients"]) for row in clients], [row["clients_per_hour"] for row in clients]
    )
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.margins(y=0.12)
    right.set(xlabel="clients attacked together", ylabel="clients an hour (300 steps each)")
    figure.tight_layout()
    return figure


def _finished(figure: Any, found: dict[str, Any]) -> Any:
    figure.suptitle(_title(found), fontsize=10)
    figure.tight_layout()
    return figure
