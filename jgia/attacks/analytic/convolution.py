"""The linear equations for the input of one convolution."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jgia.attacks.analytic.arrays import LayerArrays
from jgia.attacks.analytic.chain import Stage
from jgia.models import Conv


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where a convolution looks, with the zero padding of :class:`jgia.models.Conv`.

    Attributes:
      shape: (H, W, C) of the input.
      sides: (kh, kw) of the kernel.
      stride: in both directions.
    """

    shape: tuple[int, int, int]
    sides: tuple[int, int]
    stride: int

    def patches(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to (H' W', kh kw C), one row per output pixel."""
        pads = [((side - 1) // 2, side // 2) for side in self.sides]
        padded = np.pad(image, (*pads, (0, 0)))
        views = sliding_window_view(padded, self.sides, axis=(0, 1))
        views = views[:: self.stride, :: self.stride]
        rows, columns = views.shape[:2]
        return views.transpose(0, 1, 3, 4, 2).reshape(rows * columns, -1)

    def add_patches(self, patches: np.ndarray) -> np.ndarray:
        """The adjoint of :meth:`patches`: (H' W', kh kw C) to (H, W, C)."""
        height, width, channels = self.shape
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        parts = patches.reshape(rows, columns, *self.sides, channels)
        down, right = (self.stride * n for n in (rows, columns))
        total = np.zeros((down + self.sides[0], right + self.sides[1], channels))
        for a in range(self.sides[0]):
            for b in range(self.sides[1]):
                total[a : a + down : self.stride, b : b + right : self.stride] += parts[:, :, a, b]
        top, left = ((side - 1) // 2 for side in self.sides)
        return total[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class ConvSystem:
    """``W^T u = z - b`` at known outputs, and ``sum_ij delta_ij u_ij = dW``, in the input u.

    With P(u) the matrix of patches: ``w (P(u) W) = w (z - b)`` and ``s P(u)^T delta = s dW``.

    Attributes:
      windows: of the convolution.
      kernel: (kh kw C, F).
      deltas: (H' W', F) derivatives of the loss by the outputs before the activation, in the
        update's scale.
      weights: (H' W', F) of the first kind of equation; 0 where the output is not known.
      scale: s, of the second.
    """

    windows: Windows
    kernel: np.ndarray
    deltas: np.ndarray
    weights: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(equations, unknowns), zero rows included."""
        return self.weights.size + self.kernel.size, int(np.prod(self.windows.shape))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Both kinds of left-hand side for a flat input."""
        patches = self.windows.patches(x.reshape(self.windows.shape))
        outputs = (patches @ self.kernel) * self.weights
        gradients = (patches.T @ self.deltas) * self.scale
        return np.concatenate([outputs.reshape(-1), gradients.reshape(-1)])

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        """The adjoint of :meth:`apply`."""
        outputs = y[: self.weights.size].reshape(self.weights.shape) * self.weights
        gradients = y[self.weights.size :].reshape(self.kernel.shape) * self.scale
        patches = outputs @ self.kernel.T + self.deltas @ gradients.T
        return self.windows.add_patches(patches).reshape(-1)

    def right_hand_side(self, outputs: np.ndarray, kernel_update: np.ndarray) -> np.ndarray:
        """(m,) from ``z - b`` (H' W', F), finite where it is not known, and ``dW``."""
        return np.concatenate(
            [(outputs * self.weights).reshape(-1), kernel_update.reshape(-1) * self.scale]
        )

    @property
    def num_equations(self) -> int:
        """Equations that are not ``0 = 0``; those of the update counted without repetition.

        A filter whose deltas are all zero contributes nothing.
        """
        kh, kw = self.windows.sides
        height, width, channels = self.windows.shape
        rows = kh * kw * int(np.count_nonzero(np.any(self.deltas, axis=0)))
        return int(np.count_nonzero(self.weights)) + channels * min(rows, height * width)


def windows_of(stage: Stage) -> Windows:
    """The windows of a stage that is a convolution."""
    layer, (height, width, channels) = stage.layer, stage.input_shape
    if not isinstance(layer, Conv):
        raise TypeError(f"layer {layer.name} is no convolution.")
    return Windows((height, width, channels), layer.kernel_size, layer.stride)


def conv_system(
    stage: Stage,
    arrays: LayerArrays,
    deltas: np.ndarray,
    slopes: np.ndarray,
    known: np.ndarray,
) -> ConvSystem:
    """The system of one layer, its two kinds of equation brought to the same size.

    Equations of outputs are weighted by the activation's slope: an error of an output after a flat
    activation is a large one before it.

    Args:
      stage: the convolution.
      arrays: its weights.
      deltas: (H', W', F) before the activation.
      slopes: (H', W', F) of the activation at the outputs.
      known: (H', W', F) where the output before the activation is known.
    """
    num_filters = stage.layer.features
    kernel = arrays.kernel.reshape(-1, num_filters)
    deltas = deltas.reshape(-1, num_filters)
    weights = (slopes * known).reshape(-1, num_filters)
    size = np.sqrt(np.mean(np.sum(kernel**2, axis=0))) * np.abs(weights).max(initial=0.0)
    typical = np.sqrt(np.mean(np.sum(deltas**2, axis=0)))
    return ConvSystem(
        windows_of(stage),
        kernel,
        deltas,
        weights / size if size > 0 else weights,
        1 / typical if typical > 0 else 0.0,
    )
