"""Gradient matching of images as one differentiable function: a jvp, then a vjp."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.transform import Transform
from jgia.attacks.gradient_matching.distances import distance, square
from jgia.attacks.gradient_matching.objective import check_fedavg
from jgia.config.gradient_matching import DistanceName
from jgia.models import Victim, flatten_params
from jgia.models.convolutions import fast_convolutions, patch_convolutions
from jgia.observation import Observation, ThreatModel
from jgia.replay import replayed, simulated_update

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matching:
    """One client's update as a search of images sees it. Clients of one round differ in arrays.

    Attributes:
      update: the client's, of the visible layers.
      params: what the server sent.
      labels: (B,) classes of the victim.
      transform: what is done to the images' update before it is compared.
      target_square: squared length of ``update`` where the distance needs it; else ``None``.
      victim: the model.
      threat_model: without the labels, which are data.
      distance: of updates; see :func:`jgia.attacks.gradient_matching.distance`.
      stacked: whether all but ``params`` have a leading axis, one entry per search.
      vmapped: whether searches are vmapped; how convolutions are computed depends on it.
    """

    update: PyTree
    params: PyTree
    labels: Array
    transform: Transform
    target_square: Array | None
    victim: Victim = dataclasses.field(metadata={"static": True})
    threat_model: ThreatModel = dataclasses.field(metadata={"static": True})
    distance: DistanceName = dataclasses.field(metadata={"static": True})
    stacked: bool = dataclasses.field(default=False, metadata={"static": True})
    vmapped: bool = dataclasses.field(default=False, metadata={"static": True})


def make_matching(
    observation: Observation,
    labels: ArrayLike,
    *,
    distance: DistanceName = "cosine",
    transform: Transform | None = None,
) -> Matching:
    """Check that an observation can be matched, and put together what that takes.

    Args:
      observation: what the attacker holds.
      labels: (B,) integer classes.
      distance: of updates.
      transform: of the images' update; none when left out.

    Raises:
      ValueError: the update is not finite, is zero, or the threat model does not allow it.
    """
    threat = observation.threat_model
    labels = jnp.asarray(labels, jnp.int32)
    for name, leaf in flatten_params(observation.update).items():
        bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
        if bad:
            raise ValueError(
                f"the update's {name} has {bad} NaN or infinite entries of {np.size(leaf)}: "
                "nothing can match it; export the update again."
            )
    if threat.protocol == "fedavg":
        check_fedavg(threat, len(labels), distance)
    dtype = jax.tree.leaves(observation.params)[0].dtype
    update = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), observation.update)
    length = square(update)
    if not float(length):
        raise ValueError("the update is zero everywhere: it says nothing about any image.")
    return Matching(
        update=update,
        params=jax.tree.map(jnp.asarray, observation.params),
        labels=labels,
        transform=transform or Transform(),
        target_square=length if distance == "cosine" else None,
        victim=observation.victim,
        threat_model=dataclasses.replace(threat, labels=None),
        distance=distance,
    )


def stack(problems: Sequence[Matching]) -> Matching:
    """Problems of one round as one, for :func:`jax.vmap` over searches; parameters are shared.

    Raises:
      ValueError: they differ in more than arrays, or in parameters.
    """
    first = problems[0]
    for other in problems[1:]:
        statics = [(p.victim, p.threat_model, p.distance) for p in (first, other)]
        same = jax.tree.map(lambda a, b: a is b or bool((a == b).all()), first.params, other.params)
        if statics[0] != statics[1] or not all(jax.tree.leaves(same)):
            raise ValueError(
                "clients that are attacked together must share the model, the parameters that were "
                "sent, the threat model (labels aside) and the settings; attack them one by one."
            )
    if len({problem.labels.shape for problem in problems}) > 1:
        raise ValueError("clients that are attacked together must hold equally many examples.")
    everywhere = {
        name: problem.transform.masks[name]
        for problem in problems
        for name in problem.transform.masks
    }
    filled = [
        dataclasses.replace(
            problem.transform,
            masks={
                name: problem.transform.masks.get(name, jnp.ones_like(mask))
                for name, mask in sorted(everywhere.items())
            },
        )
        for problem in problems
    ]
    parts = [
        (p.update, p.labels, transform, p.target_square)
        for p, transform in zip(problems, filled, strict=True)
    ]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return _with(dataclasses.replace(first, stacked=True), joined)


def vmapped(problem: Matching, function: Any, *arguments: PyTree) -> PyTree:
    """``function(problem, *arguments)`` over the first axis of the arguments.

    That of a stacked problem goes with them. One search is run without :func:`jax.vmap`, which is
    quicker.
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    if count == 1:
        first = jax.tree.map(lambda leaf: leaf[0], arguments)
        if problem.stacked:
            parts = jax.tree.map(lambda leaf: leaf[0], _parts(problem))
            problem = _with(dataclasses.replace(problem, stacked=False), parts)
        return jax.tree.map(lambda leaf: leaf[None], function(problem, *first))
    many = dataclasses.replace(problem, vmapped=True, stacked=False)
    if not problem.stacked:
        return jax.vmap(lambda *each: function(many, *each))(*arguments)
    return jax.vmap(lambda parts, *each: function(_with(many, parts), *each))(
        _parts(problem), *arguments
    )


def _parts(problem: Matching) -> PyTree:
    return problem.update, problem.labels, problem.transform, problem.target_square


def _with(problem: Matching, parts: PyTree) -> Matching:
    update, labels, transform, target_square = parts
    return dataclasses.replace(
        problem, update=update, labels=labels, transform=transform, target_square=target_square
    )


def matching_distance(problem: Matching, inputs: Array) -> Array:
    r"""``D(T'(update(x)), g*)``, differentiable in ``x`` once, by reverse mode.

    With ``g(x) = dL(theta; x)/dtheta`` and ``v = dD/dg``, a constant for the moment, the derivative
    is ``d/dx <g(x), v>``; and ``<g(x), v>`` is the derivative of the loss in direction ``v`` of the
    parameters. So a jvp of the loss, then a vjp of that to the images. Nothing is differentiated
    twice in reverse, no kernel's gradient is ever differentiated, and it equals what
    reverse over reverse computes up to rounding. For the cosine of all entries

    ``v = -(g* / (|g| |g*|) - <g, g*> g / (|g|^3 |g*|))``.

    FedAvg clients whose training is replayed have no such form: they are unrolled, and
    differentiated in reverse over reverse.

    Args:
      problem: see :func:`make_matching`; not stacked.
      inputs: (B, H, W, C) normalized pixels.

    Returns:
      A scalar.

    Edge cases:
      Derivatives in anything but ``inputs`` are zero.
    """
    if problem.threat_model.protocol == "fedavg" and replayed(problem.threat_model):
        return _compared(problem, _update(problem, inputs))
    return _matched(*_split(problem), inputs)


def _update(problem: Matching, inputs: Array) -> PyTree:
    with fast_convolutions(vmapped=problem.vmapped):
        return simulated_update(
            problem.victim, problem.params, inputs, problem.labels, problem.threat_model
        )


def _compared(problem: Matching, update: PyTree) -> Array:
    return distance(
        problem.distance,
        problem.transform.apply(update),
        problem.update,
        target_square=problem.target_square,
    )


class _Statics(NamedTuple):
    victim: Victim
    threat_model: ThreatModel
    distance: DistanceName
    vmapped: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matched(statics: _Statics, arrays: PyTree, inputs: Array) -> Array:
    problem = _problem(statics, arrays)
    return _compared(problem, _update(problem, inputs))


def _forward(statics: _Statics, arrays: PyTree, inputs: Array) -> tuple[Array, Any]:
    problem = _problem(statics, arrays)
    update = _update(problem, inputs)
    value, direction = jax.value_and_grad(lambda update: _compared(problem, update))(update)
    return value, (arrays, inputs, direction)


def _backward(statics: _Statics, kept: Any, seed: Array) -> tuple[None, Array]:
    arrays, inputs, direction = kept
    problem = _problem(statics, arrays)
    if problem.threat_model.protocol == "fedavg":  # its update is minus the gradient
        direction = jax.tree.map(jnp.negative, direction)

    def along(inputs: Array) -> Array:
        def loss(seen: PyTree) -> Array:
            params = {**problem.params, **seen}
            return problem.victim.loss_of_inputs(params, inputs, problem.labels)

        seen = {name: problem.params[name] for name in direction}
        with _forward_convolutions(problem.vmapped):
            return jax.jvp(loss, (seen,), (direction,))[1]

    return None, seed * jax.grad(along)(inputs)


_matched.defvjp(_forward, _backward)


def _forward_convolutions(vmapped: bool) -> contextlib.AbstractContextManager[None]:
    """How a jvp computes convolutions: by patches, but by the device's own library for one search.

    Of many searches each has kernel tangents of its own, which would be a grouped convolution.
    """
    if vmapped or jax.default_backend() == "cpu":
        return patch_convolutions()
    return contextlib.nullcontext()


def _split(problem: Matching) -> tuple[_Statics, PyTree]:
    """What is hashable of a problem, and its arrays in plain containers."""
    statics = _Statics(problem.victim, problem.threat_model, problem.distance, problem.vmapped)
    transform = dict(problem.transform.masks), problem.transform.bound
    known = problem.target_square
    return statics, (problem.update, problem.params, problem.labels, transform, known)


def _problem(statics: _Statics, arrays: PyTree) -> Matching:
    update, params, labels, (masks, bound), target_square = arrays
    return Matching(
        update=update,
        params=params,
        labels=labels,
        transform=Transform(masks, bound),
        target_square=target_square,
        victim=statics.victim,
        threat_model=statics.threat_model,
        distance=statics.distance,
        vmapped=statics.vmapped,
    )
