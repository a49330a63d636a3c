"""One row per cell: what varied, what was recovered, what it cost."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jgia._io import atomic_write, atomic_write_bytes
from jgia.config.sweep import shown
from jgia.observation import Status
from jgia.report.records import THRESHOLDS
from jgia.sweep.records import CellRecord, read_record

IDENTITY = ("attack", "model", "data", "batch", "seed")
"""Options that every table has, whether they vary or not."""

_CAP_DB = 60.0
_STAGES = ("setup_s", "compile_s", "client_s", "leak_s", "invert_s", "score_s")
TIMINGS = (*_STAGES, "seconds", "cpu_seconds", "peak_rss_mib")
"""Columns that differ from run to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResults:
    """A sweep's folder, read back.

    Attributes:
      name: of the sweep.
      varying: options that differ between cells, ``seed`` last.
      records: of the finished cells, in the order of the file.
      num_cells: cells in all, finished or not.
    """

    name: str
    varying: tuple[str, ...]
    records: tuple[CellRecord, ...]
    num_cells: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table, with Python values; ``None`` where a cell has no such figure."""
        return [self._row(record) for record in self.records]

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        lpips = any("lpips" in (r.result or {}).get("scores", {}) for r in self.records)
        names = [*self.options, "status", "num_true", "num_reconstructed", "num_recovered"]
        for threshold in THRESHOLDS:
            names += [f"recovered_{threshold}{end}" for end in ("", "_low", "_high")]
        names += ["psnr_median", "psnr_median_capped", "psnr_mean_capped", "ssim_median"]
        names += ["lpips_median"] if lpips else []
        names += ["expected_recovered", "num_candidates"]
        names += [f"num_{status.name.lower()}" for status in Status]
        return [*names, *TIMINGS, "key", "error"]

    @property
    def options(self) -> list[str]:
        """The columns that are options: those that vary, and the identity of an audit."""
        return list(dict.fromkeys([*IDENTITY, *self.varying]))

    def counts(self) -> dict[str, int]:
        """Cells by status, with ``"unfinished"``."""
        counts = dict.fromkeys(("ok", "refused", "failed"), 0)
        for record in self.records:
            counts[record.status] += 1
        return {**counts, "unfinished": self.num_cells - len(self.records)}

    def _row(self, record: CellRecord) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(self.columns)
        for name in self.options:
            row[name] = record.config[name]
        row |= {"status": record.status, "error": record.error, "key": record.key}
        row |= {"seconds": record.seconds, "cpu_seconds": record.cpu_seconds}
        if record.peak_rss_bytes is not None:
            row["peak_rss_mib"] = record.peak_rss_bytes / 2**20
        if record.result is None:
            return row
        scores, attack = record.result["scores"], record.result["attack"]
        for name in ("num_true", "num_reconstructed", "num_recovered"):
            row[name] = scores[name]
        for threshold in THRESHOLDS:
            rate = scores["success_rate"][threshold]
            row[f"recovered_{threshold}"] = rate["rate"]
            row[f"recovered_{threshold}_low"] = rate["low"]
            row[f"recovered_{threshold}_high"] = rate["high"]
        median = scores["psnr"]["median"]
        row["psnr_median"] = median
        row["psnr_median_capped"] = None if median is None else min(median, _CAP_DB)
        row["psnr_mean_capped"] = scores["psnr"]["mean_capped"]
        row["ssim_median"] = scores["ssim"]["median"]
        if "lpips" in scores:
            row["lpips_median"] = scores["lpips"]["median"]
        row["expected_recovered"] = attack["expected_recovered"]
        row["num_candidates"] = attack["num_candidates"]
        for status in Status:
            row[f"num_{status.name.lower()}"] = attack["status_counts"].get(str(status), 0)
        for stage in _STAGES:
            row[stage] = record.result["timings"].get(stage)
        return row


def load_results(folder: str | Path) -> SweepResults:
    """Read a sweep's folder back, finished or not.

    Raises:
      ValueError: the folder holds no sweep.
    """
    path = Path(folder) / "sweep.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        name, varying = str(content["name"]), tuple(map(str, content["varying"]))
        keys = [str(cell["key"]) for cell in content["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no sweep ({path.name} is missing or not one); give the folder "
            "that jgia sweep wrote with --out."
        ) from error
    found = [read_record(path.parent / "cells" / f"{key}.json") for key in keys]
    records = tuple(record for record in found if record is not None)
    return SweepResults(name=name, varying=varying, records=records, num_cells=len(keys))


def write_tables(results: SweepResults, folder: Path) -> list[Path]:
    """Write ``results.csv``, and ``results.parquet`` where pyarrow is installed."""
    rows, columns = results.rows, results.columns
    path = folder / "results.csv"
    atomic_write_bytes(path, csv_text(rows, columns).encode())
    paths = [path]
    if importlib.util.find_spec("pyarrow"):
        paths.append(_write_parquet(rows, columns, folder / "results.parquet"))
    return paths


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The table as comma-separated values; nothing where there is no figure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_field(row[name]) for name in columns] for row in rows)
    return file.getvalue()


def _field(value: Any) -> str:
    if isinstance(value, list | tuple):
        return shown(tuple(value))
    if isinstance(value, float):
        return repr(value)
    return "" if value is None else str(value)


def _write_parquet(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path
) -> Path:  # pragma: no cover - pyarrow is not a dependency
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = pyarrow.table(
        {
            name: [_field(v) if isinstance(v := row[name], list) else v for row in rows]
            for name in columns
        }
    )
    with atomic_write(path) as file:
        parquet.write_table(table, file)
    return path
