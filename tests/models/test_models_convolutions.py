"""Convolutions rewritten for gradient matching equal flax's, up to third derivatives."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gradient_matching as matching
from jgia.config import ClientConfig
from jgia.federated import client_update
from jgia.models import convolution_forms as forms
from jgia.models import convolutions, make_victim
from jgia.models.convolutions import fast_convolutions

FORMS = ("convolution", "patches")
WINDOWS = {
    "same": {"kernel_size": (3, 3), "padding": "SAME"},
    "same, stride 2": {"kernel_size": (3, 3), "strides": 2, "padding": "SAME"},
    "valid, uneven": {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"},
    "one-sided": {"kernel_size": (4, 3), "strides": (2, 2), "padding": ((2, 1), (0, 2))},
    "pixels unused": {"kernel_size": (2, 2), "strides": 3, "padding": 1},
    "stride above kernel": {"kernel_size": (1, 1), "strides": (2, 2), "padding": 0},
    "mixed pads": {"kernel_size": (3, 3), "padding": [1, (0, 1)]},
    "no bias": {"kernel_size": (3, 3), "use_bias": False},
    "dilated": {"kernel_size": (3, 3), "kernel_dilation": 2},
    "grouped": {"kernel_size": (3, 3), "feature_group_count": 2},
    "circular": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
}


class _Net(nn.Module):
    """The layer in question behind another, with an activation that has all derivatives."""

    window: dict

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x))
        return jnp.tanh(nn.Conv(6, **self.window, param_dtype=x.dtype)(x))


def _matching(net, params, direction, x, context):
    """A function of the gradient, as gradient matching has it."""
    with context:
        gradient = jax.grad(lambda p: jnp.sum(jnp.square(net.apply(p, x))))(params)
    products = jax.tree.map(lambda g, d: jnp.sum(jnp.sin(g) * d + g * g), gradient, direction)
    return sum(jax.tree.leaves(products))


@pytest.fixture
def choose(monkeypatch):
    """Fixes the form that every convolution takes."""

    def fix(form):
        monkeypatch.setattr(convolutions, "_form", lambda *_: form)
        return fast_convolutions()

    return fix


def _case(window, seed=0, side=(9, 8)):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, *side, 3)))
    net = _Net(window)
    params = net.init(jax.random.key(seed), x)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)
    return net, params, direction, x


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWS)
def test_derivative_of_a_gradient_is_that_of_flax(name, choose):
    net, params, direction, x = _case(WINDOWS[name])

    def derivative(context):
        return jax.jit(jax.grad(lambda x: _matching(net, params, direction, x, context())))(x)

    expected = derivative(contextlib.nullcontext)
    for form in (*FORMS, "winograd") if name == "same" else FORMS:
        found = derivative(lambda form=form: choose(form))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * float(abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_derivative_agrees_with_finite_differences(form, choose):
    net, params, direction, x = _case(WINDOWS["same, stride 2"])
    along = jnp.asarray(np.random.default_rng(9).standard_normal(x.shape))

    def value(x):
        return _matching(net, params, direction, x, choose(form))

    found = float(jnp.vdot(jax.grad(value)(x), along))
    step = 1e-5
    expected = float((value(x + step * along) - value(x - step * along)) / (2 * step))
    assert found == pytest.approx(expected, rel=1e-7)
    assert found != pytest.approx(1.01 * expected, rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("side", [(4, 7), (5, 4)])
def test_third_derivatives(side, choose):
    net, params, direction, x = _case(WINDOWS["one-sided"], side=side)

    def third(context):
        def once(p):
            return jax.grad(lambda x: _matching(net, p, direction, x, context()))(x).sum()

        return jax.tree.leaves(jax.jit(jax.grad(once))(params))

    expected = third(contextlib.nullcontext)
    for form in FORMS:
        found = third(lambda form=form: choose(form))
        for mine, theirs in zip(found, expected, strict=True):
            scale = float(abs(theirs).max()) + 1e-9
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-11 * scale)


SQUARE = forms.Window((1, 1), ((1, 1), (1, 1)), "winograd")


@pytest.mark.parametrize("side", [(6, 8), (7, 6), (5, 9), (1, 2)])
@pytest.mark.parametrize("form", ["convolution", "patches", "winograd"])
def test_each_form_is_the_convolution_and_its_derivatives(form, side):
    rng = np.random.default_rng(0)
    x, kernel, d = (
        jnp.asarray(rng.standard_normal(shape))
        for shape in ((2, *side, 3), (3, 3, 3, 4), (2, *side, 4))
    )
    window = SQUARE._replace(form=form)

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    expected, pullback = jax.vjp(plain, x, kernel)
    wanted = (expected, *pullback(d))
    found = (
        forms.forward(window, x, kernel),
        forms.to_input(window, x.shape, d, kernel),
        forms.to_kernel(window, kernel.shape, d, x),
    )
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13 * float(abs(theirs).max()))
        assert not np.allclose(mine, jnp.roll(theirs, 1, axis=-1))


def test_winograd_loses_few_digits_of_float32():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 16, 16, 64)), "float32")
    kernel = jnp.asarray(rng.standard_normal((3, 3, 64, 8)), "float32")
    exact = forms.forward(
        SQUARE._replace(form="convolution"), x.astype(float), kernel.astype(float)
    )
    error = abs(np.asarray(forms.forward(SQUARE, x, kernel), float) - np.asarray(exact)).max()
    assert error < 2e-6 * float(abs(exact).max())


def test_many_channels_at_many_pixels_are_filtered_by_winograd():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 23, 24, 128)))
    conv = nn.Conv(256, (3, 3), param_dtype=x.dtype)
    params = conv.init(jax.random.key(0), x)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)

    def derivative(context):
        return jax.grad(lambda x: _matching(conv, params, direction, x, context))

    found = derivative(fast_convolutions())
    jaxpr = jax.make_jaxpr(found)(x).jaxpr
    assert "conv_general_dilated" not in _operations(jaxpr, [])
    assert "concatenate" not in _operations(jaxpr, [])  # which patches would need
    expected = jax.jit(derivative(contextlib.nullcontext()))(x)
    difference = abs(jax.jit(derivative(fast_convolutions()))(x) - expected).max()
    assert float(difference) < 1e-11 * float(abs(expected).max())


def _operations(jaxpr, found):
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _operations(inner, found)
    return found


@pytest.mark.parametrize(("vmapped", "xlas"), [(True, False), (False, True)])
def test_vmapped_searches_have_no_convolution_left(vmapped, xlas):
    net, params, direction, x = _case(WINDOWS["same"], side=(64, 64))

    def value(x):
        return _matching(net, params, direction, x, fast_convolutions(vmapped=vmapped))

    jaxpr = jax.make_jaxpr(jax.grad(value))(x).jaxpr
    assert ("conv_general_dilated" in _operations(jaxpr, [])) is xlas


def test_a_convolution_with_an_operation_of_its_own_keeps_it():
    used = []

    def own(x, kernel, *args, **kwargs):
        used.append(kernel.shape)
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    x = jnp.ones((1, 4, 4, 1), jnp.float32)
    conv = nn.Conv(2, (3, 3), conv_general_dilated=own)
    params = conv.init(jax.random.key(0), x)
    used.clear()
    with fast_convolutions():
        conv.apply(params, x)
    assert used == [(3, 3, 1, 2)]


def test_outside_nothing_changes():
    net, params, _, x = _case(WINDOWS["same"])
    before = str(jax.make_jaxpr(net.apply)(params, x))
    with fast_convolutions():
        assert str(jax.make_jaxpr(net.apply)(params, x)) != before
    assert str(jax.make_jaxpr(net.apply)(params, x)) == before


def test_initialization_inside_is_as_outside():
    net, params, _, x = _case(WINDOWS["same"])
    with fast_convolutions():
        inside = net.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, inside, params)


@pytest.mark.slow
def test_restarts_take_the_same_way_one_by_one_and_at_once():
    victim = make_victim("convnet", input_shape=(8, 8, 3), num_classes=3, widths=(8, 8))
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), victim.init(jax.random.key(0)))
    image = np.random.default_rng(1).uniform(size=(1, 8, 8, 3))
    observation = client_update(
        jax.random.key(1), victim, params, image, np.array([2]), ClientConfig()
    )
    chosen = matching.Settings(num_steps=4, restarts=3, optimizer="adam")
    problem = matching.make_problem(observation, np.array([2]), chosen)
    keys = jax.random.split(jax.random.key(3), 3)
    states = jax.vmap(matching.search.init, in_axes=(0, None))(keys, problem)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1] + 0, states) for i in range(3)]

    def losses(groups):
        kept = []
        matching.run(
            [problem] * len(groups),
            groups,
            num_steps=4,
            stretch=4,
            on_event=lambda event: bool(kept.append(event.losses)),
        )
        return kept[0]

    np.testing.assert_allclose(losses([states]), losses(parts), rtol=1e-9)
