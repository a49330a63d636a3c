"""Run the cells that are not finished yet, one after the other, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jgia import _checks
from jgia._io import atomic_write_bytes, require_writable_folder
from jgia.audit import environment, run_audit
from jgia.config.fields import flatten
from jgia.config.sweep import Cell, Sweep
from jgia.data import DataError
from jgia.sweep.memory import peak_rss_bytes, reset_peak
from jgia.sweep.records import CellRecord, cell_key, json_ready, read_record, trimmed
from jgia.sweep.table import SweepResults, load_results, write_tables

SweepProgress = Callable[[Cell, str, int, int], None]
"""Called with (cell, stage in words, cells finished, cells in all)."""

_BEFORE_COMPUTE = ("loading images", "crafting parameters")
"""Stages of an audit in which the library refuses what does not fit."""


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    retry_failed: bool = False,
    minutes: float | None = None,
    progress: SweepProgress | None = None,
) -> SweepResults:
    """Audit every cell that has no record in ``out`` yet, then write the table and the figures.

    Killed at any moment, it goes on where it was when called again: a cell's record is written
    atomically when it is finished. A cell that is refused or fails is recorded with the reason
    and does not stop the others. Cells that share shapes run one after another, so that compiled
    programs are used again.

    Writes ``cells/KEY.json``, ``results.csv`` (and ``results.parquet`` if pyarrow is installed),
    ``figures/*.png`` and ``sweep.json``. Records of cells that are not in this sweep stay where
    they are and are not in the table.

    Args:
      sweep: from :func:`~jgia.config.sweep.read_sweep`.
      out: folder, made if it is missing.
      retry_failed: run cells again that failed; refused ones would be refused again.
      minutes: start no cell later than this; the next call goes on.
      progress: see :data:`SweepProgress`.

    Returns:
      The results of all finished cells.

    Raises:
      ValueError: the folder cannot be written, or another sweep is writing into it.
      ImportError: LPIPS is asked for and not installed.
      KeyboardInterrupt: as it came; the table of what is finished is written first.
    """
    if minutes is not None:
        _checks.positive(minutes=minutes)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    folder = require_writable_folder(out)
    if any(cell.config.lpips for cell in sweep.cells):
        from jgia.metrics.lpips import load_evaluator

        load_evaluator()  # a missing extra should not fail every cell at its end
    with _only_one(folder):
        _write_description(sweep, folder)
        todo = [cell for cell in sweep.cells if not finished(cell, folder, retry_failed)]
        done = len(sweep.cells) - len(todo)
        try:
            last = None
            for cell in in_running_order(todo):
                if time.monotonic() > deadline:
                    break
                if last is not None and _images(last) != _images(cell):
                    jax.clear_caches()  # hundreds of shapes would fill the memory
                last = cell

                def report(stage: str, cell: Cell = cell, done: int = done) -> None:
                    if progress is not None:
                        progress(cell, stage, done, len(sweep.cells))

                run_cell(cell, report).write(folder / "cells")
                done += 1
        finally:
            results = load_results(folder)
            write_tables(results, folder)
        from jgia.sweep.figures import write_figures

        write_figures(results, folder / "figures")
        return results


def finished(cell: Cell, folder: Path, retry_failed: bool = False) -> bool:
    """Whether the cell has a record that stands."""
    record = read_record(Path(folder) / "cells" / f"{cell_key(cell.config)}.json")
    return record is not None and not (retry_failed and record.status == "failed")


def run_cell(cell: Cell, report: Callable[[str], None]) -> CellRecord:
    """One audit and what became of it; only an interrupt comes out as an exception."""
    config = cell.config
    record = CellRecord(key=cell_key(config), config=json_ready(flatten(config)), status="ok")
    stages = ["loading images"]

    def follow(stage: str, done: int, total: int) -> None:
        del done, total
        stages.append(stage)
        report(stage)

    scope = "cell" if reset_peak() else "process"
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        outcome = run_audit(config, command=f"jgia sweep ({cell.label})", progress=follow)
        record = dataclasses.replace(record, result=trimmed(outcome.result))
    except Exception as error:
        refused = isinstance(error, ValueError) and stages[-1] in _BEFORE_COMPUTE
        missing = isinstance(error, DataError)  # the file may be there at the next try
        record = dataclasses.replace(
            record,
            status="refused" if refused and not missing else "failed",
            error=_sentence(error),
        )
    return dataclasses.replace(
        record,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        peak_rss_bytes=peak_rss_bytes(),
        peak_rss_scope=scope,
        environment=json_ready(environment()),
    )


def in_running_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that share shapes next to one another; else in the order of the file."""
    groups: dict[Any, dict[Any, list[Cell]]] = {}
    for cell in cells:
        config = cell.config
        group = groups.setdefault((_images(cell), config.model, config.attack), {})
        group.setdefault((config.batch, config.performance), []).append(cell)
    return [cell for group in groups.values() for part in group.values() for cell in part]


def _images(cell: Cell) -> Hashable:
    """What decides the shape of an image."""
    return cell.config.data.data, cell.config.data.image_size


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _write_description(sweep: Sweep, folder: Path) -> None:
    content = {
        "format": "jgia-sweep-1",
        "name": sweep.name,
        "varying": sweep.varying,
        "environment": environment(),
        "source": sweep.source,
        "cells": [
            {"key": cell_key(cell.config), "config": json_ready(flatten(cell.config))}
            for cell in sweep.cells
        ],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    atomic_write_bytes(folder / "sweep.json", text.encode())


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second sweep out; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another sweep is writing into {str(folder)!r}; wait for it, or choose another "
                "folder with --out."
            ) from error
        yield
