"""BigGAN-deep: its blocks against NumPy, the released sizes, stored statistics, the attack."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d
from scipy.stats import truncnorm

from jgia.attacks import gifd
from jgia.config import ClientConfig
from jgia.config.gifd import GifdOptions
from jgia.federated import client_update
from jgia.generators.biggan import PRESETS, BigGAN, standing_statistics
from jgia.generators.biggan_layers import Attention, Block, Layer
from jgia.generators.protocol import StagedGenerator
from jgia.models import make_victim

TINY = BigGAN(
    multipliers=(2, 2, 1), base=8, attention=8, latent_dim=6, embedding_dim=4, num_classes=3
)


@pytest.fixture(scope="module")
def params(filled):
    """Random ones, with statistics that were measured."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0))
    return _measured(filled(shapes, scaled=True))


@jax.jit
def _measured(params):
    return standing_statistics(TINY, params, jax.random.key(1), 256)


@jax.jit
def _images(params, side):
    return TINY.image(params, side, TINY.run(params, side, None))


def _count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Oracle in float64.


def _conv(x, p):
    kernel = np.asarray(p["kernel"], float)
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for b, o, c in np.ndindex(len(x), kernel.shape[3], kernel.shape[2]):
        out[b, :, :, o] += correlate2d(x[b, :, :, c], kernel[:, :, c, o], mode="same")
    return out + np.asarray(p.get("bias", 0.0), float)


def _norm(x, p, statistics, vector):
    y = (x - np.asarray(statistics["mean"], float)) / np.sqrt(
        np.asarray(statistics["variance"], float) + 1e-4
    )
    gain = 1 + vector @ np.asarray(p["gain"]["kernel"], float)
    offset = vector @ np.asarray(p["offset"]["kernel"], float)
    return y * gain[:, None, None] + offset[:, None, None]


def _block(x, vector, p, statistics, after, up):
    y = x
    for i in range(4):
        y = np.maximum(_norm(y, p[f"norm{i}"], statistics[f"norm{i}"], vector), 0)
        if i == 1 and up:
            y = np.kron(y, np.ones((1, 2, 2, 1)))
        y = _conv(y, p[f"conv{i}"])
    x = x[..., :after]
    return y + (np.kron(x, np.ones((1, 2, 2, 1))) if up else x)


def _attention(x, p):
    out = np.zeros_like(x)
    query, key, value = (_conv(x, p[name]) for name in ("query", "key", "value"))
    height, width = x.shape[1] // 2, x.shape[2] // 2
    for b in range(len(x)):
        windows = [
            (slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)) for i, j in np.ndindex(height, width)
        ]
        keys = np.array([key[b][w].max(axis=(0, 1)) for w in windows])
        values = np.array([value[b][w].max(axis=(0, 1)) for w in windows])
        for i, j in np.ndindex(*x.shape[1:3]):
            weights = np.exp(keys @ query[b, i, j])
            seen = weights @ values / weights.sum()
            out[b, i, j] = seen @ np.asarray(p["out"]["kernel"], float)[0, 0]
    return x + float(p["gain"]) * out


@pytest.mark.parametrize("layer", [Layer(8, 8), Layer(8, 4, up=True)], ids=["same", "up"])
def test_residual_block_is_that_of_the_paper(layer):
    rng = np.random.default_rng(0)
    x, vector = rng.normal(size=(2, 4, 4, 8)), rng.normal(size=(2, 5))
    inputs = jnp.asarray(x, "float32"), jnp.asarray(vector, "float32")
    variables = Block(layer, False).init(jax.random.key(1), *inputs)
    shapes = variables["statistics"]
    statistics = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), "float32"), shapes
    )
    params = variables["params"]
    result: Any = Block(layer, False).apply({"params": params, "statistics": statistics}, *inputs)
    expected = _block(x, vector, params, statistics, layer.after, layer.up)
    assert result.shape == (2, *(2 * [8 if layer.up else 4]), layer.after)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_attention_is_that_of_the_paper():
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 16))
    params = Attention().init(jax.random.key(2), jnp.asarray(x, "float32"))["params"]
    off = Attention().apply({"params": params}, jnp.asarray(x, "float32"))
    np.testing.assert_array_equal(off, np.asarray(x, "float32"))  # it begins as the identity
    params = {**params, "gain": jnp.asarray(1.5, "float32")}
    result: Any = Attention().apply({"params": params}, jnp.asarray(x, "float32"))
    np.testing.assert_allclose(result, _attention(x, params), rtol=0, atol=1e-5)


# Sizes.


def test_features_of_the_256_pixel_network_are_the_published_ones():
    generator = PRESETS["deep256"]()
    assert isinstance(generator, StagedGenerator)
    assert (generator.resolution, generator.num_blocks) == (256, 13)
    params = jax.eval_shape(generator.init, jax.random.key(0))
    labels = jax.ShapeDtypeStruct((1,), "int32")
    side = jax.eval_shape(lambda p, y: generator.draw(p, jax.random.key(0), 1, y), params, labels)
    assert jax.tree.map(lambda leaf: leaf.shape, side) == {"z": (1, 128), "condition": (1, 128)}
    entering = {
        k: jax.eval_shape(
            lambda p, s, k=k: generator.run(p, s, None, stop=k).features, params, side
        ).shape[1:]
        for k in range(1, 10)
    }
    assert entering == {
        1: (4, 4, 2048),
        **dict.fromkeys((2, 3), (8, 8, 2048)),
        **dict.fromkeys((4, 5), (16, 16, 1024)),
        **dict.fromkeys((6, 7), (32, 32, 1024)),
        **dict.fromkeys((8, 9), (64, 64, 512)),
    }
    image = jax.eval_shape(
        lambda p, s: generator.image(p, s, generator.run(p, s, None)), params, side
    )
    assert image.shape == (1, 256, 256, 3)


@pytest.mark.parametrize(("preset", "millions"), [("deep128", 50.4), ("deep256", 55.9)])
def test_as_many_parameters_as_published(preset, millions):
    generator = PRESETS[preset]()
    params = jax.eval_shape(generator.init, jax.random.key(0))
    count = _count({name: params[name] for name in ("embedding", "blocks", "head")})
    # The released networks' last convolution has 128 outputs, three of which are the image.
    count += 125 * (9 * 128 + 1)
    assert round(count / 1e6, 1) == millions


def test_tiny_preset_fits_a_processor():
    generator = PRESETS["tiny32"]()
    assert (generator.resolution, generator.num_classes) == (32, 10)
    assert _count(jax.eval_shape(generator.init, jax.random.key(0))) < 200_000
    assert hash(generator) == hash(PRESETS["tiny32"]())


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"multipliers": (2,)}, "two or more"),
        ({"multipliers": (1, 2)}, "do not grow"),
        ({"multipliers": (2, 0), "attention": None}, "positive"),
        ({"attention": 4}, "attention"),
        ({"attention": 16, "multipliers": (2, 1)}, "no resolutions"),
        ({"num_classes": 0}, "num_classes"),
        ({"base": 0}, "base"),
    ],
)
def test_wrong_sizes_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        BigGAN(**fields)


# Sampling, statistics.


def test_init_has_orthogonal_weights_and_neutral_statistics():
    params = jax.jit(TINY.init)(jax.random.key(0))
    assert params["embedding"].shape == (3, 4)
    kernel = np.asarray(params["blocks"]["block0"]["conv1"]["kernel"]).reshape(-1, 4)
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(4), rtol=0, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["statistics"]):
        assert set(np.unique(leaf)) == {float(path[-1].key == "variance")}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_side_inputs_are_latent_codes_and_class_vectors(params):
    labels = jnp.array([2, 0, 2])
    side = TINY.draw(params, jax.random.key(1), 3, labels)
    np.testing.assert_array_equal(side["condition"], params["embedding"][labels])
    again = TINY.draw(params, jax.random.key(1), 3, 2 - labels)
    np.testing.assert_array_equal(side["z"], again["z"])  # whatever the classes
    none = jnp.zeros(4000, "int32")
    many = np.asarray(TINY.draw(params, jax.random.key(2), 4000, none)["z"])
    assert abs(many.mean()) < 4.5 / math.sqrt(many.size)
    assert abs(many.var() - 1) < 4.5 * math.sqrt(2 / many.size)
    cut = np.asarray(TINY.draw(params, jax.random.key(2), 4000, none, truncation=0.5)["z"])
    assert 0.49 < np.abs(cut).max() <= 0.5
    expected = truncnorm(-0.5, 0.5).var()
    assert abs(cut.var() / expected - 1) < 0.03
    assert abs(cut.var() / (0.5**2) - 1) > 0.5  # no scaled normal


def test_labels_are_needed_one_for_each_image(params):
    with pytest.raises(ValueError, match="give labels"):
        TINY.draw(params, jax.random.key(1), 2)
    with pytest.raises(ValueError, match="one class per image"):
        TINY.draw(params, jax.random.key(1), 2, jnp.zeros(3, "int32"))
    with pytest.raises(ValueError, match="truncation"):
        TINY.draw(params, jax.random.key(1), 1, jnp.zeros(1, "int32"), truncation=0.0)


def test_only_the_latent_code_is_free_and_only_at_first():
    side = {"z": jnp.zeros((1, 6)), "condition": jnp.zeros((1, 4))}
    assert TINY.free(side, 0) == {"z": True, "condition": False}
    for stage in range(1, TINY.num_blocks):
        assert TINY.free(side, stage) == {"z": False, "condition": False}


def test_standing_statistics_are_those_of_what_enters(params):
    key_labels, key_latents = jax.random.split(jax.random.key(1))  # as standing_statistics does

    @jax.jit
    def entering(params):
        labels = jax.random.randint(key_labels, (256,), 0, 3)
        side = TINY.draw(params, key_latents, 256, labels)
        first = jnp.concatenate([side["z"], side["condition"]], axis=-1)
        return first, TINY.run(params, side, None).features

    vectors, last = entering(params)
    linear = params["blocks"]["linear"]
    first = vectors @ linear["kernel"] + linear["bias"][None]
    known = params["statistics"]
    for features, kept in (
        (np.asarray(first).reshape(-1, 16), known["blocks"]["block0"]["norm0"]),
        (np.asarray(last).reshape(-1, 8), known["head"]["norm"]),
    ):
        np.testing.assert_allclose(kept["mean"], features.mean(axis=0), rtol=0, atol=1e-3)
        np.testing.assert_allclose(kept["variance"], features.var(axis=0), rtol=1e-3)
    again = _measured({**params, "statistics": jax.tree.map(jnp.zeros_like, known)})
    jax.tree.map(np.testing.assert_array_equal, again, params)  # the old ones are not read


def test_an_image_does_not_depend_on_the_others_of_its_batch(params, sides):
    side = sides(TINY, params, 4, jnp.array([0, 1, 2, 1]))
    images = _images(params, side)
    alone = _images(params, jax.tree.map(lambda leaf: leaf[:1], side))
    np.testing.assert_allclose(alone, images[:1], rtol=0, atol=1e-5)
    assert images.dtype == jnp.float32
    assert float(np.abs(images).max()) <= 1
    moved = _images(params, {**side, "condition": -side["condition"]})
    assert float(np.abs(images - moved).max()) > 1e-2  # the class matters


# The attack.


@dataclasses.dataclass(frozen=True, eq=False)
class _Prior:
    generator: BigGAN
    params: object
    name: str = "tiny biggan"


def test_the_attack_runs_on_it_with_the_papers_preset(params):
    victim = make_victim("mlp", input_shape=(8, 8, 3), num_classes=3, widths=(8,))
    sent = victim.init(jax.random.key(0))
    images = np.random.default_rng(0).uniform(size=(1, 8, 8, 3)).astype("float32")
    observation = client_update(
        jax.random.key(1), victim, sent, images, np.array([1]), ClientConfig()
    )
    prior = _Prior(TINY, params)
    options = GifdOptions(
        preset="paper_biggan_imagenet", last_stage=3, gifd_steps=6, gifd_restarts=2
    )
    result = gifd.attack(jax.random.key(2), observation, prior, options=options)
    assert result.images.shape == (1, 8, 8, 3)
    assert result.labels.tolist() == [1]
    assert [str(status) for status in result.statuses] == ["matched"]
    assert result.stats["stage_names"] == [
        "latent codes",
        "features 4x4x16",
        "features 8x8x16",
        "features 8x8x16",
    ]
    first, *_, last = result.stats["stage_distances"]
    assert min(last) < min(first)  # features reach what latent codes do not
    assert result.stats["settings"]["radii"][:3] == (2000.0, 2500.0, 3000.0)
    assert result.stats["settings"]["side_radii"] == ()


def test_no_image_is_carried_beside_the_features(params, sides):
    side = sides(TINY, params, 1, jnp.zeros(1, "int32"))
    state = jax.eval_shape(lambda: TINY.run(params, side, None, stop=2))
    assert state.image is None
    with pytest.raises(ValueError, match="stop >= 1"):
        TINY.run(params, side, None, stop=0)
