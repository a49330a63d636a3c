"""Many audits from one file: resumable, one record per cell, one table, figures."""

from jgia.config.sweep import Cell, Sweep, parse_sweep, read_sweep
from jgia.sweep.records import CellRecord, cell_key
from jgia.sweep.run import run_sweep
from jgia.sweep.table import SweepResults, load_results

__all__ = [
    "Cell",
    "CellRecord",
    "Sweep",
    "SweepResults",
    "cell_key",
    "load_results",
    "parse_sweep",
    "read_sweep",
    "run_sweep",
]
