"""What leaves a client, as one differentiable function of its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jgia import _checks
from jgia.models import Victim
from jgia.models.convolutions import patch_convolutions
from jgia.observation import ThreatModel
from jgia.replay import simulated_update

PyTree = Any
_HONEST = ThreatModel(server="honest_but_curious")


Release = Callable[[PyTree, Array, Array], PyTree]
"""From parameters, images and labels to what is shared: any pytree of floating-point arrays.

Compiled functions take a release as a static argument: give a function that lives as long as the
analysis, or a frozen dataclass with ``__call__``, such as the two below.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRelease:
    r"""The update of a client: a gradient, or the parameter difference of local training.

    ``G(x) = grad L(theta; x, y)`` (FedSGD; the mean over the images for a batch) or ``theta_T(x) -
    theta_0`` (FedAvg with known steps and learning rate), of the visible layers, clipped to
    ``clip_norm`` where that is set: ``g min(1, c / ||g||)``. Batch normalization is computed as
    the victim's mode says (:func:`jgia.models.with_batch_norm`): with the batch's own statistics in
    ``"train"``.

    Attributes:
      victim: the model.
      threat_model: protocol, local training and visible layers; what it says of knowledge other
        than the labels' does not matter here.
      clip_norm: largest Euclidean norm of the update, or ``None``.

    Raises:
      ValueError: FedAvg without steps or learning rate (the release is not known then).
    """

    victim: Victim
    threat_model: ThreatModel = _HONEST
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            _checks.positive(clip_norm=self.clip_norm)
        threat = self.threat_model
        if threat.protocol == "fedavg" and None in (
            threat.local_steps,
            threat.local_learning_rate,
        ):
            raise ValueError(
                "the release of a FedAvg client needs local_steps and local_learning_rate: risk "
                "is a property of what the client computes, whatever the attacker is told."
            )

    def __call__(
        self,
        params: PyTree,
        images: Float[Array, "*batch height width channels"],
        labels: Shaped[Array, "*classes"],
        /,
    ) -> PyTree:
        """The update of one image (H, W, C) in [0, 1], or of a batch of them.

        Args:
          params: the parameters that were sent.
          images: pixels; one image or (B, H, W, C).
          labels: an integer class (or (B,) of them), or probabilities with one more axis.
        """
        if images.ndim == 3:
            images, labels = images[None], labels[None]
        inputs = self.victim.normalization.normalize(images)
        with patch_convolutions():
            update = simulated_update(self.victim, params, inputs, labels, self.threat_model)
        if self.clip_norm is None:
            return update
        norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(update)))
        scale = jnp.where(norm > self.clip_norm, self.clip_norm / norm, 1)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRelease:
    """The output of one layer: what a party of vertical or split learning sends.

    ``G(x) = h_theta(x)``, before the layer's activation function. Labels play no part.

    Attributes:
      victim: the bottom model.
      layer: name of a layer of the victim, such as ``"fc1"`` or ``"block1/conv1"``.
    """

    victim: Victim
    layer: str

    def __call__(
        self,
        params: PyTree,
        images: Float[Array, "*batch height width channels"],
        labels: Shaped[Array, "*classes"] | None = None,
        /,
    ) -> Array:
        """The embedding of one image (H, W, C) in [0, 1], or of a batch of them, per image.

        Raises:
          ValueError: the victim has no such layer.
        """
        del labels
        single = images.ndim == 3
        inputs = self.victim.normalization.normalize(images[None] if single else images)
        path = tuple(self.layer.split("/"))

        def is_layer(module: nn.Module, method: str) -> bool:
            return module.path == path and method == "__call__"

        with patch_convolutions():
            _, kept = self.victim.module.apply(
                {"params": params}, inputs, capture_intermediates=is_layer
            )
        found: Any = dict(kept).get("intermediates", {})
        for name in path:
            if name not in found:
                raise ValueError(
                    f"the victim has no layer {self.layer!r}; its layers with parameters are "
                    f"{', '.join(sorted(params))}."
                )
            found = found[name]
        output = found["__call__"][0]
        return output[0] if single else output


def function_of_image(release: Release, params: PyTree, labels: Array) -> Callable[[Array], PyTree]:
    """The release as a function of the image alone, for everything that takes ``fn`` and ``x``.

    >>> fn = function_of_image(lambda params, x, y: params * x, jnp.ones(()), jnp.zeros((), int))
    >>> fn(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    return lambda images: release(params, images, labels)
