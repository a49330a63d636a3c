"""The defense as part of an audit: options, threat model, result file, report."""

import pytest

from jgia import AuditConfig, DataConfig, ModelConfig, run_audit
from jgia.config import DefenseConfig
from jgia.report import validate_result
from jgia.report.words import threat_model_words


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "options"),
    [
        ("quantize_stochastic", {"num_bits": 20}),
        ("quantize", {"num_bits": 12}),
        ("top_k", {"keep_fraction": 0.95}),
    ],
)
def test_lost_precision_is_not_taken_for_a_mixture(defense, options):
    def audited(config):
        return run_audit(
            AuditConfig(
                data=DataConfig(num_public=32),
                model=ModelConfig(fc_width=64),
                defense=config,
                batch=4,
            )
        )

    open_, defended = (
        audited(DefenseConfig()),
        audited(DefenseConfig(defense=(defense,), **options)),
    )
    rates = [each.result["scores"]["success_rate"]["18"]["rate"] for each in (open_, defended)]
    assert rates[1] == rates[0] > 0
    statuses = [str(each["status"]) for each in defended.reconstruction.candidates]
    assert "noisy" in statuses or "exact" in statuses


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
