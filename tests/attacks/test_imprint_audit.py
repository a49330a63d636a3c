"""The baselines through the audit: named, timed, scored, and refused before any compute."""

import dataclasses
import json

import numpy as np
import pytest

from jgia.audit import run_audit
from jgia.config import AuditConfig, ClientConfig, DataConfig, ModelConfig
from jgia.config.imprint import ImprintOptions
from jgia.report import to_json, validate_result

MODELS = {
    "rtf": ModelConfig(model="imprint_mlp", fc_width=64, widths=(8,)),
    "trap_weights": ModelConfig(model="mlp", widths=(96,)),
    "qbi": ModelConfig(model="mlp", widths=(96,)),
    "loki": ModelConfig(model="cnn", fc_width=64, widths=(3,)),
}


@pytest.fixture(scope="module")
def data(pools, tmp_path_factory) -> DataConfig:
    """8 x 8 crops on disk."""
    images, labels, public = pools
    path = tmp_path_factory.mktemp("data") / "crops.npz"
    whole = np.concatenate([images, public])[:, 4:12, 4:12]
    classes = np.concatenate([labels, np.zeros(len(public), labels.dtype)])
    flags = np.arange(len(whole)) >= len(images)
    np.savez(path, x=np.round(255 * whole).astype(np.uint8), y=classes, public=flags)
    return DataConfig(data=f"npz:{path}", num_public=96, normalize=False)


@pytest.mark.slow
@pytest.mark.parametrize("attack", MODELS)
def test_audits_name_the_baseline_and_score_it(data: DataConfig, attack):
    config = AuditConfig(data=data, model=MODELS[attack], batch=6, attack=attack)
    outcome = run_audit(config)
    result = outcome.result
    validate_result(json.loads(to_json(result)))
    assert result["attack"]["name"] == attack
    assert result["attack"]["stats"]["method"] == attack
    # Rows of their own isolate less on pixels, whose common brightness turns all of them on.
    expected = 0.3 if attack in ("qbi", "trap_weights") else 0.5
    assert result["scores"]["success_rate"]["40"]["rate"] >= expected
    assert result["timings"]["leak_s"] > 0
    has_bins = attack in ("rtf", "loki")
    assert (result["attack"]["expected_recovered"] is not None) == has_bins
    if has_bins:
        assert 3 < result["attack"]["expected_recovered"] <= 6


def test_a_baseline_on_another_model_is_refused(data: DataConfig):
    config = AuditConfig(data=data, model=MODELS["loki"], batch=2, attack="qbi")
    with pytest.raises(ValueError, match="qbi cannot attack the model 'cnn'"):
        run_audit(config)


def test_its_options_reach_the_attack(data: DataConfig):
    config = AuditConfig(data=data, model=MODELS["qbi"], batch=6, attack="qbi")
    strict = dataclasses.replace(config, imprint=ImprintOptions(min_agreement=96))
    assert len(run_audit(strict).reconstruction.images) == 0


def test_secure_aggregation_is_one_large_batch(data: DataConfig):
    client = ClientConfig(num_clients=3)
    config = AuditConfig(data=data, model=MODELS["rtf"], batch=6, attack="rtf", client=client)
    result = run_audit(config).result
    assert result["threat_model"]["num_clients"] == 3
    assert result["scores"]["success_rate"]["40"]["rate"] >= 0.5
