"""A sweep of small audits, run once."""

import dataclasses
from pathlib import Path

import pytest

from jgia.sweep import SweepResults, parse_sweep, run_sweep

TINY = """
name = "tiny"
seeds = [0, 1]
[base]
front-end = "signed"
fc-width = 32
num-public = 16
microbatch = 2
front-end-trials = 1
[axes]
batch = [1, 2]
[[cells]]
model = "lenet"
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished sweep and its folder."""

    text: str
    folder: Path
    results: SweepResults


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("sweep")
    return Done(TINY, folder, run_sweep(parse_sweep(TINY), folder))
