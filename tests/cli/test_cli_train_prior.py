import dataclasses
from typing import Any

import numpy as np
import pytest

from jgia.config import DataConfig
from jgia.config.prior import TrainPriorConfig
from jgia.train_prior_command import grid, run_prior_training, training_images

SMALL: dict[str, Any] = {
    "resolution": 16,
    "base": 64,
    "max_features": 4,
    "latent_dim": 4,
    "style_dim": 4,
}


@pytest.fixture
def config(tmp_path):
    return TrainPriorConfig(
        data=DataConfig(data="faces:64"),
        out=tmp_path / "prior",
        prior_batch=8,
        kimg=0.016,
        kid_images=0,
        license="Apache-2.0",
        name="drawn",
        **SMALL,
    )


def test_images_are_the_public_ones_at_the_generators_size(config):
    images = training_images(config)
    assert images.image_shape == (16, 16, 3)
    assert len(images) == 32


def test_a_grid_holds_every_image_in_order():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    sheet = grid(images)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert grid(images[..., :1]).shape == (4, 6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kimg": 0.0}, "kimg must be positive"),
        ({"prior_batch": 0}, "prior_batch must be at least 1"),
        ({"r1_gamma": -1.0}, "r1_gamma must be zero or more"),
        ({"kid_images": 5}, "kid_images must be at least 100"),
        ({"data": DataConfig(num_public=3)}, "leave num_public out"),
    ],
)
def test_bad_options_are_refused(config, change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(config, **change)


def test_a_resolution_that_no_generator_has_is_refused(config):
    with pytest.raises(ValueError, match="power of two"):
        run_prior_training(dataclasses.replace(config, resolution=24))


def test_images_of_another_size_are_refused(config):
    other = dataclasses.replace(config.data, image_size=32)
    with pytest.raises(ValueError, match="16 x 16"):
        run_prior_training(dataclasses.replace(config, data=other))
