"""Running, being killed, going on: no finished cell is done again, and nothing is half written."""

import csv
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jgia.sweep.run as run_module
from jgia.report import validate_result
from jgia.sweep import CellRecord, load_results, parse_sweep, run_sweep
from jgia.sweep.records import read_record
from jgia.sweep.run import in_running_order
from jgia.sweep.table import TIMINGS

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "[base]\nfront-end = 'signed'\nfc-width = 16\nnum-public = 16\nmicrobatch = 1\n"


def table(folder: Path) -> list[dict[str, str]]:
    """results.csv without what differs from run to run."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = sorted((folder / "cells").glob("*.json"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def outcome():
    """One real audit."""
    (cell,) = parse_sweep(PLAIN + "batch = 1").cells
    return run_module.run_audit(cell.config)


@pytest.fixture
def audits(monkeypatch, outcome):
    """Configurations that were audited, each with the same outcome."""
    seen = []

    def counted(config, *, command, progress):
        seen.append(config)
        for stage in ("loading images", "crafting parameters", "scoring"):
            progress(stage, 0, 1)
        return outcome

    monkeypatch.setattr(run_module, "run_audit", counted)
    return seen


@pytest.mark.slow
def test_every_cell_has_one_record(done):
    results = done.results
    assert results.counts() == {"ok": 4, "refused": 2, "failed": 0, "unfinished": 0}
    assert {path.stem for path in (done.folder / "cells").iterdir()} == {
        record.key for record in results.records
    }
    for record in results.records:
        assert record.seconds > 0
        assert record.peak_rss_bytes is None or record.peak_rss_bytes > 50e6
        assert record.environment["jgia"]


def test_a_refused_cell_says_why_and_stops_nothing(done):
    refused = [record for record in done.results.records if record.status == "refused"]
    assert len(refused) == 2
    for record in refused:
        assert record.config["model"] == "lenet"
        assert record.result is None
        assert "'lenet'" in record.error
        assert "\n" not in record.error


def test_what_is_left_out_of_a_result_is_in_the_record(done):
    record = next(record for record in done.results.records if record.status == "ok")
    assert record.result is not None
    assert record.result["scores"]["num_true"] == record.config["batch"]
    whole = {
        **record.result,
        "command": "jgia sweep",
        "config": record.config,
        "environment": record.environment,
    }
    candidates = [
        {"status": status}
        for status, count in record.result["attack"]["status_counts"].items()
        for _ in range(count)
    ]
    validate_result({**whole, "attack": {**record.result["attack"], "candidates": candidates}})


def test_a_finished_sweep_does_nothing(done, audits):
    before = written(done.folder)
    again = run_sweep(parse_sweep(done.text), done.folder)
    assert audits == []
    assert written(done.folder) == before
    assert again.records == done.results.records


def test_more_seeds_run_only_what_is_new(done, audits, tmp_path):
    folder = tmp_path / "copy"
    (folder / "cells").mkdir(parents=True)
    for name, (_, content) in written(done.folder).items():
        (folder / "cells" / name).write_bytes(content)
    results = run_sweep(parse_sweep(done.text.replace("[0, 1]", "[1, 2]")), folder)
    assert {config.seed for config in audits} == {2}
    assert len(audits) == 3
    assert {record.config["seed"] for record in results.records} == {1, 2}
    assert len(written(folder)) == 9


def test_a_damaged_record_is_run_again(done, audits, tmp_path):
    sweep = parse_sweep(PLAIN + "batch = 1")
    run_sweep(sweep, tmp_path)
    (path,) = (tmp_path / "cells").iterdir()
    good = path.read_bytes()
    wrong = [good[:-40], b"", b"[1]", good.replace(b"jgia-cell-1", b"jgia-cell-0"), b"\xff"]
    other = json.loads(good)
    wrong += [json.dumps({**other, key: None}).encode() for key in ("status", "result")]
    wrong += [json.dumps({**other, "more": 1}).encode()]
    for content in wrong:
        path.write_bytes(content)
        assert read_record(path) is None, content[:60]
    audits.clear()
    run_sweep(sweep, tmp_path)
    assert len(audits) == 1
    assert read_record(path) is not None


def test_failed_cells_are_retried_only_if_asked(audits, monkeypatch, tmp_path):
    sweep = parse_sweep(PLAIN + "batch = 1\n[[cells]]\nmodel='lenet'\n[[cells]]\nbatch = 1")

    def broken(config, **kwargs):
        kwargs["progress"]("crafting parameters", 0, 1)
        audits.append(config)
        if config.model.model == "lenet":
            raise ValueError("not this model")
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_audit", broken)
        results = run_sweep(sweep, tmp_path)
    assert [(r.status, r.error) for r in results.records] == [
        ("refused", "not this model"),
        ("failed", "RuntimeError: out of memory"),
    ]
    audits.clear()
    assert run_sweep(sweep, tmp_path).counts()["failed"] == 1
    assert audits == []
    results = run_sweep(sweep, tmp_path, retry_failed=True)
    assert [record.status for record in results.records] == ["refused", "ok"]
    assert [config.model.model for config in audits] == ["cnn"]


def test_late_value_errors_are_failures(monkeypatch, tmp_path):
    def broken(config, **kwargs):
        kwargs["progress"]("inverting activations", 0, 1)
        raise ValueError("a shape that no check saw")

    monkeypatch.setattr(run_module, "run_audit", broken)
    (record,) = run_sweep(parse_sweep(""), tmp_path).records
    assert record.status == "failed"


def test_missing_data_can_be_retried(tmp_path):
    (record,) = run_sweep(parse_sweep("base.data = 'npz:/none/none.npz'"), tmp_path).records
    assert record.status == "failed"
    assert "none.npz" in record.error


def test_an_interrupt_leaves_a_table_and_a_folder_that_goes_on(monkeypatch, audits, tmp_path):
    sweep = parse_sweep(PLAIN + "[axes]\nbatch = [1, 2]")
    audit = run_module.run_audit

    def interrupted(config, **kwargs):
        if config.batch == 2:
            raise KeyboardInterrupt
        return audit(config, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_audit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, tmp_path)
    assert [row["batch"] for row in table(tmp_path)] == ["1"]
    assert load_results(tmp_path).counts()["unfinished"] == 1
    audits.clear()
    assert run_sweep(sweep, tmp_path).counts()["ok"] == 2
    assert [config.batch for config in audits] == [2]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_if_never_killed(done, tmp_path):
    """SIGKILL in the middle of the third cell, in a process of its own."""
    config, folder = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(done.text, "utf-8")
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
import jgia.sweep.run as run
from jgia.sweep import read_sweep
original, calls = run.run_audit, []
def slow(config, **kwargs):
    calls.append(config)
    if len(calls) == 3:
        print("in the middle", flush=True)
        time.sleep(600)
    return original(config, **kwargs)
run.run_audit = slow
run.run_sweep(read_sweep({str(config)!r}), {str(folder)!r})
"""
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        with pytest.raises(ValueError, match="another sweep is writing"):
            run_sweep(parse_sweep(done.text), folder)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    first = written(folder)
    assert len(first) == 2
    assert not (folder / "results.csv").exists()
    results = run_sweep(parse_sweep(done.text), folder)  # the lock went with the process
    assert written(folder).items() >= first.items()
    assert results.counts() == done.results.counts()
    assert table(folder) == table(done.folder)


def test_cells_that_share_shapes_run_together():
    sweep = parse_sweep("seeds = [0, 1]\n[axes]\nbatch = [1, 2]\nmodel = ['cnn', 'mlp']")
    order = [(c.config.model.model, c.config.batch) for c in in_running_order(sweep.cells)]
    expected = [("cnn", 1), ("cnn", 2), ("mlp", 1), ("mlp", 2)]
    assert order == [pair for pair in expected for _ in range(2)]


def test_progress_names_cell_and_stage(audits, tmp_path):
    seen = []
    sweep = parse_sweep(PLAIN + "[axes]\nbatch = [1, 2]")
    run_sweep(sweep, tmp_path, progress=lambda *news: seen.append(news))
    assert {(cell.label, done, total) for cell, _, done, total in seen} == {
        ("batch=1", 0, 2),
        ("batch=2", 1, 2),
    }
    assert "scoring" in {stage for _, stage, _, _ in seen}


def test_time_that_is_up_starts_no_cell(audits, tmp_path):
    sweep = parse_sweep(PLAIN + "[axes]\nbatch = [1, 2]")
    assert run_sweep(sweep, tmp_path, minutes=1e-9).counts()["unfinished"] == 2
    assert audits == []
    assert run_sweep(sweep, tmp_path, minutes=60.0).counts()["ok"] == 2
    with pytest.raises(ValueError, match="minutes must be positive"):
        run_sweep(sweep, tmp_path, minutes=0.0)


def test_lpips_without_the_extra_is_refused_at_once(monkeypatch, audits, tmp_path):
    def missing():
        raise ImportError("install jgia[lpips]")

    module = importlib.import_module("jgia.metrics.lpips")  # not the function of that name
    monkeypatch.setattr(module, "load_evaluator", missing)
    with pytest.raises(ImportError, match="lpips"):
        run_sweep(parse_sweep("base.lpips = true"), tmp_path)
    assert audits == []


def test_a_record_without_memory_has_no_figure(done):
    record = dataclasses.replace(done.results.records[0], peak_rss_bytes=None)
    results = dataclasses.replace(done.results, records=(record,))
    assert results.rows[0]["peak_rss_mib"] is None
    assert isinstance(record, CellRecord)
