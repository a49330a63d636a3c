"""Parameter files are inspected without a model, in both layouts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.config import AresOptions
from jgia.defenses import detect_crafted
from jgia.federated import UpdateError, save_update
from jgia.inspect import inspect_parameters, inspection_lines
from jgia.models import make_victim

VICTIM = make_victim("cnn", input_shape=(8, 8, 3), num_classes=4, widths=(12, 12), fc_width=32)


@pytest.fixture(scope="module")
def crafted():
    rng = np.random.default_rng(0)
    public = rng.uniform(size=(32, 8, 8, 3)) * rng.uniform(0.1, 1, size=(32, 1, 1, 1))
    options = AresOptions(front_end_trials=1)
    params, _ = ares.craft(jax.random.key(0), VICTIM, public.astype("float32"), options=options)
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def benign():
    return jax.tree.map(np.asarray, jax.jit(VICTIM.init)(jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_files_are_judged_like_the_parameters_in_them(tmp_path, crafted, benign, suffix, layout):
    for name, params in (("crafted", crafted), ("benign", benign)):
        path = tmp_path / f"{name}{suffix}"
        save_update(path, params, layout=layout, victim=VICTIM)
        report, direct = inspect_parameters(path), detect_crafted(params)
        assert report.flagged == (name == "crafted")
        assert report.scores.keys() == direct.scores.keys()
        assert report.layers.keys() == direct.layers.keys()
        for check, score in direct.scores.items():
            assert report.scores[check] == pytest.approx(score, abs=1e-6), check


def test_a_crafted_folder_is_found(tmp_path, crafted):
    save_update(tmp_path / "params.npz", crafted)
    (tmp_path / "victim.json").write_text(json.dumps({"params": "params.npz"}))
    assert inspect_parameters(tmp_path).flagged


def test_lines_say_what_was_found(tmp_path, crafted, benign):
    lines = inspection_lines(detect_crafted(crafted))
    assert "look crafted" in lines[0]
    assert any("parallel_neurons" in line and "fc" in line for line in lines[1:])
    clean = inspection_lines(detect_crafted(benign))
    assert "no proof" in clean[0]
    assert clean[1] == ""
    report = detect_crafted(benign)
    assert len(clean) == 2 + len(report.scores)
    assert dataclasses.replace(report, reasons=()) == report


def test_thresholds_are_passed_on(tmp_path, benign):
    save_update(tmp_path / "p.npz", benign)
    assert inspect_parameters(tmp_path / "p.npz", thresholds={"parallel_readout": 1e-6}).flagged


@pytest.mark.parametrize("content", [None, "{", "[]", '{"params": 3}', '{"params": "../x.npz"}'])
def test_folders_that_are_not_crafted_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "victim.json").write_text(content)
    with pytest.raises(UpdateError, match=r"victim\.json"):
        inspect_parameters(tmp_path)


def test_files_that_hold_no_layer_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", counts=np.arange(3), scale=np.ones(3))
    with pytest.raises(UpdateError, match="no convolution or fully connected layer"):
        inspect_parameters(tmp_path / "x.npz")
    with pytest.raises(UpdateError, match="pickle"):
        inspect_parameters(tmp_path / "x.pt")
