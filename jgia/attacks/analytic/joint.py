"""Layers that do not determine their input alone, solved together for the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jgia.attacks.analytic.arrays import LayerArrays
from jgia.attacks.analytic.chain import Stage
from jgia.attacks.analytic.convolution import ConvSystem, Windows, windows_of
from jgia.attacks.analytic.linear import determined, least_squares

_STARTS = 3
_MAX_STEPS = 100
_INNER_ITERATIONS = 100
_PATIENCE = 10  # steps in which the residual must fall by a tenth


class Front(NamedTuple):
    """The convolutions from the image to one whose output is known.

    Attributes:
      stages: all of them.
      arrays: one per stage.
      system: linear equations for the input of the last stage.
      y: (m,) their right-hand side.
      off: (H' W', F) weights of outputs of the last stage that are known to be zero behind a
        ReLU, which bounds what is before it; 0 elsewhere.
    """

    stages: Sequence[Stage]
    arrays: Sequence[LayerArrays]
    system: ConvSystem
    y: np.ndarray
    off: np.ndarray

    @property
    def windows(self) -> list[Windows]:
        """Of the stages but the last."""
        return [windows_of(stage) for stage in self.stages[:-1]]


class Found(NamedTuple):
    """The best image of a search.

    Attributes:
      inputs: (H, W, C).
      determined: of the same shape, by the equations linearized at the image.
      report: JSON-ready.
    """

    inputs: np.ndarray
    determined: np.ndarray
    report: dict[str, Any]


def search_image(
    front: Front,
    *,
    precision: float,
    rng: np.random.Generator,
    start: np.ndarray | None = None,
    test_rank: bool = True,
) -> Found | None:
    """The image whose forward pass satisfies the equations of the last stage.

    The stage's input ``u(x)`` has more entries than the image x that made it. Gauss-Newton with
    Levenberg's damping minimizes ``|A u(x) - y|^2 + |w max(z(x), 0)|^2`` over x, the second sum
    over outputs that are off. Behind ReLU everything is piecewise linear, so that the last steps
    are exact as soon as the activation pattern is right. From a wrong one it may end in a local
    minimum: random starts, of which the smallest residual wins.

    Args:
      front: the layers.
      precision: unit roundoff of the update: where a search is done.
      rng: of the starts.
      start: (H, W, C) the only start, if given.
      test_rank: whether to test what is determined.

    Returns:
      ``None`` where there are fewer equations than pixels.
    """
    pixels = int(np.prod(front.stages[0].input_shape))
    if front.system.num_equations < pixels:
        return None
    size = float(np.linalg.norm(front.y))
    best, steps = None, 0
    for _ in range(_STARTS if start is None else 1):
        image = rng.standard_normal(front.stages[0].input_shape) if start is None else start
        point, taken = _descend(front, image, target=(max(2 * precision, 1e-12) * size) ** 2)
        steps += taken
        if best is None or point.loss < best.loss:
            best = point
        if np.sqrt(best.loss) <= max(32 * precision, 1e-11) * size:
            break
    if best is None:
        return None
    sure = np.ones(pixels, bool)
    if test_rank:
        sure = determined(_Linearized(front, front.windows, best), rng)
    report = {
        "layer": f"{front.stages[0].layer.name} to {front.stages[-1].layer.name}",
        "equations": front.system.num_equations,
        "unknowns": pixels,
        "undetermined": int(pixels - np.count_nonzero(sure)),
        "residual": float(np.sqrt(best.loss) / size),
        "iterations": steps,
    }
    return Found(best.image, sure.reshape(best.image.shape), report)


class _Point(NamedTuple):
    """An image and what its forward pass gives: slopes of each stage but the last, residuals."""

    image: np.ndarray
    slopes: tuple[np.ndarray, ...]
    residual: np.ndarray
    violated: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.residual @ self.residual)


class _Linearized(NamedTuple):
    """The derivative of all equations by the image, at a point."""

    front: Front
    windows: Sequence[Windows]
    point: _Point

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.point.residual), self.point.image.size

    def apply(self, x: np.ndarray) -> np.ndarray:
        inner = x.reshape(self.point.image.shape)
        for windows, arrays, slopes in self._stages():
            inner = windows.patches(inner) @ _matrix(arrays)
            inner = inner.reshape(slopes.shape) * slopes
        last = self.front.system
        bounded = (last.windows.patches(inner) @ last.kernel) * self.point.violated
        return np.concatenate([last.apply(inner.reshape(-1)), bounded.reshape(-1)])

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        last = self.front.system
        rows = last.shape[0]
        bounded = y[rows:].reshape(self.point.violated.shape) * self.point.violated
        inner = last.adjoint(y[:rows]).reshape(last.windows.shape)
        inner = inner + last.windows.add_patches(bounded @ last.kernel.T)
        for windows, arrays, slopes in reversed(self._stages()):
            before = (inner * slopes).reshape(-1, slopes.shape[-1])
            inner = windows.add_patches(before @ _matrix(arrays).T)
        return inner.reshape(-1)

    def _stages(self) -> list[tuple[Windows, LayerArrays, np.ndarray]]:
        arrays = self.front.arrays[:-1]
        return list(zip(self.windows, arrays, self.point.slopes, strict=True))


def _matrix(arrays: LayerArrays) -> np.ndarray:
    return arrays.kernel.reshape(-1, arrays.kernel.shape[-1])


def _evaluate(front: Front, windows: Sequence[Windows], image: np.ndarray) -> _Point:
    inner, slopes = image, []
    for stage, arrays, places in zip(front.stages, front.arrays, windows, strict=False):
        before = places.patches(inner) @ _matrix(arrays) + arrays.bias
        inner = stage.activation.apply(before.reshape(stage.output_shape))
        slopes.append(stage.activation.derivative(inner))
    last = front.system
    outputs = last.windows.patches(inner) @ last.kernel + front.arrays[-1].bias
    violated = front.off * (outputs > 0)
    equalities = front.y - last.apply(inner.reshape(-1))
    residual = np.concatenate([equalities, -(violated * outputs).reshape(-1)])
    return _Point(image, tuple(slopes), residual, violated)


def _descend(front: Front, image: np.ndarray, *, target: float) -> tuple[_Point, int]:
    """Levenberg-Marquardt from one start: the last point, and steps taken, two at least."""
    windows = front.windows
    point = _evaluate(front, windows, image)
    damping, reference = 1e-2, point.loss
    size = float(front.y @ front.y)
    step = 0
    while (point.loss > target or step < 2) and step < _MAX_STEPS and damping < 1e3:
        step += 1
        change = least_squares(
            _Linearized(front, windows, point),
            point.residual,
            tolerance=1e-3 if point.loss > 1e-8 * size else 1e-8,
            max_iterations=_INNER_ITERATIONS,
            damping=damping * float(np.sqrt(point.loss)),
        ).x.reshape(image.shape)
        length, new = 1.0, _evaluate(front, windows, point.image + change)
        while new.loss >= point.loss and length > 0.2:
            length /= 2
            new = _evaluate(front, windows, point.image + length * change)
        if new.loss < point.loss:
            # a full step that went most of the way: the linearization holds
            good = length == 1 and new.loss < 0.7 * point.loss
            damping = max(damping / 2, 1e-3) if good else damping * (1 if length == 1 else 2)
            point = new
        else:
            damping *= 4
        if step % _PATIENCE == 0:
            if point.loss > 0.8 * reference:
                break
            reference = point.loss
    return point, step
