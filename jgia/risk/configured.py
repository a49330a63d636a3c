"""Releases and priors as the options of commands describe them."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jgia.config import ClientConfig
from jgia.config.risk import PriorName
from jgia.models import Victim
from jgia.observation import ThreatModel
from jgia.risk.prior import Prior
from jgia.risk.release import UpdateRelease


def client_release(
    client: ClientConfig,
    victim: Victim,
    *,
    num_examples: int,
    visible_layers: tuple[str, ...] | None,
    clip_norm: float | None,
) -> UpdateRelease:
    """The update of a client with so many images, whatever an attacker is told of it."""
    threat = ThreatModel(server="honest_but_curious", visible_layers=visible_layers)
    if client.protocol == "fedavg":
        per_epoch = math.ceil(num_examples / (client.local_batch_size or num_examples))
        threat = dataclasses.replace(
            threat,
            protocol="fedavg",
            local_steps=client.local_epochs * per_epoch,
            local_epochs=client.local_epochs,
            local_batch_size=client.local_batch_size,
            local_learning_rate=client.learning_rate,
            local_optimizer=client.optimizer,
            local_momentum=client.momentum,
        )
    return UpdateRelease(victim=victim, threat_model=threat, clip_norm=clip_norm)


def make_prior(
    name: PriorName, pixels: np.ndarray, *, rank: int = 64, shrinkage: float = 1e-3
) -> Prior:
    """The prior of a name from public images (N, H, W, C)."""
    if name == "isotropic":
        flat = Prior.isotropic(pixels[0].size, variance=float(pixels.var(axis=0).mean()))
        mean = jnp.asarray(pixels.reshape(len(pixels), -1).mean(axis=0), flat.mean.dtype)
        return dataclasses.replace(flat, mean=mean)
    if name == "low_rank":
        return Prior.low_rank(pixels, rank=rank)
    return Prior.from_data(pixels, shrinkage=shrinkage)
