"""Several local steps and adaptive optimizers: what scaled parameters still give away."""

import dataclasses

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.config import AresOptions, ClientConfig, PerformanceFlags
from jgia.federated import client_update

SMALL = PerformanceFlags(microbatch=16)


def _recovered(setting, best_psnr, client, options):
    params, plan = ares.craft(
        jax.random.key(0),
        setting.victim,
        setting.public,
        options=options,
        num_examples=8,
        client=client,
    )
    observation = client_update(
        jax.random.key(1), setting.victim, params, setting.images[:8], setting.labels[:8], client
    )
    result = ares.attack(jax.random.key(2), observation, plan=plan, performance=SMALL)
    return best_psnr(setting.images[:8], result.images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "least"),
    [
        (ClientConfig(protocol="fedavg", learning_rate=0.01, local_batch_size=2), 7),
        (
            ClientConfig(
                protocol="fedavg",
                learning_rate=0.003,
                local_batch_size=2,
                optimizer="momentum",
            ),
            7,
        ),
        (ClientConfig(protocol="fedavg", learning_rate=1e-3, optimizer="adam"), 8),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_scales_chosen_for_the_client_keep_the_update_readable(client, least, setting, best_psnr):
    chosen = _recovered(setting, best_psnr, client, AresOptions(front_end_trials=1))
    assert np.sum(chosen > 40) >= least
    plain = AresOptions(front_end_trials=1, head_gain=1.0, front_scale=1.0, imprint_scale=1.0)
    assert np.sum(_recovered(setting, best_psnr, client, plain) > 40) < least


def test_scales_follow_the_client():
    def scales(client, num_examples=32, num_bins=1024):
        return AresOptions().scales(client, num_examples=num_examples, num_bins=num_bins)

    steps = ClientConfig(protocol="fedavg", local_batch_size=8, learning_rate=0.01)
    assert scales(ClientConfig()) == (1.0, 1.0, 1.0)
    assert scales(ClientConfig(protocol="fedavg")) == (1.0, 1.0, 1.0)
    assert scales(steps, num_examples=8) == (1.0, 1.0, 1.0)
    assert scales(steps, num_bins=512)[0] == scales(steps)[0] / 2 < 1
    mine = AresOptions(head_gain=0.5, front_scale=0.25, imprint_scale=0.125)
    assert mine.scales(steps, num_examples=32, num_bins=1024) == (0.5, 0.25, 0.125)


@pytest.mark.parametrize("name", ["head_gain", "front_scale", "imprint_scale"])
def test_scales_must_be_positive(name):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(AresOptions(), **{name: 0.0})
