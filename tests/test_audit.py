"""The audit as a library call: what it composes, records and refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jgia.audit as audit_module
from jgia.audit import AuditOutcome, build_victim, load_split, plain, reproduce_command, run_audit
from jgia.config import (
    AresOptions,
    AuditConfig,
    ClientConfig,
    DataConfig,
    ModelConfig,
    PerformanceFlags,
)
from jgia.report import to_json, validate_result

CONFIG = AuditConfig(
    batch=4,
    model=ModelConfig(fc_width=64),
    ares=AresOptions(front_end="signed"),
    data=DataConfig(num_public=64),
    performance=PerformanceFlags(microbatch=4),
)


@pytest.fixture(scope="module")
def outcome() -> AuditOutcome:
    return run_audit(CONFIG, command="jgia audit --batch 4")


def _without_times(result) -> dict:
    return {key: value for key, value in result.items() if key not in ("timings", "environment")}


@pytest.mark.slow
def test_result_is_valid_and_says_what_happened(outcome):
    result = outcome.result
    validate_result(result)
    assert result["command"] == "jgia audit --batch 4"
    assert result["seed"] == 0
    assert result["data"]["num_client"] == 4
    assert result["data"]["num_public"] == 64
    assert result["data"]["image_shape"] == [32, 32, 3]
    assert result["threat_model"]["server"] == "malicious"
    assert result["threat_model"]["public_data"] == result["data"]["provenance"]
    assert result["scores"]["num_true"] == 4
    assert result["scores"]["psnr"]["median"] >= 120
    assert 0 < result["attack"]["expected_recovered"] <= 4
    assert json.loads(to_json(result))["config"] == plain(CONFIG)


def test_times_add_up(outcome):
    times = outcome.result["timings"]
    parts = [value for name, value in times.items() if name not in ("run_s", "total_s")]
    assert times["total_s"] == pytest.approx(sum(parts))
    run = times["client_s"] + times["leak_s"] + times["invert_s"]
    assert times["run_s"] == pytest.approx(run)


def test_client_and_public_images_are_disjoint():
    client, public = load_split(DataConfig(), batch=32, seed=3)
    private = {image.tobytes() for image in client.images}
    assert len(private) == 32
    assert not private & {image.tobytes() for image in public.images}


def test_normalization_is_of_the_public_images_only():
    client, public = load_split(DataConfig(), batch=8, seed=0)
    victim = build_victim(ModelConfig(fc_width=8), client, public, normalize=True)
    pixels, _ = public.take(np.arange(len(public)))
    mean = pixels.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(victim.normalization.mean, mean, rtol=1e-12)
    plain_victim = build_victim(ModelConfig(fc_width=8), client, public, normalize=False)
    assert plain_victim.normalization.mean == (0.0, 0.0, 0.0)
    assert plain_victim.normalization.std == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_same_seed_same_result_and_other_seed_other_images(outcome):
    again = run_audit(CONFIG, command="jgia audit --batch 4")
    assert _without_times(again.result) == _without_times(outcome.result)
    np.testing.assert_array_equal(again.reconstruction.images, outcome.reconstruction.images)
    other = run_audit(dataclasses.replace(CONFIG, seed=1))
    assert other.truth is not None
    assert outcome.truth is not None
    assert not np.array_equal(other.truth.images, outcome.truth.images)


def test_attack_is_not_given_the_truth(monkeypatch):
    """With the truth swapped for noise the attack returns the same, and scores badly."""
    honest = run_audit(CONFIG)

    def misplaced(*, images, labels):
        return truth_of(images=np.random.default_rng(0).uniform(size=images.shape), labels=labels)

    truth_of = audit_module.Truth
    monkeypatch.setattr(audit_module, "Truth", misplaced)
    scored = audit_module.score
    monkeypatch.setattr(
        audit_module,
        "score",
        lambda found, true, **kwargs: scored(found, np.zeros_like(true), **kwargs),
    )
    blind = run_audit(CONFIG)
    np.testing.assert_array_equal(blind.reconstruction.images, honest.reconstruction.images)
    assert blind.result["scores"]["psnr"]["median"] < 30


def test_fedavg_is_recorded(outcome):
    client = ClientConfig(protocol="fedavg", learning_rate=0.5)
    result = run_audit(dataclasses.replace(CONFIG, client=client)).result
    assert result["threat_model"]["protocol"] == "fedavg"
    assert result["threat_model"]["local_learning_rate"] == 0.5
    assert result["scores"]["psnr"]["median"] > 40
    assert outcome.result["threat_model"]["protocol"] == "fedsgd"


def test_progress_names_every_stage():
    stages = []
    run_audit(CONFIG, progress=lambda stage, done, total: stages.append((stage, done, total)))
    names = list(dict.fromkeys(stage for stage, _, _ in stages))
    assert names == [
        "loading images",
        "crafting parameters",
        "client computes its update",
        "reading activations out of the update",
        "inverting activations",
        "scoring",
    ]
    assert all(0 <= done <= total for _, done, total in stages)
    assert ("inverting activations", 4, 4) in stages


@pytest.mark.parametrize("model", ["mlp", "lenet", "convnet"])
def test_impossible_attack_is_refused_before_anything_is_crafted(model, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("crafting started")

    monkeypatch.setattr(audit_module.ares, "craft", forbidden)
    config = dataclasses.replace(CONFIG, model=ModelConfig(model=model))
    with pytest.raises(ValueError, match=f"ARES cannot attack the model '{model}'"):
        run_audit(config)


def test_calibration_of_another_shape_is_refused():
    data = DataConfig(calibration="sample:64")
    with pytest.raises(ValueError, match=r"calibration images have shape \(64, 64, 3\)"):
        run_audit(dataclasses.replace(CONFIG, data=data))


def test_calibration_from_elsewhere_is_used(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "public.npz"
    np.savez(path, x=rng.uniform(size=(20, 32, 32, 3)).astype(np.float32), y=np.arange(20) % 2)
    data = DataConfig(calibration=f"npz:{path}")
    client, public = load_split(data, batch=4, seed=0)
    assert len(public) == 20
    assert len(client) == 4


def test_plain_is_what_json_reads_back():
    value = plain(CONFIG)
    assert json.loads(json.dumps(value)) == value
    assert value["model"]["widths"] is None
    assert plain({"a": (1, 2.5), "b": jax.numpy.float32}) == {
        "a": [1, 2.5],
        "b": str(jax.numpy.float32),
    }


def test_command_can_be_typed_again():
    assert reproduce_command(["audit", "--data", "folder:a b"]) == "jgia audit --data 'folder:a b'"
