"""``jgia risk`` from the command line."""

import json

import numpy as np
import pytest

QUICK = ["--model", "mlp", "--widths", "8", "--prior", "low_rank", "--prior-rank", "6"]


@pytest.fixture
def risk(run, tmp_path):
    def command(*arguments):
        return run("risk", *QUICK, "--num-public", "32", "--out", tmp_path / "out", *arguments)

    return command


@pytest.mark.slow
def test_it_writes_what_it_says(risk, tmp_path):
    code, out, _ = risk("--images", "2", "--spectrum", "True", "--prior-rank", "5")
    assert code == 0
    assert "Risk" in out
    assert "low rank prior" in out
    folder = tmp_path / "out"
    result = json.loads((folder / "risk.json").read_text())
    assert result["risk"]["count"] == 2
    assert result["prior"]["rank"] == 5
    assert result["command"].startswith("jgia risk --model mlp")
    assert 0 <= result["risk"]["mean"] <= result["risk"]["worst"] <= 1
    for row in result["inputs"]:
        assert row["invloss_lower"] <= row["invloss"] <= row["invloss_upper"] * (1 + 1e-6)
        assert set(row["layer_risk"]) == {"fc1", "head"}
    with np.load(folder / "risk.npz") as arrays:
        assert arrays["pixel_errors"].shape == (2, 3072)
        assert arrays["sigma"].shape == (2, 5)
        assert arrays["images"].shape == (2, 1, 32, 32, 3)
    for name in ("pixels.png", "spectrum.png", "layers.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_more_noise_and_larger_batches_tell_less(risk, tmp_path):
    def mean(*arguments):
        assert risk("--images", "2", *arguments)[0] == 0
        return json.loads((tmp_path / "out" / "risk.json").read_text())["risk"]["mean"]

    assert mean("--noise-std", "1") < mean("--noise-std", "0.001")


@pytest.mark.slow
def test_embedding_as_json(risk):
    code, out, _ = risk("--images", "1", "--embedding", "fc1", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["release"] == {
        "kind": "embedding",
        "victim": "mlp",
        "num_inputs": 3072,
        "num_outputs": 8,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise-std", "0"], "noise_std must be positive"),
        (["--images", "3", "--together", "2"], "together=2 must divide images=3"),
        (["--embedding", "fc1", "--clip-norm", "1"], "an embedding has no clip_norm"),
        (["--embedding", "conv7", "--images", "1"], "no layer 'conv7'"),
        (["--num-clients", "2"], "one client's update"),
        (["--prior-rank", "4000"], "rank=4000 needs"),
    ],
)
def test_bad_input_is_one_line(risk, check_refused, tmp_path, arguments, message):
    check_refused(*risk(*arguments), message)
    assert not (tmp_path / "out" / "risk.json").exists()
