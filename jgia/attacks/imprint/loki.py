"""The LOKI idea on a built-in CNN: convolutions that pass the image on, then bins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares import fit_thresholds
from jgia.attacks.ares.calibrate import check_calibration, smoothed_bin_masses
from jgia.attacks.imprint.bins import attack_bins
from jgia.attacks.imprint.plan import ImprintPlan, image_matrix, refuse, with_layer
from jgia.config.imprint import ImprintOptions
from jgia.models import Conv, Dense, Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_NAME = "loki"


def check(victim: Victim) -> None:
    """Refuse a victim that is not convolutions, one fully connected layer, head.

    Raises:
      ValueError: the reason and what to choose.
    """
    _split(victim)


def craft(
    key: Array,
    victim: Victim,
    calibration: np.ndarray,
    *,
    options: ImprintOptions | None = None,
    num_examples: int = 32,
) -> tuple[PyTree, ImprintPlan]:
    """Identity kernels, and identical rows with increasing thresholds behind them.

    The fully connected layer sees ``max(x, 0)`` of the normalized image x. What is darker than the
    data set's mean is lost, unless inputs are not normalized.

    Args:
      key: PRNG key; decides the head.
      victim: convolutions of stride 1 without normalization or pooling, one fully connected layer
        with ReLU, a head.
      calibration: (N, H, W, C) public images in [0, 1], N >= 16.
      options: not used.
      num_examples: not used; bins do not depend on the batch.

    Returns:
      ``(params, plan)``.

    Raises:
      ValueError: the architecture cannot carry the attack or the calibration images do not fit.

    References:
      Zhao et al., "Loki: Large-scale Data Reconstruction Attack against Federated Learning through
      Model Manipulation" (IEEE S&P 2024, arXiv 2303.12233), section 4.

    Departures: kept are the identity kernels and the fully connected imprint. LOKI inserts them
    as a module of its own; here the model's own layers play the part and the architecture stays.
    Not kept: its HardTanh, which makes differences of neighbors unnecessary; the scaling factor
    and the separate kernels per client, which matter only under secure aggregation; and the
    thresholds learned over rounds, which are fitted to public images instead. The head is the one
    of ARES, since a constant one sends nothing back.
    """
    del options, num_examples
    convs, fc, head = _split(victim)
    public = check_calibration(calibration, victim)
    height, width, channels = victim.input_shape
    shapes = victim.param_shapes()
    params: dict[str, dict[str, Array]] = {}
    for conv in convs:
        kernel = np.zeros(shapes[conv.name]["kernel"].shape, np.float32)
        center = (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        kernel[(*center, range(channels), range(channels))] = 1
        params = with_layer(params, conv.name, kernel, np.zeros(conv.features))

    column = np.zeros((height, width, convs[-1].features))
    column[..., :channels] = 1 / (height * width * channels)
    features = np.maximum(image_matrix(victim, public), 0).mean(axis=1)
    thresholds = np.sort(fit_thresholds(features, fc.features).astype(np.float32))
    identical = jnp.broadcast_to(
        jnp.asarray(column.reshape(-1, 1), jnp.float32), (column.size, fc.features)
    )
    params[fc.name] = {"kernel": identical, "bias": -jnp.asarray(thresholds)}
    signs = np.where(np.arange(victim.num_classes) % 2 == 0, 1.0, -1.0)
    u = signs[np.asarray(jax.random.permutation(key, victim.num_classes))]
    rows = np.tile(u / fc.features, (fc.features, 1))
    params = with_layer(params, head.name, rows, np.zeros(victim.num_classes))
    masses = smoothed_bin_masses(features, thresholds.astype(np.float64))
    return params, ImprintPlan(method=_NAME, layer=fc.name, bin_masses=masses)


def attack(
    key: Array,
    observation: Observation,
    *,
    plan: ImprintPlan | None = None,
    options: ImprintOptions | None = None,
    noise_std: float = 0.0,
) -> Reconstruction:
    """Read the bins and keep what can be an image.

    Args:
      key: not used; the read-out is deterministic.
      observation: update, parameters that were sent, model, threat model.
      plan: from :func:`craft`; the parameters tell as much.
      options: see :class:`~jgia.config.imprint.ImprintOptions`.
      noise_std: noise that a defense is known to add to every gradient entry.

    Returns:
      A :class:`Reconstruction`, ordered by the precision of the read-out.

    Raises:
      ValueError: the architecture does not fit, the layer is not visible, or the threat model
        does not allow a malicious server.
    """
    del key, plan
    convs, fc, _ = _split(observation.victim)
    return attack_bins(
        observation,
        fc.name,
        options,
        method=_NAME,
        noise_std=noise_std,
        num_channels=convs[-1].features,
        rectified=True,
    )


def _split(victim: Victim) -> tuple[tuple[Conv, ...], Dense, Dense]:
    """Convolutions, fully connected layer, head; or a refusal with the reason."""
    layers = victim.layers()
    *front, fc, head = layers if len(layers) > 2 else (None, None, None)
    channels = victim.input_shape[2]
    remedy = "choose --model cnn without strides and pooling"
    convs = tuple(layer for layer in front if isinstance(layer, Conv))
    if not isinstance(fc, Dense) or not isinstance(head, Dense) or len(convs) != len(front):
        reason = "it is not convolutions, one fully connected layer and a head"
        raise refuse(_NAME, victim, reason, remedy)
    for layer in (*convs, fc):
        if layer.activation != "relu":
            raise refuse(_NAME, victim, f"layer {layer.name} has no ReLU", remedy)
    for conv in convs:
        if conv.stride != 1 or conv.pooled or conv.normalized:
            reason = f"layer {conv.name} strides, pools or is normalized"
            raise refuse(_NAME, victim, reason, remedy)
        if min(conv.kernel_size) % 2 == 0 or max(conv.kernel_size) % 2 == 0:
            raise refuse(_NAME, victim, f"layer {conv.name} has an even kernel", remedy)
        if conv.features < channels:
            reason = f"layer {conv.name} has fewer channels than the image's {channels}"
            raise refuse(_NAME, victim, reason, "widen it with --widths")
    if fc.features < 2:
        raise refuse(_NAME, victim, "bins need at least two neurons", "widen it with --fc-width")
    return convs, fc, head
