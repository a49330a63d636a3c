"""The discriminator's parts against NumPy, and the augmentation of what it sees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.generators.augmentation import _color, _cut_out, _translate, augment
from jgia.generators.discriminator import Architecture, Discriminator, with_minibatch_deviation
from jgia.generators.layers import normalize_second_moment
from jgia.generators.stylegan2 import StyleGAN2

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("batch", "group", "size"), [(8, 4, 4), (6, 4, 3), (7, 4, 1), (2, 32, 2), (1, 4, 1)]
)
def test_minibatch_deviation_is_that_of_groups(batch, group, size):
    """``size``: the largest divisor of the batch that is not larger than the group."""
    x = RNG.normal(size=(batch, 2, 3, 4))
    result = np.asarray(with_minibatch_deviation(jnp.asarray(x), group))
    np.testing.assert_array_equal(result[..., :4], x)
    for i in range(batch):
        own = [j for j in range(batch) if j % (batch // size) == i % (batch // size)]
        assert len(own) == size
        expected = np.sqrt(np.var(x[own], axis=0) + 1e-8).mean()
        np.testing.assert_allclose(result[i, :, :, 4], expected, rtol=1e-12)


def _network(filled, architecture: Architecture = "residual", **fields):
    sizes = {"resolution": 8, "base": 64, "max_features": 8, "latent_dim": 8, "style_dim": 8}
    network = Discriminator(StyleGAN2(**{**sizes, **fields}), architecture, 4)
    labels = jnp.zeros(1, "int32") if fields.get("num_classes") else None
    images = jnp.zeros((1, 8, 8, 3))
    return network, filled(jax.eval_shape(network.init, jax.random.key(0), images, labels))


def _apply(network):
    return jax.jit(lambda variables, x, y=None: network.apply(variables, x, y))


@pytest.mark.parametrize("architecture", ["residual", "plain"])
@pytest.mark.usefixtures("single_precision")
def test_shortcuts_are_what_the_architectures_differ_in(filled, architecture):
    network, variables = _network(filled, architecture)
    names = set(variables["params"])
    assert ("8_skip" in names) == (architecture == "residual")
    assert names - {"8_skip"} == {
        *("from_image", "8_conv_a", "8_conv_b", "4_conv", "dense", "logit")
    }
    logits = _apply(network)(variables, RNG.normal(size=(4, 8, 8, 3)))
    assert logits.shape == (4,)
    assert logits.dtype == jnp.float32
    # Without its convolutions, a block passes the shortcut on alone.
    cut = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * float(path[1].key != "8_conv_b"), variables
    )
    spread = float(np.std(_apply(network)(cut, RNG.normal(size=(4, 8, 8, 3)))))
    assert (spread > 1e-3) == (architecture == "residual")


@pytest.mark.usefixtures("single_precision")
def test_a_conditional_logit_is_a_projection_on_the_vector_of_the_class(filled):
    network, variables = _network(filled, num_classes=3)
    images = RNG.normal(size=(3, 8, 8, 3))
    apply = _apply(network)
    tables = np.stack([apply(variables, images, jnp.full(3, k, "int32")) for k in range(3)])
    np.testing.assert_allclose(
        apply(variables, images, jnp.array([2, 0, 1])), tables[[2, 0, 1], range(3)], rtol=1e-5
    )
    embed = variables["params"]["embed"]
    rows = normalize_second_moment(embed["kernel"] + embed["bias"][None])  # sqrt(3) / sqrt(3)
    _, kept = network.apply(
        variables,
        jnp.asarray(images),
        jnp.zeros(3, "int32"),
        capture_intermediates=True,
        mutable="intermediates",
    )
    found = np.asarray(kept["intermediates"]["logit"]["__call__"][0])
    np.testing.assert_allclose(np.asarray(rows) @ found.T / math.sqrt(8), tables, atol=1e-5)
    spoiled = variables["params"] | {"embed": jax.tree.map(lambda leaf: 5 * leaf, embed)}
    scaled = apply({"params": spoiled}, images, jnp.zeros(3, "int32"))
    np.testing.assert_allclose(scaled, tables[0], rtol=1e-4)  # the length does not matter
    turned = variables["params"] | {"embed": jax.tree.map(lambda leaf: leaf[..., ::-1], embed)}
    other = apply({"params": turned}, images, jnp.zeros(3, "int32"))
    assert float(np.abs(other - tables[0]).max()) > 1e-3


def test_a_conditional_discriminator_judges_with_float64_on(filled):
    network, variables = _network(filled, num_classes=3)
    images, labels = RNG.normal(size=(3, 8, 8, 3)), jnp.array([2, 0, 1])
    logits = _apply(network)(variables, images, labels)
    assert logits.dtype == jnp.float32
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: leaf.astype("float32"), variables)
        expected = _apply(network)(single, images.astype("float32"), np.asarray(labels, "int32"))
    np.testing.assert_allclose(logits, expected, rtol=1e-4)


@pytest.mark.usefixtures("single_precision")
def test_bfloat16_ends_in_single_precision(filled):
    network, variables = _network(filled, dtype="bfloat16")
    images = RNG.normal(size=(4, 8, 8, 3)).astype("float32")
    logits = _apply(network)(variables, images)
    exact, _ = _network(filled)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - _apply(exact)(variables, images)).max()
    assert 0 < error < 0.1


# Augmentation.

_augment = jax.jit(augment)


def test_probability_decides_which_images_are_changed():
    images = RNG.uniform(-1, 1, size=(200, 8, 8, 3)).astype("float32")
    none = _augment(jax.random.key(0), images, 0.0)
    np.testing.assert_array_equal(none, images)
    all_of_them = np.asarray(_augment(jax.random.key(0), images, 1.0))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(all_of_them, images, strict=True))
    some = np.asarray(_augment(jax.random.key(0), images, 0.2))
    untouched = (some == images).all(axis=(1, 2, 3)).mean()
    # None of three with 0.8 each; a shift by zero or a cut at a corner leaves a few more.
    assert abs(untouched - 0.8**3) < 0.15
    np.testing.assert_array_equal(all_of_them, _augment(jax.random.key(0), images, 1.0))
    assert np.abs(all_of_them - _augment(jax.random.key(1), images, 1.0)).max() > 0.1


def test_it_is_differentiable_in_the_images():
    images = RNG.uniform(-1, 1, size=(2, 8, 8, 3))
    weights, step = RNG.normal(size=images.shape), 1e-4 * RNG.normal(size=images.shape)

    @jax.jit
    def value(x):
        return jnp.square(jnp.sum(augment(jax.random.key(3), x) * weights))

    slope = jax.jit(jax.grad(value))(images)
    assert float(np.abs(slope).max()) > 0
    measured = (value(images + step) - value(images - step)) / 2
    np.testing.assert_allclose(np.vdot(slope, step), measured, rtol=1e-5)


def test_colors_stay_within_their_bounds():
    images = RNG.uniform(-1, 1, size=(500, 4, 4, 3))
    changed = np.asarray(jax.jit(_color)(jax.random.key(0), images))
    shift = changed.mean(axis=(1, 2, 3)) - images.mean(axis=(1, 2, 3))  # of the brightness alone
    assert shift.min() >= -0.5
    assert shift.max() <= 0.5
    assert abs(shift.std() - math.sqrt(1 / 12)) < 0.02

    def gray(x):
        return x.mean(axis=-1, keepdims=True)

    def spread(x):
        return np.sqrt(np.square(x).mean(axis=(1, 2, 3)))

    centered = gray(changed) - changed.mean(axis=(1, 2, 3), keepdims=True)
    before = gray(images) - images.mean(axis=(1, 2, 3), keepdims=True)
    contrast = spread(centered) / spread(before)
    np.testing.assert_allclose([contrast.min(), contrast.max()], [0.5, 1.5], atol=0.02)
    saturation = spread(changed - gray(changed)) / spread(images - gray(images)) / contrast
    np.testing.assert_allclose([saturation.min(), saturation.max()], [0, 2], atol=0.05)


def test_shifts_are_up_to_an_eighth_with_zeros_moving_in():
    images = RNG.uniform(0.5, 1, size=(200, 16, 8, 1))
    moved = np.asarray(jax.jit(_translate)(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (2, 2), (1, 1), (0, 0)))
    seen = set()
    for image, around in zip(moved, padded, strict=True):
        fits = [
            (down, right)
            for down, right in np.ndindex(5, 3)
            if np.array_equal(around[down : down + 16, right : right + 8], image)
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 15


def test_a_square_of_half_the_side_is_cut_out():
    images = np.ones((400, 16, 16, 1))
    cut = np.asarray(jax.jit(_cut_out)(jax.random.key(0), images)) == 0
    area = cut.sum(axis=(1, 2, 3))
    assert area.max() == 8 * 8  # the whole square is inside
    assert area.min() == 4 * 4  # its center is at a corner
    for image in cut[..., 0]:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    # Of the side of 8, between 4 and 8 are inside, as its center is uniform on 0, ..., 16.
    expected = ((9 * 8 + 2 * sum(range(4, 8))) / 17) ** 2
    assert abs(area.mean() - expected) < 4.5 * area.std() / math.sqrt(400)
