"""What trap weights and quantile biases share: independent rows, each hoping for one example."""

from __future__ import annotations

import numpy as np

from jgia.attacks.imprint.plan import ImprintPlan, first_dense, image_matrix
from jgia.attacks.imprint.readout import read_rows
from jgia.attacks.imprint.verdict import as_candidates, judge
from jgia.config.imprint import ImprintOptions
from jgia.observation import Observation, Reconstruction

_MARGIN = 1e-4  # of a row's output scale: float32 may see it on either side of zero


def attack_rows(
    observation: Observation,
    plan: ImprintPlan | None,
    options: ImprintOptions | None,
    *,
    method: str,
    noise_std: float,
) -> Reconstruction:
    """Ratios of the first layer's gradients, tested against its own weights."""
    if observation.threat_model.server != "malicious":
        raise ValueError(
            f"{method} needs a server that chooses the parameters it sends "
            "(ThreatModel(server='malicious')); the observation is of an honest-but-curious one."
        )
    victim = observation.victim
    layer = plan.layer if plan is not None else first_dense(method, victim).name
    kernel = np.asarray(observation.params[layer]["kernel"], np.float64)
    bias = np.asarray(observation.params[layer]["bias"], np.float64)
    read = read_rows(observation, layer, noise_std=noise_std)
    outputs = np.einsum("jd,dj->j", read.inputs, kernel[:, read.neurons]) + bias[read.neurons]
    norms = np.linalg.norm(kernel, axis=0)
    slack = (_MARGIN * np.linalg.norm(read.inputs, axis=1) + 6 * read.noise) * norms[read.neurons]
    consistent = outputs > -slack

    def turned_on(images: np.ndarray) -> np.ndarray:
        inputs = image_matrix(victim, images)
        margin = _MARGIN * np.linalg.norm(inputs, axis=1)[:, None] * norms[None, :]
        return inputs @ kernel + bias[None, :] > margin

    return judge(
        as_candidates(read, victim, consistent),
        options or ImprintOptions(),
        method=method,
        turned_on=turned_on,
    )
