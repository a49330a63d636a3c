"""Deeper convolutional networks: strides, pooling, residual blocks, batch normalization."""

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.attacks.ares.predict import LARGEST_MISPREDICTION, imprint_inputs, misprediction
from jgia.config import AresOptions, FrontEnd, PerformanceFlags
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.normalization import Normalization

OPTIONS = AresOptions(front_end_trials=1)


def _attack(pools, name, batch=4, options=OPTIONS, **architecture):
    images, labels, public = pools
    victim = make_victim(
        name,
        input_shape=images.shape[1:],
        num_classes=int(labels.max()) + 1,
        normalization=Normalization.fit(public),
        **{"fc_width": 96, **architecture},
    )
    params, plan = ares.craft(jax.random.key(0), victim, public, options=options)
    observation = client_update(jax.random.key(1), victim, params, images[:batch], labels[:batch])
    performance = PerformanceFlags(microbatch=4)
    result = ares.attack(
        jax.random.key(2), observation, plan=plan, options=options, performance=performance
    )
    return result, images[:batch], plan, victim, observation


DEEP = {
    "three convolutions": ("cnn", {"widths": (12, 12, 12)}, 100, {"exact", "rank_deficient"}),
    "stride, enough channels": ("cnn", {"widths": (12, 48), "strides": (1, 2)}, 100, {"exact"}),
    "residual, batch norm": (
        "resnet",
        {"widths": (16, 64), "strides": (1, 2), "batch_norm": "eval"},
        80,
        {"exact", "rank_deficient"},
    ),
    "average pooling": (
        "cnn",
        {"widths": (32,), "pool": "average"},
        22,
        {"regularised", "rank_deficient"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DEEP)
def test_images_come_through_deeper_networks(case, pools, best_psnr):
    name, architecture, least, statuses = DEEP[case]
    result, images, plan, victim, observation = _attack(pools, name, **architecture)
    assert {str(s) for s in result.statuses} <= statuses
    assert np.sum(best_psnr(images, result.images) > least) >= 3
    # The plan can be read off the parameters, and what enters the imprint layer is what it says.
    again = ares.read_plan(victim, observation.params)
    np.testing.assert_array_equal(again.channels, plan.channels)
    np.testing.assert_array_equal(again.query, plan.query)
    measured = plan.measurement(victim)
    inputs = victim.normalization.normalize(jax.numpy.asarray(images))
    seen = np.asarray(imprint_inputs(victim, plan.fc_name, observation.params, inputs))
    seen = seen.reshape(len(images), *plan.query.shape[:2], -1)[..., : len(plan.channels)]
    planes = jax.numpy.transpose(inputs, (3, 1, 2, 0)).astype(np.float32)
    linear = np.asarray(measured.operator.apply(planes)) + measured.bias[..., None]
    expected = np.moveaxis(np.maximum(linear, 0), -1, 0)
    difference = np.moveaxis(seen, -1, 1) - expected
    assert np.abs(difference[:, measured.exact]).max() < 1e-4


@pytest.mark.slow
def test_mixtures_behind_average_pooling_fail_to_reproduce_what_was_not_solved_for(pools):
    architecture = {"widths": (32,), "pool": "average", "fc_width": 12}
    result, images, plan, victim, observation = _attack(pools, "cnn", 24, **architecture)
    statuses = [record["status"] for record in result.candidates]
    assert "mixture" in statuses
    candidates = ares.leak(observation, plan)
    planes = np.transpose(np.asarray(victim.normalization.normalize(images)), (3, 1, 2, 0))
    measured = plan.measurement(victim)
    q = ares.query_features(measured, plan.query, jax.numpy.asarray(planes, np.float32))
    bins = np.searchsorted(plan.thresholds, q, side="left") - 1
    shared = {int(b) for b in bins if np.sum(bins == b) > 1}
    for record in result.candidates:
        if record["bin"] in shared:
            assert record["status"] == "mixture"
    # The truth reproduces every channel; another image does not.
    alone = [i for i, b in enumerate(bins) if int(b) not in shared]
    order = [int(np.flatnonzero(candidates.bins == bins[i])[0]) for i in alone]
    chosen = candidates.take(np.asarray(order))
    assert misprediction(chosen, images[alone], plan, victim).max() < 1e-4
    wrong = misprediction(chosen, np.roll(images[alone], 1, axis=0), plan, victim)
    assert wrong.min() > LARGEST_MISPREDICTION


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("resnet", {"batch_norm": "train"}, "couple the examples"),
        ("resnet", {"norm": "group"}, "group normalization"),
        ("cnn", {"pool": "max"}, "maxima"),
        ("resnet", {"head": "pool"}, "fully connected"),
    ],
)
def test_what_no_parameters_make_linear_is_refused_with_the_reason(
    name, architecture, message, pools
):
    with pytest.raises(ValueError, match=message):
        _attack(pools, name, **architecture)


def test_front_ends_that_need_what_is_not_there_are_refused(pools):
    refused: list[tuple[FrontEnd, str]] = [("signed", "6 channels"), ("principal", "multilayer")]
    for front_end, message in refused:
        options = AresOptions(front_end=front_end)
        with pytest.raises(ValueError, match=message):
            _attack(pools, "cnn", options=options, widths=(12, 12), strides=(1, 2))
