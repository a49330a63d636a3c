"""The Gram matrix of dense layers from their factors: the gradient is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jgia.models import Victim, flatten_params
from jgia.models.convolutions import patch_convolutions
from jgia.risk.jacobian import CHUNK, gram_of_rows, push, rows_of
from jgia.risk.release import UpdateRelease

PyTree = Any
Factors = dict[str, tuple[Array, Array]]
"""Of every dense layer: inputs (T, m) and derivatives of the loss in its outputs (T, n)."""


def structured_grams(
    release: UpdateRelease,
    params: PyTree,
    images: Float[Array, "*batch height width channels"],
    labels: Shaped[Array, "*classes"],
    directions: Float[Array, "directions inputs"],
    *,
    chunk_size: int = CHUNK,
) -> dict[str, Float[Array, "directions directions"]]:
    r"""``L J_l' J_l L'`` of every layer, dense ones without their gradients.

    A dense layer's gradient is ``sum_t a_t d_t'`` over the images t, with its inputs a and the
    loss's derivatives d. Along a direction its derivative is ``sum_t (a'_t d_t' + a_t d'_t')``, so
    that the product of two of them needs only products of the factors' derivatives:

    ``sum_ts (a'_t.a'_s)(d_t.d_s) + (a_t.a_s)(d'_t.d'_s) + (a'_t.a_s)(d_t.d'_s) +
    (a_t.a'_s)(d'_t.d_s)``

    and ``sum_ts d'_t.d'_s`` for the bias. Memory grows with the layers' widths, not with their
    product. Other layers are pushed forward as they are.

    Args:
      release: an unclipped FedSGD gradient.
      params: the parameters.
      images: one image or a batch.
      labels: its labels.
      directions: rows in the order of ``images.ravel()``.
      chunk_size: directions at a time.

    Returns:
      A Gram matrix for every layer that is visible, by its name. Their sum is that of the release.

    Raises:
      ValueError: FedAvg, or a clipped gradient.
    """
    if release.threat_model.protocol != "fedsgd" or release.clip_norm is not None:
        raise ValueError(
            "the structured route knows the unclipped FedSGD gradient only; use another route."
        )
    victim, visible = release.victim, release.threat_model.visible_layers
    if images.ndim == 3:
        images, labels = images[None], labels[None]
    names = dense_layers(victim, params)
    names = {name for name in names if visible is None or name.split("/")[0] in visible}

    def factors(x: Array) -> Factors:
        return _factors(victim, params, x, labels, names)

    grams: dict[str, Array] = {}
    at = factors(images)
    moved = push(factors, images, directions, chunk_size=chunk_size)
    for name in sorted(names):
        grams[name] = _dense_gram(at[name], moved[name], "bias" in _layer(params, name))

    def others(x: Array) -> dict[str, Array]:
        flat = flatten_params(release(params, x, labels))
        return {leaf: value for leaf, value in flat.items() if leaf.rpartition("/")[0] not in names}

    rest = jax.eval_shape(others, images)
    if not rest:
        return grams
    pushed = push(others, images, directions, chunk_size=chunk_size)
    for layer in sorted({leaf.rpartition("/")[0] for leaf in rest}):
        part = {leaf: rows for leaf, rows in pushed.items() if leaf.rpartition("/")[0] == layer}
        grams[layer] = gram_of_rows(rows_of(part))
    return grams


def structured_gram(
    release: UpdateRelease,
    params: PyTree,
    images: Float[Array, "*batch height width channels"],
    labels: Shaped[Array, "*classes"],
    directions: Float[Array, "directions inputs"],
    *,
    chunk_size: int = CHUNK,
) -> Float[Array, "directions directions"]:
    """The sum of :func:`structured_grams`: the Gram matrix of the whole release."""
    grams = structured_grams(release, params, images, labels, directions, chunk_size=chunk_size)
    return sum(grams.values(), jnp.zeros((), images.dtype))


def structured_outputs(release: UpdateRelease, params: PyTree, num_images: int) -> int | None:
    """Numbers whose derivatives :func:`structured_gram` holds, in place of all of the gradient's.

    The inputs and errors of dense layers, and the gradient of the others.

    Args:
      release: any; ``None`` is returned where it is not an unclipped FedSGD gradient.
      params: the parameters, or their shapes.
      num_images: behind one update.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(8,))
    >>> structured_outputs(UpdateRelease(victim=victim), victim.param_shapes(), 1)
    35
    """
    threat = release.threat_model
    if threat.protocol != "fedsgd" or release.clip_norm is not None:
        return None
    names = dense_layers(release.victim, params)
    total = 0
    for path, leaf in flatten_params(params).items():
        name = path.rpartition("/")[0]
        if threat.visible_layers is not None and name.split("/")[0] not in threat.visible_layers:
            continue
        if name not in names:
            total += leaf.size
        elif leaf.ndim == 2:
            total += num_images * sum(leaf.shape)
    return total


def dense_layers(victim: Victim, params: PyTree) -> set[str]:
    """Names of the plain ``flax.linen.Dense`` layers that the victim calls once, on vectors."""
    calls: dict[str, int] = {}

    def count(module: nn.Dense, x: Array) -> None:
        name = "/".join(module.path)
        calls[name] = calls.get(name, 0) + (1 if x.ndim == 2 else 2)

    like = jax.ShapeDtypeStruct((1, *victim.input_shape), jax.tree.leaves(params)[0].dtype)
    with nn.intercept_methods(_observing(count)):
        jax.eval_shape(victim.apply, params, like)
    return {name for name, number in calls.items() if number == 1}


def _observing(seen: Callable[[nn.Dense, Array], Any]) -> Any:
    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if type(module) is nn.Dense and context.method_name == "__call__" and not kwargs:
            added = seen(module, args[0])
            output = method(*args)
            return output if added is None else output + added
        return method(*args, **kwargs)

    return intercept


def _factors(
    victim: Victim, params: PyTree, images: Array, labels: Array, names: set[str]
) -> Factors:
    inputs = victim.normalization.normalize(images)

    def loss(probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        kept: dict[str, Array] = {}

        def probe(module: nn.Dense, x: Array) -> Array | None:
            name = "/".join(module.path)
            if name not in probes:
                return None
            kept[name] = x
            return probes[name]

        with patch_convolutions(), nn.intercept_methods(_observing(probe)):
            value = victim.loss_of_inputs(params, inputs, labels)
        return value, kept

    probes = {
        name: jnp.zeros((len(images), _layer(params, name)["kernel"].shape[1]), images.dtype)
        for name in names
    }
    errors, kept = jax.grad(loss, has_aux=True)(probes)
    return {name: (kept[name], errors[name]) for name in names}


def _layer(params: PyTree, name: str) -> Any:
    for part in name.split("/"):
        params = params[part]
    return params


def _dense_gram(at: tuple[Array, Array], moved: tuple[Array, Array], bias: bool) -> Array:
    (a, d), (da, dd) = at, moved  # (T, m), (T, n), (k, T, m), (k, T, n)
    inputs, errors = a @ a.T, d @ d.T
    if bias:
        inputs = inputs + jnp.ones((), a.dtype)

    def flat(rows: Array) -> Array:
        return rows.reshape(rows.shape[0], -1)

    first = flat(da) @ flat(jnp.einsum("ts,ksm->ktm", errors, da)).T
    second = flat(dd) @ flat(jnp.einsum("ts,ksn->ktn", inputs, dd)).T
    left = flat(jnp.einsum("ktm,sm->kts", da, a))
    right = flat(jnp.einsum("tn,ksn->kts", d, dd))
    cross = left @ right.T
    total = first + second + cross + cross.T
    return (total + total.T) / 2
