import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgia.models import (
    CNN,
    Conv,
    ConvNet,
    Dense,
    Residual,
    Victim,
    flatten_params,
    flattened_features,
    make_victim,
    output_shape,
    unflatten_params,
)
from jgia.normalization import Normalization

SMALL = {
    "cnn": make_victim("cnn", input_shape=(6, 5, 3), num_classes=4, widths=(2, 3), fc_width=7),
    "mlp": make_victim("mlp", input_shape=(6, 5, 3), num_classes=4, widths=(7, 5)),
    "lenet": make_victim("lenet", input_shape=(6, 5, 3), num_classes=4, widths=(2, 3, 2)),
    "convnet": make_victim("convnet", input_shape=(6, 5, 3), num_classes=4, widths=(8,)),
    "resnet": make_victim(
        "resnet", input_shape=(6, 5, 3), num_classes=4, widths=(2, 3), fc_width=7
    ),
}
PUBLISHED = {
    "resnet18": make_victim(
        "resnet18", input_shape=(9, 5, 3), num_classes=4, widths=(2, 2, 3, 3), stem="imagenet"
    ),
    "vgg11": make_victim("vgg11", input_shape=(32, 33, 3), num_classes=4, widths=(2,) * 8),
    "vgg11, batch norm": make_victim(
        "vgg11", input_shape=(32, 33, 3), num_classes=4, widths=(2,) * 8, norm="batch"
    ),
}


@pytest.fixture(params=SMALL.values(), ids=list(SMALL))
def victim(request):
    return request.param


@functools.cache
def _params(victim, dtype="float32"):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), dtype),
        victim.param_shapes(),
    )


def _pixels(victim, count, dtype="float64"):
    pixels = np.random.default_rng(count).random((count, *victim.input_shape))
    return jnp.asarray(pixels, dtype)


def _features(victim, params, x) -> dict[str, Any]:
    """The outputs of every layer, as flax captures them."""

    def run(p, inputs):
        return victim.module.apply(
            {"params": p}, inputs, capture_intermediates=True, mutable=["intermediates"]
        )[1]

    captured: Any = run(params, x) if isinstance(x, jax.Array) else jax.eval_shape(run, params, x)
    return {
        name: value["__call__"][0]
        for name, value in captured["intermediates"].items()
        if name != "__call__"
    }


@functools.cache
def _apply(victim):
    return jax.jit(victim.apply)


def _count(victim):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(victim.param_shapes()))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        # Worked by hand: kernel height x width x in x out + out, layer by layer.
        ("lenet", (32, 32, 3), 10, 912 + 3612 + 3612 + 8 * 8 * 12 * 10 + 10),
        ("lenet", (32, 32, 3), 100, 912 + 3612 + 3612 + 76900),
        ("mlp", (28, 28, 1), 10, 784 * 1024 + 1024 + 10250),
        ("cnn", (32, 32, 3), 10, 336 + 1308 + 32 * 32 * 12 * 1024 + 1024 + 10250),
        (
            "convnet",
            (32, 32, 3),
            10,
            (896 + 64) + (18496 + 128) + (73856 + 256) + 4 * 4 * 128 * 10 + 10,
        ),
    ],
)
def test_parameter_counts(name, shape, classes, count):
    assert _count(make_victim(name, input_shape=shape, num_classes=classes)) == count


def test_the_lenet_of_deep_leakage_has_15826_parameters():
    assert _count(make_victim("lenet", input_shape=(32, 32, 3), num_classes=10)) == 15_826


def test_shapes_and_jit(victim):
    params, x = _params(victim, "float64"), _pixels(victim, 3)
    compiled = _apply(victim)(params, x)
    assert compiled.shape == (3, victim.num_classes)
    with jax.disable_jit():
        logits = victim.apply(params, x)
    np.testing.assert_allclose(compiled, logits, rtol=1e-10, atol=1e-12)


def test_examples_do_not_couple(victim):
    params = _params(victim, "float64")
    x = _pixels(victim, 3)
    apply = _apply(victim)
    one = apply(params, x)[0]
    changed = apply(params, x.at[1:].set(0.5))
    assert not np.allclose(changed[1], apply(params, x)[1])
    np.testing.assert_allclose(changed[0], one, rtol=1e-10, atol=1e-12)


def test_loss_is_the_mean_cross_entropy_of_normalized_pixels(victim):
    norm = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    victim = Victim(victim.module, victim.input_shape, victim.num_classes, norm, victim.name)
    params = _params(victim, "float64")
    x = _pixels(victim, 3)
    y = jnp.array([0, 3, 1])
    inputs = (np.asarray(x) - np.array(norm.mean)) / np.array(norm.std)
    logits = np.asarray(_apply(SMALL[victim.name])(params, jnp.asarray(inputs)))
    log_z = np.log(np.exp(logits).sum(axis=1))
    expected = np.mean(log_z - logits[np.arange(3), np.asarray(y)])
    np.testing.assert_allclose(jax.jit(victim.loss)(params, x, y), expected, rtol=1e-10)
    raw = np.asarray(_apply(SMALL[victim.name])(params, x))
    assert not np.allclose(raw, logits)  # the normalization matters


@pytest.mark.parametrize("victim", [*SMALL.values(), *PUBLISHED.values()])
def test_layer_descriptions_match_the_parameters(victim):
    shapes = {name: leaf.shape for name, leaf in flatten_params(victim.param_shapes()).items()}
    described = {}

    def describe(layers, shape):
        for i, layer in enumerate(layers):
            before = output_shape(layers[:i], shape) if isinstance(layer, Conv) else shape
            if isinstance(layer, Conv):
                kernel = (*layer.kernel_size, before[-1], layer.features)
                described[f"{layer.name}/kernel"] = kernel
                if not layer.normalized or victim.name == "convnet":
                    described[f"{layer.name}/bias"] = kernel[-1:]
                if layer.normalized:
                    norm = layers[i + 1].name
                    described[f"{norm}/scale"] = described[f"{norm}/bias"] = kernel[-1:]
            elif isinstance(layer, Residual):
                inside = output_shape(layers[:i], shape)
                describe(layer.branch, inside)
                describe(layer.shortcut, inside)
            elif isinstance(layer, Dense):
                assert shapes[f"{layer.name}/kernel"][-1] == layer.features
                described[f"{layer.name}/kernel"] = shapes[f"{layer.name}/kernel"]
                described[f"{layer.name}/bias"] = (layer.features,)

    describe(victim.layers(), victim.input_shape)
    assert described == shapes
    name, features = flattened_features(victim)
    assert shapes[f"{name}/kernel"][0] == np.prod(features)
    assert victim.layers()[-1].name == "head"
    assert victim.layers()[-1].activation == "none"
    assert victim.layers()[-1].features == victim.num_classes


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("lenet", 2, 2), ("cnn", 1, 1), ("convnet", 1, 1)],
)
def test_strides_and_pooling_describe_what_the_model_does(name, first, second):
    victim = make_victim(name, input_shape=(9, 12, 3), num_classes=2, widths=(8, 8))
    layers = [layer for layer in victim.layers() if isinstance(layer, Conv)]
    assert [layer.stride for layer in layers] == [first, second]
    image = jax.ShapeDtypeStruct((1, 9, 12, 3), "float32")
    captured = _features(victim, victim.param_shapes(), image)
    height, width = 9, 12
    for layer in layers:
        height, width = -(-height // layer.stride), -(-width // layer.stride)
        assert captured[layer.name].shape == (1, height, width, layer.features)
        if layer.pooled:
            height, width = height // 2, width // 2


def test_first_layer_is_a_convolution_with_zero_padding():
    victim = SMALL["cnn"]
    params = _params(victim, "float64")
    x = np.random.default_rng(0).random((1, 6, 5, 3))
    padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    kernel, bias = (np.asarray(params["conv1"][name]) for name in ("kernel", "bias"))
    expected = np.zeros((6, 5, 2))
    for i in range(6):
        for j in range(5):
            expected[i, j] = np.einsum("abc,abco->o", padded[i : i + 3, j : j + 3], kernel) + bias
    got = _features(victim, params, jnp.asarray(x))["conv1"][0]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_victims_are_values(victim):
    again = Victim(
        victim.module.copy(), victim.input_shape, victim.num_classes, victim.normalization,
        victim.name,
    )  # fmt: skip
    assert again == victim
    assert hash(again) == hash(victim)
    assert len({*SMALL.values(), again}) == len(SMALL)


def test_init_depends_on_the_key_alone():
    init = jax.jit(SMALL["mlp"].init)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
    assert not all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_flatten_and_unflatten_are_inverse(victim):
    params = _params(victim)
    flat = flatten_params(params)
    assert set(flat) >= {"head/kernel", "head/bias"}
    assert jax.tree.structure(unflatten_params(flat)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"fc_width": 0}, "fc_width must be at least 1"),
        ({"widths": (4, 0)}, "every size of the model must be at least 1"),
        ({"widths": ()}, "widths must name at least one layer"),
        ({"input_shape": (8, 0, 3)}, "every size of the model must be at least 1"),
        ({"normalization": Normalization.identity(1)}, "for 1 channels, the images have 3"),
        ({"name": "convnet", "input_shape": (7, 8, 3)}, "halves the image 3 times"),
        ({"name": "convnet", "widths": (12,)}, r"multiple of 8; got \(12,\)"),
        ({"strides": ()}, "strides must name at least one layer"),
        ({"strides": (2,)}, r"one value for each of the 2 widths \(12, 12\), got \(2,\)"),
        ({"strides": (2, 0)}, "every size of the model must be at least 1"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"pool_every": 2}, "pool_every needs pool"),
        ({"pool": "max", "pool_every": 3}, "would never pool: there are 2 convolutions"),
        ({"pool": "max", "widths": (4,) * 4}, "does not fit into 1x1 features"),
        ({"blocks": 2}, "'cnn' has no option 'blocks'; leave it out, or choose the model resnet"),
        ({"name": "mlp", "strides": (2,)}, "choose the model cnn or lenet or resnet"),
        ({"name": "lenet", "pool": "max"}, "'lenet' has no option 'pool'"),
        ({"name": "resnet", "blocks": 0}, "blocks must be at least 1"),
        ({"name": "resnet", "norm": "group", "batch_norm": "eval"}, "needs norm='batch'"),
        ({"name": "resnet", "strides": (1, 2)}, "one value for each of the 3 widths"),
        ({"name": "resnet18", "blocks": 2}, "'resnet18' has no option 'blocks'"),
        ({"name": "resnet18", "head": "pool"}, "'resnet18' has no option 'head'"),
        ({"name": "resnet18", "widths": (4, 8)}, r"4 stages: widths need 4 values, got \(4, 8\)"),
        ({"name": "resnet18", "norm": "none", "batch_norm": "train"}, "needs norm='batch'"),
        ({"name": "resnet", "stem": "cifar"}, "'resnet' has no option 'stem'.*model resnet18"),
        ({"name": "vgg11", "stem": "cifar"}, "'vgg11' has no option 'stem'"),
        ({"name": "vgg11", "strides": (1,) * 8}, "'vgg11' has no option 'strides'"),
        ({"name": "vgg11", "widths": (4, 8)}, "8 convolutions: widths need 8 values"),
        ({"name": "vgg11", "batch_norm": "eval"}, "needs norm='batch', got norm='none'"),
        ({"name": "vgg11"}, "pooling window does not fit into 1x1 features"),
        ({"name": "lenet", "norm": "batch"}, "choose the model resnet or resnet18 or vgg11"),
    ],
)
def test_make_victim_rejects(fields, message):
    arguments = {"name": "cnn", "input_shape": (8, 8, 3), "num_classes": 10} | fields
    with pytest.raises(ValueError, match=message):
        make_victim(arguments.pop("name"), **arguments)


def test_unhashable_modules_are_refused_at_once():
    with pytest.raises(ValueError, match="must be hashable"):
        Victim(CNN([2, 3], 4, 2), (4, 4, 1), 2, Normalization.identity(1))


def test_undescribed_modules_say_so():
    victim = Victim(nn.Dense(2), (1, 1, 1), 2, Normalization.identity(1))
    with pytest.raises(ValueError, match="layers of Dense are not described"):
        victim.layers()


def test_gradient_of_the_head_bias_is_softmax_minus_one_hot(victim):
    params = _params(victim, "float64")
    x = _pixels(victim, 3)
    y = jnp.array([3, 0, 1])
    gradient = jax.jit(jax.grad(victim.loss))(params, x, y)["head"]["bias"]
    logits = _apply(victim)(params, victim.normalization.normalize(x))
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(y, 4, dtype="float64")).mean(axis=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    assert optax.tree.norm(gradient) > 1e-3


def test_convnet_pools_by_means_and_drops_an_odd_row():
    module = ConvNet((4,), groups=0, num_classes=2)
    victim = Victim(module, (3, 5, 1), 2, Normalization.identity(1))
    params = _params(victim, "float64")
    x = _pixels(victim, 2)
    conv = np.maximum(_features(victim, params, x)["conv1"], 0)
    pooled = np.stack(
        [conv[:, :2, 2 * j : 2 * j + 2].mean(axis=(1, 2)) for j in range(2)], axis=1
    ).reshape(2, -1)
    expected = pooled @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(victim.apply(params, x), expected, rtol=1e-12, atol=1e-14)
