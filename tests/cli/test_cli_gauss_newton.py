"""The most probable image from the command line: a simulated client, and an update file."""

import json

import jax
import numpy as np
import pytest

from jgia import cli
from jgia.config import ModelConfig
from jgia.federated import client_update, save_update
from jgia.models import make_victim
from jgia.report import validate_result
from jgia.training import Metrics, TrainedVictim, save_victim

QUICK = ["--newton-steps", "2", "--newton-solver", "cg", "--image-prior", "isotropic"]


def test_a_simulated_client_is_attacked_with_public_images(tmp_path):
    model = ["--model", "mlp", "--widths", "4", "--batch", "1", "--num-public", "16"]
    noise = ["--defense", "gaussian", "--noise-std", "0.01"]
    arguments = ["attack", "gauss_newton", *model, *noise, *QUICK, "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    validate_result(result)
    assert result["attack"]["stats"]["noise_std"] == pytest.approx(0.01)
    assert result["attack"]["stats"]["labels_by"] == "idlg"
    assert "How the search went" in (tmp_path / "report.html").read_text()


def test_an_update_file_needs_public_images(tmp_path, capsys):
    config = ModelConfig(model="mlp", widths=(4,))
    victim = make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(4,))
    params = victim.init(jax.random.key(0))
    metrics = Metrics(loss=1.0, accuracy=0.5)
    trained = TrainedVictim(victim=victim, params=params, history=(), train=metrics, test=None)
    save_victim(tmp_path / "model", trained, model=config)
    images = np.random.default_rng(0).uniform(size=(9, 4, 4, 1)).astype("float32")
    seen = client_update(jax.random.key(1), victim, params, images[:1], np.array([2]))
    save_update(tmp_path / "update.npz", seen.update)
    np.savez(tmp_path / "public.npz", x=images[1:], y=np.arange(8) % 3)
    arguments = ["attack", "gauss_newton", "--update", str(tmp_path / "update.npz")]
    arguments += ["--trained", str(tmp_path / "model"), "--num-examples", "1", *QUICK]
    arguments += ["--out", str(tmp_path / "report")]
    assert cli.main(arguments) == 2
    assert "--public" in capsys.readouterr().err
    assert cli.main([*arguments, "--public", f"npz:{tmp_path / 'public.npz'}"]) == 0
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    assert result["threat_model"]["public_data"].startswith("npz:")
    assert result["data"]["num_public"] == 8
