import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgia.federated import ClientConfig, ClientError, client_update
from jgia.federated.client import _gradient
from jgia.models import Victim, flatten_params, make_victim
from jgia.normalization import Normalization
from jgia.observation import ThreatModel

NORM = Normalization((0.4,), (0.3,))
MLP = make_victim("mlp", input_shape=(3, 2, 1), num_classes=3, widths=(5, 4), normalization=NORM)
CNN = make_victim("cnn", input_shape=(4, 4, 1), num_classes=3, widths=(2,), fc_width=4)
KEY = jax.random.key(7)


def _params(victim, dtype="float64"):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), dtype),
        victim.param_shapes(),
    )


def _data(victim, count=5, dtype="float64"):
    rng = np.random.default_rng(count)
    images = rng.random((count, *victim.input_shape)).astype(dtype)
    return images, rng.integers(0, victim.num_classes, count)


def _fedavg(**fields):
    return ClientConfig(protocol="fedavg", **fields)


def _close(left, right, rtol=1e-12, atol=1e-14):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)


def _mlp_gradient(params, images, labels):
    """Backpropagation by hand, in NumPy: the oracle."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten_params(params).items()}
    names = ["fc1", "fc2", "head"]
    inputs = [(images.reshape(len(images), -1) - 0.4) / 0.3]
    for name in names:
        sums = inputs[-1] @ flat[f"{name}/kernel"] + flat[f"{name}/bias"]
        inputs.append(np.maximum(sums, 0) if name != "head" else sums)
    odds = np.exp(inputs.pop())
    back = odds / odds.sum(axis=1, keepdims=True)
    back[np.arange(len(labels)), labels] -= 1
    back /= len(labels)
    gradient = {}
    for name, x in zip(names[::-1], inputs[::-1], strict=True):
        gradient[name] = {"kernel": x.T @ back, "bias": back.sum(axis=0)}
        back = (back @ flat[f"{name}/kernel"].T) * (x > 0)
    return gradient


def test_fedsgd_is_backpropagation():
    params, (images, labels) = _params(MLP), _data(MLP)
    seen = client_update(KEY, MLP, params, images, labels)
    _close(seen.update, _mlp_gradient(params, images, labels))
    assert seen.threat_model == ThreatModel(num_examples=5)
    assert seen.victim is MLP
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (seen.params, params)), strict=True))
    doubled = jax.tree.map(lambda leaf: 5 * leaf, seen.update)  # a sum instead of a mean
    with pytest.raises(AssertionError):
        _close(doubled, _mlp_gradient(params, images, labels))


@pytest.mark.parametrize("name", ["cnn", "lenet", "convnet"])
def test_fedsgd_matches_finite_differences(name):
    widths = (8,) if name == "convnet" else (2,)
    victim = make_victim(name, input_shape=(4, 4, 1), num_classes=3, widths=widths, fc_width=4)
    params, (images, labels) = _params(victim), _data(victim, 3)
    gradient = client_update(KEY, victim, params, images, labels).update
    loss = jax.jit(victim.loss)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        along = jax.tree.map(lambda leaf, rng=rng: rng.standard_normal(leaf.shape), params)

        def at(step, along=along):
            moved = optax.tree.add_scale(params, step, along)
            return float(loss(moved, jnp.asarray(images), jnp.asarray(labels)))

        step = 1e-6
        expected = (at(step) - at(-step)) / (2 * step)
        got = sum(
            float(np.vdot(g, d))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("victim", [MLP, CNN], ids=["mlp", "cnn"])
def test_one_step_of_sgd_is_the_scaled_gradient(victim):
    params, (images, labels) = _params(victim), _data(victim)
    gradient = client_update(KEY, victim, params, images, labels).update
    seen = client_update(KEY, victim, params, images, labels, _fedavg(learning_rate=0.25))
    _close(seen.update, jax.tree.map(lambda g: -0.25 * g, gradient), rtol=1e-9, atol=1e-15)
    assert seen.threat_model == ThreatModel(
        protocol="fedavg", local_steps=1, local_learning_rate=0.25, num_examples=5
    )


def _loop(optimizer, params, images, labels, batches):
    state, now = optimizer.init(params), params
    for batch in batches:
        gradient = _mlp_gradient(now, images[batch], labels[batch])
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradient, state, now)
        now = jax.tree.map(lambda p, u: p + u, now, change)
    return jax.tree.map(lambda after, before: after - before, now, params)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_epochs_of_minibatches_match_an_explicit_loop(optimizer):
    params, (images, labels) = _params(MLP), _data(MLP)
    config = _fedavg(
        local_epochs=2, local_batch_size=2, optimizer=optimizer, learning_rate=0.05,
        momentum=0.8, shuffle=False,
    )  # fmt: skip
    seen = client_update(KEY, MLP, params, images, labels, config)
    rule = {
        "sgd": optax.sgd(0.05),
        "momentum": optax.sgd(0.05, 0.8),
        "adam": optax.adam(0.05),
    }[optimizer]
    batches = [[0, 1], [2, 3], [4]] * 2  # the short last minibatch counts as one whole step
    _close(seen.update, _loop(rule, params, images, labels, batches), rtol=1e-8, atol=1e-12)
    assert seen.threat_model.local_steps == config.num_steps(5) == 6
    dropped = _loop(rule, params, images, labels, [[0, 1], [2, 3]] * 2)
    with pytest.raises(AssertionError):
        _close(seen.update, dropped, rtol=1e-3)


def test_adam_by_hand():
    params, (images, labels) = _params(MLP), _data(MLP)
    config = _fedavg(local_epochs=3, optimizer="adam", learning_rate=0.01)
    seen = client_update(KEY, MLP, params, images, labels, config)
    now = params
    first = second = jax.tree.map(lambda leaf: 0.0 * leaf, params)
    for t in range(1, 4):
        g = _mlp_gradient(now, images, labels)
        first = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x, first, g)
        second = jax.tree.map(lambda v, x: 0.999 * v + 0.001 * x**2, second, g)
        now = jax.tree.map(
            lambda p, m, v, t=t: (
                p - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            ),
            now,
            first,
            second,
        )
    expected = jax.tree.map(lambda after, before: after - before, now, params)
    _close(seen.update, expected, rtol=1e-7, atol=1e-12)


def test_order_comes_from_the_key_alone():
    params, (images, labels) = _params(MLP), _data(MLP)
    config = _fedavg(local_batch_size=2, local_epochs=2)

    def bits(key, config=config):
        update = client_update(key, MLP, params, images, labels, config).update
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(update))

    assert bits(jax.random.key(1)) == bits(jax.random.key(1))
    assert bits(jax.random.key(1)) != bits(jax.random.key(2))
    ordered = dataclasses.replace(config, shuffle=False)
    assert bits(jax.random.key(1), ordered) == bits(jax.random.key(2), ordered)
    assert bits(jax.random.key(1), ordered) != bits(jax.random.key(1))
    whole = dataclasses.replace(config, local_batch_size=9)
    assert bits(jax.random.key(1), whole) == bits(jax.random.key(2), whole)


def test_shuffling_uses_every_example_once_per_epoch():
    # With a step too small to move the gradient, an epoch sums to the full gradient.
    params, (images, labels) = _params(MLP), _data(MLP, 6)
    gradient = client_update(KEY, MLP, params, images, labels).update
    config = _fedavg(local_batch_size=2, learning_rate=1e-7)
    seen = client_update(KEY, MLP, params, images, labels, config)
    expected = jax.tree.map(lambda g: -3e-7 * g, gradient)
    _close(seen.update, expected, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("config", [ClientConfig(), _fedavg(local_epochs=2, optimizer="momentum")])
def test_jit_is_eager(config):
    params, (images, labels) = _params(MLP), _data(MLP)
    compiled = client_update(KEY, MLP, params, images, labels, config).update
    with jax.disable_jit():
        eager = client_update(KEY, MLP, params, images, labels, config).update
    _close(compiled, eager, rtol=1e-9, atol=1e-12)


TRACES = []


class Counting(nn.Module):
    """A linear model that notes every trace."""

    @nn.compact
    def __call__(self, x):
        TRACES.append(x.shape)
        return nn.Dense(2, name="head")(x.reshape((x.shape[0], -1)))


def test_a_second_call_traces_nothing():
    victim = Victim(Counting(), (2, 2, 1), 2, Normalization.identity(1))
    images, labels = np.full((3, 2, 2, 1), 0.5, "float32"), np.array([0, 1, 1])
    params = _params(victim, "float32")

    def traced_shapes(config, scale):
        sent = jax.tree.map(lambda leaf: scale * leaf, params)
        TRACES.clear()
        twin = dataclasses.replace(victim)  # equal, not identical
        client_update(jax.random.key(scale), twin, sent, images, labels, config)
        return [shape for shape in TRACES if shape[0] > 1 or config.protocol == "fedavg"]

    average = _fedavg(local_batch_size=2, local_epochs=3)
    assert traced_shapes(ClientConfig(), 1) == [(3, 2, 2, 1)]
    assert traced_shapes(ClientConfig(), 2) == []
    assert (2, 2, 2, 1) in traced_shapes(average, 1)
    assert set(traced_shapes(average, 2)) <= {(1, 2, 2, 1)}  # only the structure check of params


def test_sent_parameters_survive_and_nothing_of_their_size_is_added():
    victim = make_victim("mlp", input_shape=(32, 32, 1), num_classes=2, widths=(512,))
    params = _params(victim, "float32")
    before = jax.tree.map(np.array, params)
    images, labels = _data(victim, 2, "float32")
    client_update(KEY, victim, params, images, labels, _fedavg(local_epochs=3, optimizer="adam"))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    _close(params, before, rtol=0, atol=0)
    used = _gradient.lower(victim, params, jnp.asarray(images), jnp.asarray(labels)).compile()
    memory = used.memory_analysis()
    assert memory is not None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.output_size_in_bytes < 1.1 * size
    assert memory.temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_has_the_dtype_of_the_parameters(dtype):
    images, labels = _data(MLP, dtype="float32")
    seen = client_update(KEY, MLP, _params(MLP, dtype), images, labels, _fedavg(optimizer="adam"))
    assert {leaf.dtype for leaf in jax.tree.leaves(seen.update)} == {np.dtype(dtype)}


def test_float32_and_default_integers_with_x64_off():
    images, labels = _data(MLP, dtype="float64")
    params = jax.tree.map(np.asarray, _params(MLP))  # float64 on the host: becomes float32
    with jax.enable_x64(False):
        seen = client_update(KEY, MLP, params, images, labels)
        assert {leaf.dtype for leaf in jax.tree.leaves(seen.update)} == {np.dtype("float32")}
        got = jax.device_get(seen.update)
    _close(got, _mlp_gradient(params, images, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((0, 3, 2, 1))}, "got batch 0"),
        ({"images": np.zeros((5, 2, 3, 1))}, r"shape \(B, 3, 2, 1\), got \(5, 2, 3, 1\)"),
        ({"images": np.zeros((3, 2, 1))}, r"shape \(B, 3, 2, 1\), got \(3, 2, 1\)"),
        ({"images": np.zeros((5, 3, 2, 1), np.uint8)}, "divide bytes by 255"),
        ({"images": np.full((5, 3, 2, 1), np.nan)}, "NaN or infinite pixels"),
        ({"images": np.full((5, 3, 2, 1), np.inf)}, "NaN or infinite pixels"),
        ({"images": np.full((5, 3, 2, 1), 1.01)}, r"\[0, 1\], got \[1.01, 1.01\]"),
        ({"images": np.full((5, 3, 2, 1), -0.5)}, "before normalization"),
        ({"labels": np.zeros(4, int)}, r"shape \(5,\), one per image, got \(4,\)"),
        ({"labels": np.zeros((5, 3), int)}, r"shape \(5,\), one per image, got \(5, 3\)"),
        ({"labels": np.zeros(5)}, "labels must be integers"),
        ({"labels": np.full(5, 3)}, r"\[0, 3\), got values from 3 to 3"),
        ({"labels": np.array([0, 1, -1, 2, 0])}, "got values from -1 to 2"),
        ({"params": {}}, "the parameters do not fit the model"),
        ({"params": _params(CNN)}, "the parameters do not fit the model"),
        (
            {"params": _params(dataclasses.replace(MLP, input_shape=(2, 2, 1)))},
            r"fc1/kernel must have shape \(6, 5\), got \(4, 5\)",
        ),
        ({"params": _params(MLP, "int32")}, "one floating-point dtype, got int32"),
        (
            {"params": _params(MLP) | {"head": _params(MLP, "float32")["head"]}},
            "one floating-point dtype, got float32, float64",
        ),
    ],
)
def test_bad_inputs_are_refused_before_any_compute(change, message, monkeypatch):
    monkeypatch.setattr("jgia.federated.client._gradient", None)
    images, labels = _data(MLP)
    given = {"params": _params(MLP), "images": images, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        client_update(KEY, MLP, given["params"], given["images"], given["labels"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_epochs": 0}, "local_epochs must be at least 1"),
        ({"local_batch_size": 0, "protocol": "fedavg"}, "local_batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"momentum": 1.0}, "momentum must lie strictly"),
        ({"local_epochs": 2}, "use protocol='fedavg'"),
        ({"local_batch_size": 4}, "use protocol='fedavg'"),
    ],
)
def test_config_rejects(fields, message):
    with pytest.raises(ValueError, match=message):
        ClientConfig(**fields)


@pytest.mark.parametrize(
    ("examples", "size", "epochs", "steps"),
    [(5, None, 1, 1), (5, 2, 1, 3), (4, 2, 3, 6), (3, 8, 2, 2), (1, 1, 1, 1)],
)
def test_number_of_steps(examples, size, epochs, steps):
    config = _fedavg(local_batch_size=size, local_epochs=epochs)
    assert config.num_steps(examples) == steps


def test_a_gradient_that_is_not_finite_is_an_error():
    params, (images, labels) = _params(MLP), _data(MLP)
    params["fc2"]["kernel"] = params["fc2"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ClientError, match=r"fc1/bias.*NaN or infinite.*parameters that were sent"):
        client_update(KEY, MLP, params, images, labels)


def test_diverging_local_training_is_an_error():
    params, (images, labels) = _params(MLP, "float32"), _data(MLP, dtype="float32")
    config = _fedavg(local_epochs=8, learning_rate=1e30)
    with pytest.raises(ClientError, match=r"lower learning_rate=1e\+30"):
        client_update(KEY, MLP, params, images, labels, config)
