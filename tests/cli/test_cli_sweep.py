"""``jgia sweep`` on the command line."""

import csv
import json

import pytest

_TOML = """
[base]
front-end = "signed"
fc-width = 16
num-public = 16
microbatch = 1
[axes]
batch = [1, 2]
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "many.toml"
    path.write_text(_TOML, "utf-8")
    return path


def test_help_explains_the_file(run):
    code, out, _ = run("sweep", "--help")
    assert code == 0
    for word in ("TOML", "--out", "--dry-run", "--retry-failed", "[axes]"):
        assert word in out


def test_dry_run_lists_cells_and_runs_nothing(run, config, tmp_path):
    out = tmp_path / "out"
    code, text, err = run("sweep", config, "--out", out, "--dry-run")
    assert (code, err) == (0, "")
    assert "batch=1" in text
    assert text.count("to do") == 2
    assert not out.exists()


def test_sweep_writes_a_table_and_goes_on(run, config, tmp_path):
    out = tmp_path / "out"
    config.write_text(_TOML.replace("[1, 2]", "[1]") + "[[cells]]\nmodel = 'lenet'", "utf-8")
    code, text, err = run("sweep", config, "--out", out)
    assert (code, err) == (0, "")
    assert "Cells: 1 ok, 1 refused" in text
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok", "refused"]
    assert json.loads((out / "sweep.json").read_text("utf-8"))["name"] == "many"
    assert (out / "figures" / "recovered_18.png").stat().st_size > 1000
    _, listed, _ = run("sweep", config, "--out", out, "--dry-run")
    assert listed.count("finished") == 2


def test_failed_cells_give_exit_code_one(run, config, tmp_path):
    config.write_text("base.data = 'npz:none.npz'", "utf-8")
    code, text, err = run("sweep", config, "--out", tmp_path / "out")
    assert (code, err) == (1, "")
    assert "failed: seed=0" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[axes]\nbatch = []", "many.toml: axes.batch: is an empty list"),
        ("[base]\nbacth = 2", "many.toml: base.bacth: no such field"),
        ("= 3", "many.toml is no TOML"),
        ("[base]\nbatch = 0", "many.toml: cell seed=0: batch must be at least 1"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(
    run, config, check_refused, tmp_path, content, message
):
    config.write_text(content, "utf-8")
    check_refused(*run("sweep", config, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_refused(run, check_refused, tmp_path):
    check_refused(*run("sweep", tmp_path / "none.toml"), "none.toml")
