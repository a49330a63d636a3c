"""The command line: the files it writes, what goes to which stream, and its help."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jgia
from jgia import config
from jgia.exchange import _read_description, _victim
from jgia.federated import load_arrays, to_torch_layout
from jgia.report import validate_result
from jgia.report.write import FILE_NAMES


@pytest.mark.slow
def test_audit_writes_a_valid_report(reported, contents):
    assert set(contents(reported)) == set(FILE_NAMES)
    result = json.loads((reported / "result.json").read_text())
    validate_result(result)
    assert result["command"].startswith("jgia audit --fc-width 64")
    assert result["config"]["batch"] == 4
    with np.load(reported / "reconstructions.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape[1:] == (32, 32, 3)
        assert len(arrays["images"]) == result["scores"]["num_reconstructed"] >= 3
    with Image.open(reported / "grid.png") as picture:
        assert picture.width > 64
    assert (reported / "report.html").read_text().startswith("<!")


def test_summary_goes_to_standard_output(tmp_path, audit, contents):
    code, out, err = audit(tmp_path / "new" / "folder")
    assert code == 0
    assert "report.html" in out.replace("\n", "")
    assert err == ""
    assert set(contents(tmp_path / "new" / "folder")) == set(FILE_NAMES)


def test_json_alone_is_on_standard_output_and_the_seed_decides_it(tmp_path, audit):
    results = []
    for seed in (0, 0, 7):
        code, out, err = audit(tmp_path, "--json", "--seed", seed)
        assert code == 0
        assert err == ""
        result = json.loads(out)
        assert result == json.loads((tmp_path / "result.json").read_text())
        results.append({k: v for k, v in result.items() if k not in ("timings", "environment")})
    assert results[0] == results[1]
    assert results[0]["scores"] != results[2]["scores"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_update_is_saved(suffix, tmp_path, audit):
    path = tmp_path / f"update.{suffix}"
    code, _, _ = audit(tmp_path / "r", "--save-update", path)
    assert code == 0
    arrays = load_arrays(path)
    assert arrays["fc/kernel"].shape == (32 * 32 * 12, 64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flax", "torch"])
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_craft_then_attack(layout, form, exchange, tmp_path, run, contents):
    code, out, err = run(
        "craft",
        "--fc-width",
        64,
        "--front-end-trials",
        2,
        "--out",
        tmp_path,
        "--layout",
        layout,
        "--format",
        form,
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{tmp_path}/params.{form}", f"{tmp_path}/victim.json"]
    # The same seed crafts the same parameters, so the update of the fixture fits.
    update = load_arrays(exchange / "update.npz")
    if layout == "torch":
        update = to_torch_layout(update, _victim(_read_description(tmp_path / "victim.json")))
    np.savez(tmp_path / "update.npz", allow_pickle=False, **update)
    code, out, _ = run(
        "attack", "--crafted", tmp_path, "--update", tmp_path / "update.npz", "--layout", layout,
        "--truth", f"npz:{exchange / 'truth.npz'}", "--out", tmp_path / "r", "--microbatch", 4,
        "--json")  # fmt: skip
    assert code == 0
    result = json.loads(out)
    validate_result(result)
    assert result["scores"]["num_recovered"] >= 3
    assert result["scores"]["psnr"]["median"] >= 120
    assert set(contents(tmp_path / "r")) == set(FILE_NAMES)


def test_attack_without_truth_scores_nothing(exchange, tmp_path, attack):
    code, out, _ = attack(exchange, exchange / "update.npz", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["scores"] is None


def _options(type_) -> set[str]:
    """The long options that a configuration must have, found without the parser."""
    names: set[str] = set()
    for field in dataclasses.fields(type_):
        nested = {
            "DataConfig": config.DataConfig,
            "ModelConfig": config.ModelConfig,
            "ClientConfig": config.ClientConfig,
            "AresOptions": config.AresOptions,
            "DefenseConfig": config.DefenseConfig,
            "ImprintOptions": config.ImprintOptions,
            "KnowledgeConfig": config.KnowledgeConfig,
            "MatchingOptions": config.MatchingOptions,
            "RunOptions": config.RunOptions,
            "GaussNewtonOptions": config.GaussNewtonOptions,
            "GifdOptions": config.GifdOptions,
            "LabelMappingOptions": config.LabelMappingOptions,
            "GiasOptions": config.GiasOptions,
            "GglOptions": config.GglOptions,
            "AuditRiskOptions": config.AuditRiskOptions,
            "PerformanceFlags": config.PerformanceFlags,
            "AuditConfig": config.AuditConfig,
        }.get(str(field.type))
        names |= _options(nested) if nested else {"--" + field.name.replace("_", "-")}
    return names


@pytest.mark.parametrize(
    ("command", "type_"),
    [
        ("audit", config.AuditConfig),
        ("craft", config.CraftConfig),
        ("attack", config.AttackConfig),
    ],
)
def test_every_option_is_in_the_help(command, type_, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    expected = _options(type_) | ({"--out", "--json", "--save-update"} & _known(command))
    assert len(expected) >= 10
    assert {name for name in expected if not re.search(rf"{name}\b(?!-)", out)} == set()


def _known(command: str) -> set[str]:
    known = {"--out", "--json", "--save-update"}
    return {"audit": known, "craft": {"--out"}, "attack": {"--out", "--json"}}[command]


def _environment() -> dict[str, str]:
    root = Path(jgia.__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


@pytest.mark.slow
def test_as_users_run_it_with_float64_off(tmp_path):
    run = subprocess.run(
        [sys.executable, "-P", "-m", "jgia", "audit", "--batch", "8", "--front-end-trials", "4"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    result = json.loads((tmp_path / "jgia-report" / "result.json").read_text())
    validate_result(result)
    assert result["scores"]["num_recovered"] >= 7
    assert result["scores"]["psnr"]["median"] >= 120
