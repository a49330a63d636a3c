"""Crafted models, images and updates that the attack's tests share."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.config import AresOptions, ClientConfig, PerformanceFlags
from jgia.data import load_dataset
from jgia.federated import client_update
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Reconstruction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A crafted model with images to try it on."""

    victim: Victim
    params: Any
    plan: ares.Plan
    images: np.ndarray
    labels: np.ndarray
    public: np.ndarray

    def observe(self, images=None, labels=None, *, params=None, config=None) -> Observation:
        """The update of a client that holds ``images`` (the first eight when left out)."""
        images = self.images[:8] if images is None else images
        labels = self.labels[: len(images)] if labels is None else labels
        return client_update(
            jax.random.key(1),
            self.victim,
            self.params if params is None else params,
            images,
            labels,
            config or ClientConfig(),
        )

    def attack(self, images=None, labels=None, *, config=None, **kwargs) -> Reconstruction:
        """The whole public path: one client's update, then the attack on nothing else."""
        observation = self.observe(images, labels, config=config)
        kwargs = {"performance": PerformanceFlags(microbatch=16), **kwargs}
        return ares.attack(jax.random.key(2), observation, **kwargs)

    def bins_of(self, images) -> np.ndarray:
        """The bin that each image falls into, -1 below the first threshold (the truth)."""
        planes = np.transpose(np.asarray(self.victim.normalization.normalize(images)), (3, 1, 2, 0))
        q = ares.query_features(
            self.plan.measurement(self.victim), self.plan.query, jax.numpy.asarray(planes)
        )
        return np.searchsorted(self.plan.thresholds, q, side="left") - 1


@pytest.fixture(scope="session")
def pools():
    """Bundled crops cut to 16 x 16: (client images, client labels, public images)."""
    dataset = load_dataset("sample")
    images, labels = dataset.take(np.arange(len(dataset)))
    images = images[:, 8:24, 8:24]
    assert dataset.public is not None
    private = ~dataset.public
    return images[private], labels[private], images[dataset.public][:128]


@pytest.fixture(scope="session")
def make_setting(pools):
    """Craft a model; the same arguments give the same object."""

    @functools.cache
    def make(
        *,
        widths=(12, 12),
        fc_width=128,
        seed=0,
        normalize=True,
        gray=False,
        options=None,
    ) -> Setting:
        options = options or AresOptions(front_end_trials=4)
        images, labels, public = pools
        if gray:
            images, public = images[..., :1], public[..., :1]
        channels = images.shape[-1]
        normalization = Normalization.fit(public) if normalize else Normalization.identity(channels)
        victim = make_victim(
            "cnn",
            input_shape=images.shape[1:],
            num_classes=int(labels.max()) + 1,
            normalization=normalization,
            widths=widths,
            fc_width=fc_width,
        )
        params, plan = ares.craft(jax.random.key(seed), victim, public, options=options)
        return Setting(
            victim=victim, params=params, plan=plan, images=images, labels=labels, public=public
        )

    return make


@pytest.fixture(scope="session")
def setting(make_setting) -> Setting:
    return make_setting()


@pytest.fixture(scope="session")
def observation(setting) -> Observation:
    """The update of eight images on the crafted model."""
    return setting.observe()


@pytest.fixture(scope="session")
def reconstruction(setting) -> Reconstruction:
    """What the attack makes of it."""
    return setting.attack()


def _psnr(a, b) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(min(200.0, -10 * np.log10(max(error, 1e-20))))


@pytest.fixture(scope="session")
def best_psnr():
    """For each image, the PSNR of its best match among others, in dB: an oracle of its own."""

    def best(images, others) -> np.ndarray:
        return np.array([max((_psnr(a, b) for b in others), default=0.0) for a in images])

    return best
