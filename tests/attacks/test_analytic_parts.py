"""Parts of the analytic attack: activations, convolutions, linear systems, chains, searches."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.analytic import check, count_equations
from jgia.attacks.analytic.activations import Activation, parse_activation
from jgia.attacks.analytic.arrays import LayerArrays
from jgia.attacks.analytic.chain import Stage, head_name, stages
from jgia.attacks.analytic.convolution import Windows, conv_system
from jgia.attacks.analytic.joint import (
    Front,
    _evaluate,
    _Linearized,
    search_image,
)
from jgia.attacks.analytic.linear import determined, least_squares
from jgia.attacks.analytic.recursion import ratio
from jgia.models import Conv, Dense, Victim, make_victim
from jgia.normalization import Normalization

RNG = np.random.default_rng
JAX = {
    "none": lambda z: z,
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "leaky_relu(0.2)": lambda z: nn.leaky_relu(z, 0.2),
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
}


class Matrix:
    """A dense matrix as a linear map."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix, self.shape = matrix, matrix.shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        return self.matrix @ x

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        return self.matrix.T @ y


def dense(system) -> np.ndarray:
    """The matrix of a linear map."""
    return np.stack([system.apply(row) for row in np.eye(system.shape[1])], axis=1)


@pytest.mark.parametrize("name", JAX)
def test_activations_are_those_of_jax_and_invert(name):
    activation = parse_activation(name)
    assert activation is not None
    z = RNG(0).normal(size=40)
    outputs = activation.apply(z)
    np.testing.assert_allclose(outputs, JAX[name](jnp.asarray(z)), rtol=1e-14)
    slopes = jax.vmap(jax.grad(JAX[name]))(jnp.asarray(z))
    np.testing.assert_allclose(activation.derivative(outputs), slopes, rtol=1e-12)
    inverse, known = activation.invert(outputs)
    np.testing.assert_allclose(inverse[known], z[known], rtol=1e-12)
    assert known.all() if name != "relu" else list(known) == list(z > 0)


@pytest.mark.parametrize("name", ["gelu", "leaky_relu(-1)", "leaky_relu(0)", "leaky_relu(1e)", ""])
def test_unknown_activations_are_not_guessed(name):
    assert parse_activation(name) is None


def test_zeros_of_a_rectifier_are_told_from_small_outputs_by_their_scatter():
    relu = Activation("relu")
    np.testing.assert_array_equal(
        relu.clean(np.array([1.0, 3e-7, -2e-7, 1e-3]), 1e-7), [1.0, 0.0, 0.0, 1e-3]
    )
    exact = np.array([1.0, 0.0, 1e-5])
    np.testing.assert_array_equal(relu.clean(exact, 1e-7), exact)
    inside = Activation("sigmoid").clean(np.array([-0.1, 0.5, 1.1]), 1e-7)
    assert inside.min() > 0
    assert inside[1] == 0.5
    assert inside.max() < 1


@pytest.mark.parametrize(
    ("sides", "stride", "shape"),
    [
        ((3, 3), 1, (6, 5, 2)),
        ((5, 5), 2, (8, 8, 3)),
        ((4, 2), 3, (7, 8, 1)),
        ((1, 1), 2, (5, 4, 2)),
    ],
)
def test_windows_are_those_of_the_model(sides, stride, shape):
    """Against JAX's convolution with the padding that Conv describes."""
    image = RNG(1).normal(size=shape)
    kernel = RNG(2).normal(size=(*sides, shape[-1], 4))
    windows = Windows(shape, sides, stride)
    got = windows.patches(image) @ kernel.reshape(-1, 4)
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(image)[None],
        jnp.asarray(kernel),
        (stride, stride),
        [((side - 1) // 2, side // 2) for side in sides],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(got, np.asarray(expected).reshape(-1, 4), atol=1e-12)
    other = RNG(3).normal(size=windows.patches(image).shape)
    forward = np.vdot(windows.patches(image), other)
    np.testing.assert_allclose(forward, np.vdot(image, windows.add_patches(other)), rtol=1e-12)


def system_of(shape=(6, 6, 2), features=4, stride=1, *, known=1.0, seed=0):
    """A random layer with its equations and the input that satisfies them."""
    rng = RNG(seed)
    layer = Conv("conv1", (3, 3), features, stride, "relu")
    out = (-(-shape[0] // stride), -(-shape[1] // stride), features)
    stage = Stage(layer, Activation("relu"), shape, out)
    kernel, deltas = rng.normal(size=(3, 3, shape[-1], features)), rng.normal(size=out)
    u = rng.normal(size=shape)
    windows = Windows(shape, (3, 3), stride)
    patches = windows.patches(u)
    update = (patches.T @ deltas.reshape(-1, features)).reshape(kernel.shape)
    arrays = LayerArrays(kernel, np.zeros(features), update, None)
    mask = rng.uniform(size=out) < known
    system = conv_system(stage, arrays, deltas, np.ones(out), mask)
    outputs = patches @ kernel.reshape(-1, features)
    return system, system.right_hand_side(outputs, update), u, stage, arrays


def test_equations_of_a_convolution_hold_for_its_input():
    system, y, u, stage, arrays = system_of(known=0.5, stride=2)
    np.testing.assert_allclose(system.apply(u.reshape(-1)), y, atol=1e-12)
    other = RNG(5).normal(size=system.shape[0])
    product = np.vdot(system.apply(u.reshape(-1)), other)
    np.testing.assert_allclose(product, np.vdot(u, system.adjoint(other)), rtol=1e-12)

    def loss(kernel):  # whose derivative by the output is delta
        out = jax.lax.conv_general_dilated(
            jnp.asarray(u)[None],
            kernel,
            (2, 2),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(out.reshape(-1, 4) * jnp.asarray(system.deltas))

    gradient = jax.grad(loss)(jnp.asarray(arrays.kernel))
    np.testing.assert_allclose(gradient, arrays.kernel_update, atol=1e-12)
    assert stage.layer.features == 4


@pytest.mark.parametrize("known", [0.0, 0.2, 1.0])
def test_what_is_determined_is_what_the_null_space_leaves(known):
    """Against the singular value decomposition of the dense matrix."""
    system, y, u, *_ = system_of((5, 5, 2), 2, known=known)
    matrix = dense(system)
    _, values, rows = np.linalg.svd(matrix)
    rank = int(np.count_nonzero(values > 1e-10 * values[0]))
    null = rows[rank:]
    got = determined(system, RNG(0))
    np.testing.assert_array_equal(got, np.linalg.norm(null, axis=0) < 1e-8)
    assert system.num_equations >= rank
    solution = least_squares(system, y, tolerance=1e-14)
    shortest = np.linalg.lstsq(matrix, y, rcond=1e-12)[0]
    np.testing.assert_allclose(solution.x, shortest, atol=1e-8)
    np.testing.assert_allclose(solution.x[got], u.reshape(-1)[got], atol=1e-8)
    assert solution.converged


def test_some_entries_may_be_determined_and_others_not():
    matrix = np.array([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2], [1, 0, 0, 1]])
    np.testing.assert_array_equal(determined(Matrix(matrix), RNG(0)), [True, False, False, True])


def test_least_squares_is_that_of_numpy_and_says_when_it_is_not_done():
    rng = RNG(0)
    matrix, y = rng.normal(size=(30, 12)), rng.normal(size=30)
    got = least_squares(Matrix(matrix), y, tolerance=1e-13)
    expected = np.linalg.lstsq(matrix, y)[0]
    np.testing.assert_allclose(got.x, expected, rtol=1e-9)
    left = np.linalg.norm(matrix @ expected - y) / np.linalg.norm(y)
    assert got.converged
    assert got.residual == pytest.approx(left)
    damped = least_squares(Matrix(matrix), y, tolerance=1e-13, damping=2.0)
    ridge = np.linalg.solve(matrix.T @ matrix + 4 * np.eye(12), matrix.T @ y)
    np.testing.assert_allclose(damped.x, ridge, rtol=1e-9)
    assert not least_squares(Matrix(matrix), y, tolerance=1e-13, max_iterations=3).converged
    nothing = least_squares(Matrix(matrix), 0 * y, tolerance=1e-13)
    assert not nothing.x.any()


def test_the_ratio_uses_all_rows():
    rng = RNG(0)
    x, deltas = rng.normal(size=6), rng.normal(size=4)
    update = np.outer(x, deltas)
    got, left = ratio(update, deltas)
    np.testing.assert_allclose(got, x, rtol=1e-14)
    assert left < 1e-15
    two = update + np.outer(rng.normal(size=6), rng.normal(size=4))
    assert ratio(two, deltas)[1] > 0.1
    assert np.isnan(ratio(update, 0 * deltas)[0]).all()


def front_of(widths=(2, 6), size=6, seed=0, off=True):
    """Two ReLU convolutions with a known output, and the image behind it."""
    rng = RNG(seed)
    shape, channels, parts, arrays = (size, size, 1), 1, [], []
    image = rng.normal(size=shape)
    below = inner = image
    for i, width in enumerate(widths):
        layer = Conv(f"conv{i + 1}", (3, 3), width, 1, "relu")
        kernel = rng.normal(size=(3, 3, channels, width)) / 3
        bias = 0.1 * rng.normal(size=width)
        stage = Stage(layer, Activation("relu"), inner.shape, (size, size, width))
        arrays.append(LayerArrays(kernel, bias, np.zeros_like(kernel), None))
        parts.append(stage)
        windows = Windows(inner.shape, (3, 3), 1)
        before = windows.patches(inner) @ kernel.reshape(-1, width) + bias
        below, inner = inner, np.maximum(before, 0).reshape(stage.output_shape)
        channels = width
    deltas, known = rng.normal(size=inner.shape), inner > 0
    update = Windows(below.shape, (3, 3), 1).patches(below).T @ deltas.reshape(-1, widths[-1])
    arrays[-1] = arrays[-1]._replace(kernel_update=update.reshape(arrays[-1].kernel.shape))
    system = conv_system(parts[-1], arrays[-1], deltas, known * 1.0, known)
    y = system.right_hand_side(
        (inner - arrays[-1].bias[None, None, :]).reshape(-1, widths[-1]), update
    )
    bounded = (~known).reshape(-1, widths[-1]) * system.weights.max() * off
    return Front(tuple(parts), tuple(arrays), system, y, bounded), image


def test_the_linearization_is_the_derivative():
    front, image = front_of()
    rng = RNG(1)
    point = _evaluate(front, front.windows, image + 0.3 * rng.normal(size=image.shape))
    derivative = _Linearized(front, front.windows, point)
    change, step = rng.normal(size=image.shape), 1e-7
    moved = _evaluate(front, front.windows, point.image + step * change)
    numeric = (point.residual - moved.residual) / step  # the residual falls where A u rises
    np.testing.assert_allclose(derivative.apply(change.reshape(-1)), numeric, atol=1e-5)
    y = rng.normal(size=derivative.shape[0])
    product = np.vdot(derivative.apply(change.reshape(-1)), y)
    np.testing.assert_allclose(product, np.vdot(change, derivative.adjoint(y)), rtol=1e-10)
    assert _evaluate(front, front.windows, image).loss < 1e-24


def test_the_search_finds_the_image_and_says_when_it_cannot():
    front, image = front_of((6, 6))
    found = search_image(front, precision=1e-15, rng=RNG(0))
    assert found is not None
    np.testing.assert_allclose(found.inputs, image, atol=1e-9)
    assert found.determined.all()
    assert found.report["residual"] < 1e-11
    short = dataclasses.replace(front.system, weights=0 * front.system.weights)
    short = dataclasses.replace(short, deltas=0 * short.deltas)
    assert search_image(front._replace(system=short), precision=1e-15, rng=RNG(0)) is None


def custom(layers) -> Victim:
    """A victim that only describes itself."""

    class Described(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(2, (3, 3), name="conv1")(x)
            x = nn.Conv(2, (3, 3), name="conv2")(x)
            x = x.reshape((x.shape[0], -1))
            x = nn.Dense(3, name="fc", use_bias=False)(x)
            return nn.Dense(3, name="head", use_bias=False)(x)

        def describe(self):
            return layers

    return Victim(Described(), (4, 4, 1), 3, Normalization.identity(1))


CONV, HEAD = Conv("conv1", (3, 3), 2, 1, "relu"), Dense("head", 3, "none")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((dataclasses.replace(CONV, activation="gelu"), HEAD), "activation 'gelu'"),
        ((dataclasses.replace(CONV, pooled=True), HEAD), "pooling follows the layer conv1"),
        ((dataclasses.replace(CONV, normalized=True), HEAD), "a normalization follows"),
        ((CONV, Dense("fc", 3, "relu"), CONV, HEAD), "comes after a fully connected layer"),
        ((CONV, Dense("fc", 3, "relu")), "does not end with a linear fully connected layer"),
        ((CONV, HEAD), "layer head has no bias"),
        ((Dense("fc", 3, "relu"), HEAD), "layer fc has no bias"),
    ],
)
def test_other_chains_are_refused_with_the_reason(layers, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check(custom(layers))
    assert "analytic cannot attack" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("cnn", {"pool": "max"}, "pooling follows the layer conv1"),
        ("resnet", {"widths": (4,)}, "normalization follows|kind"),
        ("convnet", {"widths": (8, 8)}, "normalization follows"),
        ("imprint_cnn", {}, None),
        ("mlp", {}, None),
        ("lenet", {}, None),
        ("cnn", {}, None),
    ],
)
def test_bundled_models_are_accepted_or_refused(name, options, reason):
    victim = make_victim(name, input_shape=(8, 8, 3), num_classes=3, **options)
    if reason is None:
        check(victim)
        assert head_name(victim) is not None
    else:
        with pytest.raises(ValueError, match=reason):
            check(victim)


def test_equations_are_counted_from_shapes():
    victim = make_victim("cnn", input_shape=(32, 32, 3), num_classes=10)
    first, second = count_equations(victim)
    assert (first.unknowns, first.gradient_equations, first.weight_equations) == (3072, 324, 12288)
    assert (second.unknowns, second.gradient_equations) == (12288, 1296)
    small = count_equations(make_victim("cnn", input_shape=(4, 4, 3), num_classes=10))[1]
    assert small.gradient_equations == small.unknowns == 192  # 108 rows for 16 entries a channel
    mlp = make_victim("mlp", input_shape=(4, 4, 1), num_classes=2)
    assert count_equations(mlp) == ()
    assert len(stages(mlp)) == 1
