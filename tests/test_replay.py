"""The update that an attack simulates is the one that the client shares."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.gradient_matching import distance, simulated_update
from jgia.config import ClientConfig
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.normalization import Normalization
from jgia.observation import ThreatModel, restrict
from jgia.replay import minibatches

NORMALIZATION = Normalization((0.4,), (0.2,))
VICTIM = make_victim(
    "lenet", input_shape=(6, 6, 1), num_classes=3, widths=(2,), normalization=NORMALIZATION
)
IMAGES = np.random.default_rng(0).uniform(size=(5, 6, 6, 1))
LABELS = np.array([0, 2, 1, 1, 0])


def _observe(config):
    params = jax.tree.map(lambda leaf: leaf.astype("float64"), VICTIM.init(jax.random.key(0)))
    return client_update(jax.random.key(1), VICTIM, params, IMAGES, LABELS, config)


def _relative(observation, threat=None):
    """Distance between what is simulated at the true images and what was shared."""
    inputs = jnp.asarray(NORMALIZATION.normalize(jnp.asarray(IMAGES)))
    update = simulated_update(
        VICTIM,
        observation.params,
        inputs,
        jnp.asarray(LABELS),
        threat or observation.threat_model,
    )
    zero = jax.tree.map(jnp.zeros_like, observation.update)
    return float(
        distance("l2", update, observation.update) / distance("l2", zero, observation.update)
    )


CLIENTS = {
    "fedsgd": ClientConfig(),
    "one step": ClientConfig(protocol="fedavg"),
    "epochs": ClientConfig(protocol="fedavg", local_epochs=3, local_batch_size=2, shuffle=False),
    "momentum": ClientConfig(protocol="fedavg", local_epochs=3, optimizer="momentum", momentum=0.7),
    "adam": ClientConfig(protocol="fedavg", local_epochs=2, optimizer="adam", learning_rate=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_simulated_equals_shared(name):
    observation = _observe(CLIENTS[name])
    assert _relative(observation) < 1e-20


def test_what_is_known_wrongly_does_not_fit():
    observation = _observe(CLIENTS["epochs"])
    threat = observation.threat_model
    for wrong in (
        {"local_learning_rate": 0.2},
        {"local_steps": 3, "local_epochs": 1},
        {"local_optimizer": "momentum"},
        {"local_batch_size": 2, "local_order": ((4,), (1, 2), (0, 3)) * 3},
    ):
        assert _relative(observation, dataclasses.replace(threat, **wrong)) > 1e-6, wrong


def test_a_known_order_is_replayed():
    config = ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=2)
    observation = _observe(config)
    assert _relative(observation) > 1e-6  # shuffled, and the attacker does not know how
    order = []
    for epoch in range(2):
        rows = jax.random.permutation(jax.random.fold_in(jax.random.key(1), epoch), 5).tolist()
        order += [tuple(rows[i : i + 2]) for i in (0, 2, 4)]
    threat = dataclasses.replace(observation.threat_model, local_order=tuple(order))
    assert _relative(observation, threat) < 1e-20


def test_an_unknown_learning_rate_leaves_the_direction():
    observation = _observe(CLIENTS["one step"])
    threat = dataclasses.replace(observation.threat_model, local_learning_rate=None)
    inputs = jnp.asarray(NORMALIZATION.normalize(jnp.asarray(IMAGES)))
    update = simulated_update(VICTIM, observation.params, inputs, jnp.asarray(LABELS), threat)
    assert float(distance("cosine", update, observation.update)) == pytest.approx(0, abs=1e-12)
    assert float(distance("l2", update, observation.update)) > 1e-3


@pytest.mark.parametrize("name", ["fedsgd", "epochs"])
def test_only_visible_layers_are_simulated(name):
    observation = restrict(_observe(CLIENTS[name]), ["head"])
    assert _relative(observation) < 1e-20


def test_probabilities_of_one_are_labels():
    observation = _observe(ClientConfig())
    inputs = jnp.asarray(NORMALIZATION.normalize(jnp.asarray(IMAGES)))
    soft = jax.nn.one_hot(LABELS, 3, dtype=inputs.dtype)
    update = simulated_update(VICTIM, observation.params, inputs, soft, ThreatModel())
    assert float(distance("l2", update, observation.update)) < 1e-25


@pytest.mark.slow
def test_adam_has_derivatives_where_gradients_vanish():
    observation = _observe(CLIENTS["adam"])
    params = observation.params | {
        "conv1": jax.tree.map(jnp.zeros_like, observation.params["conv1"])
    }
    params["head"] = jax.tree.map(jnp.zeros_like, params["head"])  # nothing reaches the convolution

    def size(inputs):
        update = simulated_update(
            VICTIM, params, inputs, jnp.asarray(LABELS), observation.threat_model
        )
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(update))

    assert np.isfinite(jax.grad(size)(jnp.asarray(IMAGES))).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_steps": 4}, "the threat model says 4"),
        ({"local_steps": 300}, "at most 256"),
        ({"local_steps": None}, "not known"),
        ({"local_steps": 2, "local_order": ((0, 1), (2, 3))}, "every row of 5"),
    ],
)
def test_contradictions_are_refused(fields, message):
    threat = ThreatModel(protocol="fedavg", local_batch_size=2, **fields)
    with pytest.raises(ValueError, match=message):
        minibatches(5, threat)
