"""What quantization and sparsification took is read off the values they left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.coarseness import coarseness
from jgia.defenses import keep_top_k, quantize_nearest, quantize_stochastic


def _defended(transformation, values):
    tree = {"w": jnp.asarray(values, jnp.float32)}
    return np.asarray(transformation.update(tree, transformation.init(tree))[0]["w"])


def _values(seed=0, shape=(300, 40)):
    """Columns of very different sizes, as the gradients of neurons are, some of them zero."""
    rng = np.random.default_rng(seed)
    columns = np.exp(rng.normal(0, 1.5, shape[1])) * (rng.random(shape[1]) < 0.8)
    return np.float32(rng.standard_normal(shape) * columns)


ROUNDINGS = {
    "nearest": (lambda bits: quantize_nearest(num_bits=bits), 1 / np.sqrt(12)),
    "stochastic": (lambda bits: quantize_stochastic(jax.random.key(1), num_bits=bits), 1 / 6**0.5),
}


@pytest.mark.parametrize("bits", [4, 8, 12, 16, 20])
@pytest.mark.parametrize("kind", ROUNDINGS)
def test_grid_is_found_and_its_loss_is_right(kind, bits):
    make, factor = ROUNDINGS[kind]
    values = _values()
    seen = _defended(make(bits), values)
    found = coarseness(seen)
    assert found.levels == 2 ** (bits - 1) - 1
    told = found.lost_std(seen)
    step = np.abs(values).max() / found.levels
    assert told == pytest.approx(step / np.sqrt(6))
    if bits > 8:  # else entries are not anywhere between two levels
        real = np.sqrt(np.mean((seen.astype(float) - values)[values != 0] ** 2))
        assert real == pytest.approx(factor * step, rel=0.25)


@pytest.mark.parametrize("fraction", [0.6, 0.4])
def test_cut_is_found_and_its_loss_bounds_the_real_one(fraction):
    values = _values()
    seen = _defended(keep_top_k(keep_fraction=fraction), values)
    found = coarseness(seen)
    assert found.threshold == np.abs(seen[seen != 0]).min()
    real = np.sqrt(np.mean((seen.astype(float) - values) ** 2))
    assert real < found.lost_std(seen) < 4 * real


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_values_that_nobody_touched(seed):
    values = np.asarray(_values(seed))
    assert coarseness(values).lost_std(values) == 0
    sparse = np.asarray(np.where(values > 0, values, 0))
    assert coarseness(sparse).lost_std(sparse) == 0
    one = np.outer(np.random.default_rng(seed).uniform(0.1, 1, 300), np.arange(40) < 9)
    assert coarseness(one).lost_std(one) == 0


def test_few_entries_prove_nothing():
    few = np.zeros((50, 40))
    few[0] = 1.0
    assert coarseness(few).lost_std(few) == 0
    assert coarseness(np.zeros((0, 3))).lost_std(np.zeros((0, 3))) == 0


def test_another_array_of_the_update_has_its_own_step():
    found = coarseness(_defended(quantize_nearest(num_bits=8), _values()))
    assert found.lost_std(np.array([0.5, -2.0])) == pytest.approx(2 / 127 / np.sqrt(6))
