"""What the server remembers of its crafted parameters, and how to read it off any parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jgia.attacks.ares.front import Front, front_layers, num_equations
from jgia.attacks.ares.measurement import Measurement, measurement
from jgia.models import BatchNorm, Conv, Dense, Victim, flatten_params
from jgia.sparse import DenseOperator

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The measurement that a set of parameters makes of every example.

    Attributes:
      front_end: ``"random"``, ``"signed"``, ``"direct"``, or ``"unknown"`` when read off
        parameters that were not crafted here.
      kernel: the first layer, restricted to the F features that reach the imprint layer:
        (kh, kw, C, F) of a convolution, (H * W * C, F) of a fully connected layer.
      bias: (F,) its bias.
      channels: (F',) the first-layer feature that each channel at the imprint layer's input
        carries; strides spread one feature over several channels.
      query: (H', W', F') weights of the query feature q = <query, activation>, at the imprint
        layer's input; (1, 1, F) behind fully connected layers.
      thresholds: (K,) increasing; neuron ``order[j]`` is on iff q > thresholds[j].
      order: (K,) neuron indices by increasing threshold.
      bin_masses: (K,) probability that an example falls into (thresholds[j], thresholds[j+1]],
        measured on the calibration data; ``None`` if there was none.
      fc_name: the fully connected layer that is read.
      first_name: the first layer, whose own gradient is read too if it is fully connected.
    """

    front_end: str
    kernel: np.ndarray
    bias: np.ndarray
    channels: np.ndarray
    query: np.ndarray
    thresholds: np.ndarray
    order: np.ndarray
    fc_name: str
    first_name: str = ""
    bin_masses: np.ndarray | None = None

    @property
    def num_bins(self) -> int:
        """Number of bins, one per neuron of the fully connected layer."""
        return len(self.thresholds)

    @property
    def dense(self) -> bool:
        """Whether the first layer is fully connected (type II)."""
        return self.kernel.ndim == 2

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """(P, 2) channels that no single example can have both positive: +/- the same filter."""
        columns = self.kernel.reshape(-1, self.kernel.shape[-1])
        carried = [np.flatnonzero(self.channels == f) for f in range(columns.shape[1])]
        found = [
            np.stack([carried[i], carried[k]], axis=1)
            for i, k in opposite_pairs(columns, self.bias)
            if len(carried[i]) == len(carried[k])
        ]
        return np.concatenate(found) if found else np.zeros((0, 2), int)

    def activations(self, inputs: np.ndarray) -> np.ndarray:
        """``ReLU(W^T x + b)`` of a fully connected first layer in float64: (N, ...) to (N, F)."""
        flat = inputs.reshape(len(inputs), self.kernel.shape[0])
        return np.maximum(flat @ self.kernel.astype(np.float64) + self.bias, 0)

    def measurement(self, victim: Victim, dtype: np.dtype | type = np.float32) -> Measurement:
        """The linear map from normalized image planes (C, H, W, J) to activations before ReLU."""
        return measured_by(victim, self.kernel.astype(dtype), self.bias.astype(dtype))


def measured_by(victim: Victim, kernel: np.ndarray, bias: np.ndarray) -> Measurement:
    """What a first layer measures at the imprint layer's input, through all layers between."""
    if kernel.ndim == 4:
        return measurement(front_layers(victim), kernel, bias)
    number = kernel.shape[-1]
    return Measurement(
        operator=dense_operator(kernel, victim),
        bias=bias[:, None, None],
        exact=np.ones((number, 1, 1), bool),
        always_on=np.zeros(number, bool),
        feature=np.arange(number),
    )


def dense_operator(kernel: np.ndarray, victim: Victim) -> DenseOperator:
    """A fully connected first layer (H * W * C, m) as a linear map of image planes."""
    height, width, channels = victim.input_shape
    return DenseOperator(jnp.asarray(kernel), (channels, height, width))


def opposite_pairs(columns: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Pairs (i, k), i < k, of exactly opposite columns whose biases sum to at most zero: (P, 2).

    ``<w, x> + b_i > 0`` and ``-<w, x> + b_k > 0`` cannot both hold then, so two positive
    activations prove that several examples were added up.
    """
    columns = np.ascontiguousarray((np.asarray(columns) + 0.0).T)  # + 0.0: no negative zeros
    where: dict[bytes, int] = {}
    pairs = []
    for k, column in enumerate(columns):
        if not column.any():
            continue
        i = where.pop((0.0 - column).tobytes(), None)
        if i is None:
            where[column.tobytes()] = k
        elif bias[i] + bias[k] <= 0:
            pairs.append((i, k))
    return np.asarray(pairs, int).reshape(-1, 2)


class Attackable(NamedTuple):
    """A victim's layers by the part they play: convolutional or dense front, imprint, head."""

    front: Front | tuple[Dense, ...]
    fc: Dense
    head: Dense

    @property
    def first(self) -> Conv | Dense:
        """The layer that measures."""
        return self.front.first if isinstance(self.front, Front) else self.front[0]

    @property
    def num_inputs(self) -> int:
        """Channels at the imprint layer's input, whether or not they carry anything."""
        if isinstance(self.front, Front):
            return self.front.output_shape[-1]
        return self.front[-1].features


def attackable_layers(victim: Victim) -> Attackable:
    """Split a victim into (front, imprint layer, head), or refuse with the reason.

    The front is everything before the fully connected layers of a CNN (type I), or every hidden
    layer of a multilayer perceptron but the last (type II).

    Raises:
      ValueError: the architecture cannot carry the attack as it is.
    """
    layers = victim.layers()
    dense = tuple(layer for layer in layers if isinstance(layer, Dense))
    if len(dense) != len(layers):
        front = front_layers(victim)
        return Attackable(front, front.fc, front.head)
    *hidden, head = dense
    reason = None
    if len(hidden) < 2:
        reason = (
            "a multilayer perceptron needs two hidden layers, one that measures and one that "
            f"separates, it has {len(hidden)}"
        )
    elif any(layer.activation != "relu" for layer in hidden):
        reason = "a hidden layer ends in something other than ReLU, which reading bins needs"
    elif hidden[-1].features < 2:
        reason = f"layer {hidden[-1].name} has {hidden[-1].features} neuron; bins need at least 2"
    if reason is not None:
        raise ValueError(
            f"ARES cannot attack the model {victim.name!r} as it is: {reason}. The attack never "
            "changes an architecture; choose --widths 1024 1024 or --model cnn."
        )
    return Attackable(tuple(hidden[:-1]), hidden[-1], head)


def read_plan(victim: Victim, params: PyTree) -> Plan:
    """Read a plan off any parameters of an attackable architecture.

    For crafted parameters this recovers what :func:`~jgia.attacks.ares.craft.craft` built (with
    ``front_end="unknown"`` unless the kernel gives it away). For benign parameters it is merely
    the best guess (mean query, biases as thresholds): the candidate tests then reject what it
    leads to.

    Raises:
      ValueError: the architecture cannot carry the attack.
    """
    attackable = attackable_layers(victim)
    fc = attackable.fc
    flat = flatten_params(params)
    first = attackable.first
    kernel, bias = _first_layer(attackable, flat)
    used = _used_features(attackable)
    kernel, bias = kernel[..., :used], bias[:used]
    measured = measured_by(victim, kernel, bias)
    fc_kernel = params[fc.name]["kernel"]
    # Identical columns: one is enough. The mean would read gigabytes for the same answer.
    left, right = np.asarray(fc_kernel[:, 0]), np.asarray(fc_kernel[:, -1])
    column = left if np.array_equal(left, right) else np.asarray(fc_kernel).mean(axis=1)
    height, width = measured.exact.shape[1:]
    query = column.reshape(height, width, -1)[..., : len(measured.feature)]
    thresholds = -np.asarray(params[fc.name]["bias"], np.float64)
    order = np.argsort(thresholds, kind="stable")
    return Plan(
        front_end=_recognize(kernel),
        kernel=kernel,
        bias=bias,
        channels=measured.feature,
        query=query,
        thresholds=thresholds[order],
        order=order,
        fc_name=fc.name,
        first_name=first.name,
    )


def _first_layer(attackable: Attackable, flat: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of the layer that measures, with the normalization behind it folded in."""
    name = attackable.first.name
    kernel = np.asarray(flat[f"{name}/kernel"])
    bias = np.asarray(flat.get(f"{name}/bias", np.zeros(kernel.shape[-1], kernel.dtype)))
    if not isinstance(attackable.front, Front):
        return kernel, bias
    norm = next(iter(attackable.front.layers[1:]), None)
    if not isinstance(norm, BatchNorm):
        return kernel, bias
    mean, var = (np.asarray(v, np.float64) for v in (norm.mean or 0.0, norm.var or 1.0))
    factor = np.asarray(flat[f"{norm.name}/scale"], np.float64) / np.sqrt(var + norm.epsilon)
    shifted = np.asarray(flat[f"{norm.name}/bias"]) + (bias - mean) * factor
    return (kernel * factor).astype(kernel.dtype), shifted.astype(bias.dtype)


def _used_features(attackable: Attackable) -> int:
    """First-layer features that reach the imprint layer."""
    if isinstance(attackable.front, Front):
        return most_equations(attackable.front)
    return min(layer.features for layer in attackable.front)


def most_equations(front: Front) -> int:
    """The fewest first-layer features that give as many equations as can be had."""
    counts = [num_equations(front, n) for n in range(1, front.first.features + 1)]
    return int(np.argmax(counts)) + 1


def _recognize(kernel: np.ndarray) -> str:
    if kernel.ndim == 2:
        return "unknown"
    num_in = kernel.shape[2]
    for name, build in (("signed", signed_kernel), ("direct", direct_kernel)):
        if kernel.shape[-1] >= num_in * (2 if name == "signed" else 1) and np.array_equal(
            kernel, build(kernel.shape[:2], num_in, kernel.shape[-1])
        ):
            return name
    return "unknown"


def direct_kernel(size: tuple[int, ...], num_in: int, num_out: int) -> np.ndarray:
    """Center tap 1 from channel c to channel c, (kh, kw, C, F); further channels are zero."""
    kernel = np.zeros((*size, num_in, num_out), np.float32)
    num = min(num_in, num_out)
    kernel[size[0] // 2, size[1] // 2, range(num), range(num)] = 1
    return kernel


def signed_kernel(size: tuple[int, ...], num_in: int, num_out: int) -> np.ndarray:
    """Center taps +1 to channel c and -1 to channel C + c; further channels are zero."""
    kernel = np.zeros((*size, num_in, num_out), np.float32)
    center = (size[0] // 2, size[1] // 2)
    kernel[(*center, range(num_in), range(num_in))] = 1
    kernel[(*center, range(num_in), range(num_in, 2 * num_in))] = -1
    return kernel
