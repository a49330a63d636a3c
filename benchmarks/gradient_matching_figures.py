"""One picture of what the JSON files hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jgia._io import atomic_write_bytes


def draw(folder: Path) -> None:
    """``gradient_matching.png``: loss curves of both sides, and iterations a second."""
    found: dict[str, Any] = {}
    for name in ("maths", "speed"):
        path = folder / f"gradient_matching_{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    if len(found) < 2:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for i, row in enumerate(found["maths"]["rows"]):
        curves = row["curves"]["float64"]
        left.semilogy(curves["ours"], color=f"C{i}", label=row["model"])
        if "peer" in curves:
            steps = range(0, len(curves["peer"]), 4)
            left.semilogy(steps, curves["peer"][::4], f"C{i}.", markersize=5)
    left.set(xlabel="step", ylabel="loss", title="jgia (lines), breaching (dots), float64")
    left.legend()
    rows = [row for row in found["speed"]["rows"] if "iterations_per_s" in row]
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    for i, side in enumerate(("jgia", "breaching")):
        best = [
            max(
                (
                    row["iterations_per_s"]
                    for row in rows
                    if (row["model"], row["batch"]) == case and row["contender"].startswith(side)
                ),
                default=0.0,
            )
            for case in cases
        ]
        bars = right.bar([n + 0.4 * i for n in range(len(cases))], best, 0.38, label=side)
        right.bar_label(bars, fmt="%.3g", fontsize=8)
    right.set_yscale("log")
    right.set_xticks([n + 0.2 for n in range(len(cases))])
    right.set_xticklabels([f"{model}\nB={batch}" for model, batch in cases])
    right.set(ylabel="iterations a second", title="whole calls, each side at its best threads")
    right.legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    atomic_write_bytes(folder / "gradient_matching.png", content.getvalue())
    print(f"wrote {folder / 'gradient_matching.png'}")
