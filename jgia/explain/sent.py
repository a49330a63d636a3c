"""What a client sends under a defense, without the defense's noise: a function of the image."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray, Shaped

from jgia.config import DefenseConfig
from jgia.defenses import Defense
from jgia.models.convolutions import patch_convolutions
from jgia.risk import Posterior, Release, UpdateRelease
from jgia.risk.diagnostics import diagnose
from jgia.risk.jacobian import rows_of

PyTree = Any

IN_GRADIENT = ("augment", "dp_sgd", "dropout")
"""Defenses that change the function of the image inside the gradient."""

SMOOTH = (*IN_GRADIENT, "clip")
"""Defenses that change the function of the image; the others add noise or leave entries out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """A release under a defense, less its noise: what an attacker who knows both models.

    Hashable, a static argument of compiled functions.

    Attributes:
      release: without the defense.
      config: the defense; only those of :data:`SMOOTH` change anything here.
    """

    release: Release
    config: DefenseConfig = dataclasses.field(default_factory=DefenseConfig)

    def __call__(
        self, params: PyTree, images: Array, labels: Array, key: PRNGKeyArray, /
    ) -> PyTree:
        """The release of the images, with the draws of dropout and augmentation that the key makes.

        Args:
          params: the parameters.
          images: (H, W, C), or (B, H, W, C).
          labels: () or (B,).
          key: of :meth:`jgia.defenses.Defense.gradient`; other defenses ignore it.
        """
        name = self.config.defense[0] if self.config.defense else ""
        if name not in SMOOTH:
            return self.release(params, images, labels)
        if name == "clip":
            update = self.release(params, images, labels)
            return Defense(config=self.config).share(jax.random.clone(key), update)[0]
        config = self.config
        if name == "dp_sgd":
            config = dataclasses.replace(config, noise_multiplier=0.0)
        return gradient_under(config, self.release, params, images, labels, key)[0]


def gradient_under(
    config: DefenseConfig,
    release: Release,
    params: PyTree,
    images: Array,
    labels: Array,
    key: PRNGKeyArray,
) -> tuple[PyTree, Any]:
    """What the library's client computes in place of its one gradient, and what it declares."""
    assert isinstance(release, UpdateRelease)  # checked before
    single = images.ndim == 3
    pixels, classes = (images[None], labels[None]) if single else (images, labels)
    with patch_convolutions():
        return Defense(config=config).gradient(
            jax.random.clone(key), release.victim, params, pixels, classes
        )


def flat(tree: PyTree) -> Shaped[Array, " outputs"]:
    """All leaves behind each other."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnums=0)
def value_of(
    sent: Sent, params: PyTree, image: Array, labels: Array, key: PRNGKeyArray
) -> Float[Array, " outputs"]:
    """What is sent, flat."""
    return flat(sent(params, image, labels, key))


@functools.partial(jax.jit, static_argnums=(0, 1))
def linearized(
    sent: Sent, chunk_size: int, params: PyTree, image: Array, labels: Array, key: PRNGKeyArray
) -> tuple[Float[Array, " outputs"], Float[Array, "outputs inputs"]]:
    """What is sent, flat, and its Jacobian with respect to the pixels.

    Args:
      sent: the release under its defense.
      chunk_size: directions at a time.
      params: the parameters.
      image: where.
      labels: its labels.
      key: of the defense's draws.
    """
    value, derivative = jax.linearize(lambda x: sent(params, x, labels, key), image)
    pushed = lax.map(
        lambda row: derivative(row.reshape(image.shape)),
        jnp.eye(image.size, dtype=image.dtype),
        batch_size=min(chunk_size, image.size),
    )
    return flat(value), rows_of(pushed).T


@functools.partial(jax.jit, static_argnums=0)
def linearization_ratio(
    sent: Sent,
    key: PRNGKeyArray,
    params: PyTree,
    image: Array,
    labels: Array,
    defense_key: PRNGKeyArray,
    posterior: Posterior,
) -> Array:
    """:func:`jgia.risk.diagnose` of what is sent, over what an attacker cannot tell apart."""
    found = diagnose(
        key,
        lambda x: sent(params, x, labels, defense_key),
        image,
        posterior,
        victim=None,
        params=params,
        squared_safely=jnp.ones((), bool),
    )
    return found.linearization_ratio
