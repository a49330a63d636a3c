"""A sweep in the terminal: a progress line, and what came of it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jgia.config.sweep import Cell, Sweep, shown
from jgia.sweep.run import finished, in_running_order
from jgia.sweep.table import SweepResults


class SweepLine:
    """Cells finished of all, and what the current one does; silent when that is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> SweepLine:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, cell: Cell, stage: str, done: int, total: int) -> None:
        """Show what ``cell`` does while ``done`` of ``total`` cells are finished."""
        text = f"{cell.label} · {stage}"
        self._progress.update(self._task, completed=done, total=total, description=text)


def print_cells(console: Console, sweep: Sweep, folder: Path, *, retry_failed: bool) -> None:
    """List the cells in the order in which they would run, and which are finished."""
    table = Table("cell", "state")
    for cell in in_running_order(sweep.cells):
        done = finished(cell, folder, retry_failed)
        table.add_row(Text(cell.label), "finished" if done else "to do")
    console.print(table)
    console.print(Text(f"{len(sweep.cells)} cells in {sweep.name}; nothing was run."))


def print_results(console: Console, results: SweepResults, folder: Path) -> None:
    """The table's main columns, and the reasons of cells without figures."""
    options = results.varying
    table = Table(*options)
    for title in ("≥ 18 dB", "≥ 40 dB", "median PSNR", "time", "memory"):
        table.add_column(title, justify="right")
    for row in results.rows:
        cells = [shown(tuple(v) if isinstance(v := row[name], list) else v) for name in options]
        figures = [row["status"], "–", "–"]
        if row["status"] == "ok":
            median = row["psnr_median"]
            figures = [f"{row['recovered_18']:.0%}", f"{row['recovered_40']:.0%}"]
            figures.append("–" if median is None else f"{median:.1f} dB")
        memory = row["peak_rss_mib"]
        figures += [f"{row['seconds']:.1f} s", "–" if memory is None else f"{memory:.0f} MiB"]
        table.add_row(*(Text(str(value)) for value in [*cells, *figures]))
    console.print(table)
    for row in results.rows:
        if row["error"]:
            label = " ".join(f"{name}={row[name]}" for name in options)
            text = f"{row['status']}: {label}: {row['error']}"
            console.print(Text(text), soft_wrap=True)
    counts = ", ".join(f"{count} {status}" for status, count in results.counts().items() if count)
    console.print(Text(f"Cells: {counts}. Table: {folder / 'results.csv'}"), soft_wrap=True)
