"""StyleGAN2's discriminator."""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgia.generators.layers import (
    EPS,
    Conv,
    Dense,
    activate,
    downsample,
    normalize_second_moment,
)
from jgia.generators.stylegan2 import FIRST_RESOLUTION, StyleGAN2

Architecture = Literal["residual", "plain"]


class Discriminator(nn.Module):
    """Images to one logit each: large for real ones.

    ``1x1 from image - blocks that halve the resolution - deviation over the minibatch - 3x3 -
    dense - dense``; a block is ``3x3 - 3x3 - downsample``, beside a downsampled 1x1 in the
    residual architecture (added up and divided by ``sqrt(2)``). The logit of a conditional one is
    the product with the vector of the class.

    Attributes:
      generator: whose images it tells from real ones: resolution, features, classes, dtype.
      architecture: ``"residual"``, or ``"plain"`` as for small images.
      group_size: images over which the deviation is taken; a divisor of the batch near it.

    References:
      Karras et al. 2020 (arXiv 1912.04958), section 4; minibatch deviation: Karras et al. 2018
      (arXiv 1710.10196), section 3; projection: Miyato and Koyama 2018 (arXiv 1802.05637).
    """

    generator: StyleGAN2
    architecture: Architecture = "residual"
    group_size: int = 4

    @nn.compact
    def __call__(self, images: Array, labels: Array | None = None) -> Array:
        """(B, H, W, channels), about [-1, 1], and (B,) classes to (B,) logits."""
        sizes = self.generator
        x = jnp.asarray(images, sizes.dtype)
        last = sizes.num_blocks - 1
        x = activate(Conv(sizes.features(last), size=1, name="from_image")(x))
        for b in range(last, 0, -1):
            skip = x
            size = FIRST_RESOLUTION << b
            x = activate(Conv(sizes.features(b), name=f"{size}_conv_a")(x))
            x = activate(Conv(sizes.features(b - 1), down=True, name=f"{size}_conv_b")(x))
            if self.architecture == "residual":
                narrow = Conv(sizes.features(b - 1), 1, use_bias=False, name=f"{size}_skip")
                x = (x + narrow(downsample(skip))) / math.sqrt(2)
        x = jnp.asarray(x, "float32")
        x = with_minibatch_deviation(x, self.group_size)
        width = sizes.features(0)
        x = activate(Conv(width, name="4_conv")(x))
        x = activate(Dense(width, name="dense")(x.reshape(len(x), -1)))
        if not sizes.num_classes:
            return Dense(1, name="logit")(x)[:, 0]
        assert labels is not None
        hot = jax.nn.one_hot(labels, sizes.num_classes, dtype=x.dtype)
        embedded = Dense(width, name="embed")(hot * math.sqrt(sizes.num_classes))
        vector = normalize_second_moment(embedded)
        return jnp.sum(Dense(width, name="logit")(x) * vector, axis=-1) / math.sqrt(width)


def with_minibatch_deviation(x: Array, group_size: int) -> Array:
    """One more channel: the mean over everything of the deviation over a group of images.

    Args:
      x: (B, h, w, C).
      group_size: images in a group; the largest divisor of B that is not larger is taken.

    Returns:
      (B, h, w, C + 1).
    """
    batch, height, width, _ = x.shape
    size = max(n for n in range(1, min(group_size, batch) + 1) if batch % n == 0)
    groups = x.reshape(size, batch // size, *x.shape[1:])
    deviation = jnp.sqrt(groups.var(axis=0) + EPS).mean(axis=(1, 2, 3))
    channel = jnp.tile(deviation, size)[:, None, None, None]
    return jnp.concatenate([x, jnp.broadcast_to(channel, (batch, height, width, 1))], axis=-1)
