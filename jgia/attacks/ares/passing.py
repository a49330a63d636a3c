"""Parameters that make every layer in front of the fully connected one pass a measurement."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares.front import Front, checked_bias, checked_kernel, route_of
from jgia.attacks.ares.route import all_units
from jgia.models import BatchNorm, Victim, flatten_params, unflatten_params

PyTree = Any
_EPS = float(np.finfo(np.float32).eps)
_BATCH_NORM_GAIN = 1024  # activations this much larger than a mean to subtract: see _gains


def pass_through_params(
    victim: Victim, front: Front, kernel: np.ndarray, bias: np.ndarray | None = None
) -> PyTree:
    """Parameters of all layers in front of the fully connected one.

    The first convolution gets the filters. Later ones pass: at stride 1 the center tap from
    channel i to channel i; at stride s one tap for each of the s x s places that the stride
    would skip, into channels of their own, as far as there are channels. Residual blocks are
    switched off, and the shortcut passes; where it projects with a stride, the branch, whose
    kernel has the taps, passes and the shortcut is switched off. Batch normalizations are
    undone by their own scale and bias. Rectifiers are harmless behind the first: nothing is
    negative any more.

    Args:
      victim: the model; its architecture is what ``front`` describes.
      front: from :func:`front_layers`.
      kernel: (kh, kw, C, F) filters of the first layer.
      bias: (F,) their biases; zeros when left out.

    Returns:
      Nested float32 parameters of the layers in ``front``, in the shapes of ``victim``.

    Guarantees: with the returned parameters, the fully connected layer's input is what
      :func:`measurement` says, to the rounding of one float32 sum per layer.

    Raises:
      ValueError: kernel or bias do not fit the first layer.
    """
    kernel = checked_kernel(front, kernel)
    bias = checked_bias(kernel, bias)
    route = route_of(front, kernel.shape[-1])
    shapes = flatten_params(victim.param_shapes())
    flat: dict[str, Array] = {}
    for conv, norm in all_units(front.layers):
        full = np.zeros(shapes[f"{conv.name}/kernel"].shape, np.float64)
        shift = np.zeros(conv.features, np.float64)
        if conv is front.first:
            used = kernel.shape[-1]
            full[..., :used] = kernel
            shift[:used] = bias
        else:
            source, a, b = route.taps[conv.name].T
            used = len(source)
            full[a, b, source, np.arange(used)] = 1
        if norm is not None:
            gain = _gains(norm, conv.features)
            full *= gain
            scale, offset = _undone(norm, gain, used)
            flat[f"{norm.name}/scale"] = jnp.asarray(scale, jnp.float32)
            # Behind the first layer what is off must stay off: rounding may not lift a zero.
            rounding = 0.0 if conv is front.first else 4 * _EPS * np.abs(offset)
            flat[f"{norm.name}/bias"] = jnp.asarray(offset - rounding + shift, jnp.float32)
            shift = np.zeros_like(shift)
        flat[f"{conv.name}/kernel"] = jnp.asarray(full, jnp.float32)
        if f"{conv.name}/bias" in shapes:
            flat[f"{conv.name}/bias"] = jnp.asarray(shift, jnp.float32)
    return unflatten_params(flat)


def _gains(norm: BatchNorm, features: int) -> np.ndarray:
    """Powers of two that make activations large beside the mean that is subtracted from them.

    Subtracting a mean and adding it back rounds to the digits of the mean. Scaled up before, and
    down by the normalization's scale, activations keep their own.
    """
    mean = np.abs(np.asarray(norm.mean or (0.0,) * features))
    return np.where(mean > 0, 2.0 ** np.ceil(np.log2(np.maximum(_BATCH_NORM_GAIN * mean, 1))), 1.0)


def _undone(norm: BatchNorm, gain: np.ndarray, used: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias that make the normalization divide by ``gain``; unused channels give 0."""
    mean = np.asarray(norm.mean or (0.0,) * len(gain))
    var = np.asarray(norm.var or (1.0,) * len(gain))
    on = np.arange(len(gain)) < used
    return np.where(on, np.sqrt(var + norm.epsilon) / gain, 0), np.where(on, mean / gain, 0)
