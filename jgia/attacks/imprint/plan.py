"""What the server remembers of parameters whose first linear layer it crafted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jgia.models import Dense, Victim

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprintPlan:
    """How the gradient of one linear layer is read. Everything else is in the parameters.

    Attributes:
      method: ``"rtf"``, ``"trap_weights"``, ``"qbi"`` or ``"loki"``.
      layer: the fully connected layer that is read.
      bin_masses: (K,) probability that an example falls into each bin, measured on the public
        images; ``None`` for methods without bins.
    """

    method: str
    layer: str
    bin_masses: np.ndarray | None = None


def refuse(method: str, victim: Victim, reason: str, remedy: str) -> ValueError:
    """The error of an architecture that cannot carry the attack."""
    return ValueError(
        f"{method} cannot attack the model {victim.name!r}: {reason}. The attack never changes an "
        f"architecture; {remedy}."
    )


def first_dense(method: str, victim: Victim) -> Dense:
    """The victim's first layer, if it is a rectified fully connected one on the image itself.

    Raises:
      ValueError: it is something else.
    """
    first = victim.layers()[0]
    if not isinstance(first, Dense) or first.activation != "relu":
        raise refuse(
            method,
            victim,
            "its first layer is not a fully connected layer with ReLU on the image itself",
            "choose --model mlp",
        )
    return first


def image_matrix(victim: Victim, images: np.ndarray) -> np.ndarray:
    """Pixels (N, H, W, C) as the normalized rows (N, H * W * C) that the first layer sees."""
    inputs = victim.normalization.normalize(jnp.asarray(images, jnp.float32))
    return np.asarray(inputs, np.float64).reshape(len(images), -1)


def with_layer(params: PyTree, name: str, kernel: np.ndarray, bias: np.ndarray) -> PyTree:
    """The parameters with one layer's kernel and bias replaced, in float32."""
    layer = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return {**params, name: layer}
