import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.ares.front import (
    feature_range,
    front_layers,
    num_equations,
    shift_bias,
)
from jgia.attacks.ares.measurement import measurement
from jgia.attacks.ares.passing import pass_through_params
from jgia.data import load_dataset
from jgia.models import CNN, Victim, flatten_params, make_victim, with_buffers
from jgia.normalization import Normalization
from jgia.sparse import AveragePool, Composition, ConvOperator, to_planes

NORM = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def _victim(name, *, size=(8, 8), widths=(6, 6), **options):
    return make_victim(
        name,
        input_shape=(*size, 3),
        num_classes=3,
        normalization=NORM,
        widths=widths,
        fc_width=4,
        **options,
    )


def _with_statistics(victim, seed=0):
    """Running statistics far from zero mean and unit variance."""
    rng = np.random.default_rng(seed)
    shapes = {
        name.removesuffix("/scale"): leaf.shape
        for name, leaf in flatten_params(victim.param_shapes()).items()
        if name.endswith("/scale")
    }
    return with_buffers(
        victim,
        {
            name: (rng.normal(0, 3, shape), rng.uniform(0.05, 9, shape))
            for name, shape in shapes.items()
        },
    )


# What is named, the victim, and (features, equations) that come through of the first layer's.
VICTIMS = {
    "plain": (_victim("cnn"), 6, 6 * 64),
    "narrowing": (_victim("cnn", widths=(6, 4)), 6, 4 * 64),
    "large kernel": (_victim("cnn", kernel_size=5), 6, 6 * 64),
    "stride 2, 1": (_victim("cnn", strides=(2, 1)), 6, 6 * 16),
    "stride 1, 2": (_victim("cnn", strides=(1, 2), widths=(6, 24)), 6, 24 * 16),
    "stride 2, 2": (_victim("cnn", strides=(2, 2), widths=(6, 24)), 6, 24 * 4),
    "too few channels": (_victim("cnn", strides=(1, 2), widths=(6, 9)), 6, 9 * 16),
    # The second phase of the last row and column lies outside.
    "odd sides, stride": (
        _victim("cnn", size=(7, 6), strides=(1, 2), widths=(3, 12)),
        3,
        3 * (12 + 12 + 9 + 9),
    ),
    # The tap behind the center sees row -1 instead of the last one, and so do the columns.
    "stride 3": (_victim("cnn", size=(9, 9), strides=(1, 3), widths=(2, 18)), 2, 2 * 8 * 8),
    "resnet": (_victim("resnet", norm="none", widths=(4, 16), strides=(1, 2)), 4, 16 * 16),
    "resnet, batch norm": (_with_statistics(_victim("resnet", widths=(4, 16))), 4, 16 * 16),
    "resnet, deep": (
        _with_statistics(_victim("resnet", widths=(2, 3, 12), strides=(1, 1, 2), blocks=2)),
        2,
        8 * 16,
    ),
}
POOLED = {
    "pooled": _victim("cnn", widths=(6, 7), pool="average", pool_every=2),
    "pooled, odd sides": _victim("cnn", size=(9, 7), pool="average"),
    "pooled, stride after": _victim("cnn", strides=(1, 2), widths=(3, 12), pool="average"),
    "stride, pooled after, odd": _victim(
        "cnn", size=(7, 7), strides=(1, 2), widths=(3, 12), pool="average", pool_every=2
    ),
}


def _filters(victim, num, seed=1):
    rng = np.random.default_rng(seed)
    first = front_layers(victim).first
    kernel = rng.normal(size=(*first.kernel_size, 3, num))
    return kernel / np.linalg.norm(kernel.reshape(-1, num), axis=0), rng.normal(0, 0.3, num)


@functools.partial(jax.jit, static_argnums=0)
def _fc_input_of(victim, params, images):
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if context.module.name == "fc" and context.method_name == "__call__":
            seen["x"] = args[0]
        return next_fun(*args, **kwargs)

    shapes = victim.param_shapes()
    whole = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, images.dtype), shapes) | params
    with nn.intercept_methods(watch):
        victim.apply(whole, victim.normalization.normalize(images))
    return seen["x"]


def _fc_input(victim, params, images):
    """What flax itself feeds to the fully connected layer: planes (F, H', W', J)."""
    x = np.asarray(_fc_input_of(victim, params, images))
    return np.moveaxis(x.reshape(-1, *front_layers(victim).output_shape), (0, 3), (3, 0))


_apply = jax.jit(lambda operator, planes: operator.apply(planes))


def _images(victim, count=3, dtype="float64"):
    return jnp.asarray(np.random.default_rng(5).random((count, *victim.input_shape)), dtype)


def _predicted(victim, kernel, bias, images):
    got = measurement(front_layers(victim), kernel, bias)
    planes = to_planes(victim.normalization.normalize(images))
    return got, np.asarray(_apply(got.operator, planes)) + got.bias[..., None]


def _as64(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), params)


def _mismatch(victim, params, kernel, bias, images):
    """Largest error of what the measurement says about the network's own forward pass."""
    got, predicted = _predicted(victim, kernel, bias, images)
    actual = _fc_input(victim, params, images)
    assert not actual[len(got.bias) :].any()  # channels without use are silent
    actual = actual[: len(got.bias)]
    error = np.abs(np.maximum(predicted, 0) - actual)[got.exact]
    return float(error.max())


@pytest.mark.slow
@pytest.mark.parametrize("name", VICTIMS)
def test_what_reaches_the_fully_connected_layer(name):
    victim, num, equations = VICTIMS[name]
    front = front_layers(victim)
    kernel, bias = (np.float32(x).astype(float) for x in _filters(victim, num))
    params = _as64(pass_through_params(victim, front, kernel, bias))
    images = _images(victim)
    # Scale and bias of a batch normalization are rounded to float32; nothing else is.
    normalized = any(name.endswith("scale") for name in flatten_params(params))
    tolerance = 16 * np.finfo(np.float32).eps if normalized else 1e-13
    assert _mismatch(victim, params, kernel, bias, images) < tolerance
    assert num_equations(front, num) == equations
    got = measurement(front, kernel, bias)
    assert got.exact.sum() == num_equations(front, num)
    actual = _fc_input(victim, params, images)[: len(got.bias)]
    assert not actual[~got.exact].any()  # off the image: silent, never wrong
    assert 0.1 < (actual[got.exact] > 0).mean() < 0.9


@pytest.mark.parametrize("name", ["stride 2, 2", "resnet, deep"])
def test_float32_rounds_to_its_own_digits(name):
    victim, num, _ = VICTIMS[name]
    kernel, bias = (x.astype(np.float32) for x in _filters(victim, num))
    params = pass_through_params(victim, front_layers(victim), kernel, bias)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    images = _images(victim, dtype="float32")
    # 27 products, a dozen layers of scales; running means of 3 would cost another digit.
    assert _mismatch(victim, params, kernel, bias, images) < 100 * np.finfo(np.float32).eps
    got, predicted = _predicted(victim, kernel, bias, images)
    actual = _fc_input(victim, params, images)[: len(got.bias)]
    clearly_off = got.exact[..., None] & (predicted < -1e-5)
    assert not actual[clearly_off].any()  # a zero stays a zero through every layer


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_averages_are_linear_where_everything_is_on(name):
    victim = POOLED[name]
    front = front_layers(victim)
    assert front.averages
    num = 3
    kernel, _ = (np.float32(x).astype(float) for x in _filters(victim, num))
    bias = shift_bias(front, kernel).astype(float)
    got = measurement(front, kernel, bias)
    assert got.always_on.all()
    assert got.exact.sum() == num_equations(front, num) > 0
    params = _as64(pass_through_params(victim, front, kernel, bias))
    images = _images(victim)
    assert _mismatch(victim, params, kernel, bias, images) < 1e-12
    _, predicted = _predicted(victim, kernel, bias, images)
    assert predicted[got.exact].min() > 0
    # Without the shift nothing is promised, and rightly: rectifiers come before the average.
    unshifted = measurement(front, kernel, np.zeros(num))
    assert not unshifted.exact.any()
    plain = _as64(pass_through_params(victim, front, kernel))
    _, predicted = _predicted(victim, kernel, np.zeros(num), images)
    actual = _fc_input(victim, plain, images)[: len(predicted)]
    assert np.abs(np.maximum(predicted, 0) - actual).max() > 0.05


def test_unshifted_features_beside_shifted_ones_are_left_out_of_the_equations():
    victim = POOLED["pooled"]
    front = front_layers(victim)
    kernel, _ = _filters(victim, 4)
    bias = shift_bias(front, kernel) * np.array([1, 0, 1, 0])
    got = measurement(front, kernel, bias)
    np.testing.assert_array_equal(got.always_on, got.feature % 2 == 0)
    np.testing.assert_array_equal(got.exact.all(axis=(1, 2)), got.feature % 2 == 0)


@pytest.mark.parametrize("name", ["stride 1, 2", "resnet, batch norm"])
def test_wrong_parameters_are_seen(name):
    victim, num, _ = VICTIMS[name]
    front = front_layers(victim)
    kernel, bias = _filters(victim, num)
    images = _images(victim)
    right = _as64(pass_through_params(victim, front, kernel, bias))
    without_bias = _as64(pass_through_params(victim, front, kernel))
    assert _mismatch(victim, without_bias, kernel, bias, images) > 0.1
    shifted = measurement(front, np.roll(kernel, 1, axis=0), bias)
    planes = to_planes(victim.normalization.normalize(images))
    wrong = np.maximum(np.asarray(_apply(shifted.operator, planes)), 0)
    assert np.abs(wrong - _fc_input(victim, right, images)[: len(wrong)]).max() > 0.1


def test_a_batch_normalization_that_is_not_undone_is_seen():
    plain, sent = _victim("resnet", widths=(4, 16)), VICTIMS["resnet, batch norm"][0]
    kernel, bias = _filters(plain, 4)
    params = _as64(pass_through_params(plain, front_layers(plain), kernel, bias))
    assert _mismatch(plain, params, kernel, bias, _images(plain)) < 1e-6
    assert _mismatch(sent, params, kernel, bias, _images(sent)) > 0.1


@pytest.mark.parametrize("name", ["stride 2, 2", "odd sides, stride", "resnet, batch norm"])
def test_the_operator_is_one_convolution_with_its_adjoint(name):
    victim, num, _ = VICTIMS[name]
    kernel, bias = _filters(victim, num)
    operator = measurement(front_layers(victim), kernel, bias).operator
    assert isinstance(operator, ConvOperator)
    _check_adjoint(operator, victim.input_shape)


def test_behind_odd_sides_pooling_is_an_operator_of_its_own():
    victim = POOLED["pooled, odd sides"]
    kernel, bias = _filters(victim, 3)
    operator = measurement(front_layers(victim), kernel, bias).operator
    assert isinstance(operator, Composition)
    assert isinstance(operator.outer, AveragePool)
    _check_adjoint(operator, victim.input_shape)
    assert float(operator.squared_norm_bound()) > 0


def _check_adjoint(operator, input_shape):
    rng = np.random.default_rng(3)
    height, width, channels = input_shape
    x = jnp.asarray(rng.normal(size=(channels, height, width, 2)))
    image = _apply(operator, x)
    y = jnp.asarray(rng.normal(size=image.shape))
    back = jax.jit(lambda o, v: o.adjoint(v))(operator, y)
    np.testing.assert_allclose(jnp.vdot(image, y), jnp.vdot(x, back), rtol=1e-12)


def test_even_kernels_have_their_center_before_the_middle():
    module = CNN((4, 16), 5, 2, strides=(1, 2), kernel_size=(2, 4))
    victim = Victim(module, (6, 9, 3), 2, NORM)
    kernel, bias = _filters(victim, 4)
    kernel, bias = (np.float32(x).astype(float) for x in (kernel, bias))
    params = _as64(pass_through_params(victim, front_layers(victim), kernel, bias))
    assert _mismatch(victim, params, kernel, bias, _images(victim)) < 1e-12


def test_feature_ranges_are_reached_and_never_left():
    victim = _victim("cnn")
    front = front_layers(victim)
    kernel, _ = _filters(victim, 6)
    low, high = feature_range(front, kernel)
    images = (np.random.default_rng(0).random((64, 8, 8, 3)) > 0.5).astype(float)
    # The image that is worst for feature 0 around one pixel.
    images[0] = 0.5
    images[0, 2:5, 2:5] = kernel[..., 0] < 0
    got = measurement(front, kernel)
    planes = to_planes(victim.normalization.normalize(jnp.asarray(images)))
    outputs = np.asarray(_apply(got.operator, planes))
    assert (outputs.min(axis=(1, 2, 3)) >= low - 1e-12).all()
    assert (outputs.max(axis=(1, 2, 3)) <= high + 1e-12).all()
    np.testing.assert_allclose(outputs[0, 3, 3, 0], low[0], rtol=1e-12)


def test_a_shift_costs_the_digits_it_says():
    images = load_dataset("sample").take(np.arange(50))[0].astype(float)
    victim = make_victim(
        "cnn",
        input_shape=(32, 32, 3),
        num_classes=2,
        normalization=Normalization.fit(images),
        pool="average",
        pool_every=2,
    )
    front = front_layers(victim)
    planes = to_planes(victim.normalization.normalize(jnp.asarray(images)))
    direct = np.zeros((3, 3, 3, 3))
    direct[1, 1, range(3), range(3)] = 1
    for kernel, at_least, at_most in ((_filters(victim, 12)[0], 0.7, 1.2), (direct, 0.1, 0.5)):
        bias = shift_bias(front, kernel)
        outputs = np.asarray(_apply(ConvOperator(jnp.asarray(kernel)), planes))
        signal = np.sqrt(np.mean(outputs**2))
        stored = np.sqrt(np.mean((outputs + bias[:, None, None, None]) ** 2))
        assert at_least < np.log10(stored / signal) < at_most


# Victim, features, whether shifted, and the PSNR that float32 activations leave at least (dB).
RECOVERABLE = {
    "resnet": (_with_statistics(_victim("resnet", widths=(16, 64))), 16, False, 110),
    "resnet, few channels": (_with_statistics(_victim("resnet", widths=(16, 32))), 8, True, 100),
    "pooled twice": (_victim("cnn", widths=(20, 80), pool="average"), 20, True, 60),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECOVERABLE)
def test_the_image_comes_back_from_what_flax_computes_in_float32(name):
    victim, num, shifted, least = RECOVERABLE[name]
    front = front_layers(victim)
    kernel, _ = _filters(victim, num)
    bias = shift_bias(front, kernel) if shifted else np.zeros(num)
    params = pass_through_params(victim, front, kernel, bias)
    images = _images(victim, 1, "float32")
    got = measurement(front, np.float32(kernel).astype(float), np.float32(bias).astype(float))
    seen = _fc_input(victim, params, images)[: len(got.bias), ..., 0].astype(float)
    active = got.exact & (seen > 1e-5)
    matrix = _dense(got.operator, victim)[active.reshape(-1)]
    assert np.linalg.matrix_rank(matrix) == matrix.shape[1]
    planes = np.linalg.lstsq(matrix, (seen - got.bias)[active], rcond=None)[0]
    inputs = np.transpose(planes.reshape(3, 8, 8), (1, 2, 0))
    pixels = np.asarray(victim.normalization.denormalize(jnp.asarray(inputs)))
    assert -10 * np.log10(np.mean((pixels - np.asarray(images[0], float)) ** 2)) > least
    # A measurement that forgets the bias explains nothing.
    _, residual, *_ = np.linalg.lstsq(matrix, seen[active], rcond=None)
    if shifted:
        assert residual.sum() > 1e-3 * np.sum(seen[active] ** 2)


def _dense(operator, victim):
    height, width, channels = victim.input_shape
    eye = jnp.eye(height * width * channels).reshape(channels, height, width, -1)
    matrix = np.asarray(_apply(operator, eye), np.float64)
    return matrix.reshape(-1, matrix.shape[-1])


def test_only_unshifted_features_show_a_mixture():
    victim = _victim("cnn", widths=(40, 40), pool="average", pool_every=2)
    front = front_layers(victim)
    kernel = np.float32(_filters(victim, 40)[0]).astype(float)
    bias = shift_bias(front, kernel) * (np.arange(40) < 32)
    params = _as64(pass_through_params(victim, front, kernel, bias))
    got = measurement(front, kernel, bias)
    images = _images(victim, 2)
    seen = _fc_input(victim, params, images)
    mixture = 0.6 * seen[..., 0] + 0.4 * seen[..., 1]
    exact = got.exact
    assert exact.any(axis=(1, 2)).sum() == 32
    matrix = _dense(got.operator, victim)[exact.reshape(-1)]
    planes, *_ = np.linalg.lstsq(matrix, (mixture - got.bias)[exact], rcond=None)
    error = matrix @ planes - (mixture - got.bias)[exact]
    assert np.abs(error).max() < 1e-9  # the equations do not tell a mixture from an image
    inputs = np.transpose(planes.reshape(3, 8, 8), (1, 2, 0))[None]
    pixels = victim.normalization.denormalize(jnp.asarray(inputs))
    again = _fc_input(victim, params, pixels)[..., 0]
    np.testing.assert_allclose(again[exact], mixture[exact], atol=1e-9)
    assert np.abs(again - mixture)[~exact].max() > 0.05  # the rectified features do


def test_shapes_are_those_of_the_victim():
    for victim, num, _ in VICTIMS.values():
        kernel, bias = _filters(victim, num)
        got = flatten_params(pass_through_params(victim, front_layers(victim), kernel, bias))
        expected = flatten_params(victim.param_shapes())
        assert {name: leaf.shape for name, leaf in got.items()} == {
            name: leaf.shape
            for name, leaf in expected.items()
            if not name.startswith(("fc/", "head/"))
        }
