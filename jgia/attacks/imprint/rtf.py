"""Robbing the Fed: a linear block put in front of the model reads images bin by bin."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from jgia.attacks.ares import fit_thresholds
from jgia.attacks.ares.calibrate import check_calibration, smoothed_bin_masses
from jgia.attacks.imprint.bins import attack_bins
from jgia.attacks.imprint.plan import ImprintPlan, image_matrix, refuse, with_layer
from jgia.config.imprint import ImprintOptions
from jgia.models import Dense, Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_NAME = "rtf"


def check(victim: Victim) -> None:
    """Refuse a victim without an imprint block in front.

    Raises:
      ValueError: the reason and what to choose.
    """
    _block(victim)


def craft(
    key: Array,
    victim: Victim,
    calibration: np.ndarray,
    *,
    options: ImprintOptions | None = None,
    num_examples: int = 32,
) -> tuple[PyTree, ImprintPlan]:
    """Fill the imprint block; the model behind it keeps random benign values.

    Every row of the block's first layer is the mean ``1/d``, its biases ``-t_j`` are quantiles of
    the mean of public images. Its second layer has identical columns, so that all neurons of an
    example receive the same back-propagated signal; the image that it passes on is one random
    pattern, as bright as the number of thresholds below the example's mean.

    Args:
      key: PRNG key.
      victim: a model with an :class:`~jgia.models.imprint_block.ImprintBlock` in front.
      calibration: (N, H, W, C) public images in [0, 1], N >= 16.
      options: not used.
      num_examples: not used; bins do not depend on the batch.

    Returns:
      ``(params, plan)``.

    Raises:
      ValueError: there is no such block or the calibration images do not fit.

    References:
      Fowl et al., "Robbing the Fed: Directly Obtaining Private Data in Federated Learning with
      Modified Models" (ICLR 2022, arXiv 2110.13057), section 4.

    Departures: thresholds are fitted to public images as those of ARES are, so that the two differ
    in what they read only. **The block changes the architecture**, which ARES does not need.
    """
    del options, num_examples
    imprint, restore = _block(victim)
    inputs = image_matrix(victim, check_calibration(calibration, victim))
    key_params, key_pattern = jax.random.split(key)
    size = inputs.shape[1]
    kernel = np.full((size, imprint.features), 1 / size)
    features = inputs @ kernel[:, 0]
    thresholds = np.sort(fit_thresholds(features, imprint.features).astype(np.float32))
    bias = -thresholds.astype(np.float64)

    passed = np.maximum(features[:, None] + bias[None, :], 0).mean(axis=1)
    pattern = np.asarray(jax.random.normal(key_pattern, (size,)), np.float64)
    pattern = pattern / max(float(passed.std()), 1e-12)
    params = with_layer(victim.init(key_params), imprint.name, kernel, bias)
    params = with_layer(
        params,
        restore.name,
        np.tile(pattern / imprint.features, (imprint.features, 1)),
        -pattern * passed.mean(),
    )
    masses = smoothed_bin_masses(features, thresholds.astype(np.float64))
    return params, ImprintPlan(method=_NAME, layer=imprint.name, bin_masses=masses)


def attack(
    key: Array,
    observation: Observation,
    *,
    plan: ImprintPlan | None = None,
    options: ImprintOptions | None = None,
    noise_std: float = 0.0,
) -> Reconstruction:
    """Read the block's bins and keep what can be an image.

    Args:
      key: not used; the read-out is deterministic.
      observation: update, parameters that were sent, model, threat model.
      plan: from :func:`craft`; the parameters tell as much.
      options: see :class:`~jgia.config.imprint.ImprintOptions`.
      noise_std: noise that a defense is known to add to every gradient entry.

    Returns:
      A :class:`Reconstruction`, ordered by the precision of the read-out.

    Raises:
      ValueError: there is no such block, its update is not visible, or the threat model does not
        allow a malicious server.
    """
    del key
    victim = observation.victim
    return attack_bins(
        observation,
        plan.layer if plan is not None else _block(victim)[0].name,
        options,
        method=_NAME,
        noise_std=noise_std,
        num_channels=victim.input_shape[2],
        rectified=False,
    )


def _block(victim: Victim) -> tuple[Dense, Dense]:
    """The block's two layers: image to bins, and bins to something of an image's size."""
    layers = victim.layers()
    size = int(np.prod(victim.input_shape))
    if len(layers) > 2:
        first, second = layers[:2]
        if (
            isinstance(first, Dense)
            and isinstance(second, Dense)
            and first.activation == "relu"
            and (second.features, second.activation) == (size, "none")
            and first.features >= 2
        ):
            return first, second
    raise refuse(
        "rtf",
        victim,
        f"it has no imprint block in front (a fully connected layer with ReLU on the image, and "
        f"one back to its {size} values)",
        "choose a model that has one, --model imprint_mlp or imprint_cnn",
    )
