"""Read candidate activations out of the fully connected layer's gradient."""

from __future__ import annotations

import numpy as np

from jgia import _checks
from jgia.attacks.ares.candidates import Candidates, measured_candidates
from jgia.attacks.ares.first_layer import read_first_layer
from jgia.attacks.ares.plan import Plan, attackable_layers
from jgia.attacks.coarseness import coarseness
from jgia.config import FirstLayer
from jgia.observation import Observation

_EPS = float(np.finfo(np.float32).eps)
_ROWS_PER_CHUNK = 16384


def leak(
    observation: Observation,
    plan: Plan,
    *,
    noise_std: float = 0.0,
    first_layer: FirstLayer = "joint",
) -> Candidates:
    """Forward differences of neighboring neurons' gradients, in float64 on the host.

    ``h_j = (G_j - G_{j+1}) / (g_j - g_{j+1})`` and ``h_{K-1} = G_{K-1} / g_{K-1}`` with G and g
    the gradients of the layer's weights and biases: examples with ``t_j < q <= t_{j+1}``
    contribute to the difference, all others cancel. Scale-free, so a FedAvg difference and any
    learning rate do as well as a gradient, up to the rounding of the trained parameters: where
    that leaves the scale of an activation open, the bin it fell into bounds it.

    Behind a fully connected first layer that layer's own gradient is read as well
    (:mod:`jgia.attacks.ares.first_layer`).

    Args:
      observation: what the server holds after the round.
      plan: from :func:`craft` or :func:`read_plan`, for the parameters in the observation.
      noise_std: standard deviation of noise that a defense is known to add to every entry; the
        read-out estimates it from the empty bins when it is larger than told.
      first_layer: how the gradient of a fully connected first layer is read: ``"joint"``,
        ``"ratio"`` or ``"ignore"``.

    Returns:
      :class:`Candidates`; possibly none.

    Raises:
      ValueError: the update's fully connected layer is not visible or does not fit the plan.
    """
    _checks.non_negative(noise_std=noise_std)
    weight_gradient, bias_gradient, num_features = _imprint_gradient(observation, plan)
    height, width, num_passed = plan.query.shape
    g = bias_gradient.astype(np.float64)[plan.order]
    differences = g - np.append(g[1:], 0.0)
    weight_rounding, bias_rounding = _parameter_rounding(observation, plan)
    coarse = coarseness(weight_gradient)
    told = float(np.hypot(noise_std, coarse.lost_std(bias_gradient)))
    gradient_noise = _gradient_noise(differences, told, bias_rounding)
    weight_noise = max(gradient_noise, float(np.hypot(noise_std, coarse.lost_std(weight_gradient))))
    rounding = 32 * _EPS * float(np.abs(g).max(initial=0.0))
    floor = max(rounding, 4 * np.sqrt(2) * float(np.hypot(gradient_noise, bias_rounding)))
    kept = np.flatnonzero(np.abs(differences) > floor)

    activations = np.empty((len(kept), height * width, num_passed))
    largest = np.zeros(len(kept))
    rows = weight_gradient.reshape(height * width, num_features, plan.num_bins)[:, :num_passed]
    pixels = max(1, _ROWS_PER_CHUNK // num_passed)
    for start in range(0, height * width, pixels):
        chunk = slice(start, start + pixels)
        upper, lower = _neighbors(rows[chunk], plan.order, kept)
        largest = np.maximum(largest, np.abs(upper).max(axis=(0, 1), initial=0.0))
        ratio = (upper - lower) / differences[kept]
        activations[:, chunk] = np.moveaxis(ratio, -1, 0)

    typical = np.sqrt(np.mean(activations**2, axis=(1, 2)))
    noise = _readout_noise(largest, differences[kept], typical, weight_noise, gradient_noise)
    noise += np.sqrt(2) * weight_rounding / np.abs(differences[kept])
    scale_error = np.sqrt(2) * bias_rounding / np.abs(differences[kept])
    candidates = measured_candidates(
        plan,
        activations.reshape(-1, height, width, num_passed),
        bins=kept,
        signals=differences[kept],
        noise=noise,
        scale_error=scale_error,
        signal_floor=floor,
    )
    if not plan.dense:
        return candidates
    return read_first_layer(observation, plan, candidates, first_layer)


def _imprint_gradient(observation: Observation, plan: Plan) -> tuple[np.ndarray, np.ndarray, int]:
    """Weight and bias gradient of the imprint layer, and how many features enter it per pixel."""
    if plan.fc_name not in observation.update:
        raise ValueError(
            f"the update does not show layer {plan.fc_name!r}, which ARES reads; it shows "
            f"{', '.join(sorted(observation.update)) or 'nothing'}."
        )
    height, width, _ = plan.query.shape
    layer = observation.update[plan.fc_name]
    weights, biases = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    num_features = attackable_layers(observation.victim).num_inputs
    expected = (height * width * num_features, plan.num_bins)
    if weights.shape != expected or biases.shape != expected[1:]:
        raise ValueError(
            f"the update's layer {plan.fc_name!r} has shapes {weights.shape} and "
            f"{biases.shape}, the plan reads {expected} and {expected[1:]}; was it made "
            "with another model?"
        )
    return weights, biases, num_features


def _parameter_rounding(observation: Observation, plan: Plan) -> tuple[float, float]:
    """Standard deviations of what rounding trained parameters adds to a FedAvg difference.

    Every local step rounds the parameters: an error of up to half a unit in the last place of
    the *parameter*, however small the update. For weights and for biases.
    """
    if observation.threat_model.protocol != "fedavg":
        return 0.0, 0.0
    eps = float(np.finfo(observation.params[plan.fc_name]["bias"].dtype).eps)
    unit = eps * float(np.sqrt((observation.threat_model.local_steps or 1) / 12))
    return unit * float(np.abs(plan.query).max()), unit * float(np.abs(plan.thresholds).max())


def _gradient_noise(differences: np.ndarray, noise_std: float, rounding: float) -> float:
    """Standard deviation of noise on one gradient entry, declared or seen in the empty bins.

    Most bins are empty, so the median absolute difference is a robust estimate (zero in the
    noise-free case). Where most bins are occupied it would measure signal; then it is not used,
    nor where the rounding of parameters explains it.
    """
    seen = float(np.median(np.abs(differences))) / 0.6745 / np.sqrt(2)
    if seen < 3 * rounding:
        seen = 0.0
    if 4 * np.sqrt(2) * seen > 0.2 * float(np.abs(differences).max(initial=0.0)):
        seen = 0.0
    return max(seen, noise_std)


def _neighbors(
    rows: np.ndarray, order: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of neurons order[j] and order[j + 1] (zero past the last), float64."""
    upper = rows[..., order[kept]].astype(np.float64)
    lower = np.zeros_like(upper)
    inner = kept < len(order) - 1
    lower[..., inner] = rows[..., order[kept[inner] + 1]]
    return upper, lower


def _readout_noise(
    largest: np.ndarray,
    signals: np.ndarray,
    typical: np.ndarray,
    weight_noise: float,
    bias_noise: float,
) -> np.ndarray:
    """Standard deviation of a candidate's entries, from rounding and from noise.

    Rounding of a float32 sum of size G costs about eps * |G| before the division. Noise s on
    every weight's gradient and r on every bias's costs ``sqrt(2) sqrt(s^2 + r^2 h^2) / |signal|``
    (first-order propagation through the ratio).
    """
    rounding = _EPS * largest
    added = np.sqrt(2) * np.hypot(weight_noise, bias_noise * typical)
    return (rounding + added) / np.abs(signals)
