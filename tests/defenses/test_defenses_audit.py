"""The defense as part of an audit: options, threat model, result file, report."""

from jgia import AuditConfig, DataConfig, ModelConfig, run_audit
from jgia.config import DefenseConfig
from jgia.report import validate_result
from jgia.report.words import threat_model_words


def test_audit_carries_the_defense_from_the_options_to_the_report():
    config = AuditConfig(
        data=DataConfig(num_public=32),
        model=ModelConfig(fc_width=32),
        defense=DefenseConfig(defense=("gaussian",), noise_std=1e3),
        batch=2,
    )
    result = run_audit(config).result
    validate_result(result)
    assert result["config"]["defense"]["defense"] == ["gaussian"]
    threat = result["threat_model"]
    assert threat["defense"] == "gaussian(noise_std=1000)"
    assert abs(threat["noise_std"] - 1e3) < 1e-2
    assert result["scores"]["success_rate"]["18"]["rate"] == 0
    words = dict(threat_model_words(threat))
    assert "gaussian(noise_std=1000)" in words["What clients do against it"]
    assert "1e+03 on every entry" in words["What clients do against it"]


def test_result_without_the_keys_is_of_a_client_that_does_nothing():
    threat = {
        "server": "malicious",
        "protocol": "fedsgd",
        "local_steps": 1,
        "local_learning_rate": None,
        "num_examples": 1,
        "labels_known": False,
        "public_data": "none",
    }
    assert dict(threat_model_words(threat))["What clients do against it"].startswith("Nothing")
