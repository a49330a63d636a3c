"""Pruning of one layer's gradient where its representation gives most away: a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jgia.defenses import _adaptive
from jgia.models import flatten_params, unflatten_params

PyTree = Any


def soteria_scores(
    representation_fn: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    *,
    offset: float = 1e-10,
) -> Float[Array, " features"]:
    r"""Score of every feature: ``sum_examples ||d r_f / dx|| / (|r_f| + offset)``.

    A small score marks a feature whose value changes little with the input for its size; it is the
    first to be pruned.

    Args:
      representation_fn: from a batch (B, ...) to the (B, F) input of a fully connected layer; every
        example's features depend on that example alone.
      x: the batch.
      offset: keeps features of value 0 (behind a ReLU) finite: their score is 0 where the
        derivative is zero too, and large otherwise.

    Returns:
      F scores >= 0.

    Raises:
      ValueError: ``x`` is not floating point or the representation is not a matrix with a row per
        example.

    >>> soteria_scores(lambda x: x * jnp.array([[1.0, 3.0]]), jnp.array([[2.0, 1.0]])).tolist()
    [0.5, 1.0]

    References:
      Sun et al., "Soteria: Provable Defense Against Privacy Leakage in Federated Learning from
      Representation Perspective" (CVPR 2021, arXiv 2012.06043), section 4 and its approximation
      ``||r_f|| / ||d r_f / dx||`` of the exact criterion.
    """
    x = _adaptive.check_input(x)
    shape = jax.eval_shape(representation_fn, x).shape
    if x.ndim < 1 or len(shape) != 2 or shape[0] != x.shape[0]:
        raise ValueError(
            f"representation_fn must return one row of features per example, got shape {shape} for "
            f"{x.shape[:1]} examples; flatten the layer's input."
        )
    features, pull = jax.vjp(representation_fn, x)

    def norms(index: Array) -> Array:
        seed = jnp.broadcast_to(jnp.arange(shape[1]) == index, shape)
        (moved,) = pull(seed.astype(features.dtype))
        return jnp.sqrt(jnp.sum(jnp.square(moved.reshape(x.shape[0], -1)), axis=1))

    sizes = jax.lax.map(norms, jnp.arange(shape[1])).T
    return jnp.sum(sizes / (jnp.abs(features) + offset), axis=0)


def soteria(
    update: PyTree,
    scores: Float[Array, " features"],
    *,
    layer: str = "head",
    keep_fraction: float = 0.4,
) -> tuple[PyTree, Bool[Array, " features"]]:
    r"""An update without the rows of one fully connected layer that belong to the lowest scores.

    Args:
      update: a gradient, with ``<layer>/kernel`` of shape (F, outputs).
      scores: from :func:`soteria_scores`.
      layer: name of the layer.
      keep_fraction: share of the features that are kept, in (0, 1]; ``ceil(keep_fraction F)`` of
        them, those of the highest scores.

    Returns:
      The update with zeros in the other rows of that kernel, and which features were kept.

    Raises:
      ValueError: the layer is missing or not fully connected, the scores do not fit, or
        ``keep_fraction`` is out of range.

    Edge cases:
      Biases and **all other layers are shared as they are**, and determine the input as before: an
      attack that leaves the pruned layer out is not hindered (Balunović et al., "Bayesian Framework
      for Gradient Leakage", ICLR 2022, arXiv 2111.04706). Among equal scores, the first are kept.
      No differential privacy.

    >>> update = {"head": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
    >>> shared, kept = soteria(update, jnp.array([0.1, 3.0]), keep_fraction=0.5)
    >>> shared["head"]["kernel"].tolist(), kept.tolist()
    ([[0.0], [1.0]], [False, True])

    References:
      As :func:`soteria_scores`; Sun et al. prune the features of the smallest
      ``||d r_f / dx|| / ||r_f||``.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction must lie in (0, 1], got {keep_fraction!r}.")
    flat = flatten_params(update)
    name = f"{layer}/kernel"
    if name not in flat or flat[name].ndim != 2:
        dense = [n.removesuffix("/kernel") for n, leaf in flat.items() if _is_dense(n, leaf)]
        raise ValueError(
            f"soteria needs a fully connected layer; the update has {', '.join(dense) or 'none'}, "
            f"got {layer!r}."
        )
    kernel = flat[name]
    if scores.shape != kernel.shape[:1]:
        raise ValueError(
            f"scores must have shape ({kernel.shape[0]},), one per input of {layer!r}, got "
            f"{scores.shape}; take them of that layer's representation."
        )
    count = math.ceil(round(keep_fraction * scores.size, 9))
    chosen = jax.lax.top_k(scores, count)[1]
    kept = jnp.zeros(scores.shape, bool).at[chosen].set(True)
    pruned = {**flat, name: jnp.where(kept[:, None], kernel, 0)}
    return unflatten_params(pruned), kept


def _is_dense(name: str, leaf: Any) -> bool:
    return name.endswith("/kernel") and leaf.ndim == 2
