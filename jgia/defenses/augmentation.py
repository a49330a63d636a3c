"""Random changes of the client's images before a gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks


def augment(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    *,
    policy: Sequence[str] = ("crop", "flip"),
    crop_padding: int = 4,
    jitter: float = 0.2,
) -> Float[Array, "batch height width channels"]:
    r"""Change every image at random, by a sequence of operations in pixel space.

    ==============  ===========================================================================
    operation       what it does to one image, with draws of its own
    ==============  ===========================================================================
    ``crop``        pads by ``crop_padding`` black pixels, cuts out the size at a uniform place
    ``flip``        mirrors left and right with probability 1/2
    ``rotate``      turns by 0, 90, 180 or 270 degrees, equally likely (square images)
    ``brightness``  adds a uniform draw from [-jitter, jitter], then clips to [0, 1]
    ``contrast``    scales around the image's mean by 1 + uniform [-jitter, jitter], then clips
    ``solarize``    inverts pixels above a uniform threshold from [0.5, 1]
    ==============  ===========================================================================

    Labels are untouched: choose operations that keep the class (``flip`` does not keep digits).

    Args:
      key: random key; every image and operation has draws of its own.
      images: (B, H, W, C) pixels in [0, 1].
      policy: operations, applied in this order; the same one may appear more than once.
      crop_padding: >= 0.
      jitter: in [0, 1).

    Returns:
      (B, H, W, C) pixels in [0, 1], of the same dtype.

    Raises:
      ValueError: an unknown operation, an option out of range, or ``rotate`` on images that are
        not square.

    Guarantees:
      Pixels stay in [0, 1]. An empty policy, and zero strength of ``crop``, ``brightness`` and
      ``contrast``, return the images as they are up to rounding. ``flip`` and ``rotate`` only move
      pixels. The result for an image depends on its place in the batch, not on other images.

    Edge cases:
      What leaks is the changed image, exactly: an attack that reads activations is not hindered,
      and what it returns, a flipped or shifted picture, is as private as the original while its
      PSNR against the original is low. Score against both, or look.

    >>> pixels = jnp.zeros((2, 4, 4, 1))
    >>> augment(jax.random.key(0), pixels, policy=("crop", "rotate"), crop_padding=1).shape
    (2, 4, 4, 1)

    References:
      Gao et al., "Privacy-preserving Collaborative Learning with Automatic Transformation Search"
      (CVPR 2021, arXiv 2011.12505): fixed sequences of such operations, found by search, as a
      defense. Departure: the sequence is given, not searched for.
    """
    _checks.at_least(0, crop_padding=crop_padding)
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must lie in [0, 1), got {jitter!r}.")
    for name in policy:
        _checks.one_of(_OPERATIONS, policy=name)
    if "rotate" in policy and images.shape[1] != images.shape[2]:
        raise ValueError(
            f"rotate needs square images, got {images.shape[1]} by {images.shape[2]}; leave it "
            "out of the policy."
        )
    for step, name in enumerate(policy):
        keys = jax.random.split(jax.random.fold_in(key, step), images.shape[0])
        strength = float(crop_padding) if name == "crop" else jitter
        images = jax.vmap(lambda k, x, f=_OPERATIONS[name], s=strength: f(k, x, s))(keys, images)
    return images


def _crop(key: PRNGKeyArray, image: Array, padding: float) -> Array:
    width = int(padding)
    padded = jnp.pad(image, ((width, width), (width, width), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * width + 1)
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def _flip(key: PRNGKeyArray, image: Array, _: float) -> Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _rotate(key: PRNGKeyArray, image: Array, _: float) -> Array:
    turns = [jnp.rot90(image, k) for k in range(4)]
    return jnp.stack(turns)[jax.random.randint(key, (), 0, 4)]


def _brightness(key: PRNGKeyArray, image: Array, jitter: float) -> Array:
    shift = jax.random.uniform(key, (), image.dtype, -jitter, jitter)
    return jnp.clip(image + shift, 0, 1)


def _contrast(key: PRNGKeyArray, image: Array, jitter: float) -> Array:
    factor = 1 + jax.random.uniform(key, (), image.dtype, -jitter, jitter)
    mean = jnp.mean(image)
    return jnp.clip(mean + factor * (image - mean), 0, 1)


def _solarize(key: PRNGKeyArray, image: Array, _: float) -> Array:
    threshold = jax.random.uniform(key, (), image.dtype, 0.5, 1)
    return jnp.where(image > threshold, 1 - image, image)


_OPERATIONS: dict[str, Callable[[PRNGKeyArray, Array, float], Array]] = {
    "crop": _crop,
    "flip": _flip,
    "rotate": _rotate,
    "brightness": _brightness,
    "contrast": _contrast,
    "solarize": _solarize,
}
