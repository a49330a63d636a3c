"""Bad input and Ctrl-C: one clear line, an exit code, and earlier reports as they were."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jgia
import jgia.audit
from jgia.federated import load_arrays, save_update
from jgia.models import unflatten_params


def _changed(change):
    """An editor of the flat update."""

    def edit(arrays, path):
        arrays = dict(arrays)
        change(arrays)
        np.savez(path, allow_pickle=False, **arrays)

    return edit


def _set(name, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[5] = value

    return _changed(change)


def _truncated(arrays, path):
    np.savez(path, allow_pickle=False, **arrays)
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
def test_bad_update_is_one_line_and_leaves_the_report(
    name, exchange, report, tmp_path, attack, check_refused
):
    write, message = _BAD_UPDATES[name]
    path = tmp_path / "update.npz"
    write(load_arrays(exchange / "update.npz"), path)
    check_refused(*attack(exchange, path, report), message)


def test_truncated_safetensors(exchange, report, tmp_path, attack, check_refused):
    path = tmp_path / "update.safetensors"
    save_update(path, unflatten_params(load_arrays(exchange / "update.npz")))
    content = path.read_bytes()
    for size in (3, 100, len(content) - 1):
        path.write_bytes(content[:size])
        check_refused(*attack(exchange, path, report), "truncated|header")


def test_missing_files(exchange, report, tmp_path, attack, check_refused):
    nothing = tmp_path / "nothing.npz"
    check_refused(*attack(exchange, nothing, report), "no such file")
    update = exchange / "update.npz"
    check_refused(*attack(tmp_path, update, report), "needs a folder from")
    check_refused(*attack(exchange, exchange, report), "a folder; expected")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "jgia-crafted-1"}', '{"format": 1}'])
def test_damaged_description(text, exchange, report, tmp_path, attack, check_refused):
    (tmp_path / "victim.json").write_text(text)
    outcome = attack(tmp_path, exchange / "update.npz", report)
    check_refused(*outcome, "run 'jgia craft' again")


def test_update_in_the_other_layout(exchange, report, attack, check_refused):
    update = exchange / "update.npz"
    outcome = attack(exchange, update, report, "--layout", "torch")
    check_refused(*outcome, "choose it .--layout flax")


def _folder_of_images(root: Path, images) -> Path:
    for i, image in enumerate(images):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


def test_one_colour_images_do_not_calibrate(report, tmp_path, audit, check_refused):
    images = np.full((24, 32, 32, 3), 120, np.uint8)
    data = _folder_of_images(tmp_path / "flat", images)
    outcome = audit(report, "--data", f"folder:{data}")
    check_refused(*outcome, "same query feature")


def test_equal_images_do_not_calibrate(report, tmp_path, audit, check_refused):
    one = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    data = _folder_of_images(tmp_path / "same", np.repeat(one, 24, axis=0))
    outcome = audit(report, "--data", f"folder:{data}")
    check_refused(*outcome, "same query feature")


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
        (["--image-size", "48"], "no size '48'"),
        (["--num-public", "3"], "at least 16 public images"),
        (["--model", "mlp"], "ARES cannot attack the model 'mlp'"),
        (["--model", "lenet"], "choose --model cnn"),
        (["--front-end", "signed", "--widths", "4"], "needs 6 channels"),
        (["--save-update", "update.pt"], "needs a .npz or .safetensors file"),
        (["--fc-width", "1"], "bins need at least 2"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_option_is_one_line_and_leaves_the_report(
    arguments, message, report, audit, check_refused
):
    check_refused(*audit(report, *arguments), message)


@pytest.mark.parametrize("command", ["audit", "craft", "attack"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_folder_that_cannot_be_written(command, below, exchange, tmp_path, run, check_refused):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"mine")
    arguments = ["--out", blocker / below]
    if command == "attack":
        arguments += ["--crafted", exchange, "--update", exchange / "update.npz"]
    outcome = run(command, *arguments)
    check_refused(*outcome, "cannot write to the output folder")
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
def test_unknown_option_exits_with_2_and_says_so(arguments, run):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err
    assert "Traceback" not in err
    assert "__tyro" not in err


_STAGES = ["load_split", "build_victim", "simulate_clients", "score", "assemble_result"]


@pytest.mark.parametrize("stage", _STAGES)
def test_interrupt_at_any_stage_leaves_the_report(stage, report, monkeypatch, audit):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jgia.audit, stage, interrupted)
    code, out, err = audit(report)
    assert code == 130
    assert out == ""
    assert err == "interrupted; earlier results are as they were\n"


def test_interrupt_while_the_report_is_rendered(report, monkeypatch, audit):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    write = importlib.import_module("jgia.report.write")
    monkeypatch.setattr(write, "grid_png", interrupted)
    code, _, err = audit(report)
    assert code == 130
    assert "Traceback" not in err


def _environment() -> dict[str, str]:
    root = Path(jgia.__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


# A process started in the background inherits an ignored SIGINT; a terminal's does not.
_SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
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
