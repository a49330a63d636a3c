"""Dropout on the input of a fully connected layer, in the client's forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from jgia.models import Victim, flatten_params

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutLoss:
    r"""A victim's loss with dropout on the input of one fully connected layer.

    ``loss(theta; x, y, m)`` where the layer reads ``m h / (1 - p)`` instead of ``h``, with
    independent ``m ~ Bernoulli(1 - p)`` per example and feature. The expected input is unchanged.
    The server need not agree: architecture and parameters are those it sent.

    Attributes:
      victim: the model.
      rate: p in [0, 1), the probability of a zero.
      layer: name of a fully connected layer, ``"head"`` in every bundled model.

    Raises:
      ValueError: the rate is out of range, or the model has no such layer.

    Guarantees:
      With ``rate=0`` the loss is the victim's, bit for bit. A pure function: jit, grad and vmap
      pass through it. The victim's module is not changed.

    Edge cases:
      A neuron that is dropped for an example sends nothing back for it, so the layer *before*
      loses that example too; a bin of a linear-layer attack misses dropped examples. An
      attacker who samples or optimizes the mask as well can undo much of it (reference): dropout
      alone is no protection against gradient matching.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(2, 2, 1), num_classes=2, widths=(8,))
    >>> loss = DropoutLoss(victim=victim, rate=0.5)
    >>> params = victim.init(jax.random.key(0))
    >>> pixels, labels = jnp.full((1, 2, 2, 1), 0.5, "float32"), jnp.array([1])
    >>> float(loss(params, pixels, labels, jax.random.key(1))) > 0
    True

    References:
      Scheliga, Mäder and Seeland, "Dropout is NOT All You Need to Prevent Gradient Leakage"
      (AAAI 2023, arXiv 2208.06163): the defense, and an attack that adapts to it.
    """

    victim: Victim
    rate: float
    layer: str = "head"

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout rate must lie in [0, 1), got {self.rate!r}.")
        shapes = flatten_params(self.victim.param_shapes())
        dense = [
            name.removesuffix("/kernel")
            for name, leaf in shapes.items()
            if name.endswith("/kernel") and len(leaf.shape) == 2
        ]
        if self.layer not in dense:
            raise ValueError(
                f"dropout needs a fully connected layer; the model has {', '.join(dense) or 'none'}"
                f", got {self.layer!r}."
            )

    def __call__(self, params: PyTree, images: Array, labels: Array, key: PRNGKeyArray) -> Array:
        """Mean cross-entropy under one mask per example and feature, drawn from ``key``."""
        if self.rate == 0:
            return self.victim.loss(params, images, labels)

        def interceptor(
            call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path != self.layer:
                return call(*args, **kwargs)
            inputs, *rest = args
            mask = jax.random.bernoulli(key, 1 - self.rate, inputs.shape)
            scale = jnp.asarray(1 / (1 - self.rate), inputs.dtype)
            return call(jnp.where(mask, inputs * scale, 0), *rest, **kwargs)

        with nn.intercept_methods(interceptor):
            return self.victim.loss(params, images, labels)
