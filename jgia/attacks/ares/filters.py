"""The first layer: what is measured of every image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares.front import Front, capacity, num_equations, shift_bias
from jgia.attacks.ares.plan import direct_kernel, most_equations, signed_kernel
from jgia.config import AresOptions
from jgia.sparse import ConvOperator


def convolution_filters(
    key: Array, options: AresOptions, front: Front, inputs: Array
) -> tuple[np.ndarray, np.ndarray]:
    """The filters of the first convolution and their biases, as the options ask for them.

    Biases are zero, except where the layers average, or strides leave too few equations for the
    half that a rectifier keeps: there three of four features are shifted until they are positive
    for every image (:func:`~jgia.attacks.ares.front.shift_bias`), so that all their equations
    hold. The rest stays as it is, and tells mixtures.

    Args:
      key: PRNG key.
      options: see :class:`~jgia.config.AresOptions`.
      front: the layers in front of the imprint layer.
      inputs: (C, H, W, N) normalized public images.

    Returns:
      (kh, kw, C, F) and (F,).

    Raises:
      ValueError: a front end that convolutions do not have, or too few channels for it.
    """
    kernel = _filters(key, options, front, inputs)
    bias = np.zeros(kernel.shape[-1], np.float32)
    if options.front_end != "random":
        return kernel, bias
    unknowns = int(np.prod(front.input_shape))
    scarce = num_equations(front, kernel.shape[-1]) < 2 * unknowns and _strides(front)
    if front.averages or scarce:
        shifted = np.arange(len(bias)) % 4 != 3
        bias = np.where(shifted, shift_bias(front, kernel), 0).astype(np.float32)
    return kernel, bias


def _strides(front: Front) -> bool:
    return front.output_shape[:2] != front.input_shape[:2]


def _filters(key: Array, options: AresOptions, front: Front, inputs: Array) -> np.ndarray:
    num_in, size = front.input_shape[-1], front.first.kernel_size
    if options.front_end == "principal":
        raise ValueError(
            "the 'principal' front end is for multilayer perceptrons; a convolution sees one "
            "neighborhood at a time. Use front_end='random'."
        )
    num_passed = most_equations(front)
    needed = {"random": 1, "signed": 2 * num_in, "direct": num_in}[options.front_end]
    available = capacity(front) if options.front_end != "random" else num_passed
    if available < needed:
        raise ValueError(
            f"the {options.front_end!r} front end needs {needed} channels in every convolution, "
            f"the model passes {available}; use front_end='random'."
        )
    if options.front_end != "random" and (front.averages or min(size) % 2 == 0):
        raise ValueError(
            f"the {options.front_end!r} front end needs a center tap and no pooling; use "
            "front_end='random'."
        )
    if options.front_end == "signed":
        return signed_kernel(size, num_in, num_passed)
    if options.front_end == "direct":
        return direct_kernel(size, num_in, num_passed)
    draws = [
        unit_norm_filters(k, (*size, num_in, num_passed))
        for k in jax.random.split(key, options.front_end_trials)
    ]
    if len(draws) == 1 or min(size) % 2 == 0:
        return np.asarray(draws[0])
    probes = _central_crop(inputs[..., :48], 64)
    quality = [float(_conditioning(kernel, probes)) for kernel in draws]
    return np.asarray(draws[int(np.argmax(quality))])


def unit_norm_filters(key: Array, shape: tuple[int, ...]) -> Array:
    """Gaussian filters (kh, kw, C, F), each of Euclidean norm 1."""
    filters = jax.random.normal(key, shape, jnp.float32)
    return filters / jnp.sqrt(jnp.sum(filters**2, axis=(0, 1, 2), keepdims=True))


def _central_crop(planes: Array, side: int) -> Array:
    _, height, width, _ = planes.shape
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return planes[:, top : top + side, left : left + side]


@functools.partial(jax.jit)
def _conditioning(kernel: Array, inputs: Array) -> Array:
    """How well a filter bank determines images: a low quantile of local smallest eigenvalues.

    For every pixel of every public image, the smallest eigenvalue of the C x C diagonal block of
    ``M^T diag(active) M`` bounds the smallest eigenvalue of the whole operator from above. Its
    0.1 % quantile separates filter banks that leave dark or flat regions undetermined.
    """
    operator = ConvOperator(kernel)
    blocks = operator.pixel_blocks((operator.apply(inputs) > 0).astype(inputs.dtype))
    smallest = jnp.linalg.eigvalsh(jnp.moveaxis(blocks, (0, 1), (-2, -1)))[..., 0]
    return jnp.quantile(smallest, 1e-3)
