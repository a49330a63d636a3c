"""One affine map for client, attacker and scorer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.normalization import Normalization

_positive = st.floats(0.01, 10.0)


@given(
    stats=st.lists(st.tuples(st.floats(-2, 2), _positive), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_denormalize_undoes_normalize(stats, seed):
    mean, std = zip(*stats, strict=True)
    norm = Normalization(mean, std)
    x = np.random.default_rng(seed).uniform(size=(2, 3, 3, len(stats)))
    np.testing.assert_allclose(norm.denormalize(norm.normalize(x)), x, atol=1e-12)
    expected = (x - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(norm.normalize(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 4, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shape_and_dtype_are_kept(shape, dtype):
    norm = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    x = np.ones(shape, dtype)
    for y in (norm.normalize(x), norm.denormalize(x), jax.jit(norm.normalize)(x)):
        assert y.shape == shape
        assert y.dtype == dtype


def test_fit_whitens_each_channel():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 6, 6, 3)) * np.array([0.2, 0.5, 1.0])
    normalized = np.asarray(Normalization.fit(images).normalize(images))
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(normalized.std(axis=(0, 1, 2)), 1, rtol=1e-12)


def test_constant_channel_stays_defined():
    images = np.random.default_rng(0).uniform(size=(4, 5, 5, 2))
    images[..., 1] = 0.25
    norm = Normalization.fit(images)
    assert norm.std[1] == 1.0
    assert not np.any(np.asarray(norm.normalize(images))[..., 1])


def test_identity_changes_nothing():
    x = jnp.linspace(0, 1, 12).reshape(2, 2, 3)
    np.testing.assert_array_equal(Normalization.identity(3).normalize(x), x)


def test_is_hashable_and_compares_by_value():
    one, two = (Normalization((0.5,), (0.25,)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Normalization((0.5,), (0.26,))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), "one value per channel"),
        ((0.1, 0.2), (0.3,), "got 2 and 1"),
        ((float("nan"),), (1.0,), "mean must be finite"),
        ((0.0,), (0.0,), "std must be positive"),
        ((0.0,), (-1.0,), "std must be positive"),
        ((0.0,), (float("inf"),), "std must be positive"),
    ],
)
def test_constants_that_make_no_sense_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalization(mean, std)


@pytest.mark.parametrize("shape", [(4, 4, 1), (3, 4, 4), ()])
def test_images_with_other_channels_are_refused(shape):
    norm = Normalization((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    for function in (norm.normalize, norm.denormalize):
        with pytest.raises(ValueError, match="3 channels in their last axis"):
            function(np.zeros(shape))
