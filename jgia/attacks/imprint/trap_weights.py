"""Trap weights: rows with mostly negative outputs, which few examples get past."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from jgia.attacks.ares.calibrate import check_calibration
from jgia.attacks.imprint.independent_rows import attack_rows
from jgia.attacks.imprint.plan import ImprintPlan, first_dense, with_layer
from jgia.config.imprint import ImprintOptions
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_NAME = "trap_weights"
_LARGEST_SCALE = 0.99  # at 1 a one-colored image would be on by rounding alone


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
    """Trap the first layer; the others keep random benign values.

    Of each row, a random half of the weights is ``-|z|`` with normal z, the other half ``s`` times
    the same magnitudes in another order. On pixels in [0, 1] the negative half usually wins, so
    the row is on only for the rare example that is bright where its weights are positive.

    Args:
      key: PRNG key.
      victim: a multilayer perceptron (or a model with an imprint block, whose first layer is
        taken).
      calibration: (N, H, W, C) public images in [0, 1], N >= 16. They choose s, unless
        ``options.trap_scale`` gives it: a row is on for a public image with probability
        ``1 / num_examples``.
      options: see :class:`~jgia.config.imprint.ImprintOptions`.
      num_examples: batch size that the server expects.

    Returns:
      ``(params, plan)``.

    Raises:
      ValueError: the architecture cannot carry the attack or the calibration images do not fit.

    References:
      Boenisch et al., "When the Curious Abandon Honesty: Federated Learning Is Not Private"
      (EuroS&P 2023, arXiv 2112.02918), algorithm 1.

    Departures: weights act on pixels, not on normalized inputs, for which they were made: the
    normalization, which the server knows, is undone in weights and bias. The scale is chosen on
    public images. Weights are divided by the square root of their number, which changes no ratio.
    """
    layer = first_dense(_NAME, victim)
    options = options or ImprintOptions()
    public = check_calibration(calibration, victim).reshape(len(calibration), -1)
    size = public.shape[1]
    if size < 2:
        raise ValueError("trap_weights needs images of at least two values, half of them negative.")
    key_params, key_size, key_order = jax.random.split(key, 3)
    magnitudes = np.abs(np.asarray(jax.random.normal(key_size, (layer.features, size // 2))))
    rest = np.zeros((layer.features, size % 2))
    signed = np.concatenate([-magnitudes, magnitudes, rest], axis=1, dtype=np.float32)
    # NumPy shuffles fifty million weights in a second, XLA sorts them in minutes.
    order = np.random.default_rng(np.asarray(jax.random.bits(key_order, (4,), "uint32")))
    weights = order.permuted(signed, axis=1).T
    negative, positive = np.maximum(-weights, 0), np.maximum(weights, 0)
    scale = options.trap_scale
    if scale is None:
        # On for scales above this.
        needed = (public @ negative) / np.maximum(public @ positive, 1e-12)
        scale = min(_LARGEST_SCALE, float(np.quantile(needed, 1 / max(2, num_examples))))
    rows = (scale * positive - negative).astype(np.float64) / np.sqrt(size)
    std = np.tile(np.asarray(victim.normalization.std, np.float64), size // victim.input_shape[2])
    mean = np.tile(np.asarray(victim.normalization.mean, np.float64), size // victim.input_shape[2])
    params = with_layer(victim.init(key_params), layer.name, rows * std[:, None], mean @ rows)
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
