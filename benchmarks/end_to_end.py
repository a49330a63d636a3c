"""Five attacks, CNN and MLP, six sets of images, batches of 1 to 384: who recovers how much.

    python benchmarks/end_to_end.py --data-dir PATH --out end_to_end
    python benchmarks/end_to_end.py --data-dir PATH --out end_to_end --minutes 25
    python benchmarks/end_to_end.py --smoke --out end_to_end_smoke

Runs ``configs/end_to_end.toml`` (another with ``--config``) as ``jgia sweep`` does; stopped or
killed, the same command goes on. Beside the files of the sweep it writes ``end_to_end.csv``, with
the names of the data sets for their paths, and ``end_to_end.md``. ``--add`` joins the table of an
earlier run, of which cells of the same name are left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from jgia._io import atomic_write_bytes
from jgia.sweep import Cell, SweepResults, load_results, parse_sweep, run_sweep
from jgia.sweep.table import IDENTITY, csv_text

CONFIGS = Path(__file__).resolve().parent / "configs"
THRESHOLDS = ("18", "40")


def main() -> None:
    arguments = _parse()
    config = arguments.config or CONFIGS / f"end_to_end{'_smoke' if arguments.smoke else ''}.toml"
    text = config.read_text("utf-8")
    if "DATA_DIR" in text:
        if arguments.data_dir is None:
            raise SystemExit("give the folder of the data sets with --data-dir")
        text = text.replace("DATA_DIR", arguments.data_dir.resolve().as_posix())
    sweep = parse_sweep(text, where=str(config))
    if not arguments.tables_only:
        run_sweep(
            sweep,
            arguments.out,
            retry_failed=arguments.retry_failed,
            minutes=arguments.minutes,
            progress=_Printer(),
        )
    results = load_results(arguments.out)
    rows = [{**row, "data": dataset(row["data"])} for row in results.rows]
    total = results.num_cells
    if arguments.add is not None:
        known = {_cell(row) for row in rows}
        earlier = [row for row in read_csv(arguments.add) if _cell(row) not in known]
        total += len(earlier)
        rows = sorted([*earlier, *rows], key=lambda row: row["batch"])  # stable: earlier ones first
    table = csv_text(rows, results.columns)
    atomic_write_bytes(arguments.out / "end_to_end.csv", table.encode())
    atomic_write_bytes(arguments.out / "end_to_end.md", markdown(results, rows, total).encode())
    harness.write_json(arguments.out / "end_to_end.json", {"machine": harness.machine()})
    print((arguments.out / "end_to_end.md").read_text("utf-8"))


@dataclasses.dataclass
class _Printer:
    """A line when a cell begins."""

    last: Cell | None = None

    def __call__(self, cell: Cell, stage: str, done: int, total: int) -> None:
        del stage
        if cell is not self.last:
            config = cell.config
            name = f"{dataset(config.data.data)} {config.model.model} {config.attack}"
            print(f"[{done + 1}/{total}] {name} batch {config.batch}", flush=True)
            self.last = cell


def dataset(specification: str) -> str:
    """A data set's name without its path.

    >>> dataset("npz:/somewhere/mnist_test10k.npz")
    'mnist_test10k'
    """
    return Path(specification.removeprefix("npz:")).stem


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of an ``end_to_end.csv``: numbers where there are some, ``None`` for nothing."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {**{name: _value(text) for name, text in row.items()}, "key": row["key"]} for row in rows
    ]


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def markdown(results: SweepResults, rows: Sequence[Mapping[str, Any]], total: int) -> str:
    """One table per threshold and one of times, then why cells are empty."""
    parts = [f"# {results.name}", "", _introduction(results, rows, total)]
    for threshold in THRESHOLDS:
        title = f"Percent of the client's images recovered at ≥ {threshold} dB"
        parts += ["", f"## {title}", "", *_table(rows, f"recovered_{threshold}", _percent)]
    parts += ["", "## Seconds, compilation included", "", *_table(rows, "seconds", _seconds)]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["error"]:
            where = f"{row['data']} {row['model']} {row['attack']} {row['batch']}"
            reasons.setdefault(f"{row['status']}: {row['error']}", []).append(where)
    if reasons:
        parts += ["", "## Empty cells", ""]
        parts += [f"- {reason} ({_some(cells)})" for reason, cells in reasons.items()]
    return "\n".join(parts) + "\n"


def _introduction(results: SweepResults, rows: Sequence[Mapping[str, Any]], total: int) -> str:
    found = collections.Counter(row["status"] for row in rows)
    found["unfinished"] = total - len(rows)
    counts = ", ".join(f"{count} {status}" for status, count in found.items() if count)
    device = next((record.environment["device"] for record in results.records), "no device")
    return (
        f"{counts}; on {device}. Unmatched images count as lost. `imprint_cnn` and `imprint_mlp` "
        "have a linear block in front that the others do without. A dash is a refused cell, a dot "
        "one that has not run."
    )


def _table(rows: Sequence[Mapping[str, Any]], column: str, shown: Any) -> list[str]:
    batches = sorted({row["batch"] for row in rows})
    table: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        line = table.setdefault((row["data"], row["model"], row["attack"]), {})
        line[row["batch"]] = shown(row[column]) if row["status"] == "ok" else "–"
    lines = [f"| data | model | attack | {' | '.join(map(str, batches))} |"]
    lines.append(f"| --- | --- | --- |{' ---: |' * len(batches)}")
    for names, line in table.items():
        if set(line.values()) != {"–"}:
            cells = [line.get(batch, ".") for batch in batches]
            lines.append(f"| {' | '.join([*names, *cells])} |")
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _some(cells: Sequence[str]) -> str:
    listed = ", ".join(cells[:2])
    return listed if len(cells) <= 2 else f"{listed} and {len(cells) - 2} more"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, help="folder of the .npz files")
    parser.add_argument(
        "--out", type=Path, default=Path("end_to_end"), help="folder for the results"
    )
    parser.add_argument("--config", type=Path, help="another sweep than configs/end_to_end.toml")
    parser.add_argument("--minutes", type=float, help="start no cell later than this")
    parser.add_argument("--add", type=Path, metavar="CSV", help="join an earlier run's table")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--tables-only", action="store_true", help="write the tables again")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the bundled sample")
    return parser.parse_args()


if __name__ == "__main__":
    main()
