"""Ratios of a linear layer's gradients, in float64 on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jgia.attacks.coarseness import coarseness
from jgia.observation import Observation

_EPS = float(np.finfo(np.float32).eps)


class ReadOut(NamedTuple):
    """What one layer's gradient says about its inputs, one candidate per row or bin.

    Attributes:
      inputs: (J, d) the layer's input if the row or bin belongs to one example.
      neurons: (J,) the neuron; of a bin, the one with the smaller threshold.
      noise: (J,) estimated standard deviation of an entry of ``inputs``.
    """

    inputs: np.ndarray
    neurons: np.ndarray
    noise: np.ndarray


def read_rows(observation: Observation, layer: str, *, noise_std: float = 0.0) -> ReadOut:
    """``x_i = (dL/dW_i) / (dL/db_i)`` of every neuron whose bias gradient is not zero.

    ``dL/dW_i = sum_n delta_{n,i} x_n`` and ``dL/db_i = sum_n delta_{n,i}`` over the examples that
    turn neuron i on: of one example the ratio is the example, and its loss, its label, the batch
    size and the learning rate cancel.

    Args:
      observation: what the server holds.
      layer: the fully connected layer.
      noise_std: standard deviation of noise known to be on every entry.

    References:
      Boenisch et al. (2023, arXiv 2112.02918), eq. 4; Geiping et al. (2020, arXiv 2003.14053),
      proposition 3.1.
    """
    weights, biases = _gradients(observation, layer)
    of_weights, of_biases = _noise_stds(observation, layer, noise_std)
    floor = max(4 * of_biases, _EPS**2 * _largest(biases))
    neurons = np.flatnonzero(np.abs(biases) > floor)
    inputs = weights[:, neurons].T.astype(np.float64) / biases[neurons, None]
    largest = np.abs(weights[:, neurons]).max(axis=0, initial=0.0)
    noise = _noise(largest, biases[neurons], inputs, of_weights, of_biases)
    return ReadOut(inputs, neurons, noise)


def read_bins(observation: Observation, layer: str, *, noise_std: float = 0.0) -> ReadOut:
    """Differences of neighbors: ``x_j = (G_j - G_{j+1}) / (g_j - g_{j+1})``, by threshold.

    Neurons share one row and are on above increasing thresholds ``-b_j``, so that the examples
    between two thresholds are what two neighbors' gradients differ by. The last neuron has no
    neighbor: its own ratio.

    Args:
      observation: what the server holds.
      layer: the fully connected layer with identical rows.
      noise_std: standard deviation of noise known to be on every entry.

    References:
      Fowl et al., "Robbing the Fed" (ICLR 2022, arXiv 2110.13057), eq. 5 and 6.
    """
    weights, biases = _gradients(observation, layer)
    order = np.argsort(-np.asarray(observation.params[layer]["bias"], np.float64), kind="stable")
    g = biases[order]
    signals = g - np.append(g[1:], 0.0)
    of_weights, of_biases = np.sqrt(2) * _noise_stds(observation, layer, noise_std)
    kept = np.flatnonzero(np.abs(signals) > max(32 * _EPS * _largest(g), 4 * of_biases))
    upper = weights[:, order[kept]].astype(np.float64)
    lower = np.zeros_like(upper)
    inner = kept < len(order) - 1
    lower[:, inner] = weights[:, order[kept[inner] + 1]]
    inputs = ((upper - lower) / signals[kept]).T
    largest = np.abs(upper).max(axis=0, initial=0.0)
    noise = _noise(largest, signals[kept], inputs, of_weights, of_biases)
    return ReadOut(inputs, order[kept], noise)


def _gradients(observation: Observation, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight gradient (d, K) as it came, and bias gradient (K,) in float64."""
    update = observation.layer(layer)
    weights, biases = np.asarray(update["kernel"]), np.asarray(update["bias"])
    expected = observation.params[layer]["kernel"].shape
    if weights.shape != expected or biases.shape != expected[1:]:
        raise ValueError(
            f"the update's layer {layer!r} has shapes {weights.shape} and {biases.shape}, the "
            f"parameters' {expected} and {expected[1:]}; was it made with another model?"
        )
    return weights, biases.astype(np.float64)


def _parameter_rounding(observation: Observation, layer: str) -> float:
    """Standard deviation of what rounding of trained parameters adds to a FedAvg difference."""
    if observation.threat_model.protocol != "fedavg":
        return 0.0
    params = observation.params[layer]
    largest = max(_largest(params["kernel"]), _largest(params["bias"]))
    return _EPS * largest * float(np.sqrt((observation.threat_model.local_steps or 1) / 12))


def _noise_stds(observation: Observation, layer: str, told: float) -> np.ndarray:
    """Of weight and bias gradients: noise that is known, and precision that visibly was lost."""
    weights, biases = _gradients(observation, layer)
    rounding, coarse = _parameter_rounding(observation, layer), coarseness(weights)
    lost = np.array([coarse.lost_std(weights), coarse.lost_std(biases)])
    return np.hypot(lost, np.hypot(told, rounding))


def _noise(
    largest: np.ndarray,
    signals: np.ndarray,
    inputs: np.ndarray,
    of_weights: float,
    of_biases: float,
) -> np.ndarray:
    """First-order error of a ratio: rounding of its sums, and noise on both its parts."""
    typical = np.sqrt(np.mean(inputs**2, axis=1)) if len(inputs) else np.zeros(0)
    added = np.hypot(of_weights, of_biases * typical)
    return (_EPS * largest + added) / np.abs(signals)


def _largest(values: ArrayLike) -> float:
    return float(np.abs(np.asarray(values)).max(initial=0.0))
