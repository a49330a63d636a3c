"""Small victims in float64, whose Jacobians fit anywhere."""

import jax
import numpy as np
import pytest

from jgia.models import make_victim
from jgia.normalization import Normalization
from jgia.risk import UpdateRelease

NETS = {
    "mlp": ((4, 4, 1), {"model": "mlp", "widths": (7, 5)}),
    "wide": ((4, 4, 1), {"model": "mlp", "widths": (30,)}),
    "lenet": ((4, 4, 2), {"model": "lenet", "widths": (2,)}),
    "resnet": ((4, 4, 1), {"model": "resnet", "widths": (2, 3), "norm": "group"}),
}


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype("float64"), tree)


def _build(name):
    shape, options = NETS[name]
    channels = shape[-1]
    victim = make_victim(
        options["model"],
        input_shape=shape,
        num_classes=3,
        normalization=Normalization((0.4,) * channels, (0.3,) * channels),
        **{key: value for key, value in options.items() if key != "model"},
    )
    return victim, wide(victim.init(jax.random.key(0)))


@pytest.fixture(scope="session")
def build():
    """A function from a name to (victim, parameters)."""
    return _build


@pytest.fixture(scope="session")
def case():
    """A function from a name to (release, parameters, images, labels)."""

    def make(name, count=4, **options):
        victim, params = _build(name)
        images = np.random.default_rng(0).uniform(size=(count, *victim.input_shape))
        labels = np.arange(count) % 3
        return UpdateRelease(victim=victim, **options), params, images, labels

    return make
