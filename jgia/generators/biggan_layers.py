"""The layers of BigGAN-deep: conditional residual blocks, self-attention, stored statistics.

References:
  Brock, Donahue and Simonyan 2019 (arXiv 1809.11096), appendix B and figure 16.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgia.models.convolutions import convolve

FIRST_RESOLUTION = 4
EPS = 1e-4
_BOTTLENECK = 4  # features of a block over those inside it
_orthogonal = nn.initializers.orthogonal()


class Layer(NamedTuple):
    """One block: features that enter and leave it, and what it is.

    Attributes:
      before: features that enter.
      after: features that leave.
      up: whether it doubles the resolution.
      attends: whether it is the self-attention block.
    """

    before: int
    after: int
    up: bool = False
    attends: bool = False


class Blocks(nn.Module):
    """A linear layer to 4 x 4 pixels, then residual and self-attention blocks."""

    layers: tuple[Layer, ...]
    measure: bool = False

    @nn.compact
    def __call__(
        self,
        z: Array,
        condition: Array,
        features: Array | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Array:
        """(B, Z) and (B, E) vectors, and what enters block ``start``; what leaves ``stop - 1``."""
        vector = jnp.concatenate([z, condition], axis=-1)
        for i in range(start, len(self.layers) if stop is None else stop):
            layer = self.layers[i]
            if i == 0:
                size = FIRST_RESOLUTION
                flat = _dense(size * size * layer.before, "linear", use_bias=True)(vector)
                features = flat.reshape(-1, size, size, layer.before)
            assert features is not None
            if layer.attends:
                features = Attention(name=f"block{i}")(features)
            else:
                features = Block(layer, self.measure, name=f"block{i}")(features, vector)
        assert features is not None
        return features


class Block(nn.Module):
    """``x + f(x)``, with f of ``1x1 - 3x3 - 3x3 - 1x1`` at a quarter of the features.

    Before each convolution comes a conditional normalization and a rectifier. Twice the resolution
    is by repetition, before the first 3x3 and in the shortcut, which drops the last features where
    there are fewer behind.
    """

    layer: Layer
    measure: bool

    @nn.compact
    def __call__(self, x: Array, vector: Array) -> Array:
        """(B, h, w, before) and (B, D) to (B, h, w, after), or twice h and w."""
        inside = max(self.layer.before // _BOTTLENECK, 1)
        y = x
        for i, (width, size) in enumerate(
            ((inside, 1), (inside, 3), (inside, 3), (self.layer.after, 1))
        ):
            y = jax.nn.relu(Norm(True, self.measure, name=f"norm{i}")(y, vector))
            if i == 1 and self.layer.up:
                y = _repeated(y)
            y = Conv(width, size, name=f"conv{i}")(y)
        shortcut = x[..., : self.layer.after]
        return y + (_repeated(shortcut) if self.layer.up else shortcut)


class Attention(nn.Module):
    """Self-attention of all pixels to those of a map of half the side.

    References:
      Zhang et al. 2019 (arXiv 1805.08318), section 3; the paper, appendix B.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, h, w, C) to the same shape."""
        batch, height, width, channels = x.shape
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        query = Conv(narrow, 1, use_bias=False, name="query")(x)
        key = _pooled(Conv(narrow, 1, use_bias=False, name="key")(x))
        value = _pooled(Conv(half, 1, use_bias=False, name="value")(x))
        query, key, value = (y.reshape(batch, -1, y.shape[-1]) for y in (query, key, value))
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", query, key), axis=-1)
        seen = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(batch, height, width, half)
        gain = self.param("gain", nn.initializers.zeros, (), "float32")
        return x + gain * Conv(channels, 1, use_bias=False, name="out")(seen)


class Head(nn.Module):
    """Features to pixels: normalization, rectifier, 3x3 convolution, tanh."""

    channels: int
    measure: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, h, w, C) to (B, h, w, channels)."""
        y = jax.nn.relu(Norm(False, self.measure, name="norm")(x, None))
        return jnp.tanh(Conv(self.channels, 3, name="conv")(y))


class Norm(nn.Module):
    """``(x - mean) / sqrt(variance + 1e-4)`` by stored statistics, then a gain and an offset.

    Attributes:
      conditional: whether gain and offset are linear in a vector (the gain beside 1), or
        parameters of their own.
      measure: whether to measure the statistics on what comes in, keep and use them.
    """

    conditional: bool
    measure: bool

    @nn.compact
    def __call__(self, x: Array, vector: Array | None) -> Array:
        """(B, h, w, C) and (B, D) to (B, h, w, C)."""
        width = x.shape[-1]
        mean = self.variable("statistics", "mean", jnp.zeros, (width,), "float32")
        variance = self.variable("statistics", "variance", jnp.ones, (width,), "float32")
        if self.measure:
            mean.value, variance.value = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        y = x - mean.value[None, None, None]
        y = y * jax.lax.rsqrt(variance.value + EPS)[None, None, None]
        if self.conditional:
            gain = 1 + _dense(width, "gain")(vector)[:, None, None, :]
            offset = _dense(width, "offset")(vector)[:, None, None, :]
        else:
            gain = self.param("gain", nn.initializers.ones, (width,), "float32")[None, None, None]
            offset = self.param("offset", nn.initializers.zeros, (width,), "float32")
            offset = offset[None, None, None]
        return y * gain + offset


class Conv(nn.Module):
    """A convolution of odd size that keeps the resolution, as attacks differentiate it fast."""

    features: int
    size: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, h, w, C) to (B, h, w, features)."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _orthogonal, shape, "float32")
        half = self.size // 2
        y = (
            x @ kernel[0, 0]
            if not half
            else convolve(x, kernel, padding=((half, half), (half, half)))
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), "float32")
            y = y + bias[None, None, None]
        return y


def _dense(features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype="float32",
        param_dtype="float32",
        kernel_init=_orthogonal,
        name=name,
    )


def _repeated(x: Array) -> Array:
    """Twice the resolution, every pixel four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _pooled(x: Array) -> Array:
    """Half the resolution, the largest of four pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
