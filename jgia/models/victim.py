"""A victim model as plain data: module, input shape, normalization, and its layer list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import traverse_util
from jax import Array

from jgia.models.layers import Layer
from jgia.normalization import Normalization

PyTree = Any


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
        return self.module.init(key, jax.numpy.zeros((1, *self.input_shape), "float32"))["params"]

    def param_shapes(self) -> PyTree:
        """The parameters' structure as ``jax.ShapeDtypeStruct``: nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params: PyTree, inputs: Array) -> Array:
        """Normalized inputs (B, H, W, C) to logits (B, num_classes)."""
        return self.module.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]

    def loss(self, params: PyTree, images: Array, labels: Array) -> Array:
        """Mean cross-entropy of pixels (B, H, W, C) in [0, 1] and integer labels (B,).

        Client and attacks share this one function, so their scale cannot differ.
        """
        logits = self.apply(params, self.normalization.normalize(images))
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


def flatten_params(params: PyTree) -> dict[str, Any]:
    """Nested parameters to ``{"conv1/kernel": array, ...}``."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten_params(flat: Mapping[str, Any]) -> PyTree:
    """The inverse of :func:`flatten_params`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
