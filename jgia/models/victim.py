"""A victim model as plain data: module, input shape, normalization, and its layer list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import Array

from jgia.models.layers import BatchNorm, Layer, Residual
from jgia.models.normalizing import STATISTICS
from jgia.normalization import Normalization

PyTree = Any
Statistics = dict[str, tuple[Array, Array]]
"""Means and variances per channel, by the name of the batch normalization."""


@dataclasses.dataclass(frozen=True)
class Victim:
    """A model under attack: pure functions of ``params``, nothing mutable.

    Attributes:
      module: the flax.linen module.
      input_shape: (H, W, C) of one image.
      num_classes: number of classes.
      normalization: applied by the client before the model, and undone by the attack after.
      name: for reports.
    """

    module: nn.Module
    input_shape: tuple[int, int, int]
    num_classes: int
    normalization: Normalization
    name: str = "custom"

    def __post_init__(self) -> None:
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"the attributes of {type(self.module).__name__}, and input_shape, must be "
                "hashable (tuples, not lists): the victim is a static argument of compiled "
                "functions."
            ) from error

    def init(self, key: Array) -> PyTree:
        """Random benign parameters, as an honest server would start with."""
        return self.module.init(key, jnp.zeros((1, *self.input_shape), "float32"))["params"]

    def param_shapes(self) -> PyTree:
        """The parameters' structure as ``jax.ShapeDtypeStruct``: nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params: PyTree, inputs: Array) -> Array:
        """Normalized inputs (B, H, W, C) to logits (B, num_classes)."""
        return self.module.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]

    def apply_with_statistics(self, params: PyTree, inputs: Array) -> tuple[Array, Statistics]:
        """:meth:`apply` and :meth:`batch_statistics` in one pass."""
        logits, sown = self.module.apply({"params": params}, inputs, mutable=[STATISTICS])
        found: dict[str, Any] = flatten_params(dict(sown).get(STATISTICS, {}))
        statistics = {name.rpartition("/")[0]: moments for name, moments in found.items()}
        return logits, statistics  # pyright: ignore[reportReturnType]

    def batch_statistics(self, params: PyTree, inputs: Array) -> Statistics:
        """What enters the batch normalizations, as a client that shares statistics computes it.

        ``mean_c`` and ``sum (x - mean_c)^2 / n`` over the ``n = B H W`` values of each channel.
        What comes before a layer is computed as the victim's mode has it: earlier normalizations
        use the batch's own statistics in mode ``"train"``, running ones in mode ``"eval"``.

        Args:
          params: the parameters.
          inputs: (B, H, W, C) normalized pixels.

        Returns:
          ``{"norm1": (means, variances), "block1/norm1": ...}``, one value per channel;
          differentiable in ``inputs`` and ``params``. Empty without batch normalization.
        """
        return self.apply_with_statistics(params, inputs)[1]

    def running_statistics(self) -> Statistics:
        """The running statistics that were set, by :func:`~jgia.models.with_buffers`.

        Returns:
          As :meth:`batch_statistics`, of every batch normalization; means 0 and variances 1 for
          those that were not named. Empty if none was ever set, or without batch normalization.
        """
        given = {name: moments for name, *moments in getattr(self.module, "buffers", ())}
        if not given:
            return {}
        shapes = flatten_params(self.param_shapes())
        found: Statistics = {}
        for name in batch_norm_names(self):
            channels = shapes[f"{name}/scale"].shape[0]
            mean, var = given.get(name, ([0.0] * channels, [1.0] * channels))
            found[name] = jnp.asarray(mean), jnp.asarray(var)
        return found

    def loss(self, params: PyTree, images: Array, labels: Array) -> Array:
        """Mean cross-entropy of pixels (B, H, W, C) in [0, 1] and integer labels (B,).

        Client and attacks share this one function, so their scale cannot differ.
        """
        return self.loss_of_inputs(params, self.normalization.normalize(images), labels)

    def loss_of_inputs(self, params: PyTree, inputs: Array, labels: Array) -> Array:
        """:meth:`loss` of what the module sees, for attacks that search among normalized images.

        Args:
          params: the parameters.
          inputs: (B, H, W, C) normalized pixels.
          labels: (B,) integers, or (B, num_classes) probabilities that an attack optimizes.
        """
        logits = self.apply(params, inputs)
        if labels.ndim == 2:
            return optax.softmax_cross_entropy(logits, labels).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def layers(self) -> tuple[Layer, ...]:
        """The layers in order, or ``ValueError`` for a module that does not describe itself.

        A module of your own describes itself with a method ``describe()`` that returns this. An
        inherited one does not count: the subclass may compute something else.
        """
        kind = type(self.module)
        if "describe" not in vars(kind):
            raise ValueError(
                f"the layers of {kind.__name__} are not described; give the module a method "
                "describe() that lists them, or take one of the bundled models."
            )
        return self.module.describe()  # pyright: ignore[reportAttributeAccessIssue]


def batch_norm_names(victim: Victim) -> tuple[str, ...]:
    """The names of the victim's batch normalizations, in order."""
    names: list[str] = []
    for layer in victim.layers():
        parts = (*layer.branch, *layer.shortcut) if isinstance(layer, Residual) else (layer,)
        names += [part.name for part in parts if isinstance(part, BatchNorm)]
    return tuple(names)


def flatten_params(params: PyTree) -> dict[str, Any]:
    """Nested parameters to ``{"conv1/kernel": array, ...}``."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten_params(flat: Mapping[str, Any]) -> PyTree:
    """The inverse of :func:`flatten_params`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
