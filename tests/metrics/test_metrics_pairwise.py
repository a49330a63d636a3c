import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.metrics import mse, pairwise, pairwise_mse

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def direct(a, b):
    differences = a[:, None].astype(np.float64) - b[None].astype(np.float64)
    return np.mean(np.square(differences), axis=(2, 3, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_subtraction(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 6, 7, 3)).astype(dtype), rng.random((3, 6, 7, 3)).astype(dtype)
    out = pairwise_mse(a, b)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, direct(a, b), rtol=1e-10)
    np.testing.assert_allclose(np.diag(out[:3]), np.asarray(mse(a[:3], b)), rtol=1e-5)


@pytest.mark.parametrize("delta", [1e-1, 1e-2, 1e-3, 1e-5, 1e-8, 1e-12])
def test_close_pairs_keep_their_digits(delta):
    rng = np.random.default_rng(1)
    b = rng.random((4, 8, 8, 3))
    a = b + delta * rng.standard_normal(b.shape)
    np.testing.assert_allclose(np.diag(pairwise_mse(a, b)), np.diag(direct(a, b)), rtol=1e-9)


def test_identical_images_are_exactly_zero_where_the_products_alone_are_not():
    b = np.random.default_rng(2).random((16, 9, 9, 3))
    assert np.all(np.diag(pairwise_mse(b, b)) == 0)
    flat = b.reshape(16, -1)
    power = (flat**2).sum(1)
    assert np.any(np.diag(power[:, None] + power - 2 * flat @ flat.T) != 0)  # why it matters


def test_blocks_of_pixels_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.random((4, 5, 5, 3)), rng.random((6, 5, 5, 3))
    whole = pairwise_mse(a, b)
    monkeypatch.setattr(pairwise, "_BLOCK_BYTES", 8 * 10 * 7)  # seven pixels at a time
    np.testing.assert_allclose(pairwise_mse(a, b), whole, rtol=1e-13)


def test_memory_stays_bounded():
    import tracemalloc

    a = np.zeros((200, 32, 32, 3), np.float32) + np.linspace(0, 1, 200, dtype=np.float32).reshape(
        -1, 1, 1, 1
    )
    tracemalloc.start()
    pairwise_mse(a, a)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 96 * 2**20 < 200 * 200 * 32 * 32 * 3 * 4  # far below one array of differences


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_image_spoils_only_its_own_row(bad):
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 4, 4, 1)), rng.random((2, 4, 4, 1))
    expected = direct(a, b)
    a[1, 0, 0, 0] = bad
    out = pairwise_mse(a, b)
    assert np.isnan(out[1]).all()
    np.testing.assert_allclose(out[[0, 2]], expected[[0, 2]], rtol=1e-12)


def test_huge_values_overflow_to_infinity_not_nan():
    a = np.full((1, 2, 2, 1), 1e200)
    assert pairwise_mse(a, np.zeros((1, 2, 2, 1))).tolist() == [[np.inf]]
    assert pairwise_mse(a, a).tolist() == [[0.0]]


def test_no_images_give_an_empty_matrix():
    b = np.zeros((3, 4, 4, 1))
    assert pairwise_mse(b[:0], b).shape == (0, 3)
    assert pairwise_mse(jnp.asarray(b), b[:0]).shape == (3, 0)


unit = st.floats(0, 1, width=32)


@given(hnp.arrays(np.float64, (3, 2, 2, 1), elements=unit))
def test_symmetric_zero_diagonal_and_non_negative(images):
    out = pairwise_mse(images, images)
    np.testing.assert_allclose(out, out.T, rtol=1e-9, atol=1e-300)
    assert np.all(np.diag(out) == 0)
    assert np.all(out >= 0)


@pytest.mark.usefixtures("as_users_run")
def test_refusals():
    a = np.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="one shape"):
        pairwise_mse(a, np.zeros((2, 2, 8, 1)))
    with pytest.raises(ValueError, match="a must be floating point, got uint8"):
        pairwise_mse(a.astype(np.uint8), a)
    with pytest.raises(ValueError, match="b must be a stack"):
        pairwise_mse(a, np.zeros(3))
