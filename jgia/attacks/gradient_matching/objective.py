"""What is minimized: gradient distance plus priors, as a pure function of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gradient_matching import priors
from jgia.attacks.gradient_matching.distances import (
    distance,
    layer_names,
    layer_weights,
    square,
)
from jgia.attacks.gradient_matching.settings import Settings
from jgia.config.gradient_matching import DistanceName
from jgia.models import Pool, Victim
from jgia.models.convolutions import fast_convolutions
from jgia.observation import Observation, ThreatModel
from jgia.replay import minibatches, replayed, simulated_update

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """One observation as a search sees it. Clients of one round differ in arrays only.

    Attributes:
      update: the client's, of the visible layers.
      params: what the server sent.
      statistics: batch statistics to come close to, or ``None``.
      labels: (B,) classes, or a (B,) placeholder where they are searched.
      victim: the model.
      threat_model: without the labels, which are data.
      settings: what to minimize.
      target_square: of the update, where every step would compute it again; else ``None``.
      stacked: whether update, statistics and labels have a leading axis, one entry per search.
      vmapped: whether searches are vmapped; how convolutions are computed depends on it.
    """

    update: PyTree
    params: PyTree
    statistics: PyTree | None
    labels: Array
    victim: Victim = dataclasses.field(metadata={"static": True})
    threat_model: ThreatModel = dataclasses.field(metadata={"static": True})
    settings: Settings = dataclasses.field(metadata={"static": True})
    target_square: Array | None = None
    stacked: bool = dataclasses.field(default=False, metadata={"static": True})
    vmapped: bool = dataclasses.field(default=False, metadata={"static": True})


def stack(problems: Sequence[Problem]) -> Problem:
    """Problems of one round as one, for :func:`jax.vmap` over searches; parameters are shared.

    Raises:
      ValueError: their models, threat models, settings or parameters differ.
    """
    first = problems[0]
    for other in problems[1:]:
        known = [(p.victim, p.threat_model, p.settings) for p in (first, other)]
        same = jax.tree.map(lambda a, b: a is b or bool((a == b).all()), first.params, other.params)
        if known[0] != known[1] or not all(jax.tree.leaves(same)):
            raise ValueError(
                "clients that are attacked together must share the model, the parameters that were "
                "sent, the threat model (labels aside) and the settings; attack them one by one."
            )
    shapes = {tuple(jnp.shape(problem.labels)) for problem in problems}
    if len(shapes) > 1:
        raise ValueError(f"clients must hold equally many examples, got label shapes {shapes}.")

    def joined(*leaves: Array) -> Array:
        return jnp.stack(leaves)

    return dataclasses.replace(
        first,
        update=jax.tree.map(joined, *(problem.update for problem in problems)),
        statistics=jax.tree.map(joined, *(problem.statistics for problem in problems)),
        labels=joined(*(problem.labels for problem in problems)),
        target_square=None,
        stacked=True,
    )


class Variables(NamedTuple):
    """What a search moves.

    Attributes:
      inputs: (B, H, W, C) normalized pixels.
      label_logits: (B, num_classes), or ``None`` where labels are given or inferred.
    """

    inputs: Array
    label_logits: Array | None


def make_problem(observation: Observation, labels: ArrayLike, settings: Settings) -> Problem:
    """Check that the observation allows this search, and put what it needs together.

    Args:
      observation: what the attacker holds.
      labels: (B,) integer classes; their number is the number of images searched.
      settings: what to minimize.

    Raises:
      ValueError: the model or the threat model does not allow it; says what to change.
    """
    victim, threat = observation.victim, observation.threat_model
    labels = jnp.asarray(labels, jnp.int32)
    if threat.protocol == "fedavg":
        check_fedavg(threat, len(labels), settings.distance)
    if settings.layer_weights != "equal":
        _depth_order(victim, observation.update)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(observation.params)}
    update = jax.tree.map(lambda leaf: jnp.asarray(leaf, next(iter(dtypes))), observation.update)
    return Problem(
        update=update,
        params=jax.tree.map(jnp.asarray, observation.params),
        statistics=_wanted_statistics(observation, settings),
        labels=labels,
        target_square=square(update) if settings.distance == "cosine" else None,
        victim=victim,
        threat_model=dataclasses.replace(threat, labels=None),
        settings=settings,
    )


def loss(problem: Problem, variables: Variables, consensus: Array) -> tuple[Array, Array]:
    """(loss, gradient distance) of a batch of images; ``variables`` by reverse mode only.

    Args:
      problem: see :class:`Problem`.
      variables: the images, and label logits where they are searched.
      consensus: (B, H, W, C) mean of all restarts for the group prior; any where it is off.
    """
    settings, victim, inputs = problem.settings, problem.victim, variables.inputs
    labels = problem.labels
    if variables.label_logits is not None:
        labels = jax.nn.softmax(variables.label_logits)
    with fast_convolutions(vmapped=problem.vmapped):
        update = simulated_update(victim, problem.params, inputs, labels, problem.threat_model)
    weights = None
    if settings.layer_weights != "equal":
        weights = layer_weights(_depth_order(victim, problem.update), settings.layer_weights)
    known = problem.target_square
    fit = distance(settings.distance, update, problem.update, weights, target_square=known)
    total = fit
    if settings.total_variation:
        variation = priors.total_variation(inputs, settings.tv_form)
        total += settings.total_variation * variation
    if settings.image_l2:
        total += settings.image_l2 * priors.image_l2(inputs)
    if settings.batch_norm_prior and problem.statistics is not None:
        found = victim.batch_statistics(problem.params, inputs)
        total += settings.batch_norm_prior * priors.batch_norm_distance(found, problem.statistics)
    if settings.group_prior:
        total += settings.group_prior * priors.group_distance(inputs, consensus)
    return total, fit


def check_fedavg(threat: ThreatModel, num_examples: int, name: DistanceName) -> None:
    """Raise ``ValueError`` unless updates of such a client can be compared by a distance."""
    if replayed(threat):
        if threat.num_clients > 1:
            raise ValueError(
                f"the update sums up {threat.num_clients} clients' local training, which cannot be "
                "replayed as one client's; gradient matching needs FedSGD here."
            )
        minibatches(num_examples, threat)
    elif name in ("l2", "l2_norm"):
        raise ValueError(
            f"distance={name!r} compares lengths, which needs the client's "
            "local_steps and local_learning_rate; use distance='cosine' where they are not known."
        )


def _wanted_statistics(observation: Observation, settings: Settings) -> PyTree | None:
    """The client's statistics if it sent them, else running ones if the model has any."""
    if not settings.batch_norm_prior:
        return None
    if observation.batch_statistics is not None:
        return jax.tree.map(jnp.asarray, observation.batch_statistics)
    running = observation.victim.running_statistics()
    return running or None


def _depth_order(victim: Victim, update: PyTree) -> list[str]:
    """The update's layers in the order in which the victim applies them."""
    names = layer_names(update)
    depth = {name: i for i, name in enumerate(_applied(victim))}
    unknown = [name for name in names if name not in depth]
    if unknown:
        raise ValueError(
            f"layer_weights need the order of the layers, and {', '.join(unknown)} are not in the "
            "victim's description; use layer_weights='equal'."
        )
    return sorted(names, key=depth.__getitem__)


def _applied(victim: Victim) -> list[str]:
    names: list[str] = []
    for layer in victim.layers():
        parts = (layer, *getattr(layer, "branch", ()), *getattr(layer, "shortcut", ()))
        names += [part.name for part in parts if not isinstance(part, Pool)]
    return names
