import json
import re

import numpy as np
import pytest

from jgia import cli
from jgia.config import DataConfig, ModelConfig
from jgia.config.training import TrainConfig
from jgia.data import load_dataset
from jgia.train_command import CHECKPOINT, run_training, split_train_test
from jgia.training import evaluate, load_victim

TINY = ("--model", "mlp", "--widths", "3", "--epochs", "2", "--batch-size", "48")


@pytest.fixture
def run(capsys):
    """Run the command: exit code, standard output and standard error."""

    def command(*arguments):
        capsys.readouterr()
        code = cli.main(["train-victim", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def archive(tmp_path, stripes):
    """Stripes in a file, as a data specification; any part of its content can be replaced."""

    def write(name="images.npz", **changes):
        dataset = stripes(30)
        content = {"x": dataset.images, "y": dataset.labels, "names": np.array(["rows", "columns"])}
        np.savez(tmp_path / name, **(content | changes))
        return f"npz:{tmp_path / name}"

    return write


def _config(data, **fields):
    model = ModelConfig(model="mlp", widths=(3,))
    return TrainConfig(data=DataConfig(data=data), model=model, **fields)


@pytest.mark.slow
def test_the_command_trains_on_the_sample_and_writes_a_victim(tmp_path, run):
    out = tmp_path / "new" / "victim"
    code, printed, errors = run(*TINY, "--out", out)
    assert (code, errors) == (0, "")
    names = {"params.npz", "victim.json", "training.json"}
    assert {path.name for path in out.iterdir()} == names
    victim, params = load_victim(out)
    sample = load_dataset("sample")
    private = sample.subset(np.flatnonzero(~np.asarray(sample.public)))
    measured = evaluate(victim, params, private)
    record = json.loads((out / "training.json").read_text())
    assert record["test"] == {"loss": measured.loss, "accuracy": measured.accuracy}
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    assert (record["data"]["num_train"], record["data"]["num_test"]) == (96, 128)
    assert record["command"].startswith("jgia train-victim --model mlp --widths 3")
    assert record["environment"]["jax"]
    assert f"{measured.accuracy:.1%} of 128 test images right" in printed
    assert all(str(out / name) in printed.replace("\n", "") for name in names)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(*TINY, "--out", out)[0] == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_an_interrupted_command_goes_on(tmp_path, archive, run):
    spec = archive()
    config = _config(spec, epochs=3, batch_size=8, out=tmp_path / "whole")
    run_training(config)

    def interrupt(stage, done, total):
        if stage.startswith("epoch 3"):
            raise KeyboardInterrupt

    broken = _config(spec, epochs=3, batch_size=8, out=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        run_training(broken, progress=interrupt)
    assert [path.name for path in broken.out.iterdir()] == [CHECKPOINT]
    code, _, errors = run(
        *("--data", spec, "--model", "mlp", "--widths", 3, "--epochs", 2), "--out", broken.out
    )
    assert code == 2
    assert "belongs to another training run" in errors
    run_training(broken)
    for name in ("params.npz", "victim.json"):
        assert (broken.out / name).read_bytes() == (config.out / name).read_bytes()
    records = [json.loads((c.out / "training.json").read_text()) for c in (broken, config)]
    assert records[0]["history"] == records[1]["history"]
    assert not (broken.out / CHECKPOINT).exists()


def test_a_part_is_held_back_by_the_seed(archive):
    spec = archive()
    train, test = split_train_test(_config(spec, test_fraction=0.2))
    assert test is not None
    assert (len(train), len(test)) == (24, 6)
    rows = {image.tobytes() for image in train.images}
    assert not rows & {image.tobytes() for image in test.images}
    again, _ = split_train_test(_config(spec, test_fraction=0.2))
    other, _ = split_train_test(_config(spec, test_fraction=0.2, seed=1))
    np.testing.assert_array_equal(train.images, again.images)
    assert not np.array_equal(train.images, other.images)
    everything, none = split_train_test(_config(spec, test_fraction=0.0))
    assert (len(everything), none) == (30, None)


def test_images_of_a_client_are_never_trained_on(archive, stripes):
    public = np.arange(30) < 20
    spec = archive(public=public)
    train, test = split_train_test(_config(spec))
    assert test is not None
    np.testing.assert_array_equal(train.images, stripes(30).images[:20])
    np.testing.assert_array_equal(test.images, stripes(30).images[20:])
    train, test = split_train_test(_config(spec, test=archive("test.npz")))
    assert test is not None
    assert (len(train), len(test)) == (20, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((30, 4, 4), np.uint8)}, r"shape \(4, 4, 1\).*training images \(6, 4, 1\)"),
        ({"names": np.array(["columns", "rows"])}, "classes 'columns', 'rows', the training"),
    ],
)
def test_test_images_must_be_of_the_same_kind(changes, message, archive):
    config = _config(archive(), test=archive("test.npz", **changes))
    with pytest.raises(ValueError, match=message):
        split_train_test(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "epochs must be at least 1"),
        (("--test-fraction", 1), "test_fraction must lie in"),
        (("--num-public", 16), "training does not calibrate an attack: leave num_public out"),
        (("--data", "npz:nowhere.npz"), "nowhere.npz"),
        (("--model", "vgg11", "--widths", 2, 2), "widths need 8 values"),
        (("--model", "lenet", "--norm", "batch"), "has no option 'norm'"),
        (("--limit", 1), "none is left to train on|one class"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        code = cli.main(["train-victim", *map(str, arguments), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert not list(out.glob("*"))
    assert re.search(message, captured.err), captured.err
