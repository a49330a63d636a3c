"""A client that shares its batch statistics, and the rows that its local steps use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config import DefenseConfig
from jgia.defenses import make_defense
from jgia.federated import ClientConfig, client_images, client_update, local_order
from jgia.models import make_victim, with_batch_norm
from jgia.normalization import Normalization

VICTIM = make_victim(
    "resnet",
    input_shape=(4, 4, 1),
    num_classes=3,
    widths=(2,),
    fc_width=3,
    batch_norm="train",
    normalization=Normalization((0.4,), (0.3,)),
)
MLP = make_victim("mlp", input_shape=(2, 2, 1), num_classes=3, widths=(3,))
SHARED = ClientConfig(share_batch_statistics=True)
KEY = jax.random.key(5)


def _params(victim):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.5, leaf.shape)), victim.param_shapes()
    )


def _data(victim, count=4):
    rng = np.random.default_rng(count)
    return rng.random((count, *victim.input_shape)), rng.integers(0, 3, count)


def _fedavg(**fields):
    return ClientConfig(protocol="fedavg", learning_rate=0.5, **fields)


@jax.jit
def _oracle(params, images):
    """The first normalization by hand, later ones by the model."""
    inputs = (images - 0.4) / 0.3
    features = jax.lax.conv_general_dilated(
        inputs,
        params["conv1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    moments = features.mean(axis=(0, 1, 2)), features.var(axis=(0, 1, 2))
    return VICTIM.batch_statistics(params, inputs) | {"norm1": moments}


def _same(found, expected):
    assert set(found) == set(expected)
    for name, moments in expected.items():
        for one, two in zip(found[name], moments, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_fedsgd_shares_what_its_batch_gave_the_normalizations():
    params, (images, labels) = _params(VICTIM), _data(VICTIM)
    plain = client_update(KEY, VICTIM, params, images, labels)
    assert plain.batch_statistics is None
    seen = client_update(KEY, VICTIM, params, images, labels, SHARED)
    _same(seen.batch_statistics, _oracle(params, jnp.asarray(images)))
    with pytest.raises(AssertionError):  # one image less is another batch
        _same(seen.batch_statistics, _oracle(params, jnp.asarray(images[:3])))
    for one, two in zip(*map(jax.tree.leaves, (plain.update, seen.update)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert seen.threat_model == plain.threat_model


def test_fedavg_shares_those_of_the_first_local_step():
    params, (images, labels) = _params(VICTIM), _data(VICTIM)
    config = _fedavg(local_batch_size=2, local_epochs=2, share_batch_statistics=True)
    seen = client_update(KEY, VICTIM, params, images, labels, config)
    first = local_order(KEY, 4, config)[0]
    assert first != (0, 1)
    _same(seen.batch_statistics, _oracle(params, jnp.asarray(images[list(first)])))


def test_augmented_images_are_what_the_statistics_are_of():
    params, (images, labels) = _params(VICTIM), _data(VICTIM)
    defense = make_defense(DefenseConfig(defense=("augment",)))
    seen = client_update(KEY, VICTIM, params, images, labels, SHARED, defense)
    augmented = client_images(KEY, images, defense)
    assert not np.allclose(augmented, images)
    _same(seen.batch_statistics, _oracle(params, augmented))


def test_a_client_that_evaluates_shares_what_enters_its_layers():
    params, (images, labels) = _params(VICTIM), _data(VICTIM)
    victim = with_batch_norm(VICTIM, "eval")
    seen = client_update(KEY, victim, params, images, labels, SHARED)
    _same(
        {"norm1": dict(seen.batch_statistics or {})["norm1"]},
        {"norm1": _oracle(params, jnp.asarray(images))["norm1"]},
    )


@pytest.mark.parametrize("name", ["dropout", "dp_sgd"])
def test_defenses_without_a_pass_of_the_batch_share_no_statistics(name, monkeypatch):
    monkeypatch.setattr("jgia.federated.client._gradient", None)
    defense = make_defense(DefenseConfig(defense=(name,)))
    with pytest.raises(ValueError, match=f"cannot go with the defense '{name}'"):
        client_update(KEY, VICTIM, _params(VICTIM), *_data(VICTIM), SHARED, defense)


def test_models_without_batch_normalization_have_nothing_to_share(monkeypatch):
    monkeypatch.setattr("jgia.federated.client._gradient", None)
    with pytest.raises(ValueError, match="'mlp' does not have; choose --model resnet"):
        client_update(KEY, MLP, _params(MLP), *_data(MLP), SHARED)


def test_sums_of_statistics_are_not_simulated():
    with pytest.raises(ValueError, match="share_batch_statistics is for one client"):
        ClientConfig(share_batch_statistics=True, num_clients=2)


ORDERS = {
    "fedsgd": (ClientConfig(), [5]),
    "one batch": (_fedavg(local_epochs=2), [5, 5]),
    "minibatches": (_fedavg(local_batch_size=2, local_epochs=2), [2, 2, 1] * 2),
    "in order": (_fedavg(local_batch_size=3, shuffle=False), [3, 2]),
    "larger than all": (_fedavg(local_batch_size=9), [5]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_uses_every_row_once_per_epoch(name):
    config, sizes = ORDERS[name]
    order = local_order(KEY, 5, config)
    assert [len(rows) for rows in order] == sizes
    assert len(order) == config.num_steps(5)
    per_epoch = len(order) // config.local_epochs
    for epoch in range(config.local_epochs):
        rows = [row for step in order[epoch * per_epoch :][:per_epoch] for row in step]
        assert sorted(rows) == [0, 1, 2, 3, 4]
        assert (rows == [0, 1, 2, 3, 4]) == (name != "minibatches")
    assert order == local_order(KEY, 5, config)


def test_the_order_is_the_one_that_the_client_uses():
    params, (images, labels) = _params(MLP), _data(MLP, 5)
    config = _fedavg(local_batch_size=2, local_epochs=2)
    seen = client_update(KEY, MLP, params, images, labels, config)
    gradient = jax.jit(jax.grad(MLP.loss))

    def trained(order):
        now = params
        for rows in order:
            step = gradient(now, jnp.asarray(images[list(rows)]), jnp.asarray(labels[list(rows)]))
            now = jax.tree.map(lambda p, g: p - 0.5 * g, now, step)
        return jax.tree.map(lambda after, before: after - before, now, params)

    order = local_order(KEY, 5, config)
    for one, two in zip(*map(jax.tree.leaves, (seen.update, trained(order))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)
    other = trained(local_order(jax.random.key(6), 5, config))
    assert not np.allclose(seen.update["head"]["bias"], other["head"]["bias"], rtol=1e-4)
    dataclasses.replace(seen.threat_model, local_order=order)  # what the threat model takes


def test_an_order_needs_an_example():
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        local_order(KEY, 0)
