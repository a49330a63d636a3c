"""The gradient of a client that adapts its noise to what the gradient reveals of its batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jgia.config import DefenseConfig
from jgia.config.defense import ADAPTIVE
from jgia.defenses._tree import leaf_keys
from jgia.defenses.adaptive_scale import scale_for_target
from jgia.defenses.shaped import shaped_noise
from jgia.models.convolutions import patch_convolutions
from jgia.risk import _spectra
from jgia.risk.jacobian import gram as release_gram
from jgia.risk.shaping import covariance_factor, shaped_covariance

PyTree = Any

LARGEST = 8192
"""Pixels of a batch, B H W C, whose square Gram matrix is still formed."""

_CHUNK = 16


class AdaptiveStats(NamedTuple):
    """What an adaptive defense declares.

    Attributes:
      noise_std: root mean square over the entries of the standard deviation of the additive noise;
        0 for noise on the input.
    """

    noise_std: Float[Array, ""]


def check_adaptive(names: Sequence[str], protocol: str, num_pixels: int) -> None:
    """Raise ``ValueError`` where an adaptive defense among ``names`` cannot do its work.

    It needs one gradient as a function of the batch and, but for ``input_noise``, a Gram matrix.
    """
    for name in ADAPTIVE:
        if name in names and protocol != "fedsgd":
            raise ValueError(
                f"{name} adapts to one gradient as a function of the batch, got the protocol "
                f"{protocol!r}; choose fedsgd, or gaussian noise on what is shared."
            )
        if name in names and name != "input_noise" and num_pixels > LARGEST:
            raise ValueError(
                f"{name} forms a square matrix over all pixels of the batch and takes at most "
                f"{LARGEST} of them, got {num_pixels}; lower the batch or the image size, or use "
                "input_noise."
            )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def adaptive_gradient(
    name: str,
    config: DefenseConfig,
    loss: Any,
    key: PRNGKeyArray,
    params: PyTree,
    images: Float[Array, "batch height width channels"],
    labels: Array,
    loss_key: PRNGKeyArray,
) -> tuple[PyTree, AdaptiveStats]:
    """The mean gradient of a batch under ``adaptive_scale``, ``shaped`` or ``input_noise``.

    The release is ``x -> grad loss(params, x, labels)`` with labels and the loss's own draws fixed;
    the prior is ``prior_std^2 I`` on pixels and the target ``target_error`` of its energy. The Gram
    matrix is the private one. Singular values that rounding hides count as that of the rounding,
    not as zero, where the gradient has at least as many entries as the batch has pixels: an
    attacker without rounding errors would see them. ``noise_rounds`` releases of the same images
    tell as much as one with noise of that part of the variance: the variance is that many times
    larger.
    """

    def fn(pixels: Array) -> PyTree:
        with patch_convolutions():
            return jax.grad(loss)(params, pixels, labels, loss_key)

    variance = config.prior_std**2
    zero = jnp.zeros((), images.dtype)
    if name == "input_noise":
        std = input_noise_std(config)
        draw = jax.random.normal(key, images.shape, images.dtype)
        return fn(images + std * draw), AdaptiveStats(zero)
    target = config.target_error * images.size * variance
    gradient = fn(images)
    size = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    gram = release_gram(fn, images, chunk_size=_CHUNK)
    if name == "adaptive_scale":
        values = jnp.linalg.eigvalsh(gram)
        sigma = jnp.sqrt(jnp.maximum(values, _least(values) if size >= images.size else 0.0))
        scale = scale_for_target(sigma, variance, target) * config.noise_rounds**0.5

        def noisy(leaf: Array, leaf_key: PRNGKeyArray) -> Array:
            draw = jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
            return leaf + scale.astype(leaf.dtype) * draw

        shared = jax.tree.map(noisy, gradient, leaf_keys(key, gradient))
        return shared, AdaptiveStats(scale)
    factor, gram = _shape(config, images, gram, lift=size >= images.size)
    made = shaped_noise(key, fn, images, factor, gram=gram, floor=config.noise_floor)
    std = jnp.sqrt(made.energy / size + jnp.square(made.floor_std))
    return jax.tree.map(jnp.add, gradient, made.noise), AdaptiveStats(std)


def input_noise_std(config: DefenseConfig) -> float:
    """Standard deviation of ``input_noise`` per pixel.

    Every pixel's error ``s^2 xi / (s^2 + xi)`` after ``noise_rounds`` releases of variance ``xi
    noise_rounds`` is ``target_error s^2``, whatever the image.
    """
    share = config.target_error / (1 - config.target_error)
    return config.prior_std * (share * config.noise_rounds) ** 0.5


def shaped_covariance_of(
    config: DefenseConfig, fn: Any, images: Array, num_outputs: int
) -> tuple[Float[Array, "d d"], Float[Array, ""]]:
    """What ``shaped`` declares at these images: the factor F in input space, and the floor.

    Args:
      config: its knobs.
      fn: the gradient as a function of the images.
      images: the batch.
      num_outputs: entries of the gradient.

    Returns:
      F, with noise of covariance ``J F F' J' + floor_std^2 I`` on the gradient, and ``floor_std``.
    """
    gram = release_gram(fn, images, chunk_size=_CHUNK)
    factor, gram = _shape(config, images, gram, lift=num_outputs >= images.size)
    energy = jnp.maximum(jnp.sum(factor * (gram @ factor)), 0)
    return factor, jnp.sqrt(config.noise_floor * energy / num_outputs)


def _shape(
    config: DefenseConfig, images: Array, gram: Array, *, lift: bool
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """The factor of the covariance in input space, and the Gram matrix that it is made of."""
    variance = config.prior_std**2
    target = config.target_error * images.size * variance
    if lift:
        gram = gram + 2 * _least(jnp.linalg.eigvalsh(gram)) * jnp.eye(len(gram), dtype=gram.dtype)
    covariance = shaped_covariance(gram, variance, target, shape=config.noise_shape)
    return covariance_factor(config.noise_rounds * covariance), gram


def _least(values: Array) -> Array:
    """The eigenvalue below which rounding hides the rest."""
    return _spectra.rank_tolerance(values.dtype, values.size) * jnp.max(values)
