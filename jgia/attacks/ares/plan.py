"""What the server remembers of its crafted parameters, and how to read it off any parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jgia.models import Conv, Dense, Victim

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The measurement that a set of parameters makes of every example.

    Attributes:
      front_end: ``"random"``, ``"signed"``, ``"direct"``, or ``"unknown"`` when read off
        parameters that were not crafted here.
      kernel: (kh, kw, C, F) first convolution, restricted to the F channels that reach the
        fully connected layer.
      bias: (F,) its bias.
      query: (H, W, F) weights of the query feature q = <query, activation>.
      thresholds: (K,) increasing; neuron ``order[j]`` is on iff q > thresholds[j].
      order: (K,) neuron indices by increasing threshold.
      bin_masses: (K,) probability that an example falls into (thresholds[j], thresholds[j+1]],
        measured on the calibration data; ``None`` if there was none.
      fc_name: the fully connected layer that is read.
    """

    front_end: str
    kernel: np.ndarray
    bias: np.ndarray
    query: np.ndarray
    thresholds: np.ndarray
    order: np.ndarray
    fc_name: str
    bin_masses: np.ndarray | None = None

    @property
    def num_bins(self) -> int:
        """Number of bins, one per neuron of the fully connected layer."""
        return len(self.thresholds)


def attackable_layers(victim: Victim) -> tuple[tuple[Conv, ...], Dense, Dense]:
    """Split a victim into (convolutions, imprint layer, head), or refuse with the reason.

    Raises:
      ValueError: the architecture cannot carry the attack as it is.
    """
    layers = victim.layers()
    convs = tuple(layer for layer in layers if isinstance(layer, Conv))
    dense = [layer for layer in layers if isinstance(layer, Dense)]

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"ARES cannot attack the model {victim.name!r} as it is: {reason}. The attack never "
            "changes an architecture; choose --model cnn."
        )

    if not convs:
        raise refuse(
            "it has no convolution in front of its fully connected layer (the two-layer attack "
            "on multilayer perceptrons is not part of this version)"
        )
    if len(dense) != 2:
        raise refuse(
            f"it needs exactly one fully connected ReLU layer and a head, it has {len(dense)} "
            "fully connected layers"
        )
    fc, head = dense
    for layer in (*convs, fc):
        if layer.activation != "relu":
            raise refuse(f"layer {layer.name} ends in {layer.activation}; reading bins needs ReLU")
    for conv in convs:
        if conv.stride != 1 or conv.pooled:
            raise refuse(f"layer {conv.name} strides or pools, which is not supported")
        if conv.normalized:
            raise refuse(f"layer {conv.name} is normalized, which is not supported")
        if conv.kernel_size[0] % 2 == 0 or conv.kernel_size[1] % 2 == 0:
            raise refuse(f"layer {conv.name} has an even kernel {conv.kernel_size}")
    if fc.features < 2:
        raise refuse(f"layer {fc.name} has {fc.features} neuron; bins need at least 2")
    return convs, fc, head


def num_passed_channels(convs: tuple[Conv, ...]) -> int:
    """How many channels of the first convolution reach the fully connected layer."""
    return min(conv.features for conv in convs)


def read_plan(victim: Victim, params: PyTree) -> Plan:
    """Read a plan off any parameters of an attackable architecture.

    For crafted parameters this recovers what :func:`~jgia.attacks.ares.craft.craft` built (with
    ``front_end="unknown"`` unless the kernel gives it away). For benign parameters it is merely
    the best guess (mean query, biases as thresholds): the candidate tests then reject what it
    leads to.

    Raises:
      ValueError: the architecture cannot carry the attack.
    """
    convs, fc, _ = attackable_layers(victim)
    height, width, num_in = victim.input_shape
    num_passed = num_passed_channels(convs)
    kernel = np.asarray(params[convs[0].name]["kernel"])[..., :num_passed]
    bias = np.asarray(params[convs[0].name]["bias"])[:num_passed]
    fc_kernel = params[fc.name]["kernel"]
    # Identical columns: one is enough. The mean would read gigabytes for the same answer.
    first, last = np.asarray(fc_kernel[:, 0]), np.asarray(fc_kernel[:, -1])
    column = first if np.array_equal(first, last) else np.asarray(fc_kernel).mean(axis=1)
    query = column.reshape(height, width, -1)[..., :num_passed]
    thresholds = -np.asarray(params[fc.name]["bias"], np.float64)
    order = np.argsort(thresholds, kind="stable")
    return Plan(
        front_end=_recognize(kernel, num_in),
        kernel=kernel,
        bias=bias,
        query=query,
        thresholds=thresholds[order],
        order=order,
        fc_name=fc.name,
    )


def _recognize(kernel: np.ndarray, num_in: int) -> str:
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
