"""A recovered image sent through the network again: does it explain what was not solved for?"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares.candidates import Candidates
from jgia.attacks.ares.front import front_layers
from jgia.attacks.ares.passing import pass_through_params
from jgia.attacks.ares.plan import Plan
from jgia.models import Victim, flatten_params, unflatten_params

LARGEST_MISPREDICTION = 0.08
"""Single images, filled in by the sparse prior, mispredict the channels that were not solved for
by 0.4 to 3 % (CIFAR-10, 32 channels, 2 x 2 average pooling); mixtures by 18 % and more."""


def misprediction(
    candidates: Candidates, images: np.ndarray, plan: Plan, victim: Victim
) -> np.ndarray:
    """Relative error of the channels without a shift, predicted from the recovered image: (J,).

    Where features are shifted until they are always on, a mixture is an image as far as they can
    tell. Channels without the shift are rectified, and the rectified parts of two images do not
    add up to those of their mixture. Zero where the plan shifts nothing or everything.

    Args:
      candidates: the measured activations.
      images: (J, H, W, C) recovered pixels.
      plan: the plan.
      victim: the model; only its architecture and normalization matter.
    """
    measured = plan.measurement(victim)
    plain = ~measured.always_on
    if plan.dense or plain.all() or not plain.any() or not len(candidates):
        return np.zeros(len(candidates))
    params = front_params(victim, plan)
    pixels = np.clip(np.where(np.isfinite(images), images, 0), 0, 1).astype(np.float32)
    inputs = victim.normalization.normalize(jnp.asarray(pixels))
    seen = np.asarray(imprint_inputs(victim, plan.fc_name, params, inputs))
    seen = seen.reshape(*candidates.activations.shape[:3], -1)[..., : len(plan.channels)]
    error = (seen - candidates.activations)[..., plain]
    size = np.linalg.norm(candidates.activations[..., plain].reshape(len(seen), -1), axis=1)
    return np.linalg.norm(error.reshape(len(seen), -1), axis=1) / np.maximum(size, 1e-300)


def front_params(victim: Victim, plan: Plan) -> Any:
    """Parameters that make the plan's measurement; those behind it do not matter and are zero."""
    flat = {
        name: jnp.zeros(leaf.shape, jnp.float32)
        for name, leaf in flatten_params(victim.param_shapes()).items()
    }
    front = pass_through_params(victim, front_layers(victim), plan.kernel, plan.bias)
    return unflatten_params(flat | flatten_params(front))


@functools.partial(jax.jit, static_argnums=(0, 1))
def imprint_inputs(victim: Victim, fc_name: str, params: Any, inputs: Array) -> Array:
    """What enters the layer ``fc_name`` for normalized inputs (B, H, W, C): (B, features)."""
    seen: list[Array] = []

    def keep(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.name == fc_name and context.method_name == "__call__":
            seen.append(args[0])
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(keep):
        victim.apply(params, inputs)
    return seen[0]
