"""Table and figures against the audits they come from."""

import csv
import dataclasses
import io
import math

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from jgia.metrics import wilson_interval
from jgia.report.records import THRESHOLDS
from jgia.sweep import SweepResults, load_results
from jgia.sweep.figures import chart, write_figures
from jgia.sweep.memory import peak_rss_bytes, reset_peak
from jgia.sweep.records import CellRecord
from jgia.sweep.table import csv_text


def record(key: str, config: dict, rate: float, num_true: int = 10) -> CellRecord:
    """A made-up cell of which a known part was recovered."""
    low, high = wilson_interval(round(rate * num_true), num_true)
    success = {t: {"rate": rate, "low": low, "high": high} for t in THRESHOLDS}
    scores = {
        "num_true": num_true,
        "num_reconstructed": num_true,
        "num_recovered": round(rate * num_true),
        "success_rate": success,
        "psnr": {"median": 75.0, "mean_capped": 50.0},
        "ssim": {"median": None},
    }
    attack = {"expected_recovered": None, "num_candidates": 3, "status_counts": {"mixture": 2}}
    whole = {"attack": "ares", "model": "cnn", "data": "sample", "batch": 4, "seed": 0, **config}
    return CellRecord(
        key=key,
        config=whole,
        status="ok",
        result={"scores": scores, "attack": attack, "timings": {"setup_s": 1.0}},
    )


def results(varying: tuple[str, ...], *records: CellRecord) -> SweepResults:
    return SweepResults(name="made up", varying=varying, records=records, num_cells=len(records))


@pytest.mark.slow
def test_rows_hold_what_the_audits_found(done):
    rows = done.results.rows
    assert [(row["model"], row["batch"], row["seed"]) for row in rows] == [
        ("cnn", 1, 0),
        ("cnn", 1, 1),
        ("cnn", 2, 0),
        ("cnn", 2, 1),
        ("lenet", 32, 0),
        ("lenet", 32, 1),
    ]
    for row, cell in zip(rows, done.results.records, strict=True):
        assert set(row) == set(done.results.columns)
        if cell.result is None:
            assert row["recovered_18"] is None
            continue
        scores = cell.result["scores"]
        per_image = [value for value in scores["psnr"]["per_image"] if value is not None]
        for threshold in THRESHOLDS:
            hits = sum(value >= float(threshold) for value in per_image)
            expected = (hits / row["batch"], *wilson_interval(hits, row["batch"]))
            found = [row[f"recovered_{threshold}{end}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx(expected)
        counts = sum(v for k, v in row.items() if k in STATUS_COLUMNS and v is not None)
        assert counts == row["num_candidates"]
        assert row["psnr_median_capped"] <= 60


STATUS_COLUMNS = {
    f"num_{name}"
    for name in (
        "exact",
        "noisy",
        "regularized",
        "rank_deficient",
        "not_converged",
        "mixture",
        "duplicate",
        "nonfinite",
    )
}


def test_the_csv_reads_back_to_the_rows(done):
    text = (done.folder / "results.csv").read_text("utf-8")
    read = list(csv.DictReader(io.StringIO(text)))
    for line, row in zip(read, done.results.rows, strict=True):
        for name, value in row.items():
            if value is None:
                assert line[name] == ""
            elif isinstance(value, float):
                assert float(line[name]) == value
            else:
                assert line[name] == str(value)


def test_commas_and_lists_in_options_survive_the_csv():
    one = record("a", {"widths": [3, 4], "data": 'npz:a,"b".npz'}, 0.5)
    table = results(("widths",), one)
    (line,) = csv.DictReader(io.StringIO(csv_text(table.rows, table.columns)))
    assert (line["widths"], line["data"]) == ("3+4", 'npz:a,"b".npz')


def test_median_psnr_is_capped_beside_the_plain_one():
    (row,) = results(("seed",), record("a", {}, 0.5)).rows
    assert (row["psnr_median"], row["psnr_median_capped"]) == (75.0, 60.0)


def test_a_folder_reads_back_as_it_was_written(done):
    assert load_results(done.folder) == done.results


@pytest.mark.parametrize("content", [None, "{}", "[1]", "no json", '{"name": 1, "cells": [{}]}'])
def test_other_folders_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match="holds no sweep"):
        load_results(tmp_path)


def test_seeds_are_pooled_into_one_interval():
    cells = [record(f"{s}", {"seed": s, "batch": 4}, rate) for s, rate in ((0, 0.2), (1, 0.6))]
    cells.append(record("c", {"seed": 0, "batch": 8}, 1.0))
    drawn = chart(results(("batch", "seed"), *cells), "18")
    assert drawn.x_name == "batch"
    assert drawn.ticks is None
    (points,) = drawn.panels[""].values()
    assert [point.x for point in points] == [4, 8]
    assert points[0][1:] == pytest.approx((0.4, *wilson_interval(8, 20)))
    assert points[1][1:] == pytest.approx((1.0, *wilson_interval(10, 10)))


def test_the_first_numeric_option_is_the_axis_and_the_next_the_lines():
    cells = [
        record(f"{f}{b}{m}", {"front_end": f, "batch": b, "model": m}, 0.5)
        for f in ("random", "signed")
        for b in (1, 2)
        for m in ("cnn", "mlp")
    ]
    drawn = chart(results(("front_end", "batch", "model"), *cells), "40")
    assert drawn.x_name == "batch"
    assert set(drawn.panels) == {"model cnn", "model mlp"}
    assert set(drawn.panels["model cnn"]) == {"front_end random", "front_end signed"}


def test_zipped_options_are_named_once():
    zipped = (("mnist", 28, "x"), ("cifar", 32, "x"), ("bccd", 64, "y"))
    cells = [
        record(f"{data}{b}{a}", {"data": data, "image_size": s, "calibration": c, "batch": b,
                                 "attack": a}, 0.5)
        for data, s, c in zipped
        for b in (1, 2)
        for a in ("ares", "qbi")
    ]  # fmt: skip
    varying = ("batch", "data", "image_size", "calibration", "attack")
    drawn = chart(results(varying, *cells), "18")
    assert drawn.x_name == "batch"
    assert set(drawn.panels) == {"attack ares", "attack qbi"}
    assert set(drawn.panels["attack qbi"]) == {"data mnist", "data cifar", "data bccd"}


def test_words_are_drawn_at_places_of_their_own():
    cells = [record(name, {"front_end": name}, 0.5) for name in ("random", "signed")]
    drawn = chart(results(("front_end",), *cells), "18")
    assert drawn.ticks == ["random", "signed"]
    assert [point.x for point in drawn.panels[""]["all"]] == [0, 1]


def test_options_that_only_unfinished_cells_vary_make_no_panel(done):
    drawn = chart(done.results, "18")
    assert drawn.x_name == "batch"
    assert set(drawn.panels) == {""}


def test_figures_are_pictures_and_the_same_every_time(done, tmp_path):
    paths = write_figures(done.results, tmp_path)
    assert [path.name for path in paths] == [f"recovered_{t}.png" for t in THRESHOLDS]
    for path in paths:
        assert path.read_bytes() == (done.folder / "figures" / path.name).read_bytes()
        with Image.open(path) as image:
            assert min(image.size) >= 300
            assert image.convert("L").getextrema() != (255, 255)
    assert plt.get_fignums() == []


def test_many_panels_are_limited_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("jgia.sweep.figures._MAX_PANELS", 2)
    cells = [
        record(f"{a}-{b}-{c}", {"attack": "x$y", "batch": b, "fc_width": a, "model": c}, 0.5)
        for a in range(4)
        for b in (1, 64)
        for c in ("cnn", "mlp")
    ]
    whole = results(("batch", "model", "fc_width"), *cells)
    assert len(chart(whole, "18").panels) == 4
    assert len(write_figures(whole, tmp_path)) == 4


def test_nothing_is_drawn_of_nothing(done, tmp_path):
    refused = [r for r in done.results.records if r.status == "refused"]
    assert write_figures(results(("batch",), *refused), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_of_one_stretch():
    """A large array that is gone before the reset does not count."""
    peak = peak_rss_bytes()
    assert peak is not None
    size = 200 << 20
    block = bytearray(size)
    for start in range(0, size, 4096):
        block[start] = 1
    with_block = peak_rss_bytes()
    assert with_block is not None
    del block
    if not reset_peak():
        pytest.skip("this system cannot reset the peak")
    after = peak_rss_bytes()
    assert after is not None
    assert with_block - after > 0.7 * size
    assert math.isfinite(after)


def test_columns_of_lpips_are_there_only_if_asked():
    one = record("a", {}, 0.5)
    assert "lpips_median" not in results(("seed",), one).columns
    assert one.result is not None
    scored = {**one.result["scores"], "lpips": {"median": 0.25}}
    two = dataclasses.replace(one, result={**one.result, "scores": scored})
    (row,) = results(("seed",), two).rows
    assert row["lpips_median"] == 0.25
