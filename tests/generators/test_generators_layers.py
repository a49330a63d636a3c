"""The layers of StyleGAN2 against SciPy and explicit loops, in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import convolve2d

from jgia.generators.layers import (
    Conv,
    Dense,
    ModulatedConv,
    activate,
    downsample,
    downsampling_conv,
    normalize_second_moment,
    upsample,
    upsampling_conv,
)
from jgia.generators.stylegan2 import PRESETS, MappingNetwork, style_statistics

RNG = np.random.default_rng(0)
FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1])
_up, _down = jax.jit(upsample), jax.jit(downsample)


def _upsampling_oracle(x, kernel):
    """Zeros between, full convolution, filter: channel by channel."""
    batch, height, width, channels = x.shape
    out = np.zeros((batch, 2 * height, 2 * width, kernel.shape[-1]))
    for b, f in np.ndindex(batch, kernel.shape[-1]):
        total = np.zeros((2 * height + 1, 2 * width + 1))
        for c in range(channels):
            spread = np.zeros((2 * height - 1, 2 * width - 1))
            spread[::2, ::2] = x[b, :, :, c]
            total += convolve2d(spread, kernel[:, :, c, f])
        out[b, :, :, f] = convolve2d(np.pad(total, 1), FILTER / 16, mode="valid")
    return out


def _downsampling_oracle(x, kernel):
    """Filter, correlation, every second pixel."""
    out = np.zeros((len(x), x.shape[1] // 2, x.shape[2] // 2, kernel.shape[-1]))
    for b, f, c in np.ndindex(len(x), kernel.shape[-1], x.shape[-1]):
        smooth = convolve2d(np.pad(x[b, :, :, c], 2), FILTER / 64, mode="valid")
        out[b, :, :, f] += convolve2d(smooth, kernel[::-1, ::-1, c, f], mode="valid")[::2, ::2]
    return out


def test_upsampling_is_the_filter_on_zeros_in_between():
    x = RNG.normal(size=(2, 3, 5, 2))
    expected = np.zeros((2, 6, 10, 2))
    for b, c in np.ndindex(2, 2):
        spread = np.zeros((6, 10))
        spread[::2, ::2] = x[b, :, :, c]
        expected[b, :, :, c] = convolve2d(np.pad(spread, 2), FILTER / 16, mode="valid")[:-1, :-1]
    np.testing.assert_allclose(_up(x), expected, rtol=0, atol=1e-14)
    assert np.abs(np.asarray(_up(x)) - x.repeat(2, axis=1).repeat(2, axis=2)).max() > 0.1


def test_downsampling_is_the_adjoint_of_upsampling_by_four():
    x, y = RNG.normal(size=(2, 3, 5, 2)), RNG.normal(size=(2, 6, 10, 2))
    np.testing.assert_allclose(np.vdot(_up(x), y), 4 * np.vdot(x, _down(y)), rtol=1e-13)
    ones = np.ones((1, 8, 8, 1))  # both keep constants away from the borders
    np.testing.assert_allclose(_up(ones)[:, 1:-1, 1:-1], 1, rtol=1e-14)
    np.testing.assert_allclose(_down(ones)[:, 1:-1, 1:-1], 1, rtol=1e-14)


@pytest.mark.parametrize(
    ("function", "oracle", "side"),
    [
        (upsampling_conv, _upsampling_oracle, (4, 5)),
        (downsampling_conv, _downsampling_oracle, (8, 10)),
    ],
    ids=["up", "down"],
)
def test_resampling_convolutions_are_those_of_scipy(function, oracle, side):
    x, kernel = RNG.normal(size=(2, *side, 3)), RNG.normal(size=(3, 3, 3, 2))
    result = np.asarray(jax.jit(function)(x, kernel))
    expected = oracle(x, kernel)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)
    for wrong in (kernel[::-1, ::-1], kernel.transpose(1, 0, 2, 3)):
        assert np.abs(result - oracle(x, np.ascontiguousarray(wrong))).max() > 0.1


def test_resampling_convolutions_differentiate_twice():
    x, kernel = RNG.normal(size=(1, 2, 2, 2)), RNG.normal(size=(3, 3, 2, 2))
    step = 1e-4 * RNG.normal(size=x.shape)

    @jax.jit
    @functools.partial(jax.grad, argnums=0)
    def slope(x, kernel):
        """Of a squared gradient to the kernel: reverse over reverse."""
        inner = jax.grad(lambda k: jnp.sin(upsampling_conv(x, k)).sum())
        return jnp.square(inner(kernel)).sum()

    @jax.jit
    def value(x):
        inner = jax.grad(lambda k: jnp.sin(upsampling_conv(x, k)).sum())
        return jnp.square(inner(jnp.asarray(kernel))).sum()

    measured = (value(x + step) - value(x - step)) / 2
    np.testing.assert_allclose(np.vdot(slope(x, kernel), step), measured, rtol=1e-6)


# Learning rates, modulation, normalization.


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_dense_scales_weights_where_they_are_used(rate):
    layer = Dense(4, rate=rate, bias=1.0)
    x = RNG.normal(size=(3, 9))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x))["params"]
    kernel, bias = RNG.normal(size=shapes["kernel"].shape) / rate, RNG.normal(size=(4,))
    result: Any = layer.apply(
        {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(result, x @ kernel * rate / 3 + bias * rate, rtol=1e-12)


def test_weights_are_drawn_larger_by_as_much_as_they_learn_slower():
    params = jax.jit(Dense(64, rate=0.01, bias=2.0).init)(jax.random.key(0), jnp.zeros((1, 64)))
    kernel, bias = np.asarray(params["params"]["kernel"]), params["params"]["bias"]
    spread = 4.5 * math.sqrt(2 / kernel.size)
    assert abs(kernel.var() / 100**2 - 1) < spread
    assert abs(kernel.var() / 90**2 - 1) > spread
    np.testing.assert_allclose(bias, 200.0)


def test_convolutions_scale_by_the_root_of_their_inputs():
    x = RNG.normal(size=(1, 4, 4, 5))
    for size in (1, 3):
        kernel, bias = RNG.normal(size=(size, size, 5, 2)), RNG.normal(size=(2,))
        params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        result = jax.jit(Conv(2, size).apply)({"params": params}, x)
        expected = np.zeros((1, 4, 4, 2)) + bias
        for f, c in np.ndindex(2, 5):
            flipped = kernel[::-1, ::-1, c, f] / math.sqrt(5 * size**2)
            expected[0, :, :, f] += convolve2d(x[0, :, :, c], flipped, mode="same")
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("up", [False, True], ids=["same", "up"])
@pytest.mark.parametrize("demodulate", [False, True], ids=["plain", "demodulated"])
def test_modulation_is_a_kernel_for_each_image(up, demodulate):
    layer = ModulatedConv(2, demodulate=demodulate, up=up)
    x, style = RNG.normal(size=(3, 4, 4, 5)), RNG.normal(size=(3, 6))
    affine = {"kernel": RNG.normal(size=(6, 5)), "bias": 1 + RNG.normal(size=(5,))}
    kernel = RNG.normal(size=(3, 3, 5, 2))
    params = jax.tree.map(jnp.asarray, {"affine": affine, "kernel": kernel})
    result = np.asarray(jax.jit(layer.apply)({"params": params}, x, style))
    scales = style @ affine["kernel"] / math.sqrt(6) + affine["bias"]
    for b in range(3):
        own = kernel / math.sqrt(45) * scales[b][:, None]  # eq. 1
        if demodulate:
            own = own / np.sqrt(np.square(own).sum(axis=(0, 1, 2)) + 1e-8)  # eq. 3
        if up:
            expected = _upsampling_oracle(x[b : b + 1], own)[0]
        else:
            expected = np.zeros((4, 4, 2))
            for f, c in np.ndindex(2, 5):
                flipped = own[::-1, ::-1, c, f]
                expected[:, :, f] += convolve2d(x[b, :, :, c], flipped, mode="same")
        np.testing.assert_allclose(result[b], expected, rtol=0, atol=1e-12)


def test_normalized_vectors_have_second_moment_one():
    x = RNG.normal(size=(3, 50)) * np.array([1e-2, 1, 1e3])[:, None]
    result = np.asarray(normalize_second_moment(jnp.asarray(x)))
    np.testing.assert_allclose(np.square(result).mean(axis=-1), 1, rtol=1e-3)
    np.testing.assert_allclose(result, x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-8))


def test_activation_about_keeps_second_moments():
    x = RNG.normal(size=(200_000,))
    result = np.asarray(activate(jnp.asarray(x)))
    np.testing.assert_allclose(result, math.sqrt(2) * np.where(x > 0, x, 0.2 * x))
    assert abs(np.square(result).mean() - 1.04) < 0.02


# Styles.


def test_mapping_without_classes_ignores_the_length_of_a_vector(tiny):
    generator, params = tiny()
    latents = RNG.normal(size=(2, 8))
    mapped = jax.jit(generator.map)
    np.testing.assert_allclose(
        mapped(params, latents), mapped(params, 3 * latents), rtol=0, atol=1e-6
    )
    x = latents / np.sqrt(np.square(latents).mean(-1, keepdims=True))
    for layer in params["mapping"].values():
        x = x @ np.asarray(layer["kernel"]) * 0.01 / math.sqrt(8) + 0.01 * np.asarray(layer["bias"])
        x = math.sqrt(2) * np.where(x > 0, x, 0.2 * x)
    np.testing.assert_allclose(mapped(params, latents), x, rtol=0, atol=1e-6)


def test_mapping_with_classes_depends_on_them(tiny):
    generator, params = tiny(num_classes=3)
    latents = jnp.asarray(RNG.normal(size=(3, 8)))
    mapped = jax.jit(generator.map)
    styles = mapped(params, latents, jnp.array([0, 1, 2]))
    assert styles.shape == (3, 8)
    other = mapped(params, latents, jnp.array([0, 2, 2]))
    np.testing.assert_array_equal(other[0], styles[0])
    assert float(np.abs(other[1] - styles[1]).max()) > 1e-3
    # Of a class the network sees its row of the embedding, normalized.
    embed = params["mapping"]["embed"]
    rows = jnp.asarray(embed["kernel"]) + jnp.asarray(embed["bias"])[None]
    x = np.concatenate([np.asarray(normalize_second_moment(v)) for v in (latents, rows)], axis=-1)
    rest = {name: layer for name, layer in params["mapping"].items() if name != "embed"}
    expected = x
    for layer in rest.values():
        width = len(layer["kernel"])
        expected = expected @ np.asarray(layer["kernel"]) * 0.01 / math.sqrt(width)
        expected = expected + 0.01 * np.asarray(layer["bias"])
        expected = np.asarray(activate(jnp.asarray(expected)))
    np.testing.assert_allclose(styles, expected, rtol=0, atol=1e-6)
    assert set(rest) == {"dense0", "dense1"}


def test_labels_fit_the_generator(tiny):
    for fields, labels, word in (
        ({}, jnp.zeros(1, "int32"), "unconditional"),
        ({"num_classes": 3}, None, "give labels"),
    ):
        generator, params = tiny(**fields)
        with pytest.raises(ValueError, match=word):
            generator.draw(params, jax.random.key(0), 1, labels)


def test_a_gaussian_start_has_the_moments_of_mapped_styles(tiny):
    generator, params = tiny()
    known = jax.jit(lambda p: style_statistics(generator, p, jax.random.key(0), 4000))(params)
    params = {**params, "styles": known}

    @jax.jit
    def drawn(params):
        mapped = generator.draw(params, jax.random.key(1), 2000)["styles"]
        gaussian = generator.draw(params, jax.random.key(2), 400, start="gaussian")["styles"]
        short = generator.draw(params, jax.random.key(1), 2000, truncation=0.5)["styles"]
        return mapped, gaussian, short

    mapped, gaussian, short = (np.asarray(styles) for styles in drawn(params))
    styles = mapped[:, 0, 0]
    assert mapped.shape == (2000, 2, 3, 8)
    np.testing.assert_array_equal(mapped, np.broadcast_to(styles[:, None, None], mapped.shape))
    spread = styles.std(axis=0)
    np.testing.assert_array_less(np.abs(styles.mean(axis=0) - known["mean"]), 0.15 * spread)
    mean = np.asarray(known["mean"])
    np.testing.assert_allclose(short, mean + 0.5 * (mapped - mean), rtol=0, atol=1e-6)
    # A Gaussian start is independent in every layer, and undone it has the moments kept.
    flat = np.where(gaussian > 0, gaussian, gaussian / 0.2) / math.sqrt(2)
    count = len(flat) * 6
    deviation = np.asarray(known["flat_std"])
    assert np.abs((flat.mean(axis=(0, 1, 2)) - known["flat_mean"]) / deviation).max() < (
        4.5 / math.sqrt(count)
    )
    np.testing.assert_allclose(flat.std(axis=(0, 1, 2)), deviation, rtol=4.5 / math.sqrt(2 * count))
    assert np.abs(gaussian[:, 0, 0] - gaussian[:, 1, 2]).max() > 0.1
    undone = np.where(styles > 0, styles, styles / 0.2) / math.sqrt(2)
    np.testing.assert_allclose(undone.std(axis=0), deviation, rtol=0.15)


def test_bfloat16_is_for_features_alone(tiny, sides):
    generator, params = tiny()
    single = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    side = jax.tree.map(lambda leaf: leaf.astype("float32"), sides(generator, params))
    half, _ = tiny(dtype="bfloat16")

    @jax.jit
    def both():
        return half.run(single, side, None), generator.run(single, side, None)

    rough, exact = both()
    assert rough.features.dtype == jnp.bfloat16
    assert rough.image.dtype == exact.image.dtype == jnp.float32
    assert bool(np.isfinite(rough.image).all())
    error = np.abs(rough.image - exact.image).max()
    assert 0 < error < 0.1 * np.abs(exact.image).max()


def test_presets_and_wrong_sizes(tiny, count):
    generator = PRESETS["tiny32"]()
    assert [generator.features(b) for b in range(4)] == [64, 64, 64, 32]
    shapes = jax.eval_shape(generator.init, jax.random.key(0))
    assert round(count(shapes) / 1e6, 2) == 0.26
    assert MappingNetwork(8, 2, 0).num_layers == 2
    for fields, word in (
        ({"resolution": 12}, "power of two"),
        ({"resolution": 4}, "power of two"),
        ({"base": 4}, "base"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"num_classes": -1}, "num_classes"),
    ):
        with pytest.raises(ValueError, match=word):
            tiny(**fields)
