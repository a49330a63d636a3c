"""The layers of StyleGAN2: equalized learning rates, weight modulation, polyphase resampling."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgia.models.convolutions import convolve

EPS = 1e-8
_GAIN = math.sqrt(2)
_SLOPE = 0.2


def activate(x: Array) -> Array:
    """``sqrt(2)`` times the leaky rectifier of slope 0.2, which about keeps second moments."""
    return jax.nn.leaky_relu(x, _SLOPE) * _GAIN


def normalize_second_moment(x: Array) -> Array:
    """Divide by the root mean square over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)


def upsample(x: Array) -> Array:
    """Twice the resolution of (B, h, w, C), by the filter [1, 3, 3, 1] / 4 along each side.

    The two phases of the interpolated signal, zeros beyond the borders:
    ``y[2i] = x[i-1] / 4 + 3 x[i] / 4`` and ``y[2i+1] = 3 x[i] / 4 + x[i+1] / 4``.
    """
    for axis in (1, 2):
        before, after = _shifted(x, axis, 1), _shifted(x, axis, -1)
        phases = jnp.stack([before / 4 + 3 * x / 4, 3 * x / 4 + after / 4], axis=axis + 1)
        shape = list(x.shape)
        shape[axis] *= 2
        x = phases.reshape(shape)
    return x


def downsample(x: Array) -> Array:
    """Half the resolution, by the filter [1, 3, 3, 1] / 8: the adjoint of :func:`upsample`, / 4."""
    for axis in (1, 2):
        shape = list(x.shape)
        shape[axis : axis + 1] = [shape[axis] // 2, 2]
        pairs = x.reshape(shape)
        even, odd = (jnp.take(pairs, phase, axis=axis + 1) for phase in (0, 1))
        x = (_shifted(odd, axis, 1) + 3 * even + 3 * odd + _shifted(even, axis, -1)) / 8
    return x


def upsampling_conv(x: Array, kernel: Array) -> Array:
    """Transposed 3x3 convolution of stride 2, then the filter [1, 3, 3, 1] / 4 along each side.

    The four phases of the transposed convolution are one 2x2 convolution at the low resolution.

    Args:
      x: (B, h, w, C).
      kernel: (3, 3, C, F).

    Returns:
      (B, 2 h, 2 w, F).
    """
    phases = jnp.asarray(_UP_PHASES, kernel.dtype)
    small = jnp.einsum("tpk,uql,klif->tuipqf", phases, phases, kernel)
    features = kernel.shape[-1]
    small = small.reshape(2, 2, x.shape[-1], -1)
    # By patches on CPU: XLA is slow at the gradient to a 2x2 kernel, and four patches are few.
    y = convolve(x, small, padding=((1, 1), (1, 1)), vmapped=True)
    batch, height, width, _ = y.shape
    y = y.reshape(batch, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, 2 * height, 2 * width, features)  # its last row and column are zeros
    for axis in (1, 2):
        y = _filtered(y, axis, before=1, after=0) / 4
    return y


def downsampling_conv(x: Array, kernel: Array) -> Array:
    """The filter [1, 3, 3, 1] / 8 along each side, then a 3x3 convolution of stride 2.

    One 2x2 convolution of the four phases at the low resolution.

    Args:
      x: (B, 2 h, 2 w, C).
      kernel: (3, 3, C, F).

    Returns:
      (B, h, w, F).
    """
    for axis in (1, 2):
        x = _filtered(x, axis, before=2, after=3) / 8
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    phases = jnp.asarray(_DOWN_PHASES, kernel.dtype)
    small = jnp.einsum("tpk,uql,klif->tupqif", phases, phases, kernel)
    return convolve(x, small.reshape(2, 2, 4 * channels, -1), vmapped=True)


# Along one side, which entry k of a kernel joins tap t and phase p: y[2i] = K2 x[i-1] + K0 x[i] and
# y[2i+1] = K1 x[i] on the way up; y[i] = K0 x[2i] + K1 x[2i+1] + K2 x[2i+2] on the way down.
_UP_PHASES = (((0, 0, 1), (0, 0, 0)), ((1, 0, 0), (0, 1, 0)))
_DOWN_PHASES = (((1, 0, 0), (0, 1, 0)), ((0, 0, 1), (0, 0, 0)))


def _filtered(x: Array, axis: int, *, before: int, after: int) -> Array:
    """Correlation with [1, 3, 3, 1] along an axis, after zeros were added at its ends."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    x = jnp.pad(x, pads)
    length = x.shape[axis] - 3
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(4))
    return a + 3 * (b + c) + d


def _shifted(x: Array, axis: int, by: int) -> Array:
    """``x[i - by]`` along an axis, zeros moving in."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (by, 0) if by > 0 else (0, -by)
    kept = jax.lax.slice_in_dim(x, max(0, -by), x.shape[axis] - max(0, by), axis=axis)
    return jnp.pad(kept, pads)


class Dense(nn.Module):
    """``x W + b`` with weights of unit variance, scaled where they are used.

    Attributes:
      features: outputs.
      rate: factor on the learning rate (``lr_mul``): weights are drawn as much larger and scaled
        down again.
      bias: initial value of the bias, before ``rate``.

    References:
      Equalized learning rate: Karras et al. 2018 (arXiv 1710.10196), section 4.1.
    """

    features: int
    rate: float = 1.0
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(..., C) to (..., features)."""
        fan_in = x.shape[-1]
        kernel = self.param(
            "kernel", nn.initializers.normal(1 / self.rate), (fan_in, self.features)
        )
        start = nn.initializers.constant(self.bias / self.rate)
        bias = self.param("bias", start, (self.features,))
        kernel, bias = (jnp.asarray(p, x.dtype) for p in (kernel, bias))
        y = x @ (kernel * (self.rate / math.sqrt(fan_in)))
        return y + jnp.reshape(bias * self.rate, (1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """An odd convolution at an equalized learning rate.

    Attributes:
      features: output channels.
      size: side of the kernel.
      use_bias: whether there is a bias.
      down: whether to halve the resolution (:func:`downsampling_conv`).
    """

    features: int
    size: int = 3
    use_bias: bool = True
    down: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, h, w, C) to (B, h, w, features), or half of h and w."""
        kernel = _kernel(self, x, self.features, self.size)
        y = downsampling_conv(x, kernel) if self.down else _same(x, kernel)
        if self.use_bias:
            y = y + _bias(self, y)
        return y


class ModulatedConv(nn.Module):
    """A convolution whose input channels a style scales, and whose output channels it may restore.

    With style ``s = A w + b``: ``y_o = d_o sum_i W_io * (s_i x_i)`` and
    ``d_o = 1 / sqrt(sum_ikl (s_i W_iokl)^2 + 1e-8)``: the same as modulating and demodulating the
    weights, with one set of weights for the whole batch.

    Attributes:
      features: output channels.
      size: side of the kernel.
      demodulate: whether to divide by the expected deviation.
      up: whether to double the resolution (:func:`upsampling_conv`).

    References:
      Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020, arXiv
      1912.04958), eqs. 1-3.
    """

    features: int
    size: int = 3
    demodulate: bool = True
    up: bool = False

    @nn.compact
    def __call__(self, x: Array, style: Array) -> Array:
        """(B, h, w, C) and (B, D) to (B, h, w, features)."""
        scale = Dense(x.shape[-1], bias=1.0, name="affine")(style)
        kernel = _kernel(self, x, self.features, self.size)
        convolution = upsampling_conv if self.up else _same
        y = convolution(x * jnp.asarray(scale, x.dtype)[:, None, None, :], kernel)
        if self.demodulate:
            energy = jnp.sum(jnp.square(jnp.asarray(kernel, scale.dtype)), axis=(0, 1))
            restore = jax.lax.rsqrt(jnp.square(scale) @ energy + EPS)
            y = y * jnp.asarray(restore, y.dtype)[:, None, None, :]
        return y


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise of a learned strength, bias, :func:`activate`."""

    features: int
    up: bool = False

    @nn.compact
    def __call__(self, x: Array, style: Array, noise: Array) -> Array:
        """(B, h, w, C), (B, D) and (B, h, w, 1) to (B, h, w, features), or twice h and w."""
        y = ModulatedConv(self.features, up=self.up, name="conv")(x, style)
        strength = self.param("noise_strength", nn.initializers.zeros, ())
        y = y + jnp.asarray(strength, y.dtype) * jnp.asarray(noise, y.dtype)
        return activate(y + _bias(self, y))


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, noise or activation."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, style: Array) -> Array:
        """(B, h, w, C) and (B, D) to (B, h, w, channels)."""
        y = ModulatedConv(self.channels, size=1, demodulate=False, name="conv")(x, style)
        return y + _bias(self, y)


def _kernel(module: nn.Module, x: Array, features: int, size: int) -> Array:
    shape = (size, size, x.shape[-1], features)
    kernel = module.param("kernel", nn.initializers.normal(1.0), shape)
    return jnp.asarray(kernel / math.sqrt(size * size * x.shape[-1]), x.dtype)


def _bias(module: nn.Module, y: Array) -> Array:
    bias = module.param("bias", nn.initializers.zeros, (y.shape[-1],))
    return jnp.asarray(bias, y.dtype)[None, None, None, :]


def _same(x: Array, kernel: Array) -> Array:
    half = kernel.shape[0] // 2
    if not half:  # a product of matrices; the gradient to a 1x1 kernel of few channels is slow
        return x @ kernel[0, 0]
    return convolve(x, kernel, padding=((half, half), (half, half)))
