"""An observation's arrays in float64 on the host, with the size of the rounding in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jgia.attacks.analytic.chain import Stage
from jgia.models import flatten_params
from jgia.observation import Observation


class LayerArrays(NamedTuple):
    """One layer: what was sent, and what came back.

    Attributes:
      kernel: the weights.
      bias: (F,) zeros for a layer without.
      kernel_update: the weights' update, of the same shape.
      bias_update: (F,) or ``None`` for a layer without bias.
    """

    kernel: np.ndarray
    bias: np.ndarray
    kernel_update: np.ndarray
    bias_update: np.ndarray | None

    @property
    def finite(self) -> bool:
        """Whether every entry is."""
        return all(np.isfinite(array).all() for array in self if array is not None)


def precision(observation: Observation) -> float:
    """The unit roundoff of the update: of its coarsest array."""
    leaves = flatten_params(observation.update).values()
    return max(float(np.finfo(np.asarray(leaf).dtype).eps) for leaf in leaves)


def rounding(observation: Observation) -> dict[str, float]:
    """Standard deviation of the rounding in every array of the update, by name.

    A gradient carries that of its own sums. A FedAvg difference also carries the rounding of the
    trained parameters, which are much larger than their change.
    """
    eps = precision(observation)
    params = flatten_params(observation.params)
    trained = observation.threat_model.protocol == "fedavg"
    found = {}
    for name, leaf in flatten_params(observation.update).items():
        parameter = float(np.abs(np.asarray(params[name])).max(initial=0.0)) if trained else 0.0
        own = float(np.abs(np.asarray(leaf)).max(initial=0.0))
        found[name] = float(np.hypot(eps * own, eps * parameter / np.sqrt(12)))
    return found


def noise(observation: Observation) -> dict[str, float]:
    """:func:`rounding` and the noise of a defense that the attacker is told, by name."""
    told = observation.threat_model.noise_std
    return {name: float(np.hypot(own, told)) for name, own in rounding(observation).items()}


def read_layer(observation: Observation, stage: Stage) -> LayerArrays:
    """One layer's arrays.

    Raises:
      ValueError: the layer's update is not visible, or its arrays are not those of the model.
    """
    name = stage.layer.name
    top, *rest = name.split("/")
    update: Any = observation.layer(top)
    params: Any = observation.params[top]
    for part in rest:
        update, params = update[part], params[part]
    kernel = np.asarray(params["kernel"], np.float64)
    bias = np.asarray(params["bias"], np.float64) if "bias" in params else None
    kernel_update = np.asarray(update["kernel"], np.float64)
    bias_update = np.asarray(update["bias"], np.float64) if bias is not None else None
    expected = _kernel_shape(stage)
    if kernel.shape != expected or kernel_update.shape != expected:
        raise ValueError(
            f"the kernel of layer {name!r} must have shape {expected} as the model describes it, "
            f"got {kernel.shape} and {kernel_update.shape} in its update; was it made with another "
            "model?"
        )
    if bias is not None and bias_update is not None and bias_update.shape != expected[-1:]:
        raise ValueError(
            f"the bias update of layer {name!r} must have shape {expected[-1:]}, got "
            f"{bias_update.shape}; was it made with another model?"
        )
    return LayerArrays(
        kernel, np.zeros(expected[-1]) if bias is None else bias, kernel_update, bias_update
    )


def perturbed(
    arrays: LayerArrays, kernel_std: float, bias_std: float, rng: np.random.Generator
) -> LayerArrays:
    """The same layer with normal noise on what came back."""
    bias = arrays.bias_update
    return arrays._replace(
        kernel_update=arrays.kernel_update
        + kernel_std * rng.standard_normal(arrays.kernel_update.shape),
        bias_update=None if bias is None else bias + bias_std * rng.standard_normal(bias.shape),
    )


def _kernel_shape(stage: Stage) -> tuple[int, ...]:
    sides = getattr(stage.layer, "kernel_size", ())
    return (*sides, stage.input_shape[-1], stage.layer.features)
