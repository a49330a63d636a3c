"""The client's update as a differentiable function of the images that an attack tries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgia.models import Victim
from jgia.observation import ThreatModel

PyTree = Any

_LARGEST_UNROLL = 256


def simulated_update(
    victim: Victim,
    params: PyTree,
    inputs: Array,
    labels: Array,
    threat_model: ThreatModel,
) -> PyTree:
    """What a client with these examples would share, as far as the attacker knows how.

    ``grad L(theta; x, y)`` for FedSGD. For FedAvg with known steps and learning rate the client's
    training is replayed step by step and ``theta_T - theta_0`` returned. Where one of them is not
    known, the difference is approximated by one step of unknown length: ``-grad L``, whose
    direction is all that a cosine distance compares.

    Args:
      victim: the model.
      params: what the server sent.
      inputs: (B, H, W, C) normalized pixels.
      labels: (B,) classes or (B, num_classes) probabilities.
      threat_model: protocol and what is known of local training. An unknown order is taken to be
        the one in which the images are searched, in every epoch: exact for one epoch, in which
        the search finds its own order, and an approximation for more.

    Returns:
      A pytree like the client's update; only its ``visible_layers``.
    """
    if threat_model.protocol == "fedsgd" or not replayed(threat_model):
        update = _gradient(victim, params, inputs, labels, threat_model.visible_layers)
        if threat_model.protocol == "fedsgd":
            return update
        return jax.tree.map(jnp.negative, update)
    return _local_training(victim, params, inputs, labels, threat_model)


def replayed(threat_model: ThreatModel) -> bool:
    """Whether enough is known of a FedAvg client to replay its training."""
    return None not in (threat_model.local_steps, threat_model.local_learning_rate)


def minibatches(num_examples: int, threat_model: ThreatModel) -> list[tuple[int, ...]]:
    """The rows that each local step uses, as far as they are known.

    Raises:
      ValueError: what is known contradicts itself, or there are more than 256 steps to replay.

    >>> threat = ThreatModel(protocol="fedavg", local_steps=4, local_epochs=2)
    >>> minibatches(3, threat)
    [(0, 1), (2,), (0, 1), (2,)]
    """
    steps, epochs = threat_model.local_steps, threat_model.local_epochs
    if steps is None:
        raise ValueError("the number of local steps is not known.")
    if steps > _LARGEST_UNROLL:
        raise ValueError(
            f"replaying {steps} local steps needs all of them in memory (at most "
            f"{_LARGEST_UNROLL}); leave local_steps out of the threat model to match directions."
        )
    if (order := threat_model.local_order) is not None:
        if {row for rows in order for row in rows} != set(range(num_examples)):
            raise ValueError(f"local_order must use every row of {num_examples} examples.")
        return [tuple(rows) for rows in order]
    per_epoch = steps // epochs
    size = threat_model.local_batch_size or math.ceil(num_examples / per_epoch)
    epoch = [
        tuple(range(start, min(start + size, num_examples)))
        for start in range(0, num_examples, size)
    ]
    if len(epoch) != per_epoch:
        raise ValueError(
            f"{num_examples} examples in minibatches of {size} make {len(epoch)} steps per epoch, "
            f"the threat model says {per_epoch}; correct num_examples, local_steps or "
            "local_batch_size."
        )
    return epoch * epochs


def _gradient(
    victim: Victim,
    params: PyTree,
    inputs: Array,
    labels: Array,
    layers: tuple[str, ...] | None,
) -> PyTree:
    seen = {name: params[name] for name in (params if layers is None else layers)}

    def loss(part: PyTree) -> Array:
        return victim.loss_of_inputs({**params, **part}, inputs, labels)

    return jax.grad(loss)(seen)


def _local_training(
    victim: Victim, params: PyTree, inputs: Array, labels: Array, threat_model: ThreatModel
) -> PyTree:
    optimizer = _client_optimizer(threat_model)
    current, state = params, optimizer.init(params)
    for rows in minibatches(len(inputs), threat_model):
        chosen = jnp.asarray(rows)
        gradient = jax.grad(victim.loss_of_inputs)(current, inputs[chosen], labels[chosen])
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            change, state = optimizer.update(gradient, state, current)
        current = optax.apply_updates(current, change)
    difference = jax.tree.map(jnp.subtract, current, params)
    layers = threat_model.visible_layers
    return difference if layers is None else {name: difference[name] for name in layers}


def _client_optimizer(threat_model: ThreatModel) -> optax.GradientTransformation:
    rate = threat_model.local_learning_rate
    assert rate is not None  # replayed() said so
    if threat_model.local_optimizer == "adam":
        # The client's has no eps_root; without one the derivative at a zero gradient is NaN.
        return optax.adam(rate, eps_root=1e-24)
    momentum = threat_model.local_momentum
    return optax.sgd(rate, momentum if threat_model.local_optimizer == "momentum" else None)
