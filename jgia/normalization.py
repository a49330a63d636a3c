"""Normalization as one object that client and attacker share."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Per-channel affine map between pixels in [0, 1] and model inputs: ``(x - mean) / std``.

    One object serves the client, the attack and the scorer, so that an image cannot be
    normalized with one data set's statistics and de-normalized with another's.

    Attributes:
      mean: one value per channel, in pixel units ([0, 1]).
      std: one positive value per channel, in pixel units.

    >>> norm = Normalization((0.5,), (0.25,))
    >>> float(norm.normalize(jnp.ones((1, 1, 1)))[0, 0, 0])
    2.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                "mean and std need one value per channel each, "
                f"got {len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}.")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"std must be positive and finite, got {self.std}.")

    @property
    def num_channels(self) -> int:
        """Number of image channels this normalization is for."""
        return len(self.mean)

    def normalize(self, images: ArrayLike) -> Array:
        """Pixels in [0, 1], shape (..., C), to model inputs of the same shape."""
        x = jnp.asarray(images)
        mean, std = self._constants(x)
        return (x - mean) / std

    def denormalize(self, inputs: ArrayLike) -> Array:
        """Model inputs, shape (..., C), back to pixels (not clipped)."""
        x = jnp.asarray(inputs)
        mean, std = self._constants(x)
        return x * std + mean

    def _constants(self, x: Array) -> tuple[Array, Array]:
        if x.shape[-1:] != (self.num_channels,):
            raise ValueError(
                f"images must have {self.num_channels} channels in their last axis (NHWC), "
                f"got shape {x.shape}."
            )
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (
            jnp.asarray(self.mean, x.dtype).reshape(shape),
            jnp.asarray(self.std, x.dtype).reshape(shape),
        )

    @classmethod
    def identity(cls, num_channels: int) -> Normalization:
        """Leave pixels as they are, in [0, 1]."""
        return cls((0.0,) * num_channels, (1.0,) * num_channels)

    @classmethod
    def fit(cls, images: np.ndarray) -> Normalization:
        """Channel means and standard deviations of pixels (N, H, W, C) in [0, 1].

        A constant channel gets std 1, so that normalizing stays defined.
        """
        flat = np.asarray(images, np.float64).reshape(-1, images.shape[-1])
        std = flat.std(axis=0)
        return cls(
            tuple(float(m) for m in flat.mean(axis=0)),
            tuple(float(s) if s > 1e-6 else 1.0 for s in std),
        )
