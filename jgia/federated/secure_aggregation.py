"""Secure aggregation: the server sees the sum of several clients' updates and no single one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jgia import _checks
from jgia.config import ClientConfig
from jgia.defenses import Defense
from jgia.federated.client import client_update
from jgia.models import Victim, flatten_params
from jgia.observation import Observation, ThreatModel

PyTree = Any


def aggregate(
    observations: Sequence[Observation],
    *,
    num_examples: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Observation:
    """What a server sees of several clients under secure aggregation: ``sum_k w_k update_k``.

    Args:
      observations: one per client, of one round: same model, same parameters, same protocol and
        visible layers.
      num_examples: examples of each client; read from the threat models when left out. The
        server learns their sum.
      weights: w_k, finite; ``n_k / n`` when left out (the mean over examples, as in FedAvg). All
        ones give the plain sum.

    Returns:
      One observation. Its threat model carries the number of clients, the examples in all, the
      largest number of local steps, and the learning rate where all clients share it.

    Raises:
      ValueError: no client, clients that do not belong together, or neither weights nor the
        numbers of examples are known.

    Guarantees:
      FedSGD with the default weights equals one client that holds all examples, up to the
      rounding of the sum. Independent declared noise adds up:
      ``noise_std^2 = sum_k w_k^2 noise_std_k^2``. Sums one client at a time into one buffer.

    Edge cases:
      One client with the default weight is returned as it is. What this models is the server's
      view, not the cryptography: clients that drop out are simply not in the list.

    References:
      Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS
      2017); McMahan et al. (AISTATS 2017, arXiv 1602.05629), algorithm 1, for the weights.
    """
    if not observations:
        raise ValueError("observations must hold at least one client's, got none.")
    _same_round(observations)
    counts = _example_counts(observations, num_examples)
    shares = _weights(weights, counts, len(observations))
    first = observations[0]
    if len(observations) == 1 and shares == [1.0]:
        return first
    total = _zeros(first.update)
    for observation, share in zip(observations, shares, strict=True):
        total = _add(total, observation.update, share)
    threats = [observation.threat_model for observation in observations]
    return dataclasses.replace(
        first,
        update=total,
        threat_model=_combined(threats, shares, counts),
        batch_statistics=None,
    )


def simulate_clients(
    key: PRNGKeyArray,
    victim: Victim,
    params: PyTree,
    images: ArrayLike,
    labels: ArrayLike,
    config: ClientConfig = ClientConfig(),
    num_clients: int | None = None,
    *,
    defense: Defense | None = None,
) -> Observation:
    """Share a batch out among clients, let each compute its update, aggregate.

    Args:
      key: random key; split among the clients, each of which uses it as
        :func:`~jgia.federated.client_update` does.
      victim: the model that clients and server train.
      params: what the server sent to all of them.
      images: (B, H, W, C) pixels in [0, 1] of all clients, in order: the first client holds the
        first ``ceil(B / num_clients)``. Sizes differ by at most one.
      labels: (B,) class indices.
      config: protocol and local optimizer of every client.
      num_clients: 1 to B; ``config.num_clients`` when left out.
      defense: what every client does, each with draws of its own; ``None`` for none.

    Returns:
      :func:`aggregate` of their updates, weighted by numbers of examples.

    Raises:
      ValueError: more clients than images, or as :func:`~jgia.federated.client_update`.
      ClientError: a client's update is not finite.

    Guarantees:
      With one client, :func:`~jgia.federated.client_update` with the same key, bit for bit.
      Updates are added as they come: memory holds two, however many clients there are.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(2, 2, 1), num_classes=2, widths=(3,))
    >>> pixels, labels = np.full((4, 2, 2, 1), 0.5, "float32"), np.array([0, 1, 1, 0])
    >>> params = victim.init(jax.random.key(1))
    >>> seen = simulate_clients(
    ...     jax.random.key(0), victim, params, pixels, labels, num_clients=2
    ... )
    >>> seen.threat_model.num_clients, seen.threat_model.num_examples
    (2, 4)
    """
    clients = config.num_clients if num_clients is None else num_clients
    _checks.at_least(1, num_clients=clients)
    if clients == 1:
        return client_update(key, victim, params, images, labels, config, defense)
    pixels, classes = np.asarray(images), np.asarray(labels)
    if len(pixels) != len(classes):
        raise ValueError(
            f"labels must hold one class per image: {len(pixels)} images, {len(classes)} labels."
        )
    if clients > len(pixels):
        raise ValueError(
            f"{clients} clients cannot share {len(pixels)} images: each needs at least one; use "
            "fewer clients (--num-clients) or more images (--batch)."
        )
    parts = np.array_split(np.arange(len(pixels)), clients)
    shares = [len(part) / len(pixels) for part in parts]
    keys = jax.random.split(key, clients)

    def observe(client: int) -> Observation:
        part = parts[client]
        return client_update(
            keys[client], victim, params, pixels[part], classes[part], config, defense
        )

    first = observe(0)
    threats = [first.threat_model]
    total = _add(_zeros(first.update), first.update, shares[0])
    for client in range(1, clients):
        seen = observe(client)
        threats.append(seen.threat_model)
        total = _add(total, seen.update, shares[client])
    threat = _combined(threats, shares, [len(part) for part in parts])
    return dataclasses.replace(first, update=total, threat_model=threat, batch_statistics=None)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, update: PyTree, share: ArrayLike) -> PyTree:
    def leaf(sum_: Array, value: Array) -> Array:
        return sum_ + jnp.asarray(share, sum_.dtype) * value

    return jax.tree.map(leaf, total, update)


def _zeros(update: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, update)


def _same_round(observations: Sequence[Observation]) -> None:
    first = observations[0]
    for index, other in enumerate(observations[1:], start=1):
        a, b = first.threat_model, other.threat_model
        for what, same in (
            ("model", other.victim == first.victim),
            ("protocol", a.protocol == b.protocol),
            ("threat model's server", a.server == b.server),
            ("visible layers", set(other.update) == set(first.update)),
            ("parameters", _equal(first.params, other.params)),
        ):
            if not same:
                raise ValueError(
                    f"client {index} has another {what} than client 0; secure aggregation sums "
                    "updates of one round, in which the server sends everybody the same."
                )


def _equal(first: PyTree, second: PyTree) -> bool:
    if first is second:
        return True
    a, b = flatten_params(first), flatten_params(second)
    return a.keys() == b.keys() and all(
        a[name] is b[name] or np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a
    )


def _example_counts(
    observations: Sequence[Observation], num_examples: Sequence[int] | None
) -> list[int | None]:
    if num_examples is None:
        return [observation.threat_model.num_examples for observation in observations]
    if len(num_examples) != len(observations):
        raise ValueError(
            f"num_examples must hold one number per client, {len(observations)}, got "
            f"{len(num_examples)}."
        )
    for count in num_examples:
        _checks.at_least(1, num_examples=count)
    return list(num_examples)


def _weights(
    weights: Sequence[float] | None, counts: Sequence[int | None], num_clients: int
) -> list[float]:
    if weights is None:
        known = [count for count in counts if count is not None]
        if len(known) < num_clients:
            raise ValueError(
                "weights by numbers of examples need every client's: give num_examples=, or "
                "weights=[1.0, ...] for the plain sum."
            )
        return [count / sum(known) for count in known]
    shares = [float(weight) for weight in weights]
    if len(shares) != num_clients or not all(map(math.isfinite, shares)):
        raise ValueError(
            f"weights must be one finite number per client, {num_clients}, got {shares}."
        )
    return shares


def _combined(
    threats: Sequence[ThreatModel], shares: Sequence[float], counts: Sequence[int | None]
) -> ThreatModel:
    rates = {threat.local_learning_rate for threat in threats}
    known = [count for count in counts if count is not None]
    labels = [threat.labels for threat in threats if threat.labels is not None]
    steps = [threat.local_steps for threat in threats if threat.local_steps is not None]
    return dataclasses.replace(
        threats[0],
        num_clients=sum(threat.num_clients for threat in threats),
        num_examples=sum(known) if len(known) == len(threats) else None,
        local_steps=max(steps) if len(steps) == len(threats) else None,
        local_learning_rate=rates.pop() if len(rates) == 1 else None,
        local_order=None,
        labels=tuple(itertools.chain(*labels)) if len(labels) == len(threats) else None,
        noise_std=math.hypot(
            *(share * threat.noise_std for share, threat in zip(shares, threats, strict=True))
        ),
    )
