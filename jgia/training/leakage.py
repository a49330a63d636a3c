"""What a gradient tells of its image, as a term of the training loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, PRNGKeyArray

from jgia.config.training import TrainOptions
from jgia.data import Dataset
from jgia.models import Victim, batch_norm_names
from jgia.risk import UpdateRelease, differentiable_invloss

PyTree = Any
_MOST_IMAGES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakageTerm:
    r"""``weight (1 - InvLoss / E0)``, the recoverable fraction, as a mean over a few images.

    InvLoss is that of the FedSGD gradient of a single image under Gaussian noise and an isotropic
    prior (:func:`jgia.risk.differentiable_invloss`, iterative): nothing of the size of a Jacobian
    is formed.

    Attributes:
      weight: of the fraction in the loss.
      noise_std: tau, absolute.
      prior_variance: s^2, of a pixel in [0, 1].
      num_images: of every batch whose gradient is considered.
      num_probes: random directions for each of them.
      num_iterations: of conjugate gradients for each of those.
    """

    weight: float
    noise_std: float
    prior_variance: float
    num_images: int
    num_probes: int
    num_iterations: int

    def fraction(
        self,
        key: PRNGKeyArray,
        victim: Victim,
        params: PyTree,
        images: Float[Array, "batch height width channels"],
        labels: Integer[Array, " batch"],
    ) -> Float[Array, ""]:
        """The estimated fraction of the images' energy that the best attack recovers.

        Args:
          key: random key of the probes.
          victim: a model without batch normalization.
          params: what it is differentiable in.
          images: pixels in [0, 1]; the first ``num_images`` are considered.
          labels: their classes.
        """
        release = UpdateRelease(victim=victim)
        energy = self.prior_variance * np.prod(victim.input_shape).item()

        def one(key: Array, image: Array, label: Array) -> Array:
            return differentiable_invloss(
                lambda p, x: release(p, x, label),
                params,
                image,
                noise_std=self.noise_std,
                prior_variance=self.prior_variance,
                key=key,
                num_probes=self.num_probes,
                num_iterations=self.num_iterations,
                method="iterative",
            )

        count = min(self.num_images, images.shape[0])
        losses = jax.vmap(one)(jax.random.split(key, count), images[:count], labels[:count])
        return 1 - losses.mean() / energy


def leakage_term(options: TrainOptions, victim: Victim, dataset: Dataset) -> LeakageTerm | None:
    """The term that the options ask for; ``None`` where its weight is 0.

    Raises:
      ValueError: the victim normalizes by batches: a gradient then has no image of its own.
    """
    if options.risk_weight == 0:
        return None
    if batch_norm_names(victim):
        raise ValueError(
            "risk_weight estimates what the gradient of one image tells, and batch normalization "
            "mixes the images of a batch; take --norm group, or a model without."
        )
    pixels, _ = dataset.take(np.arange(min(len(dataset), _MOST_IMAGES)))
    variance = float(pixels.var(axis=0).mean())
    if variance == 0:
        raise ValueError("all training images are the same: there is nothing that could leak.")
    return LeakageTerm(
        weight=options.risk_weight * options.risk_every,
        noise_std=options.risk_noise_std,
        prior_variance=variance,
        num_images=options.risk_images,
        num_probes=options.risk_probes,
        num_iterations=options.risk_iterations,
    )
