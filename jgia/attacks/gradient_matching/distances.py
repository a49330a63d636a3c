"""How far one update is from another: the term that every gradient-matching attack minimizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jgia.config.gradient_matching import DistanceName, LayerWeights
from jgia.models import flatten_params

PyTree = Any


def distance(
    name: DistanceName,
    update: PyTree,
    target: PyTree,
    weights: Mapping[str, float] | None = None,
    *,
    target_square: Array | None = None,
) -> Array:
    r"""Distance between two updates of the same structure.

    With layers ``l`` (all parameters of one module: kernel and bias together), ``g`` the update,
    ``t`` the target, and weights ``w``:

    - ``"l2"``: ``sum_l w_l ||g_l - t_l||^2`` (Zhu et al. 2019, eq. 3)
    - ``"l2_norm"``: ``sum_l w_l ||g_l - t_l||`` (Yin et al. 2021, eq. 2)
    - ``"cosine"``: ``1 - <g, t>_w / (||g||_w ||t||_w)`` of all entries (Geiping et al. 2020, eq. 4)
    - ``"layer_cosine"``: ``sum_l w_l (1 - cos_l) / sum_l w_l``
    - ``"max_layer"``: ``max_l w_l (1 - cos_l)``

    Args:
      name: one of the above.
      update: pytree of arrays; differentiated.
      target: the same structure.
      weights: one non-negative weight per layer name (:func:`layer_weights`); ones when left out.
      target_square: :func:`square` of the target, for ``"cosine"`` without weights, where a search
        has computed it once for all steps.

    Returns:
      A scalar, at least 0 up to rounding (the cosine distances at most 2 times the largest weight).

    Edge cases:
      A layer whose target is zero (dead, or pruned by a defense) says nothing about directions:
      the cosine distances leave it out. An update of zero is at distance 1 from any other. Norms
      have derivative zero at zero.

    References:
      Zhu, Liu, Han, "Deep Leakage from Gradients" (NeurIPS 2019, arXiv 1906.08935). Geiping et al.,
      "Inverting Gradients" (NeurIPS 2020, arXiv 2003.14053). Yin et al., "See through Gradients"
      (CVPR 2021, arXiv 2104.07586).

    >>> distance("l2", {"fc": {"bias": jnp.ones(2)}}, {"fc": {"bias": jnp.zeros(2)}})
    Array(2., dtype=float32)
    """
    layers = _by_layer(update, target)
    scale = {name: 1.0 if weights is None else weights[name] for name in layers}
    if name == "l2":
        return _sum(scale[n] * _squares(g, t) for n, (g, t) in layers.items())
    if name == "l2_norm":
        return _sum(scale[n] * root(_squares(g, t)) for n, (g, t) in layers.items())
    if name == "cosine":
        products = _sum(scale[n] * _dot(g, t) for n, (g, t) in layers.items())
        own = _sum(scale[n] * _dot(g, g) for n, (g, _) in layers.items())
        other = target_square
        if other is None or weights is not None:
            other = _sum(scale[n] * _dot(t, t) for n, (_, t) in layers.items())
        return 1 - _cosine(products, own, other)
    values = {n: _layer_cosine(g, t) for n, (g, t) in layers.items()}
    weighted = [scale[n] * value for n, value in values.items()]
    if name == "layer_cosine":
        return _sum(weighted) / sum(scale.values())
    return jnp.stack(weighted).max()


def square(update: PyTree) -> Array:
    """The squared Euclidean norm of an update."""
    leaves = list(flatten_params(update).values())
    return _dot(leaves, leaves)


def layer_weights(names: Sequence[str], kind: LayerWeights) -> dict[str, float]:
    """Weights that add up to the number of layers, from the first layer to the last.

    Args:
      names: layer names in the order in which data passes them.
      kind: ``"equal"``; ``"linear"``, proportional to n, n - 1, ..., 1; ``"exponential"``,
        proportional to 1, 1/2, 1/4, ...

    >>> layer_weights(["conv1", "fc"], "linear")
    {'conv1': 1.3333333333333333, 'fc': 0.6666666666666666}
    """
    count = len(names)
    raw = {
        "equal": [1.0] * count,
        "linear": [float(count - i) for i in range(count)],
        "exponential": [0.5**i for i in range(count)],
    }[kind]
    return {name: value * count / sum(raw) for name, value in zip(names, raw, strict=True)}


def layer_names(update: PyTree) -> list[str]:
    """The names of an update's layers: modules that hold arrays of their own."""
    return list(dict.fromkeys(name.rpartition("/")[0] for name in flatten_params(update)))


def _by_layer(update: PyTree, target: PyTree) -> dict[str, tuple[list[Array], list[Array]]]:
    flat, other = flatten_params(update), flatten_params(target)
    if set(flat) != set(other):
        raise ValueError(
            f"both updates must hold the same parameters, got {sorted(flat)} and {sorted(other)}."
        )
    layers: dict[str, tuple[list[Array], list[Array]]] = {}
    for name, value in flat.items():
        mine, theirs = layers.setdefault(name.rpartition("/")[0], ([], []))
        mine.append(jnp.asarray(value))
        theirs.append(jnp.asarray(other[name]))
    return layers


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _dot(a: Sequence[Array], b: Sequence[Array]) -> Array:
    return _sum([jnp.vdot(x, y) for x, y in zip(a, b, strict=True)])


def _squares(a: Sequence[Array], b: Sequence[Array]) -> Array:
    return _sum([jnp.sum(jnp.square(x - y)) for x, y in zip(a, b, strict=True)])


def root(x: Array) -> Array:
    """Square root, with derivative zero at zero; NaN stays NaN."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _cosine(products: Array, own: Array, other: Array) -> Array:
    lengths = root(own) * root(other)
    zero = lengths == 0
    return jnp.where(zero, 0, products / jnp.where(zero, 1, lengths))


def _layer_cosine(update: Sequence[Array], target: Sequence[Array]) -> Array:
    other = _dot(target, target)
    value = 1 - _cosine(_dot(update, target), _dot(update, update), other)
    return jnp.where(other == 0, 0, value)
