"""Whether a linearized release can be trusted at an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jgia.models import Victim
from jgia.risk.posterior import Posterior

PyTree = Any
TRUSTED_RATIO = 0.3
"""Up to here the remainder is small against what the linear part says."""


class Diagnostics(NamedTuple):
    """Signs that a closed form describes the release, over draws from the posterior.

    Attributes:
      linearization_ratio: mean of ``||G(x + h) - G(x) - J h|| / ||J h||``; trust estimates where
        it is below :data:`TRUSTED_RATIO`.
      sign_flips: part of the layers' outputs whose sign changes, where the model has ReLU.
      squared_safely: whether the route kept the singular values that the noise does not hide.
    """

    linearization_ratio: Array
    sign_flips: Array
    squared_safely: Array


def diagnose(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Float[Array, "*shape"],
    posterior: Posterior,
    *,
    victim: Victim | None,
    params: PyTree,
    squared_safely: Array,
    num_draws: int = 8,
) -> Diagnostics:
    """Compare the release with its linearization at images that the attacker cannot tell from x.

    Args:
      key: random key of the draws.
      fn: the release.
      x: the image, or a batch of them.
      posterior: of the image.
      victim: the model whose signs are compared, or ``None``.
      params: its parameters.
      squared_safely: passed on.
      num_draws: images that are drawn.
    """
    value, derivative = jax.linearize(fn, x)
    signs = _signs(victim, params, x)

    def draw(noise: Array) -> tuple[Array, Array]:
        step = (noise @ posterior.root.astype(x.dtype)).reshape(x.shape)
        linear = derivative(step)
        rest = jax.tree.map(lambda a, b, c: a - b - c, fn(x + step), value, linear)
        size = jnp.maximum(_norm(linear), jnp.finfo(x.dtype).tiny)
        flipped = _signs(victim, params, x + step) != signs
        return _norm(rest) / size, jnp.mean(flipped, dtype=x.dtype)

    noise = jax.random.normal(key, (num_draws, posterior.root.shape[0]), x.dtype)
    ratios, flips = lax.map(draw, noise)
    return Diagnostics(jnp.mean(ratios), jnp.mean(flips), squared_safely)


def _norm(tree: PyTree) -> Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _signs(victim: Victim | None, params: PyTree, x: Array) -> Array:
    """Signs of what the layers that describe a ReLU put out; one False where there is none."""
    none = jnp.zeros((1,), bool)
    if victim is None or "describe" not in vars(type(victim.module)):
        return none
    if not any(_has_relu(layer) for layer in victim.layers()):
        return none
    images = x[None] if x.ndim == 3 else x

    def kept(module: nn.Module, method: str) -> bool:
        layers = (nn.Conv, nn.Dense, nn.GroupNorm)
        return method == "__call__" and isinstance(module, layers) and module.name != "head"

    _, found = victim.module.apply(
        {"params": params},
        victim.normalization.normalize(images),
        capture_intermediates=kept,
    )
    outputs = jax.tree.leaves(dict(found).get("intermediates", {}))
    return jnp.concatenate([none, *(output.reshape(-1) > 0 for output in outputs)])


def _has_relu(layer: Any) -> bool:
    parts = (*getattr(layer, "branch", ()), *getattr(layer, "shortcut", ()), layer)
    return any(getattr(part, "activation", None) == "relu" for part in parts)
