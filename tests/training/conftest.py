"""Tiny data and models for training tests."""

import numpy as np
import pytest

from jgia.config import ModelConfig
from jgia.data import Dataset
from jgia.models import make_victim
from jgia.normalization import Normalization


@pytest.fixture(scope="session")
def stripes():
    """Horizontal against vertical stripes with noise: (6, 4, 1) bytes that a network can learn."""

    def make(count: int = 24, seed: int = 0) -> Dataset:
        rng = np.random.default_rng(seed)
        labels = (np.arange(count) % 2).astype(np.int32)
        rows, columns = np.indices((6, 4))
        pattern = np.where(labels[:, None, None] == 0, rows % 2, columns % 2)
        images = 60 + 100 * pattern + rng.integers(0, 60, (count, 6, 4))
        return Dataset(
            images[..., None].astype(np.uint8), labels, ("rows", "columns"), "stripes", "Made up."
        )

    return make


@pytest.fixture(scope="session")
def models():
    """A model's options and the victim that they make for stripes."""

    def make(name: str):
        config = {
            "mlp": ModelConfig(model="mlp", widths=(5,)),
            "resnet": ModelConfig(model="resnet", widths=(3,), fc_width=4),
        }[name]
        normalization = Normalization((0.5,), (0.2,))
        return config, make_victim(
            config.model,
            input_shape=(6, 4, 1),
            num_classes=2,
            normalization=normalization,
            **config.architecture(),
        )

    return make
