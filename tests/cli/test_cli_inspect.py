"""``jgia inspect``: the decision, its reasons, and files that may come from anybody."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jgia
from jgia.defenses import THRESHOLDS
from jgia.federated import save_update
from jgia.models import make_victim

_FLAGGED = "These parameters look crafted"
_CLEAN = "No mark of a known attack. That is no proof that there is none."


@pytest.fixture(scope="module")
def benign(tmp_path_factory) -> Path:
    """A file of freshly initialized parameters in PyTorch's layout."""
    victim = make_victim("cnn", input_shape=(8, 8, 3), num_classes=4, widths=(12, 12), fc_width=32)
    path = tmp_path_factory.mktemp("benign") / "params.npz"
    save_update(path, jax.jit(victim.init)(jax.random.key(0)), layout="torch", victim=victim)
    return path


def test_crafted_folder_is_flagged_and_the_exit_code_is_zero(exchange, run):
    code, out, err = run("inspect", exchange)
    assert (code, err) == (0, "")
    assert out.startswith(_FLAGGED)
    for check in ("parallel_neurons", "parallel_readout", "monotone_bias"):
        assert f"({check} 1.000, flagged from" in out
    _, from_file, _ = run("inspect", exchange / "params.npz")
    assert from_file == out


@pytest.mark.slow
def test_benign_file_is_not_flagged(benign, run):
    code, out, err = run("inspect", benign)
    assert (code, err) == (0, "")
    assert out.startswith(_CLEAN)
    assert "parallel_neurons" in out
    assert "largest in fc" in out


def test_json_is_the_whole_report(exchange, benign, run):
    for path, flagged in ((exchange, True), (benign, False)):
        code, out, err = run("inspect", path, "--json")
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert set(report) == {
            "scores",
            "layers",
            "thresholds",
            "flagged",
            "reasons",
            "suspicion",
        }
        assert report["flagged"] is flagged is bool(report["reasons"])
        assert (report["suspicion"] >= 0.5) is flagged
        over = [name for name, score in report["scores"].items() if score >= THRESHOLDS[name]]
        assert bool(over) is flagged


def _damaged(path: Path) -> None:
    path.write_bytes(b"PK")


def _no_layer(path: Path) -> None:
    np.savez(path, counts=np.arange(3), scale=np.ones(3))


def _not_finite(path: Path) -> None:
    np.savez(path, allow_pickle=False, **{"fc/kernel": np.full((16, 16), np.nan, np.float32)})


def _array_and_module(path):
    np.savez(path, **{"fc/kernel": np.ones((4, 3), np.float32), "fc/kernel/more": np.ones(3)})


def _pickled(path: Path) -> None:
    np.savez(path, x=np.array([{}], dtype=object))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "no such file"),
        (_damaged, "damaged|not a readable"),
        (_no_layer, "no convolution or fully connected layer"),
        (_not_finite, "finite"),
        (_pickled, "pickled Python objects"),
        (_array_and_module, "both an array and a module"),
    ],
    ids=["missing", "damaged", "no-layer", "not-finite", "pickled", "array-and-module"],
)
@pytest.mark.parametrize("json_output", [[], ["--json"]], ids=["lines", "json"])
def test_bad_file_is_one_line(write, message, json_output, tmp_path, run, check_refused):
    path = tmp_path / "params.npz"
    if write is not None:
        write(path)
    check_refused(*run("inspect", path, *json_output), message)


def test_other_suffixes_and_folders_are_refused(tmp_path, run, check_refused):
    check_refused(*run("inspect", tmp_path / "model.pt"), "pickle")
    check_refused(*run("inspect", tmp_path), r"victim\.json")


def test_names_from_the_file_cannot_steer_the_terminal(tmp_path, run):
    path = tmp_path / "params.npz"
    name = "fc\x1b[2J\nNo mark of a known attack/kernel"
    np.savez(path, allow_pickle=False, **{name: np.ones((16, 16), np.float32)})
    code, out, _ = run("inspect", path)
    assert code == 0
    assert out.startswith(_FLAGGED)
    assert "\x1b" not in out
    assert "fc\\x1b[2J\\nNo mark" in out
    assert not [line for line in out.splitlines() if line.startswith("No mark")]


def test_missing_path_and_help(run):
    code, out, err = run("inspect")
    assert (code, out) == (2, "")
    assert "PATH" in err
    code, out, _ = run("inspect", "--help")
    assert code == 0
    assert "--json" in out


def test_parsing_loads_no_jax():
    root = Path(jgia.__file__).resolve().parents[1]
    code = """
import sys
from jgia.cli import _parse
print(type(_parse(["inspect", "x.npz"])).__name__, "jax" in sys.modules)
"""
    source = f"import sys; sys.path[:0] = [{str(root)!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["Inspect", "False"]
