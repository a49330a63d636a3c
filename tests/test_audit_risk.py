"""The estimate of an audit: the same as that of the risk command, and what it leaves out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.audit import run_audit
from jgia.audit_risk import AmongOthers, audit_risk
from jgia.config import AuditConfig, ClientConfig, DataConfig, DefenseConfig, ModelConfig
from jgia.config.risk import AuditRiskOptions
from jgia.models import make_victim
from jgia.report import validate_result
from jgia.risk import Prior, UpdateRelease, invre

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(3, 4, 4, 1)).astype("float32")
PUBLIC = RNG.uniform(size=(40, 4, 4, 1)).astype("float32")
LABELS = np.array([0, 2, 1])
OPTIONS = AuditRiskOptions(risk_images=2, risk_noise_std=0.05)


@pytest.fixture(scope="module")
def victim():
    return make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(12,))


@pytest.fixture(scope="module")
def params(victim):
    return victim.init(jax.random.key(1))


def estimated(victim, params, *, declared=0.0, **changes):
    config = AuditConfig(batch=3, risk=OPTIONS, **changes)
    return audit_risk(
        jax.random.key(2),
        config,
        victim,
        params,
        IMAGES,
        LABELS,
        public=PUBLIC,
        declared_noise_std=declared,
    )


def joint(victim, params, *, noise_std, index, clip_norm=None):
    """Directly: the update of the batch as a function of one image."""
    release = AmongOthers(release=UpdateRelease(victim=victim, clip_norm=clip_norm))
    found = invre(
        jax.random.key(3),
        release,
        (params, jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(index)),
        IMAGES[index][None],
        LABELS[index][None],
        prior=Prior.from_data(PUBLIC),
        noise_std=noise_std,
    )
    return float(found.estimates.risk[0])


def test_an_image_of_a_batch_has_its_share_of_the_update(victim, params):
    found = estimated(victim, params)
    assert found.pixel_errors.shape == (2, 4, 4, 1)
    assert (found.record["noise_std"], found.record["noise_from"]) == (0.05, "assumed")
    for index, row in enumerate(found.record["images"]):
        expected = joint(victim, params, noise_std=0.05, index=index)
        assert row["risk"] == pytest.approx(expected, rel=1e-4)
        wrong = joint(victim, params, noise_std=0.15, index=index)
        assert row["risk"] != pytest.approx(wrong, rel=1e-2)
    assert found.record["worst"] == max(row["risk"] for row in found.record["images"])


def test_declared_noise_comes_first_and_clipping_counts(victim, params):
    gaussian = DefenseConfig(defense=("gaussian",), noise_std=0.2)
    found = estimated(victim, params, declared=0.2, defense=gaussian)
    assert (found.record["noise_std"], found.record["noise_from"]) == (0.2, "the defense")
    clip = DefenseConfig(defense=("clip",), clip_norm=0.1)
    clipped = estimated(victim, params, defense=clip).record["images"]
    expected = joint(victim, params, noise_std=0.05, index=1, clip_norm=0.1)
    assert clipped[1]["risk"] == pytest.approx(expected, rel=1e-4)
    top = estimated(victim, params, defense=DefenseConfig(defense=("top_k",)))
    assert top.record["left_out"] == ["top_k"]


def test_local_steps_are_replayed_with_the_whole_batch(victim, params):
    client = ClientConfig(protocol="fedavg", local_batch_size=2, learning_rate=0.5)
    found = estimated(victim, params, client=client)
    assert all(0 < row["risk"] < 1 for row in found.record["images"])
    quiet = dataclasses.replace(client, learning_rate=0.01)
    less = estimated(victim, params, client=quiet)
    assert less.record["mean"] < found.record["mean"]


def test_an_audit_reports_it():
    config = AuditConfig(
        data=DataConfig(num_public=64),
        model=ModelConfig(model="mlp", widths=(8,)),
        attack="analytic",
        batch=2,
        risk=AuditRiskOptions(risk_images=1, risk_prior="low_rank", risk_prior_rank=4),
    )
    outcome = run_audit(config)
    validate_result(outcome.result)
    (row,) = outcome.result["risk"]["images"]
    assert row["attack_psnr"] == outcome.result["scores"]["psnr"]["per_image"][0]
    assert outcome.result["risk"]["prior_rank"] == 4
    assert outcome.pixel_errors is not None
    assert outcome.pixel_errors.shape == (1, 32, 32, 3)
    plain = run_audit(dataclasses.replace(config, risk=AuditRiskOptions()))
    assert "risk" not in plain.result
    assert plain.result["scores"] == outcome.result["scores"]


def test_what_is_refused():
    with pytest.raises(ValueError, match="exceeds batch=2"):
        AuditConfig(batch=2, risk=AuditRiskOptions(risk_images=3))
    with pytest.raises(ValueError, match="use num_clients=1"):
        AuditConfig(client=ClientConfig(num_clients=2), risk=AuditRiskOptions(risk_images=3))
    refused: tuple[dict[str, Any], ...] = ({"risk_noise_std": 0.0}, {"risk_prior_rank": 0})
    for bad in refused:
        with pytest.raises(ValueError, match=next(iter(bad))):
            AuditRiskOptions(**bad)
