"""``jgia risk --explain`` and ``--rounds`` from the command line."""

import json

import pytest

pytestmark = pytest.mark.slow

QUICK = ["--model", "mlp", "--widths", "6", "--images", "1", "--num-public", "60"]
SMALL = [*QUICK, "--image-size", "4", "--explain-draws", "2"]


@pytest.fixture
def risk(run, tmp_path):
    return lambda *arguments: run("risk", "--out", tmp_path / "out", *arguments)


def test_it_explains_defenses_beside_the_estimate(risk, tmp_path):
    code, out, _ = risk(*SMALL, "--explain", "gaussian", "soteria", "--defense-noise-std", "0.05")
    assert code == 0
    assert "gaussian(noise_std=0.05)" in out
    assert "Jacobian: unchanged" in out
    assert "Risk of each layer: fc1" in out
    result = json.loads((tmp_path / "out" / "risk.json").read_text())
    none, gaussian, soteria = result["explanations"]
    assert [row["defense"] for row in result["explanations"]] == ["none", "gaussian", "soteria"]
    assert none["invloss"] == pytest.approx(result["inputs"][0]["invloss"], rel=1e-3)
    assert none["risk"] == none["risk_before"] == pytest.approx(result["risk"]["mean"], abs=1e-4)
    assert gaussian["invloss"] > none["invloss"]
    assert gaussian["realized"] > none["realized"]
    assert soteria["invloss"] < 2 * none["invloss"]
    assert soteria["kept_share"] < 1
    assert gaussian["draws"] == 2
    assert gaussian["ratio"] == pytest.approx(gaussian["realized"] / gaussian["expected"])
    assert len(gaussian["inputs"]) == 1


def test_equal_rounds_are_less_noise(risk, tmp_path):
    def found(*arguments):
        options = ["--image-size", "4", "--no-per-layer"]
        assert risk(*QUICK, *options, *arguments)[0] == 0
        return json.loads((tmp_path / "out" / "risk.json").read_text())

    rounds = found("--noise-std", "0.5", "--rounds", "25")
    once = found("--noise-std", "0.1")
    assert (rounds["rounds"], rounds["noise_std"]) == (25, 0.5)
    assert rounds["inputs"][0]["invloss"] == pytest.approx(once["inputs"][0]["invloss"], rel=1e-5)
    assert found("--noise-std", "0.5")["risk"]["mean"] < once["risk"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain", "gaussian"], r"3,072 pixels, about .* GiB.*--image-size 16 fits"),
        ([*SMALL, "--explain", "soteria", "--embedding", "fc1"], "soteria acts inside a gradient"),
        ([*SMALL, "--explain", "soteria", "--soteria-layer", "fc9"], "fc1, head"),
        ([*SMALL, "--explain", "dp_sgd", "--protocol", "fedavg"], "--protocol fedavg"),
        ([*SMALL, "--explain", "dp_sgd", "--clip-norm", "1"], "--clip-norm"),
        ([*SMALL, "--explain", "gaussian", "--visible-layers", "head"], "--visible-layers"),
        ([*SMALL, "--explain", "gaussian", "--num-bits", "4"], "num_bits has no effect"),
        ([*SMALL, "--explain", "gaussian", "--rounds", "2"], "about one release"),
        ([*SMALL, "--explain", "gaussian", "--prior", "low_rank"], "full rank"),
        ([*SMALL, "--explain", "gaussian", "--no-labels-known"], "known labels"),
        ([*SMALL, "--explain", "gaussian", "gaussian"], "explained once"),
        (["--explain-draws", "8"], "explain_draws has no effect"),
        ([*QUICK, "--rounds", "0"], "rounds must be at least 1"),
    ],
)
def test_bad_input_is_one_line(risk, check_refused, tmp_path, arguments, message):
    if "--image-size" not in arguments:
        arguments = [*QUICK, *arguments]
    check_refused(*risk(*arguments), message)
    assert not (tmp_path / "out" / "risk.json").exists()
