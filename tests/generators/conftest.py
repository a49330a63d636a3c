"""Tiny networks, with parameters that NumPy fills: nothing is compiled to make them."""

import math

import jax
import numpy as np
import pytest

from jgia.config.prior import PriorOptions
from jgia.generators.stylegan2 import StyleGAN2


def _filled(shapes, seed=0, *, scaled=False):
    """Random leaves of given shapes: kernels of variance 1 (``scaled``: over their fan in)."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        if name == "flat_std" or name == "variance":
            values = rng.uniform(0.5, 1.5, shape.shape)
        elif name in ("kernel", "constant", "embedding"):
            values = rng.normal(size=shape.shape)
            if scaled and name == "kernel":
                values /= math.sqrt(math.prod(shape.shape[:-1]))
        else:
            values = 0.3 * rng.normal(size=shape.shape)
        return jax.numpy.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="session")
def filled():
    return _filled


@pytest.fixture(scope="session")
def sides():
    """Makes side inputs as ``draw`` shapes them, of NumPy's normal numbers."""

    def make(generator, params, num_images=2, labels=None, seed=1):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(
            lambda p, y: generator.draw(p, jax.random.key(0), num_images, y), params, labels
        )
        return jax.tree.map(
            lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
        )

    return make


@pytest.fixture(scope="session")
def tiny():
    """Makes a StyleGAN2 generator of 8 pixels (two blocks) or more, and parameters for it."""

    def make(seed=0, **fields):
        sizes = {"resolution": 8, "base": 64, "max_features": 8}
        sizes |= {"latent_dim": 8, "style_dim": 8, "mapping_layers": 2}
        generator = StyleGAN2(**{**sizes, **fields})
        params = _filled(jax.eval_shape(generator.init, jax.random.key(0)), seed)
        # The mapping network's weights are larger by as much as their learning rate is smaller.
        mapping = {
            name: layer if name == "embed" else jax.tree.map(lambda leaf: 100 * leaf, layer)
            for name, layer in params["mapping"].items()
        }
        return generator, {**params, "mapping": mapping}

    return make


@pytest.fixture(scope="session")
def options():
    """Options of a training run of the tiny network, in batches of four."""

    def make(**fields):
        sizes = {"resolution": 8, "base": 64, "max_features": 8, "latent_dim": 8, "style_dim": 8}
        run = {"mapping_layers": 1, "prior_batch": 4, "kimg": 0.02, "precision": "float32"}
        return PriorOptions(**{**sizes, **run, **fields})

    return make


@pytest.fixture
def single_precision():
    """As users have it: no float64."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="session")
def count():
    return lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
