from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import jgia.report.write as report_write
from jgia import _io, report
from jgia.report import print_summary, write_report

NAMES = {"report.html", "result.json", "reconstructions.npz", "grid.png"}


def write(folder, case, **changes):
    arguments = {
        "originals": case.originals,
        "reconstructions": case.reconstructions,
        "scores": case.scores,
        "statuses": case.statuses,
        **changes,
    }
    return write_report(folder, arguments.pop("result", case.result), **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_four_whole_files(tmp_path, case):
    paths = write(tmp_path / "new" / "folder", case)
    assert set(paths) == NAMES == set(contents(tmp_path / "new" / "folder"))
    assert json.loads(paths["result.json"].read_text("utf-8")) == case.result
    assert paths["result.json"].read_bytes().endswith(b"}\n")
    assert paths["report.html"].read_text("utf-8").startswith("<!DOCTYPE html>")
    Image.open(paths["grid.png"]).verify()


def test_arrays_hold_every_image_and_the_inverse_matching(tmp_path, case):
    paths = write(tmp_path, case)
    with np.load(paths["reconstructions.npz"], allow_pickle=False) as arrays:
        assert sorted(arrays) == ["images", "scores", "statuses", "truth_index"]
        np.testing.assert_array_equal(arrays["images"], case.reconstructions)
        np.testing.assert_array_equal(arrays["scores"], case.scores)
        assert arrays["images"].dtype == np.float32
        assert arrays["statuses"].dtype.kind == "U"
        assert arrays["statuses"].tolist() == case.statuses
        truth = arrays["truth_index"]
    assert truth.tolist() == [2, 1, 0]
    for index, true in enumerate(truth):
        assert case.result["scores"]["matching"][true] == index


def test_reconstruction_without_a_true_image_has_index_minus_one(tmp_path, make_case):
    case = make_case(unmatched=0)
    case.result["scores"]["num_reconstructed"] = 5
    more = np.concatenate([case.reconstructions, case.reconstructions[:1]])
    paths = write(
        tmp_path,
        case,
        reconstructions=more,
        scores=np.zeros(5),
        statuses=[*case.statuses, "exact"],
    )
    with np.load(paths["reconstructions.npz"], allow_pickle=False) as arrays:
        assert arrays["truth_index"].tolist() == [3, 2, 1, 0, -1]


@pytest.mark.parametrize("truth", [True, False])
def test_nothing_reconstructed(tmp_path, make_case, truth):
    case = make_case(unmatched=4)
    changes = {} if truth else {"originals": None, "result": {**case.result, "scores": None}}
    paths = write(tmp_path, case, **changes)
    with np.load(paths["reconstructions.npz"], allow_pickle=False) as arrays:
        assert arrays["images"].shape == (0, 8, 8, 3)
        assert arrays["statuses"].shape == (0,)


def test_page_and_picture_show_each_image_beside_its_match(tmp_path, case, monkeypatch):
    seen = []
    for name in ("render_html", "grid_png"):
        real = getattr(report_write, name)

        def spy(*args, real=real, **kwargs):
            seen.append((args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(report_write, name, spy)
    write(tmp_path, case)
    (page, page_options), (picture, _) = seen
    for shown in (page[2], picture[1]):
        for got, want in zip(shown, case.aligned, strict=True):
            assert (got is None) == (want is None)
            assert got is None or np.array_equal(got, want)
    assert page_options["statuses"] == ["exact", "regularised", "regularised", None]


def test_without_truth(tmp_path, case):
    paths = write(tmp_path, case, originals=None, result={**case.result, "scores": None})
    assert json.loads(paths["result.json"].read_text("utf-8"))["scores"] is None
    with np.load(paths["reconstructions.npz"], allow_pickle=False) as arrays:
        assert arrays["truth_index"].tolist() == [-1, -1, -1]


def test_same_input_gives_the_same_bytes(tmp_path, case):
    write(tmp_path / "a", case)
    write(tmp_path / "b", case)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("stage", ["render_html", "to_json", "_npz", "grid_png"])
def test_failure_while_rendering_leaves_the_old_report(tmp_path, case, monkeypatch, stage):
    write(tmp_path, case)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("rendering failed")

    monkeypatch.setattr(report_write, stage, fail)
    case.result["seed"] = 99
    with pytest.raises(RuntimeError, match="rendering failed"):
        write(tmp_path, case)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_whole_files_and_a_clear_message(tmp_path, case, monkeypatch):
    write(tmp_path, case)
    before = contents(tmp_path)
    real, calls = _io.atomic_write_bytes, []

    def fail_at_third(path, content):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(_io, "atomic_write_bytes", fail_at_third)
    case.result["seed"] = 99
    with pytest.raises(ValueError, match=r"npz.*No space left on device.*--out"):
        write(tmp_path, case)
    after = contents(tmp_path)
    assert set(after) == NAMES
    assert json.loads(after["result.json"])["seed"] == 99
    assert after["grid.png"] == before["grid.png"]
    assert after["reconstructions.npz"] == before["reconstructions.npz"]


def test_folder_that_cannot_be_made(tmp_path, case):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to the output folder.*--out"):
        write(tmp_path / "file" / "report", case)


def test_bad_input_is_rejected_before_the_folder_is_made(tmp_path, case):
    bad = {**case.result, "attack": {**case.result["attack"], "stats": {"gap": float("nan")}}}
    with pytest.raises(ValueError, match=r"result\.attack\.stats\.gap"):
        write(tmp_path / "report", case, result=bad)
    other = {"originals": None, "result": {**case.result, "scores": None}}
    with pytest.raises(ValueError, match=r"image shape \(8, 8, 3\)"):
        write(
            tmp_path / "report",
            case,
            reconstructions=np.zeros((3, 9, 8, 3), np.float32),
            **other,
        )
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("count", "num_scores", "num_statuses", "problem"),
    [
        (3, 3, 1, "one entry per reconstruction, 3, got shape \\(3,\\) and 1"),
        (3, 2, 3, "one entry per reconstruction, 3, got shape \\(2,\\) and 3"),
        (2, 2, 2, "must hold the 3 images that were scored, got 2"),
    ],
)
def test_counts_that_disagree_are_rejected(case, count, num_scores, num_statuses, problem):
    images, statuses = case.reconstructions[:count], case.statuses[:num_statuses]
    with pytest.raises(ValueError, match=problem):
        report_write._check_reconstructions(case.result, images, np.zeros(num_scores), statuses)


def printed(result, paths=None, width=100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_summary(console, result, paths)
    return console.file.getvalue().replace("\u00a0", " ")  # type: ignore[attr-defined]


def test_summary_names_verdict_scores_times_and_path(tmp_path, case):
    text = printed(case.result, write(tmp_path, case))
    assert "1 of 4 images recovered at ≥ 40 dB: what a malicious server sees" in text
    row = next(line for line in text.splitlines() if "ARES" in line and "│" in line)
    assert "25%" in row
    assert "dataset mean" in text
    assert "1 min 15 s run, 2.2 s compilation" in text
    assert "2 regularised" in text
    assert f"Report: {tmp_path / 'report.html'}\n" in text


def test_summary_without_truth_and_without_report(case):
    text = printed({**case.result, "scores": None})
    assert "nothing here is scored" in text
    assert "│" not in text
    assert "Report" not in text


def test_console_markup_in_names_stays_text(case):
    case.result["attack"]["name"] = "[red]x[/red] [/oops]"
    assert "[red]x[/red] [/oops]" in printed(case.result)


def test_report_package_imports_neither_jax_nor_pyplot():
    folder = Path(report.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    assert "jgia.report.markup" in imported
    assert not {name for name in imported if name.split(".")[0] in ("jax", "matplotlib")}
