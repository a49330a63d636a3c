"""Recovered fraction against the first numeric option, one line per setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jgia._io import atomic_write_bytes
from jgia.config.sweep import shown
from jgia.metrics import wilson_interval
from jgia.report.records import THRESHOLDS
from jgia.sweep.table import SweepResults

_INK, _FAINT, _GRID = "#20242a", "#70767e", "#e8eaed"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = "osD^vP"
_MAX_PANELS = 24
_MAX_LINES = 12


class Point(NamedTuple):
    """A fraction with its interval; seeds are pooled.

    Attributes:
      x: value of the first numeric option.
      rate: images recovered over images.
      low: lower end of the 95 % Wilson interval.
      high: upper end.
    """

    x: float
    rate: float
    low: float
    high: float


class Chart(NamedTuple):
    """What is drawn.

    Attributes:
      x_name: the option along the axis.
      ticks: names of the positions if the option is no number, else ``None``.
      panels: title to {line's name: points by increasing x}.
    """

    x_name: str
    ticks: list[str] | None
    panels: dict[str, dict[str, list[Point]]]


def chart(results: SweepResults, threshold: str) -> Chart:
    """The points of one figure.

    Along the axis: the first varying option whose values are all numbers (the first one at all if
    there is none). Lines: the next option; panels: the others together. Cells that differ only in
    the seed are pooled: their images are counted together. Options that follow from another one
    (zipped ones) are left out.
    """
    rows = [row for row in results.rows if row["status"] == "ok"]
    distinct = {name: {_shown(row[name]) for row in rows} for name in results.varying}
    options = [k for k, values in distinct.items() if k != "seed" and len(values) > 1] or ["seed"]
    numeric = [name for name in options if all(_is_number(row[name]) for row in rows)]
    x_name = (numeric or options)[0]
    ticks = None
    if x_name not in numeric:
        ticks = list(dict.fromkeys(_shown(row[x_name]) for row in rows))
    kept = [x_name]
    for name in options:
        if not any(_follows(name, other, rows) for other in kept):
            kept.append(name)
    others = kept[1:]
    counts: dict[tuple[str, str, float], list[int]] = {}
    for row in rows:
        x = row[x_name] if ticks is None else ticks.index(_shown(row[x_name]))
        panel = ", ".join(f"{name} {_shown(row[name])}" for name in others[1:])
        line = f"{others[0]} {_shown(row[others[0]])}" if others else "all"
        count = counts.setdefault((panel, line, float(x)), [0, 0])
        count[0] += round(row[f"recovered_{threshold}"] * row["num_true"])
        count[1] += row["num_true"]
    panels: dict[str, dict[str, list[Point]]] = {}
    for (panel, line, x), (successes, total) in sorted(counts.items(), key=lambda item: item[0][2]):
        point = Point(x, successes / total, *wilson_interval(successes, total))
        panels.setdefault(panel, {}).setdefault(line, []).append(point)
    return Chart(x_name, ticks, panels)


def write_figures(results: SweepResults, folder: Path) -> list[Path]:
    """Write ``recovered_18.png`` to ``recovered_40.png``; none if no cell is ok."""
    paths = []
    for threshold in THRESHOLDS:
        drawn = chart(results, threshold)
        if not drawn.panels:
            return []
        path = folder / f"recovered_{threshold}.png"
        atomic_write_bytes(path, _png(drawn, threshold, results.name))
        paths.append(path)
    return paths


def _png(drawn: Chart, threshold: str, name: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = dict(list(drawn.panels.items())[:_MAX_PANELS])
    columns = min(len(panels), 3)
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * num_rows + 0.4), layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False, sharey=True).ravel()
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        _draw(axis, panel, lines, drawn)
        axis.set_title(title, fontsize=9, color=_INK)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    omitted = len(drawn.panels) - len(panels)
    note = f" ({omitted} more panels in results.csv)" if omitted else ""
    figure.suptitle(f"{name}{note}".replace("$", r"\$"), fontsize=10, color=_INK)
    figure.supylabel(f"images recovered at ≥ {threshold} dB", fontsize=9, color=_INK)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(lines) > 1:
        for axis in axes[1 : len(panels)]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _draw(
    axis: Any, panel: Mapping[str, Sequence[Point]], lines: Sequence[str], drawn: Chart
) -> None:
    for line, points in list(panel.items())[:_MAX_LINES]:
        style = lines.index(line)
        rates = [point.rate for point in points]
        below = [max(0.0, point.rate - point.low) for point in points]
        above = [max(0.0, point.high - point.rate) for point in points]
        axis.errorbar(
            [point.x for point in points],
            rates,
            yerr=(below, above),
            label=line,
            color=_COLORS[style % len(_COLORS)],
            marker=_MARKERS[style // len(_COLORS) % len(_MARKERS)],
            markersize=4,
            linewidth=1.4 if drawn.ticks is None else 0,
            elinewidth=0.9,
            capsize=2,
        )
    axis.set_ylim(-0.03, 1.03)
    values = sorted({point.x for points in panel.values() for point in points})
    if drawn.ticks is not None:
        axis.set_xticks(range(len(drawn.ticks)), drawn.ticks)
    else:
        if values[0] > 0 and values[-1] / values[0] >= 8:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
        if len(values) <= 8:
            axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.set_xlabel(drawn.x_name, fontsize=9, color=_INK)
    axis.tick_params(labelsize=8, colors=_FAINT)
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _follows(name: str, other: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each value of ``other`` goes with one value of ``name``."""
    pairs = {(_shown(row[other]), _shown(row[name])) for row in rows}
    return len(pairs) == len({first for first, _ in pairs})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return shown(tuple(value) if isinstance(value, list) else value)
