import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jgia.defenses import DropoutLoss
from jgia.defenses import augment as eager
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization

augment = jax.jit(eager, static_argnames=("policy", "crop_padding", "jitter"))
MLP = make_victim("mlp", input_shape=(3, 2, 1), num_classes=3, widths=(6, 4))
PIXELS = jnp.asarray(np.random.default_rng(0).random((5, 3, 2, 1)))
LABELS = jnp.array([0, 1, 2, 1, 0])


def _params(victim):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), victim.param_shapes()
    )


def _losses_of_all_masks(params, pixels, label, layer, rate):
    """The victim by hand, once per possible mask on the layer's input."""
    values = np.asarray(pixels).reshape(1, -1)
    for name in ("fc1", "fc2", "head"):
        kernel, bias = (np.asarray(params[name][part]) for part in ("kernel", "bias"))
        if name == layer:
            masks = np.array(list(itertools.product([0, 1], repeat=len(kernel))))
            values = values * masks / (1 - rate)
        values = values @ kernel + bias
        values = np.maximum(values, 0) if name != "head" else values
    return np.log(np.exp(values).sum(axis=1)) - values[:, label]


@pytest.mark.parametrize("layer", ["fc1", "fc2", "head"])
def test_dropout_is_the_loss_under_some_mask_on_that_layer_alone(layer):
    params, rate = _params(MLP), 0.4
    loss = jax.jit(DropoutLoss(victim=MLP, rate=rate, layer=layer))
    possible = _losses_of_all_masks(params, PIXELS[0], 2, layer, rate)
    unscaled = _losses_of_all_masks(params, PIXELS[0], 2, layer, 0.0)
    seen = [float(loss(params, PIXELS[:1], jnp.array([2]), jax.random.key(s))) for s in range(12)]
    assert all(np.abs(possible - value).min() < 1e-12 for value in seen)
    assert sum(np.abs(unscaled - value).min() < 1e-12 for value in seen) < 6
    assert len(set(seen)) > 1


def test_dropout_has_the_declared_rate_and_masks_are_independent():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(x.reshape((x.shape[0], -1)))

    victim = Victim(Wide(), (50, 50, 1), 2, Normalization.identity(1))
    params = {"head": {"kernel": jnp.ones((2500, 2)), "bias": jnp.zeros(2)}}
    loss = DropoutLoss(victim=victim, rate=0.3)
    images = jnp.ones((4, 50, 50, 1))

    def gradient_rows(image, label, key):
        rows = jax.grad(loss)(params, image[None], label[None], key)["head"]["kernel"]
        return rows[:, 0]

    rows = jax.jit(jax.vmap(gradient_rows))(
        images, jnp.zeros(4, "int32"), jax.random.split(jax.random.key(3), 4)
    )
    masks = np.asarray(rows) != 0
    count = int((~masks).sum())
    assert stats.binomtest(count, masks.size, 0.3).pvalue > 1e-4
    assert stats.binomtest(count, masks.size, 0.33).pvalue < 1e-4
    for one, two in itertools.combinations(masks, 2):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


def test_examples_of_one_batch_get_masks_of_their_own():
    params = jax.tree.map(jnp.abs, _params(MLP))  # every neuron is on
    same, labels = jnp.repeat(PIXELS[:1], 20, axis=0), jnp.zeros(20, "int32")
    loss = DropoutLoss(victim=MLP, rate=0.5, layer="fc1")
    rows = jax.jit(jax.grad(loss))(params, same, labels, jax.random.key(1))["fc1"]["kernel"]
    assert np.all(np.any(np.asarray(rows) != 0, axis=1))  # one mask would leave half of them 0


def test_dropout_of_nothing_is_the_plain_loss():
    params = _params(MLP)
    dropped = DropoutLoss(victim=MLP, rate=0.0)(params, PIXELS, LABELS, jax.random.key(0))
    assert float(dropped) == float(MLP.loss(params, PIXELS, LABELS))


def test_dropout_is_the_same_under_jit_and_leaves_the_victim_alone():
    key = jax.random.key(4)
    loss, params = DropoutLoss(victim=MLP, rate=0.5), _params(MLP)
    plainly = loss(params, PIXELS, LABELS, jax.random.clone(key))
    compiled = jax.jit(loss)(params, PIXELS, LABELS, jax.random.clone(key))
    np.testing.assert_allclose(plainly, compiled, rtol=1e-13)
    plain = MLP.loss(params, PIXELS, LABELS)
    assert float(plain) != float(plainly)
    assert float(MLP.loss(params, PIXELS, LABELS)) == float(plain)


@pytest.mark.parametrize("fields", [{"rate": 1.0}, {"rate": -0.1}, {"rate": 0.5, "layer": "fc9"}])
def test_bad_dropout_is_refused(fields):
    with pytest.raises(ValueError, match=r"rate|fully connected"):
        DropoutLoss(victim=MLP, **fields)


def _images(count=64, side=6):
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.random((count, side, side, 2)))


def _variants(image, name, padding=1):
    """Every result that a movement of pixels can have."""
    array = np.asarray(image)
    if name == "flip":
        return [array, array[:, ::-1]]
    if name == "rotate":
        return [np.rot90(array, k) for k in range(4)]
    padded = np.pad(array, ((padding, padding), (padding, padding), (0, 0)))
    side, places = array.shape[0], range(2 * padding + 1)
    return [padded[i : i + side, j : j + side] for i in places for j in places]


@pytest.mark.parametrize("name", ["flip", "rotate", "crop"])
def test_movements_are_the_possible_ones_and_equally_likely(name):
    key = jax.random.key(4)
    images = _images(count=300)
    moved = np.asarray(augment(key, images, policy=(name,), crop_padding=1))
    counts = np.zeros(len(_variants(images[0], name)))
    for image, result in zip(images, moved, strict=True):
        hits = [np.array_equal(result, variant) for variant in _variants(image, name)]
        assert sum(hits) == 1
        counts += hits
    assert stats.chisquare(counts).pvalue > 1e-4


def test_brightness_and_contrast_are_affine_within_the_declared_strength():
    key = jax.random.key(4)
    images = 0.5 + (_images() - 0.5) * 0.4  # far enough from 0 and 1 that nothing is clipped
    shifts = np.asarray(augment(key, images, policy=("brightness",), jitter=0.2) - images)
    np.testing.assert_allclose(shifts, shifts[:, :1, :1, :1] + 0 * shifts, atol=1e-12)
    assert stats.kstest(shifts[:, 0, 0, 0], stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-4
    scaled = np.asarray(augment(jax.random.clone(key), images, policy=("contrast",), jitter=0.2))
    means = np.asarray(images).mean(axis=(1, 2, 3), keepdims=True)
    factors = (scaled - means) / (np.asarray(images) - means)
    np.testing.assert_allclose(factors, factors[:, :1, :1, :1] + 0 * factors, rtol=1e-6)
    assert stats.kstest(factors[:, 0, 0, 0], stats.uniform(0.8, 0.4).cdf).pvalue > 1e-4


def test_solarize_inverts_the_bright_pixels_only():
    key = jax.random.key(4)
    images = _images()
    result = np.asarray(augment(key, images, policy=("solarize",)))
    changed = result != np.asarray(images)
    assert changed.any()
    assert np.asarray(images)[changed].min() >= 0.5
    np.testing.assert_allclose(result[changed], 1 - np.asarray(images)[changed], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32"])
def test_everything_at_once_stays_in_range_and_keeps_shape_and_type(dtype):
    key = jax.random.key(4)
    images = _images().astype(dtype)
    policy = ("crop", "flip", "rotate", "brightness", "contrast", "solarize", "flip")
    result = augment(key, images, policy=policy, jitter=0.9)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1
    again = eager(jax.random.clone(key), images, policy=policy, jitter=0.9)
    np.testing.assert_allclose(result, again, rtol=1e-6, atol=1e-6)


def test_zero_strength_is_the_identity():
    key = jax.random.key(4)
    images = _images()
    options = {"crop_padding": 0, "jitter": 0.0}
    policy = ("crop", "brightness", "contrast")
    np.testing.assert_allclose(augment(key, images, policy=policy, **options), images, atol=1e-15)
    np.testing.assert_array_equal(augment(key, images, policy=()), images)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"policy": ("blur",)}, "policy"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"jitter": 1.0}, "jitter"),
        ({"policy": ("rotate",)}, "square"),
    ],
)
def test_bad_augmentation_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        eager(jax.random.key(0), jnp.zeros((1, 3, 2, 1)), **fields)
