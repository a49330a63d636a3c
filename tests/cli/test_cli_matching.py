"""Attacks of an honest-but-curious server from the command line."""

import json

import numpy as np
import pytest

from jgia import cli
from jgia.report import validate_result

SMALL = ["--model", "lenet", "--widths", "4", "--batch", "1", "--num-public", "16"]


def _run(tmp_path, *arguments):
    return cli.main([*map(str, arguments), "--out", str(tmp_path)])


@pytest.mark.slow
def test_attack_by_name_simulates_a_client(tmp_path, capsys):
    code = _run(
        tmp_path,
        "attack",
        "inverting_gradients",
        *SMALL,
        "--num-steps",
        "20",
        "--report-every",
        "10",
        "--labels-known",
    )
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    validate_result(result)
    assert result["command"].startswith("jgia attack inverting_gradients --model lenet")
    assert result["threat_model"]["server"] == "honest_but_curious"
    assert result["threat_model"]["labels_known"] is True
    assert result["attack"]["status_counts"] == {"matched": 1}
    assert result["attack"]["stats"]["labels_by"] == "given"
    assert result["scores"]["label_accuracy"] == 1
    assert "search_s" in result["timings"]
    page = (tmp_path / "report.html").read_text()
    assert "How the search went" in page
    assert "<svg" in page
    with np.load(tmp_path / "reconstructions.npz") as arrays:
        assert arrays["frames"].shape == (2, 1, 32, 32, 3)
        assert arrays["labels"].shape == (1,)
        assert len(arrays["curve_losses"]) == 20
    assert "matched" in capsys.readouterr().out


@pytest.mark.slow
def test_labels_are_inferred_where_they_are_not_given(tmp_path):
    assert _run(tmp_path, "audit", "--attack", "idlg", *SMALL, "--num-steps", "3") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["attack"]["stats"]["labels_by"] == "idlg"
    assert result["scores"]["label_accuracy"] == 1
    assert result["threat_model"]["labels_known"] is False


@pytest.mark.slow
def test_an_unknown_client_is_matched_by_direction(tmp_path, capsys):
    client = ["--protocol", "fedavg", "--local-epochs", "2", "--no-training-known"]
    arguments = ["attack", "inverting_gradients", *SMALL, *client, "--num-steps", "3"]
    assert _run(tmp_path, *arguments, "--labels-known") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["threat_model"]["local_steps"] is None
    assert "unknown number of local steps" in (tmp_path / "report.html").read_text()
    assert _run(tmp_path, *arguments, "--labels-known", "--distance", "l2") == 2
    assert "use distance='cosine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", "ares", "--trained", "nowhere"], "chooses the parameters itself"),
        (["attack", "idlg", "--trained", "nowhere"], "nowhere"),
        (["attack", "idlg", *SMALL, "--num-steps", "0"], "num_steps must be at least 1"),
        (
            ["attack", "idlg", *SMALL, "--visible-layers", "fc9"],
            "expected one or more of the layers",
        ),
        (
            ["attack", "see_through", *SMALL, "--restarts", "1", "--group-prior", "1"],
            "needs at least 2",
        ),
        (["attack", "idlg", "--update", "u.npz"], "give the parameters that were sent"),
        (["attack", "idlg", "--update", "u.npz", "--crafted", "c"], "does not read updates on"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    try:
        code = _run(tmp_path, *arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1
