"""Activations as an attack needs them: from an output back to the input and to the slope."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

_NAMES = ("none", "relu", "leaky_relu", "sigmoid", "tanh")
_LEAKY = re.compile(r"leaky_relu(?:\((?P<slope>[0-9.eE+-]+)\))?")
_LEAKY_SLOPE = 0.01  # the default of flax and of PyTorch
_EDGE = 1e-12  # how close to its bounds an output of a sigmoid or tanh is taken at its word


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation, entry by entry.

    Attributes:
      name: ``"none"``, ``"relu"``, ``"leaky_relu"``, ``"sigmoid"`` or ``"tanh"``.
      slope: of negative inputs, for the rectifiers.
    """

    name: str
    slope: float = 0.0

    def apply(self, inputs: np.ndarray) -> np.ndarray:
        """``act(z)``."""
        if self.name == "sigmoid":
            return 0.5 * (1 + np.tanh(0.5 * inputs))
        if self.name == "tanh":
            return np.tanh(inputs)
        return inputs if self.name == "none" else np.where(inputs > 0, inputs, self.slope * inputs)

    def clean(self, outputs: np.ndarray, precision: float) -> np.ndarray:
        """Outputs that were recovered, moved to values that the activation can take.

        A rectifier gives zeros, around which recovered values scatter: the most negative of them
        shows how far.

        Args:
          outputs: as recovered.
          precision: relative precision of the update, the smallest scatter that is assumed.
        """
        if self.name == "relu":
            scatter = max(-float(outputs.min()), 2 * precision * float(np.abs(outputs).max()))
            return np.where(outputs > 2 * scatter, outputs, 0.0)
        if self.name == "sigmoid":
            return np.clip(outputs, _EDGE, 1 - _EDGE)
        if self.name == "tanh":
            return np.clip(outputs, _EDGE - 1, 1 - _EDGE)
        return outputs

    def derivative(self, outputs: np.ndarray) -> np.ndarray:
        """``act'(z)`` at clean outputs ``act(z)``."""
        if self.name == "sigmoid":
            return outputs * (1 - outputs)
        if self.name == "tanh":
            return 1 - outputs**2
        if self.name == "none":
            return np.ones_like(outputs)
        return np.where(outputs > 0, 1.0, self.slope)

    def invert(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``z`` of clean outputs, and where it is known: not where a ReLU is off."""
        known = np.ones(outputs.shape, bool)
        if self.name == "sigmoid":
            return np.log(outputs) - np.log1p(-outputs), known
        if self.name == "tanh":
            return np.arctanh(outputs), known
        if self.name == "relu":
            return outputs, outputs > 0
        return np.where(outputs > 0, outputs, outputs / (self.slope or 1.0)), known


def parse_activation(name: str) -> Activation | None:
    """The activation that a layer's description names, ``None`` for one that is not known.

    ``"leaky_relu"`` has slope 0.01; ``"leaky_relu(0.2)"`` has another.

    >>> parse_activation("leaky_relu(0.2)")
    Activation(name='leaky_relu', slope=0.2)
    """
    if name == "leaky_relu" or name not in _NAMES:
        match = _LEAKY.fullmatch(name)
        if match is None:
            return None
        try:
            slope = float(match["slope"] or _LEAKY_SLOPE)
        except ValueError:
            return None
        return Activation("leaky_relu", slope) if 0 < slope < np.inf else None
    return Activation(name, 1.0 if name == "none" else 0.0)
