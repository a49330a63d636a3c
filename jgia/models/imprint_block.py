"""A model with a linear block in front, as a server that may change architectures sends it."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
from jax import Array

from jgia.models.layers import Dense, Layer, Pool, Residual


class ImprintBlock(nn.Module):
    """``flatten - FC - ReLU - FC - image shape - inner model``.

    The block of Robbing the Fed (Fowl et al., ICLR 2022, arXiv 2110.13057). No honest model needs
    it; it is here to measure what attacks gain that may change the architecture.

    Attributes:
      inner: the model behind the block; it describes its own layers. Its parameters are nested
        under ``inner``.
      image_shape: (H, W, C) of an image.
      num_bins: neurons of the block.
    """

    inner: nn.Module
    image_shape: tuple[int, int, int]
    num_bins: int = 1024

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits (B, num_classes)."""
        bins = nn.relu(nn.Dense(self.num_bins, name="imprint")(x.reshape((x.shape[0], -1))))
        restored = nn.Dense(math.prod(self.image_shape), name="restore")(bins)
        return self.inner(restored.reshape(x.shape))  # pyright: ignore[reportCallIssue]

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order; ``restore`` has as many features as the image has values."""
        behind = self.inner.describe()  # pyright: ignore[reportAttributeAccessIssue]
        block = (
            Dense("imprint", self.num_bins, "relu"),
            Dense("restore", math.prod(self.image_shape), "none"),
        )
        return (*block, *(_nested(layer) for layer in behind))


def _nested(layer: Layer) -> Layer:
    """A layer of the inner model by the name of its parameters in the whole one."""
    if isinstance(layer, Pool):
        return layer
    if isinstance(layer, Residual):
        branch, shortcut = (tuple(map(_nested, part)) for part in (layer.branch, layer.shortcut))
        layer = dataclasses.replace(layer, branch=branch, shortcut=shortcut)
    return dataclasses.replace(layer, name=f"inner/{layer.name}")
