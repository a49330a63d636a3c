import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config import ModelConfig
from jgia.models import (
    CNN,
    BatchNorm,
    Conv,
    Dense,
    GroupNorm,
    Pool,
    Residual,
    ResNet,
    Victim,
    batch_norm_names,
    flatten_params,
    make_victim,
    with_buffers,
)
from jgia.normalization import Normalization


def _victim(name, *, size=(7, 6), widths=(4, 6), **options):
    return make_victim(
        name, input_shape=(*size, 3), num_classes=3, widths=widths, fc_width=5, **options
    )


def _params(victim, seed=0):
    """Random float64 values, scales and biases of normalizations included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), victim.param_shapes()
    )


def _with_statistics(victim):
    rng = np.random.default_rng(3)
    shapes = {name: leaf.shape for name, leaf in flatten_params(victim.param_shapes()).items()}
    statistics = {
        name: (
            rng.normal(size=shapes[f"{name}/scale"]),
            rng.uniform(0.2, 3, shapes[f"{name}/scale"]),
        )
        for name in batch_norm_names(victim)
    }
    return with_buffers(victim, statistics), statistics


# The forward pass in NumPy, from the parameters alone: padding k // 2 as PyTorch has it.


def _conv(x, weights, name, stride=1):
    kernel, bias = weights[f"{name}/kernel"], weights.get(f"{name}/bias", 0.0)
    top, left = (side // 2 for side in kernel.shape[:2])
    padded = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nijcab,abcf->nijf", views[:, ::stride, ::stride], kernel) + bias


def _dense(x, weights, name):
    return x.reshape(len(x), -1) @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def _pool(x, reduce):
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    cells = [
        [reduce(x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], axis=(1, 2)) for j in range(columns)]
        for i in range(rows)
    ]
    return np.stack([np.stack(row, axis=1) for row in cells], axis=1)


def _stem_pool(x):
    """Maxima of what a 3x3 window at stride 2 sees of the image."""
    rows, columns = ([slice(max(0, i - 1), i + 2) for i in range(0, n, 2)] for n in x.shape[1:3])
    cells = [[x[:, i, j].max(axis=(1, 2)) for j in columns] for i in rows]
    return np.stack([np.stack(row, axis=1) for row in cells], axis=1)


def _normalized(x, weights, name, kind, statistics, groups, seen=None):
    if kind == "none":
        return x
    if seen is not None:
        seen[name] = (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)))
    if kind == "group":
        parts = x.reshape(*x.shape[:3], groups, -1)
        mean = parts.mean(axis=(1, 2, 4), keepdims=True)
        var = parts.var(axis=(1, 2, 4), keepdims=True)
        normal = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    else:
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        if kind == "eval":
            channels = x.shape[-1]
            mean, var = statistics.get(name, (np.zeros(channels), np.ones(channels)))
        normal = (x - mean) / np.sqrt(var + 1e-5)
    return normal * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def _resnet(x, weights, *, blocks, kind, head, statistics, groups=2, stem="cifar", seen=None):
    """``blocks``: stride and whether the shortcut is projected, of each."""

    def norm(y, name):
        return _normalized(y, weights, name, kind, statistics, groups, seen)

    x = np.maximum(norm(_conv(x, weights, "conv1", 1 if stem == "cifar" else 2), "norm1"), 0)
    if stem == "imagenet":
        x = _stem_pool(x)
    for i, (stride, projected) in enumerate(blocks, start=1):
        name = f"block{i}"
        y = np.maximum(norm(_conv(x, weights, f"{name}/conv1", stride), f"{name}/norm1"), 0)
        y = norm(_conv(y, weights, f"{name}/conv2"), f"{name}/norm2")
        if projected:
            x = norm(_conv(x, weights, f"{name}/shortcut", stride), f"{name}/shortcut_norm")
        x = np.maximum(x + y, 0)
    if head == "pool":
        return _dense(x.mean(axis=(1, 2)), weights, "head")
    return _dense(np.maximum(_dense(x, weights, "fc"), 0), weights, "head")


RESNETS = {
    "no norm": ({"norm": "none"}, [(1, False), (2, True)], "none"),
    "batch norm": ({}, [(1, False), (2, True)], "eval"),
    "batch statistics": ({"batch_norm": "train"}, [(1, False), (2, True)], "train"),
    "group norm": ({"norm": "group"}, [(1, False), (2, True)], "group"),
    "global pooling": ({"norm": "none", "head": "pool", "blocks": 2},
                       [(1, False), (1, False), (2, True), (1, False)], "none"),
    "strides": ({"norm": "none", "strides": (2, 1)}, [(2, True), (1, True)], "none"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNETS)
def test_resnets_compute_what_they_say(name):
    options, blocks, kind = RESNETS[name]
    victim, statistics = _victim("resnet", **options), {}
    if kind == "eval":
        victim, statistics = _with_statistics(victim)
    params = _params(victim)
    x = np.random.default_rng(1).random((3, 7, 6, 3))
    weights = {key: np.asarray(leaf) for key, leaf in flatten_params(params).items()}
    expected = _resnet(
        x,
        weights,
        blocks=blocks,
        kind=kind,
        head=options.get("head", "flatten_fc"),
        statistics=statistics,
    )
    apply = jax.jit(victim.apply)
    got = apply(params, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    alone = apply(params, jnp.asarray(x[:1]))
    if kind == "train":
        assert not np.allclose(alone, expected[:1], rtol=1e-2)  # the others were in it
    else:
        np.testing.assert_allclose(alone, expected[:1], rtol=1e-9, atol=1e-11)


def _vgg(x, weights, *, kind, statistics, seen):
    for i in range(1, 9):
        x = _conv(x, weights, f"conv{i}")
        x = np.maximum(_normalized(x, weights, f"norm{i}", kind, statistics, 2, seen), 0)
        if i in (1, 2, 4, 6, 8):
            x = _pool(x, np.max)
    return _dense(x, weights, "head")


PUBLISHED = {
    "resnet18": ("resnet18", (9, 6), {"widths": (4, 4, 6, 6)}, "eval"),
    "resnet18, ImageNet stem": (
        "resnet18", (9, 6), {"widths": (4, 4, 6, 6), "stem": "imagenet", "batch_norm": "train"},
        "train",
    ),
    "vgg11": ("vgg11", (33, 32), {"widths": (2, 2, 4, 4, 4, 4, 4, 6)}, "none"),
    "vgg11, batch norm": (
        "vgg11", (33, 32), {"widths": (2, 2, 4, 4, 4, 4, 4, 6), "norm": "batch"}, "eval",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_compute_what_they_say_and_report_what_they_normalize(name):
    model, size, options, kind = PUBLISHED[name]
    victim, statistics, seen = _victim(model, size=size, **options), {}, {}
    if kind == "eval":
        victim, statistics = _with_statistics(victim)
    params = _params(victim)
    x = np.random.default_rng(1).random((2, *size, 3))
    weights = {key: np.asarray(leaf) for key, leaf in flatten_params(params).items()}
    known = {"kind": kind, "statistics": statistics, "seen": seen}
    if model == "vgg11":
        expected = _vgg(x, weights, **known)
    else:
        blocks = [(1, False), (1, False), *[(2, True), (1, False)] * 3]
        stem = options.get("stem", "cifar")
        expected = _resnet(x, weights, blocks=blocks, head="pool", stem=stem, **known)
    logits, moments = jax.jit(victim.apply_with_statistics)(params, jnp.asarray(x))
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-11)
    assert set(moments) == set(seen) == set(batch_norm_names(victim))
    for layer, (mean, var) in seen.items():
        np.testing.assert_allclose(moments[layer][0], mean, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(moments[layer][1], var, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "count"),
    [
        ("resnet18", (224, 224, 3), 1000, {"stem": "imagenet"}, 11_689_512),  # torchvision's
        ("resnet18", (32, 32, 3), 10, {}, 11_173_962),
        ("resnet18", (32, 32, 3), 10, {"norm": "group"}, 11_173_962),
        ("vgg11", (32, 32, 3), 10, {}, 9_220_480 + 5_130),  # torchvision's features, and the head
        ("vgg11", (32, 32, 3), 10, {"norm": "batch"}, 9_220_480 + 5_130 + 2_752),
        ("vgg11", (64, 64, 3), 10, {}, 9_220_480 + 4 * 5_120 + 10),
    ],
)
def test_published_models_have_the_published_sizes(name, shape, classes, options, count):
    victim = make_victim(name, input_shape=shape, num_classes=classes, **options)
    shapes = jax.tree.leaves(victim.param_shapes())
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes) == count


@pytest.mark.parametrize(
    ("options", "strides", "pooled", "reduce"),
    [
        ({"strides": (2, 1)}, (2, 1), (False, False), None),
        ({"strides": (2, 2), "kernel_size": 5}, (2, 2), (False, False), None),
        ({"pool": "average"}, (1, 1), (True, True), np.mean),
        ({"pool": "max", "pool_every": 2, "strides": (1, 2)}, (1, 2), (False, True), np.max),
    ],
)
def test_cnns_with_strides_and_pooling(options, strides, pooled, reduce):
    victim = _victim("cnn", **options)
    params = _params(victim)
    weights = {key: np.asarray(leaf) for key, leaf in flatten_params(params).items()}
    inputs = np.random.default_rng(1).random((2, 7, 6, 3))
    x = inputs
    for i, (stride, pools) in enumerate(zip(strides, pooled, strict=True), start=1):
        x = np.maximum(_conv(x, weights, f"conv{i}", stride), 0)
        if pools:
            x = _pool(x, reduce)
    expected = _dense(np.maximum(_dense(x, weights, "fc"), 0), weights, "head")
    got = jax.jit(victim.apply)(params, jnp.asarray(inputs))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    described = [layer for layer in victim.layers() if isinstance(layer, Conv)]
    assert tuple(layer.stride for layer in described) == strides
    assert tuple(layer.pooled for layer in described) == pooled
    assert sum(isinstance(layer, Pool) for layer in victim.layers()) == sum(pooled)


class _PlainCNN(nn.Module):
    """The network as ARES has it, written out."""

    @nn.compact
    def __call__(self, x):
        for i in (1, 2):
            x = nn.relu(nn.Conv(12, (3, 3), padding="SAME", name=f"conv{i}")(x))
        x = nn.relu(nn.Dense(9, name="fc")(x.reshape((x.shape[0], -1))))
        return nn.Dense(4, name="head")(x)


def test_the_default_cnn_is_the_plain_one_bit_for_bit():
    x = jnp.asarray(np.random.default_rng(0).random((2, 6, 5, 3)), "float32")
    plain, ours = (
        Victim(module, (6, 5, 3), 4, Normalization.identity(3))
        for module in (_PlainCNN(), CNN(fc_width=9, num_classes=4))
    )
    params = plain.init(jax.random.key(3))
    mine = ours.init(jax.random.key(3))
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(mine)))
    np.testing.assert_array_equal(jax.jit(ours.apply)(params, x), jax.jit(plain.apply)(params, x))


def test_residual_blocks_are_described_with_their_parts():
    stem, norm, *blocks, fc, head = _victim("resnet", blocks=2).layers()
    assert stem == Conv("conv1", (3, 3), 4, 1, "relu", normalized=True)
    assert norm == BatchNorm("norm1", "eval")
    residual = [block for block in blocks if isinstance(block, Residual)]
    assert len(residual) == len(blocks) == 4
    assert [bool(block.shortcut) for block in residual] == [False, False, True, False]
    assert residual[2] == Residual(
        "block3",
        (
            Conv("block3/conv1", (3, 3), 6, 2, "relu", normalized=True),
            BatchNorm("block3/norm1", "eval"),
            Conv("block3/conv2", (3, 3), 6, 1, "none", normalized=True),
            BatchNorm("block3/norm2", "eval"),
        ),
        (
            Conv("block3/shortcut", (1, 1), 6, 2, "none", normalized=True),
            BatchNorm("block3/shortcut_norm", "eval"),
        ),
        "relu",
    )
    assert (fc, head) == (Dense("fc", 5, "relu"), Dense("head", 3, "none"))
    assert _victim("resnet", norm="group").layers()[1] == GroupNorm("norm1", 2)
    pooled = _victim("resnet", norm="none", head="pool").layers()
    assert pooled[-2:] == (Pool("global_average", 0, 0), Dense("head", 3, "none"))


def test_running_statistics_are_a_value_of_the_victim_and_never_of_the_parameters():
    victim = _victim("resnet")
    sent, statistics = _with_statistics(victim)
    assert sent != victim
    assert hash(sent) == hash(with_buffers(victim, dict(reversed(statistics.items()))))
    assert sent == with_buffers(victim, statistics)
    assert with_buffers(sent, {}) == victim
    assert sent.param_shapes() == victim.param_shapes()
    mean, var = statistics["block2/norm1"]
    block = sent.layers()[3]
    assert isinstance(block, Residual)
    described = block.branch[1]
    assert isinstance(described, BatchNorm)
    assert (described.mean, described.var) == (tuple(mean), tuple(var))


@pytest.mark.parametrize(
    ("name", "statistics", "message"),
    [
        ("norm9", ([0.0] * 4, [1.0] * 4), "no batch normalization 'norm9'; it has norm1, block1"),
        ("norm1", ([0.0] * 3, [1.0] * 4), r"must have shape \(4,\), got \(3,\) and \(4,\)"),
        ("norm1", ([0.0] * 4, [-1.0] * 4), "variances finite and not negative"),
        ("norm1", ([np.nan] * 4, [1.0] * 4), "must be finite"),
    ],
)
def test_running_statistics_must_fit(name, statistics, message):
    mean, var = statistics
    with pytest.raises(ValueError, match=message):
        with_buffers(_victim("resnet"), {name: (np.asarray(mean), np.asarray(var))})


@pytest.mark.parametrize("victim", [_victim("cnn"), _victim("resnet", norm="group")])
def test_running_statistics_need_a_batch_normalization(victim):
    with pytest.raises(ValueError, match="has no batch normalization"):
        with_buffers(victim, {})


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pooling_can_be_differentiated_twice(kind):
    victim = _victim("cnn", size=(4, 4), widths=(2,), pool=kind)
    params = _params(victim)
    x = jnp.asarray(np.random.default_rng(2).random((1, 4, 4, 3)))
    y = jnp.array([1])

    def gradient_norm(images):
        gradient = jax.grad(victim.loss)(params, images, y)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))

    direction = jnp.asarray(np.random.default_rng(3).normal(size=x.shape))
    slope = jnp.vdot(jax.jit(jax.grad(gradient_norm))(x), direction)
    value = jax.jit(gradient_norm)
    numeric = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(slope, numeric, rtol=1e-5)
    assert abs(float(slope)) > 1e-4


def test_the_options_of_the_command_line_are_those_of_make_victim():
    for config in (
        ModelConfig(),
        ModelConfig(model="cnn", widths=(4, 4), strides=(2, 1), pool="max", kernel_size=5),
        ModelConfig(model="resnet", widths=(4, 8), blocks=2, norm="batch", batch_norm="train"),
        ModelConfig(model="resnet", norm="group", head="pool"),
    ):
        victim = make_victim(
            config.model, input_shape=(16, 16, 3), num_classes=3, **config.architecture()
        )
        assert victim.name == config.model
    assert isinstance(victim.module, ResNet)
    assert victim.module.head == "pool"
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(ModelConfig().architecture()) == names - {"model"}
