"""Names and axes of PyTorch state dicts, to and from this library's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jgia.federated._errors import UpdateError, shown
from jgia.models import Victim, flatten_params, flattened_features


class _Entry(NamedTuple):
    """One array under both names; ``features`` is (H, W, C) where a flatten comes before it."""

    flax: str
    torch: str
    shape: tuple[int, ...]
    features: tuple[int, int, int] | None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        if len(self.shape) == 4:
            height, width, inputs, outputs = self.shape
            return (outputs, inputs, height, width)
        return self.shape[::-1]

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        if self.features is not None:
            turned = array.reshape(*self.features, -1).transpose(3, 2, 0, 1)  # HWC,out: out,CHW
        elif array.ndim == 4:
            turned = array.transpose(3, 2, 0, 1)  # HWIO: OIHW
        else:
            turned = array.T
        return _owned(turned.reshape(self.torch_shape), array)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        if self.features is not None:
            height, width, channels = self.features
            turned = array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
        elif array.ndim == 4:
            turned = array.transpose(2, 3, 1, 0)  # OIHW: HWIO
        else:
            turned = array.T
        return _owned(turned.reshape(self.shape), array)


def _owned(result: np.ndarray, source: np.ndarray) -> np.ndarray:
    """``result`` in C order and apart from ``source``; copied only if it is still a view."""
    return np.array(result, order="C") if np.may_share_memory(result, source) else result


def to_torch_layout(flat: Mapping[str, np.ndarray], victim: Victim) -> dict[str, np.ndarray]:
    """This library's names and axes to those of the equivalent PyTorch model.

    ======================  ==========================  =========================
    here                    PyTorch                     axes
    ======================  ==========================  =========================
    ``conv1/kernel``        ``conv1.weight``            HWIO to OIHW
    ``fc/kernel``           ``fc.weight``               (in, out) to (out, in)
    ``norm1/scale``         ``norm1.weight``            unchanged
    ``*/bias``              ``*.bias``                  unchanged
    ======================  ==========================  =========================

    The first dense layer reads flattened features: images here are NHWC and flatten in the order
    height, width, channel, while PyTorch's NCHW flattens channel, height, width. Its input axis
    is permuted accordingly. A gradient, an update and parameters all convert the same way,
    because the conversion is a permutation of entries.

    Args:
      flat: ``{"conv1/kernel": array, ...}``, exactly the model's names and shapes.
      victim: one of the bundled models (its layers give the size of the flattened features).

    Returns:
      New C-contiguous arrays under PyTorch's names.

    Raises:
      UpdateError: names or shapes do not fit the model.
      ValueError: the model's layers are not described.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(1, 2, 2), num_classes=2, widths=(1,))
    >>> zeros = {name: np.zeros(leaf.shape) for name, leaf in
    ...          flatten_params(victim.param_shapes()).items()}
    >>> zeros["fc1/kernel"][:, 0] = [0, 1, 2, 3]  # column 0: channels 0, 1; then column 1
    >>> to_torch_layout(zeros, victim)["fc1.weight"]
    array([[0., 2., 1., 3.]])
    """
    table = _table(victim)
    _check(flat, {e.flax: e.shape for e in table}, {e.torch: e.torch_shape for e in table}, "flax")
    return {e.torch: e.to_torch(np.asarray(flat[e.flax])) for e in table}


def from_torch_layout(flat: Mapping[str, np.ndarray], victim: Victim) -> dict[str, np.ndarray]:
    """The inverse of :func:`to_torch_layout`: a PyTorch state dict or gradients to names here.

    Args:
      flat: ``{"conv1.weight": array, ...}``, exactly the model's names and PyTorch shapes.
      victim: the equivalent bundled model.

    Returns:
      New C-contiguous arrays ``{"conv1/kernel": array, ...}``.

    Raises:
      UpdateError: names or shapes do not fit; the message says so when they are already in this
        library's layout. A square dense kernel that was transposed cannot be told apart.
      ValueError: the model's layers are not described.
    """
    table = _table(victim)
    _check(flat, {e.torch: e.torch_shape for e in table}, {e.flax: e.shape for e in table}, "torch")
    return {e.flax: e.from_torch(np.asarray(flat[e.torch])) for e in table}


def torch_names(victim: Victim) -> frozenset[str]:
    """The names that the victim's parameters have in PyTorch."""
    return frozenset(_torch_name(name) for name in flatten_params(victim.param_shapes()))


def _torch_name(name: str) -> str:
    *modules, leaf = name.split("/")
    return ".".join((*modules, "bias" if leaf == "bias" else "weight"))


def _table(victim: Victim) -> list[_Entry]:
    shapes = flatten_params(victim.param_shapes())
    layer, features = flattened_features(victim)
    kernel = f"{layer}/kernel"
    if math.prod(features) != shapes[kernel].shape[0]:
        raise ValueError(
            f"{kernel} reads {shapes[kernel].shape[0]} features, but the layers before it give "
            f"{features} (height, width, channels); the model is not described correctly."
        )
    return [
        _Entry(name, _torch_name(name), tuple(x.shape), features if name == kernel else None)
        for name, x in shapes.items()
    ]


def _check(
    flat: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    other: Mapping[str, tuple[int, ...]],
    layout: str,
) -> None:
    opposite = "flax" if layout == "torch" else "torch"
    if set(flat) != set(expected):
        hint = "was it computed with another model?"
        if set(flat) == set(other):
            hint = f"the names are those of layout={opposite!r}: choose it (--layout {opposite})."
        raise UpdateError(
            f"the names do not fit the model in layout={layout!r}: missing "
            f"{shown(set(expected) - set(flat))}; not in the model: "
            f"{shown(set(flat) - set(expected))}; {hint}"
        )
    for name, shape in expected.items():
        got = tuple(np.shape(flat[name]))
        if got != shape:
            hint = ""
            if sorted(got) == sorted(shape):
                hint = f" The axes look permuted: are they in layout={opposite!r}?"
            raise UpdateError(
                f"{name} must have shape {shape} in layout={layout!r}, got {got}.{hint}"
            )
