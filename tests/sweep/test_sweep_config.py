"""Reading a sweep: products, groups, seeds, and every slip named before any compute."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia import cli
from jgia.config import AuditConfig
from jgia.config.fields import build, convert, describe, flat_fields, flatten
from jgia.config.sweep import MAX_CELLS, parse_sweep, read_sweep, shown
from jgia.sweep import cell_key


def labels(text: str) -> list[str]:
    return [cell.label for cell in parse_sweep(text).cells]


def test_axes_cross_and_the_first_varies_slowest():
    text = "[axes]\nbatch = [4, 8]\nfront-end = ['random', 'signed']"
    assert labels(text) == [
        "batch=4 front_end=random",
        "batch=4 front_end=signed",
        "batch=8 front_end=random",
        "batch=8 front_end=signed",
    ]


def test_zipped_lists_go_together_and_cross_with_axes():
    text = """
    seeds = [3]
    [axes]
    batch = [2, 4]
    [[zip]]
    model = ["cnn", "mlp"]
    widths = ["None", [64, 64]]
    """
    sweep = parse_sweep(text)
    assert [(c.config.batch, c.config.model.model, c.config.model.widths) for c in sweep.cells] == [
        (2, "cnn", None),
        (2, "mlp", (64, 64)),
        (4, "cnn", None),
        (4, "mlp", (64, 64)),
    ]
    assert {cell.config.seed for cell in sweep.cells} == {3}


def test_single_cells_stand_beside_the_grid():
    text = "[base]\nfc_width = 64\n[axes]\nbatch = [2, 4]\n[[cells]]\nmodel = 'lenet'"
    cells = parse_sweep(text).cells
    assert [(c.config.model.model, c.config.batch) for c in cells] == [
        ("cnn", 2),
        ("cnn", 4),
        ("lenet", 32),
    ]
    assert {cell.config.model.fc_width for cell in cells} == {64}


def test_single_cells_alone_make_no_grid():
    assert labels("[[cells]]\nbatch = 3\n[[cells]]\nbatch = 5") == ["batch=3", "batch=5"]


def test_a_file_that_varies_nothing_is_one_audit():
    (cell,) = parse_sweep("").cells
    assert cell.config == AuditConfig()
    assert cell.label == "seed=0"


def test_seeds_are_repeated_for_every_cell():
    sweep = parse_sweep("seeds = [1, 7]\n[axes]\nbatch = [2, 4]\n[[cells]]\nbatch = 6")
    assert [(c.config.batch, c.config.seed) for c in sweep.cells] == [
        (2, 1),
        (2, 7),
        (4, 1),
        (4, 7),
        (6, 1),
        (6, 7),
    ]
    assert sweep.varying == ("batch", "seed")


def test_only_options_that_differ_vary():
    assert parse_sweep("[axes]\nbatch = [2]\nfc_width = [8, 16]").varying == ("fc_width",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a =", r"is no TOML: .*"),
        ("bacth = 3", "bacth: unknown key; a sweep has name, seeds, base, axes, zip, cells"),
        ("batch = 3", r"batch: unknown key; options go into \[base\]"),
        ("base = 3", r"base: expected a table \[base\], got 3"),
        ("[base]\nbacth = 1", r"base.bacth: no such field \(did you mean 'batch'\?\).* batch,"),
        ("[base]\nbatch = 'x'", "base.batch: expected a whole number, got 'x'"),
        ("[base]\nbatch = 2.0", "base.batch: expected a whole number, got 2.0"),
        ("[base]\nbatch = true", "base.batch: expected a whole number, got True"),
        ("[base]\nlpips = 1", "base.lpips: expected true or false, got 1"),
        ("[base]\ndata = 3", "base.data: expected a string, got 3"),
        ("[base]\nlearning_rate = nan", "base.learning_rate: expected a number, got nan"),
        ("[base]\nmodel = 'cn'", "base.model: expected one of 'cnn', .*, got 'cn'"),
        ("[base]\nwidths = 3", r"base.widths: expected a list \(each a whole number\) or"),
        ("[base]\nwidths = [3, 'a']", "base.widths: expected a list"),
        ("[base]\nseed = 3", "base.seed: seeds go to the top of the file"),
        ("[base]\nfc-width = 3\nfc_width = 4", "base.fc_width: is there twice"),
        ("[axes]\nbatch = []", "axes.batch: is an empty list"),
        ("[axes]\nbatch = 3", "axes.batch: expected a list of values, got 3"),
        ("[axes]\nbatch = [1, 'a']", r"axes.batch\[1\]: expected a whole number, got 'a'"),
        ("[axes]\nbatch = [4, 4]", "cell batch=4 seed=0: this cell is there twice"),
        ("[axes]\nbatch = [32]\n[[cells]]\nfc_width = 1024", "fc_width=1024 .* is there twice"),
        ("[axes]\nbatch = [0]", "cell batch=0 seed=0: batch must be at least 1, got 0"),
        ("[axes]\nbatch = [1]\n[base]\nnum_clients = 2", "cell batch=1 .* each needs at least"),
        ("[[zip]]\nbatch = [1, 2]\nmodel = ['cnn']", r"zip\[0\]: .* batch has 2, model has 1"),
        ("[[zip]]", r"zip\[0\]: names no field"),
        ("[axes]\nbatch = [1]\n[[zip]]\nbatch = [2]", "batch: is in two axes or zipped groups"),
        ("[axes]\nfc-width = [1]\nfc_width = [2]", "fc_width: is in two axes"),
        ("[cells]\nbatch = 3", r"cells: expected \[\[cells\]\]"),
        ("[[cells]]", r"cells\[0\]: sets no field"),
        ("[[cells]]\nbtch = 3", r"cells\[0\].btch: no such field"),
        ("seeds = []", "seeds: is an empty list"),
        ("seeds = 3", "seeds: expected a list"),
        ("seeds = ['a']", r"seeds\[0\]: expected a whole number"),
        ("seeds = [1, 1]", "seed=1: this cell is there twice"),
        ("seeds = [-1]", "seed=-1: seed must be between"),
        ("name = 3", "name: expected a string"),
    ],
)
def test_slips_are_named_with_file_and_key(text: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        parse_sweep(text, where="many.toml")
    assert str(caught.value).startswith("many.toml")


def test_too_many_cells_are_refused():
    values = list(range(1, 102))
    text = f"[axes]\nbatch = {values}\nfc_width = {values}"
    with pytest.raises(ValueError, match=f"10201 cells; at most {MAX_CELLS}"):
        parse_sweep(text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.toml is not UTF-8"):
        read_sweep(tmp_path / "a.toml")
    with pytest.raises(OSError, match="none"):
        read_sweep(tmp_path / "none.toml")


def test_the_name_is_the_files_by_default(tmp_path):
    path = tmp_path / "front-ends.toml"
    path.write_text("[axes]\nbatch = [1, 2]", "utf-8")
    assert read_sweep(path).name == "front-ends"


def test_flat_names_are_those_of_the_command_line(capsys):
    """Every option of ``jgia audit`` is a field, and the other way round."""
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    shown_options = re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", capsys.readouterr().out)
    options = {option.replace("-", "_") for option in shown_options}
    of_the_command = {"help", "out", "save_update", "json"}
    negated = {option for option in options if option.startswith("no_")}
    assert options - of_the_command - negated == set(flat_fields(AuditConfig))


def test_flattening_and_building_are_inverse():
    config = build(AuditConfig, {"batch": 4, "fc_width": 8, "widths": (3, 4), "lpips": True})
    assert (config.model.widths, config.batch) == ((3, 4), 4)
    assert build(AuditConfig, flatten(config)) == config


def test_types_are_described_in_words():
    fields = flat_fields(AuditConfig)
    assert describe(fields["image_size"][1]) == 'a whole number or "None"'
    assert "'cnn'" in describe(fields["model"][1])
    assert convert(AuditConfig, "image_size", "None") is None
    assert convert(AuditConfig, "learning_rate", 1) == 1.0
    assert isinstance(convert(AuditConfig, "learning_rate", 1), float)


def test_keys_depend_on_every_option():
    keys = {cell_key(AuditConfig())}
    for values in ({"seed": 1}, {"lpips": True}, {"microbatch": 3}, {"learning_rate": 0.2}):
        keys.add(cell_key(build(AuditConfig, values)))
    assert len(keys) == 5


def test_keys_depend_on_the_schema(monkeypatch):
    before = cell_key(AuditConfig())
    monkeypatch.setattr("jgia.sweep.records.SCHEMA_VERSION", "99.0")
    assert cell_key(AuditConfig()) != before


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    batches=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    widths=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True),
)
def test_grids_have_one_cell_per_combination(batches, widths, seeds):
    sweep = parse_sweep(f"seeds = {seeds}\n[axes]\nbatch = {batches}\nfc-width = {widths}")
    found = [(c.config.batch, c.config.model.fc_width, c.config.seed) for c in sweep.cells]
    assert found == [(b, w, s) for b in batches for w in widths for s in seeds]
    assert len({cell_key(cell.config) for cell in sweep.cells}) == len(found)


def test_values_are_shown_shortly():
    assert [shown(v) for v in ((1, 2), (), 0.5, None, "a")] == ["1+2", "none", "0.5", "None", "a"]


def test_cells_cannot_be_changed():
    (cell,) = parse_sweep("").cells
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.config = AuditConfig()  # pyright: ignore[reportAttributeAccessIssue]
