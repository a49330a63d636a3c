"""The attack behind the realized figures: on linear releases it does what is predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config import DefenseConfig
from jgia.config.explain import SoteriaOptions
from jgia.explain import DeclaredChannel, check_dense, explain_defense, most_probable
from jgia.explain.records import explanation_rows
from jgia.models import make_victim
from jgia.observation import ThreatModel
from jgia.risk import EmbeddingRelease, Prior, UpdateRelease

pytestmark = pytest.mark.slow

D, P = 6, 20
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(P, D)) * np.geomspace(0.05, 2, D)
PRIOR = Prior.from_data(RNG.uniform(size=(30, D)))
IMAGE = RNG.uniform(size=(1, D, 1))
VICTIM = make_victim("mlp", input_shape=(1, D, 1), num_classes=3, widths=(4,))


def linear(params, image, labels):
    return {"a": params @ image.reshape(-1), "b": image.reshape(-1)[:2] * 0.3}


def curved(params, image, labels):
    return jnp.tanh(params @ image.reshape(-1))


def explained(defense, release=linear, draws=60, **options):
    return explain_defense(
        jax.random.key(1),
        defense,
        release,
        jnp.asarray(WEIGHTS),
        IMAGE,
        0,
        **{"prior": PRIOR, "noise_std": 0.05, "num_draws": draws, **options},
    )


@pytest.mark.parametrize(
    "defense",
    [
        None,
        DefenseConfig(defense=("gaussian",), noise_std=0.3),
        DefenseConfig(defense=("laplace",), noise_std=0.3),
        DefenseConfig(defense=("top_k",), keep_fraction=0.4),
        DefenseConfig(defense=("quantize_stochastic",), num_bits=5),
    ],
    ids=lambda d: "none" if d is None else d.defense[0],
)
def test_on_a_linear_release_the_attack_realizes_what_is_predicted(defense):
    found = explained(defense)
    assert found.converged.all()
    assert found.linearization_ratio < 1e-6
    slack = 4.5 * found.standard_error
    if defense is not None and defense.defense == ("quantize_stochastic",):
        slack = 0.4 * found.expected  # a mean over places between levels, not this one's
    assert abs(found.realized - found.expected) < slack
    assert abs(found.realized - 2 * found.expected) > slack


def test_the_estimate_is_the_posterior_mean_for_correlated_noise():
    factor, variance = RNG.normal(size=(P, 2)), RNG.uniform(0.1, 1, P)
    noise = np.diag(variance) + factor @ factor.T
    mean, rows = np.asarray(PRIOR.mean), np.asarray(PRIOR.factor)
    seen = WEIGHTS @ IMAGE.reshape(-1) + np.sqrt(variance) * RNG.normal(size=P)
    seen = seen + factor @ RNG.normal(size=2)
    channel = DeclaredChannel(
        value=lambda x: WEIGHTS @ x,
        linear=lambda x: (WEIGHTS @ x, WEIGHTS),
        kept=np.ones(P, bool),
        variance=variance,
        factor=factor,
    )
    found = most_probable(channel, seen, mean, rows)
    precision = np.linalg.inv(rows.T @ rows) + WEIGHTS.T @ np.linalg.solve(noise, WEIGHTS)
    pull = WEIGHTS.T @ np.linalg.solve(noise, seen - WEIGHTS @ mean)
    expected = mean + np.linalg.solve(precision, pull)
    deviations = np.sqrt(np.diag(np.linalg.inv(precision)))
    assert found.converged
    assert np.max(np.abs(found.image - expected) / deviations) < 0.05
    blind = most_probable(channel._replace(factor=None), seen, mean, rows).image
    assert np.max(np.abs(blind - expected) / deviations) > 0.2


def test_a_curved_release_says_that_it_is_not_what_was_predicted():
    found = explained(
        DefenseConfig(defense=("gaussian",), noise_std=0.5), curved, draws=40, noise_std=0.2
    )
    straight = explained(DefenseConfig(defense=("gaussian",), noise_std=0.5), draws=2)
    assert found.linearization_ratio > 0.1 > straight.linearization_ratio
    (row,) = explanation_rows([[found]])
    assert row["ratio"] == pytest.approx(found.realized / found.expected)
    assert row["linearization_ratio"] == pytest.approx(found.linearization_ratio)


def test_an_end_that_the_noise_does_not_explain_is_not_converged():
    """Attributed to a release that could not have made it: a wrong channel is noticed."""
    found = explained(None, lambda params, image, labels: jnp.abs(image.reshape(-1)) * 0.01)
    assert found.converged.all()
    channel = DeclaredChannel(
        value=lambda x: WEIGHTS @ x,
        linear=lambda x: (WEIGHTS @ x, WEIGHTS),
        kept=np.ones(P, bool),
        variance=np.full(P, 1e-4),
        factor=None,
    )
    mean, rows = np.asarray(PRIOR.mean), np.asarray(PRIOR.factor)
    true = WEIGHTS @ IMAGE.reshape(-1)
    assert most_probable(channel, true + 0.01 * RNG.normal(size=P), mean, rows).converged
    assert not most_probable(channel, true + 0.1 * RNG.normal(size=P), mean, rows).converged


def test_a_release_that_is_not_finite_leaves_the_prior_mean_and_says_so():
    mean, rows = np.asarray(PRIOR.mean), np.asarray(PRIOR.factor)
    channel = DeclaredChannel(
        value=lambda x: np.full(P, np.nan),
        linear=lambda x: (np.full(P, np.nan), WEIGHTS),
        kept=np.ones(P, bool),
        variance=np.ones(P),
        factor=None,
    )
    found = most_probable(channel, np.zeros(P), mean, rows)
    assert not found.converged
    np.testing.assert_array_equal(found.image, mean)
    with pytest.raises(ValueError, match="must be positive"):
        most_probable(channel._replace(variance=np.zeros(P)), np.zeros(P), mean, rows)
    with pytest.raises(ValueError, match="agree"):
        most_probable(channel, np.zeros(P + 1), mean, rows)


def test_the_truth_only_scores():
    """Another image behind the same observation changes the score, not the estimate."""
    first = explained(None, draws=2)
    again = explained(None, draws=2)
    np.testing.assert_array_equal(first.errors, again.errors)


def test_rows_are_means_over_inputs():
    with pytest.raises(ValueError, match="every defense"):
        explanation_rows([[], []])
    parts = [explained(None, draws=2), explained(None, draws=3)]
    (row,) = explanation_rows([parts])
    assert row["realized"] == pytest.approx(np.mean([part.realized for part in parts]))
    spread = np.hypot(parts[0].standard_error, parts[1].standard_error) / 2
    assert row["standard_error"] == pytest.approx(spread)
    assert row["invloss_before"] == row["invloss"]


GAUSSIAN = DefenseConfig(defense=("gaussian",))
DP_SGD = DefenseConfig(defense=("dp_sgd",))
FEDAVG = ThreatModel(
    server="honest_but_curious", protocol="fedavg", local_steps=1, local_learning_rate=0.1
)


@pytest.mark.parametrize(
    ("defense", "options", "message"),
    [
        (SoteriaOptions(), {"release": EmbeddingRelease(victim=VICTIM, layer="fc1")}, "soteria"),
        (DP_SGD, {"release": linear}, "not an update"),
        (DP_SGD, {"release": UpdateRelease(victim=VICTIM, threat_model=FEDAVG)}, "FedSGD"),
        (DP_SGD, {"release": UpdateRelease(victim=VICTIM, clip_norm=1.0)}, "--clip-norm"),
        (SoteriaOptions(layer="conv1"), {"release": UpdateRelease(victim=VICTIM)}, "head"),
        (DefenseConfig(defense=("clip", "gaussian")), {}, "one defense at a time"),
        (DefenseConfig(), {}, "one defense at a time"),
        (GAUSSIAN, {"noise_std": 0.0}, "noise_std"),
        (GAUSSIAN, {"draws": 1}, "num_draws"),
        (GAUSSIAN, {"memory_bytes": 100}, "GiB"),
        (GAUSSIAN, {"prior": Prior.isotropic(4, variance=1.0)}, "6"),
        (GAUSSIAN, {"prior": Prior.low_rank(RNG.uniform(size=(9, D)), rank=2)}, "full rank"),
        (
            GAUSSIAN,
            {
                "release": UpdateRelease(
                    victim=VICTIM,
                    threat_model=ThreatModel(server="honest_but_curious", visible_layers=("head",)),
                )
            },
            "--visible-layers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_compute(defense, options, message):
    with pytest.raises(ValueError, match=message):
        explained(defense, **options)


def test_too_many_pixels_say_how_much_memory():
    with pytest.raises(ValueError, match=r"3,072 pixels, about 2\.16 GiB"):
        check_dense(10_000, 3072, memory_bytes=2**40)
