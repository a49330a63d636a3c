"""Generator search from the command line: a simulated client, an update file, what is refused."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jgia import run_audit
from jgia.config import AuditConfig, DataConfig, ModelConfig
from jgia.config.sweep import parse_sweep
from jgia.federated import client_update, save_update
from jgia.generators.prior import Prior, save_prior
from jgia.generators.stylegan2 import StyleGAN2
from jgia.models import make_victim
from jgia.report import validate_result
from jgia.training import Metrics, TrainedVictim, save_victim

CLIENT = ["--data", "sample", "--image-size", "8", "--model", "mlp", "--widths", "8"]
CLIENT += ["--num-public", "16"]
QUICK = ["--gifd-steps", "3", "--gifd-restarts", "2"]


@pytest.fixture(scope="session")
def prior(tmp_path_factory):
    """A folder with an untrained generator of 8 x 8 images."""
    folder = tmp_path_factory.mktemp("prior")
    generator = StyleGAN2(resolution=8, base=32, max_features=4, latent_dim=4, style_dim=4)
    params = generator.init(jax.random.key(0))
    record = {"data": {"provenance": "images of nobody"}}
    save_prior(folder, Prior(name="nobody", generator=generator, params=params, record=record))
    return folder


@pytest.mark.slow
def test_a_simulated_client_is_attacked_stage_by_stage(tmp_path, run, prior):
    command = ["attack", "gifd", "--prior", prior, *CLIENT, *QUICK, "--batch", "2"]
    command += ["--checkpoint", tmp_path / "search.npz"]
    code, out, err = run(*command, "--out", tmp_path / "first")
    assert (code, err) == (0, "")
    assert "of restart" in " ".join(out.split())
    result = json.loads((tmp_path / "first" / "result.json").read_text())
    validate_result(result)
    assert result["attack"]["status_counts"] == {"matched": 2}
    assert result["threat_model"]["server"] == "honest_but_curious"
    assert result["threat_model"]["public_data"] == "generator nobody, trained on: images of nobody"
    search = result["staged_search"]
    assert search["prior"] == "nobody"
    assert [stage["searched"] for stage in search["stages"]] == ["latent codes", "features 4x4x4"]
    table = np.array([stage["distances"] for stage in search["stages"]])
    assert table.shape == (2, 2)
    assert table[search["stage"], search["restart"]] == table.min()
    returned = search["stages"][search["stage"]]["psnr"]
    assert returned == pytest.approx(result["scores"]["psnr"]["per_image"])
    page = (tmp_path / "first" / "report.html").read_text()
    assert f"stage {search['stage']}, returned" in page
    with np.load(tmp_path / "first" / "reconstructions.npz") as arrays:
        assert arrays["frames"].shape == (2, 2, 8, 8, 3)
        images = arrays["images"]
        np.testing.assert_array_equal(images, arrays["frames"][search["stage"]])

    code, _, _ = run(*command, "--out", tmp_path / "second")  # all stages are in the checkpoint
    assert code == 0
    with np.load(tmp_path / "second" / "reconstructions.npz") as arrays:
        np.testing.assert_array_equal(images, arrays["images"])
    code, _, err = run(*command, "--gifd-rate", "0.2", "--out", tmp_path / "third")
    assert code == 2
    assert "search.npz" in err


@pytest.mark.slow
def test_an_update_file_is_attacked_within_a_budget(tmp_path, run, prior):
    victim = make_victim("mlp", input_shape=(8, 8, 3), num_classes=3, widths=(4,))
    params = victim.init(jax.random.key(0))
    metrics = Metrics(loss=1.0, accuracy=0.5)
    trained = TrainedVictim(victim=victim, params=params, history=(), train=metrics, test=None)
    save_victim(tmp_path / "model", trained, model=ModelConfig(model="mlp", widths=(4,)))
    images = np.random.default_rng(0).uniform(size=(1, 8, 8, 3)).astype("float32")
    seen = client_update(jax.random.key(1), victim, params, images, np.array([2]))
    save_update(tmp_path / "update.npz", seen.update)
    command = ["attack", "gifd", "--update", tmp_path / "update.npz", "--trained"]
    command += [tmp_path / "model", "--num-examples", "1", "--last-stage", "0"]
    code, _, err = run(*command, "--out", tmp_path / "report")
    assert code == 2
    assert "give --prior" in err
    limits = ["--gifd-restarts", "2", "--budget-steps", "4"]
    code, _, err = run(*command, "--prior", prior, *limits, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    validate_result(result)
    assert result["staged_search"]["budget_steps"] == 4
    assert [stage["steps"] for stage in result["staged_search"]["stages"]] == [4]
    assert "psnr" not in result["staged_search"]["stages"][0]
    assert "4 steps, all steps done" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gifd", *CLIENT], "give --prior, a folder written by 'jgia train-prior' or the name of"),
        (["gifd", *CLIENT, "--prior", "nowhere"], "there is no prior 'nowhere'"),
        (["gifd", *CLIENT, "--prior", "weights.pkl"], "pickled code, which is never run"),
        (["idlg", *CLIENT, "--prior", "PRIOR"], "searches no generator; leave out --prior"),
        (["gifd", *CLIENT, "--prior", "PRIOR", "--image-size", "12"], "takes 12 x 12"),
        (["gifd", *CLIENT, "--prior", "PRIOR", "--last-stage", "2"], "the largest is 1"),
        (["gifd", *CLIENT, "--prior", "PRIOR", "--radii", "0"], "must be positive"),
        (["gifd", *CLIENT, "--prior", "PRIOR", "--budget-steps", "1"], "leave no step"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, run, check_refused, prior, arguments, message):
    arguments = [prior if argument == "PRIOR" else argument for argument in arguments]
    check_refused(*run("attack", *arguments, "--out", tmp_path), message)


def test_images_of_other_channels_are_refused(tmp_path, run, check_refused, prior):
    np.savez(tmp_path / "gray.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 4)
    data = ["--data", f"npz:{tmp_path / 'gray.npz'}", "--model", "mlp", "--num-public", "16"]
    found = run("attack", "gifd", "--prior", prior, *data, "--batch", "1", "--out", tmp_path / "r")
    check_refused(*found, "3 channels, the victim takes 1")


def test_ggl_without_its_package_is_refused_before_any_compute(
    tmp_path, run, check_refused, prior, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    monkeypatch.setattr("jgia.audit.simulate_clients", lambda *_, **__: pytest.fail("too late"))
    command = ["attack", "ggl", "--prior", prior, *CLIENT, "--out", tmp_path / "report"]
    check_refused(*run(*command), r'pip install "jgia\[ggl\]"')
    data = DataConfig(data="sample", image_size=8, num_public=16)
    model = ModelConfig(model="mlp", widths=(8,))
    config = AuditConfig(attack="ggl", prior=str(prior), data=data, model=model)
    with pytest.raises(ImportError, match="ggl needs an optional package"):
        run_audit(config)


def test_a_damaged_prior_is_refused(tmp_path, run, check_refused, prior):
    for path in prior.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "prior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = run("attack", "gifd", "--prior", tmp_path, *CLIENT, "--out", tmp_path / "r")
    check_refused(*found, "SHA-256 differs")


def test_a_sweep_may_cross_settings_of_stages(prior):
    text = f'[base]\nattack = "gifd"\nprior = "{prior}"\n[axes]\nlast-stage = [0, 1]\n'
    cells = parse_sweep(text + "radii = [[0.1, 0.05], [0.2]]\n").cells
    assert [cell.config.gifd.last_stage for cell in cells] == [0, 0, 1, 1]
    assert cells[0].config.gifd.radii == (0.1, 0.05)


def test_train_prior_hands_its_options_on_and_says_what_came_of_it(tmp_path, run, monkeypatch):
    seen = []

    def train(config, *, command, progress):
        progress("training", 1, 2)
        seen.append((config, command))
        last = SimpleNamespace(kimg=0.5, seconds=90.0, kid=0.0125)
        trained = SimpleNamespace(history=(last,))
        return SimpleNamespace(trained=trained, paths=[tmp_path / "prior.safetensors"])

    monkeypatch.setattr("jgia.train_prior_command.run_prior_training", train)
    options = ["--size", "small32", "--data", "faces:64", "--kimg", "0.5", "--license", "CC0"]
    code, shown, err = run("train-prior", *options, "--out", tmp_path / "drawn")
    assert (code, err) == (0, "")
    ((config, command),) = seen
    assert (config.size, config.data.data, config.kimg) == ("small32", "faces:64", 0.5)
    assert (config.license, config.out) == ("CC0", tmp_path / "drawn")
    assert command.startswith("jgia train-prior --size small32")
    first, path = shown.splitlines()
    assert first.startswith("0.5 thousand images shown in 1.5 minutes; kernel distance 0.0125")
    assert path == str(tmp_path / "prior.safetensors")


def test_train_prior_refuses_in_one_line(tmp_path, run, check_refused):
    found = run("train-prior", "--kimg", "0", "--out", tmp_path)
    check_refused(*found, "kimg must be positive")
