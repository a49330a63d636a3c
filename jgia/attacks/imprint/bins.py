"""What Robbing the Fed and LOKI share: identical rows and increasing thresholds."""

from __future__ import annotations

import numpy as np

from jgia.attacks.imprint.readout import ReadOut, read_bins
from jgia.attacks.imprint.verdict import as_candidates, judge
from jgia.config.imprint import ImprintOptions
from jgia.observation import Observation, Reconstruction


def attack_bins(
    observation: Observation,
    layer: str,
    options: ImprintOptions | None,
    *,
    method: str,
    noise_std: float,
    num_channels: int,
    rectified: bool,
) -> Reconstruction:
    """Differences of neighbors, tested against the bin that the candidate itself falls into.

    Args:
      observation: what the server holds.
      layer: the layer with identical rows.
      options: thresholds of the tests.
      method: for messages.
      noise_std: noise known to be on every entry.
      num_channels: of the layer's input (H, W, num_channels), whose first ones are the image's.
      rectified: the layer sees the positive part of the image only; a pixel at zero stands for
        everything below, which is nothing if inputs are not normalized.
    """
    if observation.threat_model.server != "malicious":
        raise ValueError(
            f"{method} needs a server that chooses the parameters it sends "
            "(ThreatModel(server='malicious')); the observation is of an honest-but-curious one."
        )
    victim = observation.victim
    read = read_bins(observation, layer, noise_std=noise_std)
    consistent = _in_own_bin(observation, layer, read)
    height, width, channels = victim.input_shape
    images = read.inputs.reshape(-1, height, width, num_channels)[..., :channels]
    inputs = images.reshape(len(images), height * width * channels)
    candidates = as_candidates(read._replace(inputs=inputs), victim, consistent)
    if rectified:
        darker = np.greater(np.asarray(victim.normalization.mean, np.float64), 0.0)
        open_ = (images <= 6 * read.noise[:, None, None, None]) & darker[None, None, None, :]
        candidates = candidates._replace(determined=1 - open_.mean(axis=(1, 2, 3)))
    return judge(candidates, options or ImprintOptions(), method=method)


def _in_own_bin(observation: Observation, layer: str, read: ReadOut) -> np.ndarray:
    """Whether ``t_j < <w, x_j> <= t_{j+1}`` up to noise: (J,)."""
    kernel = observation.params[layer]["kernel"]
    row = np.asarray(kernel[:, 0], np.float64)
    thresholds = -np.asarray(observation.params[layer]["bias"], np.float64)
    order = np.argsort(thresholds, kind="stable")
    position = np.argsort(order)[read.neurons]
    edges = np.append(thresholds[order], np.inf)
    q = read.inputs @ row
    slack = 1e-4 * np.abs(q) + 6 * read.noise * np.linalg.norm(row)
    return (q > edges[position] - slack) & (q <= edges[position + 1] + slack)
