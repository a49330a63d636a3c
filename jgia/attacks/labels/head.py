"""The last layer's gradient, read out of whatever a client shared."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jgia.models import BatchNorm, Dense, GroupNorm, Pool, Victim, flatten_params
from jgia.observation import Observation, ThreatModel

PyTree = Any

_RECTIFIED = frozenset({"relu", "sigmoid"})
_SINGLE_PRECISION = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeadGradient:
    """``mean_i (p_i - y_i) f_i^T`` and ``mean_i (p_i - y_i)`` of B examples, as far as known.

    ``f_i`` are the features that enter the head, ``p_i`` the predicted probabilities, ``y_i`` the
    one-hot labels.

    Attributes:
      name: of the head's parameters.
      kernel: (d, K) gradient of the head's weights, or of its direction only (``scaled``).
      bias: (K,) gradient of its bias; ``None`` for a head without one.
      weights: (d, K) weights that were sent.
      offsets: (K,) bias that was sent; zeros without one.
      scaled: whether the gradient's length is known.
      single_step: whether all examples met the parameters that were sent, each with weight 1/B.
      progress: how far on the way from the sent to the returned parameters the gradients were
        taken, on average.
      noise: standard deviation of declared noise on every entry.
      tolerance: size below which an entry may be rounding, or declared noise.
      undefended: whether nothing but rounding and declared local training changed the gradient.
      nonnegative: whether features cannot be negative.
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray | None
    weights: np.ndarray
    offsets: np.ndarray
    scaled: bool
    single_step: bool
    progress: float
    noise: float
    tolerance: float
    undefended: bool
    nonnegative: bool

    @property
    def num_classes(self) -> int:
        """K."""
        return self.kernel.shape[1]


def head_name(victim: Victim) -> str:
    """The name of the last layer's parameters.

    Raises:
      ValueError: the model does not end in a fully connected layer without activation.
    """
    layers = victim.layers()
    last = layers[-1] if layers else None
    if not isinstance(last, Dense) or last.activation != "none":
        raise ValueError(
            f"labels are read off a last fully connected layer, and the model {victim.name!r} "
            "does not end in one; without it the labels must be searched with the images "
            "(labels='joint')."
        )
    return last.name


def nonnegative_features(victim: Victim) -> bool:
    """Whether what enters the head went through a rectifier or a sigmoid, and pooling at most."""
    for layer in reversed(victim.layers()[:-1]):
        if isinstance(layer, Pool | BatchNorm | GroupNorm):
            continue  # a normalization is described after its convolution, whose activation is last
        return layer.activation in _RECTIFIED
    return False


def read_head(observation: Observation) -> HeadGradient:
    """The head's part of an update as a mean gradient.

    FedSGD shares it. FedAvg shares ``-lr sum_t c_t g_t`` with the gradients ``g_t`` of the local
    steps: ``c_t = 1`` for SGD, ``c_t = (1 - m^(T - t + 1)) / (1 - m)`` for momentum ``m``. Divided
    by ``-lr sum_t c_t`` it is a mean over the steps. Where the learning rate or the number of steps
    is not known, and for Adam, it is ``-update``: a positive multiple, of unknown length (for Adam,
    of the right signs).

    Raises:
      ValueError: the model has no such head, its update is not visible, or it is zero or not
        finite.
    """
    victim, threat = observation.victim, observation.threat_model
    name = head_name(victim)
    update, sent = flatten_params(observation.update), flatten_params(observation.params)
    if f"{name}/kernel" not in update:
        observation.layer(name.partition("/")[0])  # says that it is not visible
        raise ValueError(f"the update has no array {name}/kernel, which the attack reads.")
    factor, scaled = _factor(threat)
    kernel = _array(update, f"{name}/kernel") * factor
    bias = _array(update, f"{name}/bias") * factor if f"{name}/bias" in update else None
    weights = _array(sent, f"{name}/kernel")
    offsets = _array(sent, f"{name}/bias") if f"{name}/bias" in sent else np.zeros(kernel.shape[1])
    largest = float(np.abs(kernel).max())
    if largest == 0.0 and (bias is None or not np.any(bias)):
        raise ValueError(
            f"the update of the head {name!r} is zero: it says nothing about labels. Was the head "
            "frozen, or does every example already have probability one?"
        )
    rounding = 8 * _SINGLE_PRECISION * largest
    if threat.protocol == "fedavg":  # the difference of parameters that are much larger
        rounding += 4 * _SINGLE_PRECISION * float(np.abs(weights).max()) * abs(factor)
    steps = threat.local_steps or 1
    noise = threat.noise_std * abs(factor)
    return HeadGradient(
        name=name,
        kernel=kernel,
        bias=bias,
        weights=weights,
        offsets=offsets,
        scaled=scaled,
        single_step=scaled and threat.local_steps == 1 and threat.num_clients == 1,
        progress=(steps - 1) / (2 * steps),
        noise=noise,
        tolerance=rounding + 8 * noise,
        undefended=threat.defense == "none",
        nonnegative=nonnegative_features(victim),
    )


def path_params(observation: Observation, fraction: float) -> PyTree:
    """Parameters on the straight way from those sent (0) to those the client returned (1).

    Layers whose update is not visible stay as they were sent. For FedSGD, always what was sent.
    """
    if fraction == 0.0 or observation.threat_model.protocol == "fedsgd":
        return observation.params
    moved = jax.tree.map(
        lambda start, change: start + np.asarray(fraction, start.dtype) * change,
        {name: observation.params[name] for name in observation.update},
        dict(observation.update),
    )
    return {**observation.params, **moved}


def _factor(threat: ThreatModel) -> tuple[float, bool]:
    """What turns the update into a mean gradient, and whether its size is known."""
    if threat.protocol == "fedsgd":
        return 1.0, True
    steps, rate = threat.local_steps, threat.local_learning_rate
    if steps is None or rate is None or threat.local_optimizer not in ("sgd", "momentum"):
        return -1.0, False
    total = float(steps)
    if threat.local_optimizer == "momentum":
        m = threat.local_momentum
        total = sum((1 - m ** (steps - t)) / (1 - m) for t in range(steps))
    return -1.0 / (rate * total), True


def _array(arrays: dict[str, Any], name: str) -> np.ndarray:
    array = np.asarray(arrays[name], np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"{name} has NaN or infinite entries; labels cannot be read off it. Check the client's "
            "training and export the update again."
        )
    return array
