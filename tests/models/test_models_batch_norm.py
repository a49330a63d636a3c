"""Batch normalization as a policy: running statistics, batch statistics, their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jgia.models import (
    Victim,
    batch_norm_names,
    make_victim,
    with_batch_norm,
    with_buffers,
)
from jgia.models.pooling import stem_pool
from jgia.normalization import Normalization

SIZES = {"input_shape": (4, 4, 2), "num_classes": 3}
VICTIM = make_victim("resnet", **SIZES, widths=(2, 3), fc_width=4, batch_norm="train")
MODELS = {
    "resnet": VICTIM,
    "resnet18": make_victim("resnet18", **SIZES, widths=(2, 2, 3, 3)),
    "vgg11": make_victim(
        "vgg11", input_shape=(32, 32, 2), num_classes=3, widths=(2,) * 8, norm="batch"
    ),
}

OTHERS = {
    "imagenet": make_victim("resnet18", **SIZES, widths=(2,) * 4, stem="imagenet"),
    "group": make_victim("resnet18", **SIZES, widths=(2,) * 4, norm="group"),
}


def _params(victim):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.5, leaf.shape)), victim.param_shapes()
    )


def _inputs(count=3, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 4, 4, 2)))


def _statistics(victim, seed=2):
    rng = np.random.default_rng(seed)
    shapes = victim.param_shapes()

    def channels(name):
        entry = shapes
        for part in name.split("/"):
            entry = entry[part]
        return entry["scale"].shape

    return {
        name: (rng.normal(size=channels(name)), rng.uniform(0.2, 3, channels(name)))
        for name in batch_norm_names(victim)
    }


def test_the_first_layer_sees_the_convolution_of_the_inputs():
    params, x = _params(VICTIM), _inputs()
    conv = nn.Conv(2, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)
    features = np.asarray(conv.apply({"params": params["conv1"]}, x))
    mean, var = VICTIM.batch_statistics(params, x)["norm1"]
    np.testing.assert_allclose(mean, np.mean(features, axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(var, np.var(features, axis=(0, 1, 2)), rtol=1e-10)
    unbiased = np.var(np.reshape(features, (-1, 2)), axis=0, ddof=1)
    assert not np.allclose(var, unbiased, rtol=1e-3)


def test_statistics_are_differentiable_in_the_inputs():
    params = _params(VICTIM)

    @jax.jit
    def distance(x):
        found = VICTIM.batch_statistics(params, x)
        return sum(jnp.sum(mean**2) + jnp.sum(var) for mean, var in found.values())

    check_grads(distance, (_inputs(2),), order=1, modes=("rev",), rtol=1e-5)


def test_statistics_cost_nothing_where_nobody_asks():
    params, x = _params(VICTIM), _inputs()
    for victim in (VICTIM, with_batch_norm(VICTIM, "eval")):
        logits, found = jax.jit(victim.apply_with_statistics)(params, x)
        np.testing.assert_allclose(logits, jax.jit(victim.apply)(params, x), rtol=1e-12)
        assert set(found) == set(batch_norm_names(victim))
    evaluating = with_batch_norm(VICTIM, "eval")
    plain = str(jax.make_jaxpr(evaluating.apply)(params, x))
    asked = str(jax.make_jaxpr(evaluating.apply_with_statistics)(params, x))
    assert plain.count("reduce_sum") == 0 < asked.count("reduce_sum")
    made = jax.eval_shape(VICTIM.module.init, jax.random.key(0), x.astype("float32"))
    assert set(made) == {"params"}


def test_the_mode_decides_what_later_layers_see():
    params, x = _params(VICTIM), _inputs()
    evaluating = with_buffers(with_batch_norm(VICTIM, "eval"), _statistics(VICTIM))
    train, running = (jax.jit(v.batch_statistics)(params, x) for v in (VICTIM, evaluating))
    np.testing.assert_allclose(train["norm1"][0], running["norm1"][0], rtol=1e-12)
    assert not np.allclose(train["block1/norm1"][0], running["block1/norm1"][0], rtol=1e-2)


def test_running_statistics_equal_to_those_of_the_batch_change_nothing():
    params, x = _params(VICTIM), _inputs()
    found = jax.jit(VICTIM.batch_statistics)(params, x)
    frozen = with_buffers(with_batch_norm(VICTIM, "eval"), found)
    train, evaluated = (jax.jit(v.apply)(params, x) for v in (VICTIM, frozen))
    np.testing.assert_allclose(train, evaluated, rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_running_statistics_are_those_that_were_set(name):
    victim = MODELS[name]
    assert victim.running_statistics() == {}
    given = _statistics(victim)
    for mode in ("eval", "train"):
        found = with_buffers(with_batch_norm(victim, mode), given).running_statistics()
        assert tuple(found) == batch_norm_names(victim)
        for layer, (mean, var) in given.items():
            np.testing.assert_allclose(found[layer][0], mean, rtol=1e-12)
            np.testing.assert_allclose(found[layer][1], var, rtol=1e-12)
    one = with_buffers(victim, {"norm1": given["norm1"]}).running_statistics()
    assert tuple(one) == batch_norm_names(victim)
    last = one[batch_norm_names(victim)[-1]]
    assert (last[0].tolist(), last[1].tolist()) == ([0.0] * len(last[0]), [1.0] * len(last[0]))
    assert with_buffers(victim, given).param_shapes() == victim.param_shapes()


@pytest.mark.parametrize("options", [{}, {"norm": "group"}], ids=["none", "group"])
def test_models_without_batch_normalization_have_no_statistics(options):
    victim = make_victim(
        "vgg11", input_shape=(32, 32, 1), num_classes=2, widths=(2,) * 8, **options
    )
    found = jax.eval_shape(
        victim.batch_statistics,
        victim.param_shapes(),
        jax.ShapeDtypeStruct((2, 32, 32, 1), "float32"),
    )
    assert found == {} == victim.running_statistics()
    for change in (lambda: with_buffers(victim, {}), lambda: with_batch_norm(victim, "train")):
        with pytest.raises(ValueError, match="'vgg11' has no batch normalization"):
            change()


def test_modes_are_values():
    train = with_batch_norm(MODELS["resnet18"], "train")
    assert train != MODELS["resnet18"]
    assert with_batch_norm(train, "eval") == MODELS["resnet18"]


def test_modules_of_ones_own_keep_their_statistics_to_themselves():
    victim = Victim(nn.Dense(2), (1, 1, 1), 2, Normalization.identity(1))
    assert victim.running_statistics() == {}
    with pytest.raises(ValueError, match="no batch normalization"):
        with_batch_norm(victim, "eval")


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 2)])
def test_stem_pooling_and_its_second_derivative(height, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)))
    windows = [[(slice(max(0, i - 1), i + 2), slice(max(0, j - 1), j + 2))
                for j in range(0, width, 2)] for i in range(0, height, 2)]  # fmt: skip
    expected = np.stack(
        [np.stack([np.max(x[:, i, j], axis=(1, 2)) for i, j in row], axis=1) for row in windows],
        axis=1,
    )
    np.testing.assert_array_equal(stem_pool(x), expected)
    cubes = jax.jit(lambda v: jnp.sum(stem_pool(v) ** 3))
    check_grads(cubes, (x,), order=2, modes=("rev",), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_logits_and_statistics_have_the_dtype_of_the_parameters(name, dtype):
    victim = (MODELS | OTHERS)[name]
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), victim.param_shapes()
    )
    inputs = jax.ShapeDtypeStruct((2, *victim.input_shape), dtype)
    found = jax.eval_shape(victim.apply_with_statistics, params, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
    gradient = jax.eval_shape(
        jax.grad(victim.loss), params, inputs, jax.ShapeDtypeStruct((2,), "int32")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(dtype)}
