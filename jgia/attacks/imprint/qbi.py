"""Quantile-based bias initialization: random rows, each on for one example in the batch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from jgia.attacks.ares import qbi_bias
from jgia.attacks.ares.calibrate import check_calibration
from jgia.attacks.imprint.independent_rows import attack_rows
from jgia.attacks.imprint.plan import ImprintPlan, first_dense, image_matrix, with_layer
from jgia.config.imprint import ImprintOptions
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_NAME = "qbi"


def check(victim: Victim) -> None:
    """Refuse a victim whose first layer is not fully connected with ReLU.

    Raises:
      ValueError: the reason and what to choose.
    """
    first_dense(_NAME, victim)


def craft(
    key: Array,
    victim: Victim,
    calibration: np.ndarray,
    *,
    options: ImprintOptions | None = None,
    num_examples: int = 32,
) -> tuple[PyTree, ImprintPlan]:
    """Normal rows and one bias for all; the other layers keep random benign values.

    With rows ``w ~ N(0, I/d)`` and the bias ``Phi^{-1}(1/B) |x| / sqrt(d)`` a row is on for x with
    probability 1/B, which maximizes the chance that it isolates one of B examples.

    Args:
      key: PRNG key.
      victim: a multilayer perceptron (or a model with an imprint block, whose first layer is
        taken).
      calibration: (N, H, W, C) public images in [0, 1], N >= 16, for the size of an input.
      options: not used.
      num_examples: batch size B that the server expects; of 1, as of 2, half of the rows are on.

    Returns:
      ``(params, plan)``.

    Raises:
      ValueError: the architecture cannot carry the attack or the calibration images do not fit.

    References:
      Nowak et al., "QBI: Quantile-Based Bias Initialization for Efficient Private Data
      Reconstruction in Federated Learning" (2024, arXiv 2406.18745), eq. 3.

    Departures: rows are divided by the square root of d, which changes no ratio; inputs that are
    not standardized are measured on public images (for standardized ones ``|x|^2 = d``). The
    refinement PAIRS, which draws rows again on auxiliary images, is left out.
    """
    del options
    layer = first_dense(_NAME, victim)
    inputs = image_matrix(victim, check_calibration(calibration, victim))
    key_params, key_rows = jax.random.split(key)
    size = inputs.shape[1]
    rows = np.asarray(jax.random.normal(key_rows, (size, layer.features)), np.float64)
    typical = np.sqrt(np.mean(inputs**2))  # |x| / sqrt(d); 1 for standardized inputs
    bias = qbi_bias(size, max(2, num_examples)) / np.sqrt(size) * typical
    params = with_layer(
        victim.init(key_params),
        layer.name,
        rows / np.sqrt(size),
        np.full(layer.features, bias),
    )
    return params, ImprintPlan(method=_NAME, layer=layer.name)


def attack(
    key: Array,
    observation: Observation,
    *,
    plan: ImprintPlan | None = None,
    options: ImprintOptions | None = None,
    noise_std: float = 0.0,
) -> Reconstruction:
    """Read every row's ratio and keep what can be an image.

    Args:
      key: not used; the read-out is deterministic.
      observation: update, parameters that were sent, model, threat model.
      plan: from :func:`craft`; the parameters tell as much.
      options: see :class:`~jgia.config.imprint.ImprintOptions`.
      noise_std: noise that a defense is known to add to every gradient entry.

    Returns:
      A :class:`Reconstruction`, ordered by how many rows gave an image.

    Raises:
      ValueError: the architecture does not fit, the layer is not visible, or the threat model
        does not allow a malicious server.
    """
    del key
    return attack_rows(observation, plan, options, method=_NAME, noise_std=noise_std)
