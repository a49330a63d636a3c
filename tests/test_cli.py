"""The command line: files, streams and exit codes, and one clear line for every bad input."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jgia
from jgia import cli, config
from jgia.data import load_dataset, split_client_public
from jgia.federated import load_arrays, save_update
from jgia.models import unflatten_params
from jgia.report import validate_result
from jgia.report.write import FILE_NAMES

_ROOT = Path(jgia.__file__).resolve().parents[1]
_SMALL = ["--fc-width", "64", "--front-end-trials", "2", "--microbatch", "4"]
_CRAFT = ["--fc-width", "64", "--front-end-trials", "2"]


def _run(*arguments: object, capsys) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command in this process."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _audit(out: Path, *arguments: object, capsys) -> tuple[int, str, str]:
    return _run("audit", *_SMALL, "--batch", 4, "--out", out, *arguments, capsys=capsys)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _check_refused(code: int, out: str, err: str, message: str) -> None:
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A folder with a report."""
    folder = tmp_path_factory.mktemp("report")
    code = cli.main(["audit", *_SMALL, "--batch", "4", "--out", str(folder)])
    assert code == 0
    return folder


@pytest.fixture
def report(reported, tmp_path):
    """A copy of the report, which must be the same after the test."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    for name, content in _contents(reported).items():
        (folder / name).write_bytes(content)
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before


@pytest.fixture(scope="module")
def exchange(tmp_path_factory) -> Path:
    """Crafted parameters and the update of a client on them."""
    from jgia.attacks import ares
    from jgia.exchange import _read_description, _victim
    from jgia.federated import client_update, load_params

    folder = tmp_path_factory.mktemp("exchange")
    assert cli.main(["craft", *_CRAFT, "--out", str(folder)]) == 0
    victim = _victim(_read_description(folder / "victim.json"))
    params = load_params(folder / "params.npz", victim)
    assert ares.read_plan(victim, params).num_bins == 64
    client, _ = split_client_public(load_dataset("sample"), seed=0, num_client=4, num_public=16)
    images, labels = client.take(np.arange(4))
    import jax

    observation = client_update(jax.random.key(0), victim, params, images, labels)
    save_update(folder / "update.npz", observation.update)
    np.savez(folder / "truth.npz", x=images, y=labels)
    return folder


def test_audit_writes_a_valid_report(reported):
    assert set(_contents(reported)) == set(FILE_NAMES)
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


def test_summary_goes_to_standard_output(tmp_path, capsys):
    code, out, err = _audit(tmp_path / "new" / "folder", capsys=capsys)
    assert code == 0
    assert "report.html" in out.replace("\n", "")
    assert err == ""
    assert set(_contents(tmp_path / "new" / "folder")) == set(FILE_NAMES)


def test_json_alone_is_on_standard_output_and_the_seed_decides_it(tmp_path, capsys):
    results = []
    for seed in (0, 0, 7):
        code, out, err = _audit(tmp_path, "--json", "--seed", seed, capsys=capsys)
        assert code == 0
        assert err == ""
        result = json.loads(out)
        assert result == json.loads((tmp_path / "result.json").read_text())
        results.append({k: v for k, v in result.items() if k not in ("timings", "environment")})
    assert results[0] == results[1]
    assert results[0]["scores"] != results[2]["scores"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_update_is_saved(suffix, tmp_path, capsys):
    path = tmp_path / f"update.{suffix}"
    code, _, _ = _audit(tmp_path / "r", "--save-update", path, capsys=capsys)
    assert code == 0
    arrays = load_arrays(path)
    assert arrays["fc/kernel"].shape == (32 * 32 * 12, 64)


@pytest.mark.parametrize("layout", ["flax", "torch"])
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_craft_then_attack(layout, form, exchange, tmp_path, capsys):
    from jgia.exchange import _read_description, _victim
    from jgia.federated import to_torch_layout

    code, out, err = _run(
        "craft", *_CRAFT, "--out", tmp_path, "--layout", layout, "--format", form, capsys=capsys
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{tmp_path}/params.{form}", f"{tmp_path}/victim.json"]
    # The same seed crafts the same parameters, so the update of the fixture fits.
    update = load_arrays(exchange / "update.npz")
    if layout == "torch":
        update = to_torch_layout(update, _victim(_read_description(tmp_path / "victim.json")))
    np.savez(tmp_path / "update.npz", **update)
    code, out, _ = _run(
        "attack", "--crafted", tmp_path, "--update", tmp_path / "update.npz", "--layout", layout,
        "--truth", f"npz:{exchange / 'truth.npz'}", "--out", tmp_path / "r", "--microbatch", 4,
        "--json", capsys=capsys,
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    validate_result(result)
    assert result["scores"]["num_recovered"] >= 3
    assert result["scores"]["psnr"]["median"] >= 120
    assert set(_contents(tmp_path / "r")) == set(FILE_NAMES)


def test_attack_without_truth_scores_nothing(exchange, tmp_path, capsys):
    code, out, _ = _attack(exchange, exchange / "update.npz", tmp_path, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["scores"] is None


def _attack(crafted: Path, update: Path, out: Path, *arguments: object, capsys):
    return _run(
        "attack", "--crafted", crafted, "--update", update, "--out", out, "--microbatch", 4,
        *arguments, capsys=capsys,
    )  # fmt: skip


def _changed(change):
    """An editor of the flat update."""

    def edit(arrays, path):
        arrays = dict(arrays)
        change(arrays)
        np.savez(path, **arrays)

    return edit


def _set(name, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[5] = value

    return _changed(change)


def _truncated(arrays, path):
    np.savez(path, **arrays)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _transposed(arrays):
    arrays["conv1/kernel"] = np.transpose(arrays["conv1/kernel"], (3, 2, 0, 1))


def _half(arrays):
    arrays.update({name: value.astype(np.float16) for name, value in arrays.items()})


_BAD_UPDATES = {
    "nan": (_set("fc/kernel", np.nan), "fc/kernel has 1 NaN or infinite"),
    "inf": (_set("head/bias", -np.inf), "head/bias has 1 NaN or infinite"),
    "missing": (_changed(lambda a: a.pop("fc/bias")), "missing .*fc/bias"),
    "extra": (_changed(lambda a: a.update(other=np.zeros(3, np.float32))), "other"),
    "transposed": (_changed(_transposed), "conv1/kernel must have shape .*permuted"),
    "half": (_changed(_half), "must be float32 or float64, got float16"),
    "truncated": (_truncated, "damaged, truncated"),
    "empty": (lambda _, path: path.write_bytes(b""), "not a readable .npz"),
    "other-model": (
        _changed(lambda a: a.update({"fc/bias": np.zeros(32, np.float32)})),
        "fc/bias must have shape",
    ),
    "pickled": (
        lambda _, path: np.savez(path, x=np.array([{}], dtype=object)),
        "pickled Python objects",
    ),
}


@pytest.mark.parametrize("name", _BAD_UPDATES)
def test_bad_update_is_one_line_and_leaves_the_report(name, exchange, report, tmp_path, capsys):
    write, message = _BAD_UPDATES[name]
    path = tmp_path / "update.npz"
    write(load_arrays(exchange / "update.npz"), path)
    _check_refused(*_attack(exchange, path, report, capsys=capsys), message)


def test_truncated_safetensors(exchange, report, tmp_path, capsys):
    path = tmp_path / "update.safetensors"
    save_update(path, unflatten_params(load_arrays(exchange / "update.npz")))
    content = path.read_bytes()
    for size in (3, 100, len(content) - 1):
        path.write_bytes(content[:size])
        _check_refused(*_attack(exchange, path, report, capsys=capsys), "truncated|header")


def test_missing_files(exchange, report, tmp_path, capsys):
    nothing = tmp_path / "nothing.npz"
    _check_refused(*_attack(exchange, nothing, report, capsys=capsys), "no such file")
    update = exchange / "update.npz"
    _check_refused(*_attack(tmp_path, update, report, capsys=capsys), "needs a folder from")
    _check_refused(*_attack(exchange, exchange, report, capsys=capsys), "a folder; expected")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "jgia-crafted-1"}', '{"format": 1}'])
def test_damaged_description(text, exchange, report, tmp_path, capsys):
    (tmp_path / "victim.json").write_text(text)
    outcome = _attack(tmp_path, exchange / "update.npz", report, capsys=capsys)
    _check_refused(*outcome, "run 'jgia craft' again")


def test_update_in_the_other_layout(exchange, report, capsys):
    update = exchange / "update.npz"
    outcome = _attack(exchange, update, report, "--layout", "torch", capsys=capsys)
    _check_refused(*outcome, "choose it .--layout flax")


def _folder_of_images(root: Path, images) -> Path:
    for i, image in enumerate(images):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


def test_one_colour_images_do_not_calibrate(report, tmp_path, capsys):
    images = np.full((24, 32, 32, 3), 120, np.uint8)
    data = _folder_of_images(tmp_path / "flat", images)
    outcome = _audit(report, "--data", f"folder:{data}", capsys=capsys)
    _check_refused(*outcome, "same query feature")


def test_equal_images_do_not_calibrate(report, tmp_path, capsys):
    one = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    data = _folder_of_images(tmp_path / "same", np.repeat(one, 24, axis=0))
    outcome = _audit(report, "--data", f"folder:{data}", capsys=capsys)
    _check_refused(*outcome, "same query feature")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be between 0"),
        (["--learning-rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--local-epochs", "2"], "use protocol='fedavg'"),
        (["--microbatch", "0"], "microbatch must be at least 1"),
        (["--lam-ratio", "1"], "lam_ratio must lie strictly between 0 and 1"),
        (["--batch", "100000"], "use a batch of at most|are needed"),
        (["--data", "nonsense"], "unknown data set 'nonsense'"),
        (["--data", "npz:/nowhere.npz"], "nowhere"),
        (["--data", "folder:/nowhere"], "is not a folder"),
        (["--image-size", "7"], "no size '7'"),
        (["--num-public", "3"], "at least 16 public images"),
        (["--model", "mlp"], "ARES cannot attack the model 'mlp'"),
        (["--model", "lenet"], "choose --model cnn"),
        (["--front-end", "signed", "--widths", "4"], "needs 6 channels"),
        (["--save-update", "update.pt"], "needs a .npz or .safetensors file"),
        (["--fc-width", "1"], "bins need at least 2"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_option_is_one_line_and_leaves_the_report(arguments, message, report, capsys):
    _check_refused(*_audit(report, *arguments, capsys=capsys), message)


@pytest.mark.parametrize("command", ["audit", "craft", "attack"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_folder_that_cannot_be_written(command, below, exchange, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"mine")
    arguments = ["--out", blocker / below]
    if command == "attack":
        arguments += ["--crafted", exchange, "--update", exchange / "update.npz"]
    outcome = _run(command, *arguments, capsys=capsys)
    _check_refused(*outcome, "cannot write to the output folder")
    assert blocker.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "--no-such-option"],
        ["audit", "--front-end", "other"],
        ["audit", "--batch", "many"],
        ["attack"],
        ["nonsense"],
        [],
    ],
)
def test_unknown_option_exits_with_2_and_says_so(arguments, capsys):
    code, out, err = _run(*arguments, capsys=capsys)
    assert code == 2
    assert out == ""
    assert err
    assert "Traceback" not in err
    assert "__tyro" not in err


_STAGES = ["load_split", "build_victim", "client_update", "score", "assemble_result"]


@pytest.mark.parametrize("stage", _STAGES)
def test_interrupt_at_any_stage_leaves_the_report(stage, report, monkeypatch, capsys):
    import jgia.audit

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jgia.audit, stage, interrupted)
    code, out, err = _audit(report, capsys=capsys)
    assert code == 130
    assert out == ""
    assert err == "interrupted; earlier results are as they were\n"


def test_interrupt_while_the_report_is_rendered(report, monkeypatch, capsys):
    import importlib

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    write = importlib.import_module("jgia.report.write")
    monkeypatch.setattr(write, "grid_png", interrupted)
    code, _, err = _audit(report, capsys=capsys)
    assert code == 130
    assert "Traceback" not in err


def _options(type_) -> set[str]:
    """The long options that a configuration must have, found without the parser."""
    names: set[str] = set()
    for field in dataclasses.fields(type_):
        nested = {
            "DataConfig": config.DataConfig,
            "ModelConfig": config.ModelConfig,
            "ClientConfig": config.ClientConfig,
            "AresOptions": config.AresOptions,
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
def test_every_option_is_in_the_help(command, type_, capsys):
    code, out, _ = _run(command, "--help", capsys=capsys)
    assert code == 0
    expected = _options(type_) | ({"--out", "--json", "--save-update"} & _known(command))
    assert len(expected) >= 10
    assert {name for name in expected if not re.search(rf"{name}\b(?!-)", out)} == set()


def _known(command: str) -> set[str]:
    known = {"--out", "--json", "--save-update"}
    return {"audit": known, "craft": {"--out"}, "attack": {"--out", "--json"}}[command]


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


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


_SLEEPER = """
import sys, time
import jgia.audit, jgia.cli

def sleep(*_, **__):
    print("ready", flush=True)
    time.sleep(60)

jgia.audit.load_split = sleep
sys.exit(jgia.cli.main(["audit", "--out", sys.argv[1]]))
"""


def test_ctrl_c_in_a_real_process(report):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SLEEPER, str(report)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted; earlier results are as they were\n"
