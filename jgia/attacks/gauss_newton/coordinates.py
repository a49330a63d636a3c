"""Images in the coordinates in which a Gaussian prior is standard normal."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jgia.risk import Prior


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Coordinates:
    """``x = mean + L' z`` for every image of a batch, ``z ~ N(0, I)``.

    Attributes:
      prior: of one image.
      shape: of the input: one image or a batch of them.
      whole: whether ``L`` is the symmetric root of ``factor' factor + tail_variance (I - P)``, d
        coordinates; otherwise the prior's rows, k of them.
    """

    prior: Prior
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    whole: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, prior: Prior, shape: tuple[int, ...]) -> Coordinates:
        """Those of a prior, for an input of a shape.

        Raises:
          ValueError: the input does not hold whole images of the prior's size.
        """
        size = 1
        for n in shape:
            size *= n
        if size == 0 or size % prior.num_inputs:
            raise ValueError(
                f"the input's shape {shape} must hold one or more images of the prior's "
                f"{prior.num_inputs} pixel values; make the prior of images of that shape."
            )
        whole = prior.factor is not None and float(prior.tail_variance) > 0
        return cls(prior=prior, shape=tuple(shape), whole=whole)

    @property
    def count(self) -> int:
        """Images."""
        size = 1
        for n in self.shape:
            size *= n
        return size // self.prior.num_inputs

    @property
    def per_image(self) -> int:
        """Coordinates of one image, k."""
        return self.prior.num_inputs if self.whole else self.prior.rank

    @property
    def size(self) -> int:
        """Coordinates in all."""
        return self.count * self.per_image

    def offset(self, z: Float[Array, " size"]) -> Float[Array, ...]:
        """``L' z`` in the input's shape: linear."""
        rows = z.reshape(self.count, self.per_image)
        factor = self.prior.factor
        if factor is None:
            moved = jnp.sqrt(self.prior.variance) * rows
        elif not self.whole:
            moved = rows @ factor
        else:
            lengths = jnp.linalg.norm(factor, axis=1)
            basis = factor / jnp.maximum(lengths, jnp.finfo(factor.dtype).tiny)[:, None]
            rest = jnp.sqrt(self.prior.tail_variance)
            moved = rest * rows + ((rows @ basis.T) * (lengths - rest)[None]) @ basis
        return moved.reshape(self.shape)

    def images(self, z: Float[Array, " size"]) -> Float[Array, ...]:
        """``mean + L' z`` in the input's shape."""
        mean = jnp.tile(self.prior.mean, self.count).reshape(self.shape)
        return mean + self.offset(z)
