"""One start of the search: damped steps through stages of less noise and sharper kinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgia.attacks.gauss_newton.channel import Channel, gradient, misfit
from jgia.attacks.gauss_newton.steps import Linear

End = Literal["converged", "stalled", "max_steps", "nonfinite"]

_STAGE_STEPS = 4
_STAGE_FACTOR = 4.0
_STAGE_DONE = 0.1  # next step in posterior standard deviations of a stage
_WIDTHS = (0.3, 0.1, 0.03, 0.01, 0.003)
_ROUNDS = 3
_ACROSS = (0.01, 0.03, 0.003, 0.1)
_LENGTHS = (1.0, 0.5, 0.2, 0.05)
_MAX_DAMPING = 1e9


class Found(NamedTuple):
    """Where one start ended: see :class:`~jgia.attacks.gauss_newton.Estimate`."""

    z: np.ndarray
    objective: float
    misfit: float
    step_left: float
    end: End
    losses: list[float]


class Search:
    """The state of one start: a point, and the steps that are left."""

    def __init__(
        self,
        channel: Channel,
        z: np.ndarray,
        settings: Any,
        tell: Callable[[int, float], None],
    ) -> None:
        self._channel, self.z, self._settings, self._tell = channel, z, settings, tell
        self._dtype = channel.coordinates.prior.mean.dtype
        self._outputs = sum(leaf.size for leaf in jax.tree.leaves(channel.observed))
        self._linear = Linear(channel, settings)
        self.losses: list[float] = []
        self.left = math.inf

    def run(self) -> Found:
        """All stages."""
        here = self._fit(self.z)
        self.losses.append(self._loss(here))
        if not math.isfinite(here):
            return self._found("nonfinite")
        if self._settings.noise_stages:
            for width in (*self._widths(here), 0.0):
                self._cool(width)
        end = self._minimize(0.0, 1.0, self._settings.tolerance, self._steps_left())
        if end != "nonfinite" and self._channel.width is not None:
            end = self._cross(end)
        return self._found(end)

    def _widths(self, here: float) -> tuple[float, ...]:
        """Those that make a difference: none for a release without kinks."""
        if self._channel.width is None:
            return ()
        there = self._fit(self.z, _WIDTHS[0])
        return _WIDTHS if abs(there - here) > 1e-4 * here else ()

    def _found(self, end: End) -> Found:
        value = self._fit(self.z)
        return Found(self.z, self._loss(value), value, self.left, end, self.losses)

    def _steps_left(self) -> int:
        return self._settings.max_steps - (len(self.losses) - 1)

    def _fit(self, point: np.ndarray, width: float = 0.0) -> float:
        channel = self._channel.smoothed(width)
        return float(misfit(channel, jnp.asarray(point, self._dtype)))

    def _loss(self, fit: float, point: np.ndarray | None = None, scale: float = 1.0) -> float:
        point = self.z if point is None else point
        return (fit / scale**2 + float(point @ point)) / 2

    def _explained(self, width: float) -> float:
        """Noise that explains what is left over, at least 1."""
        return max(1.0, math.sqrt(self._fit(self.z, width) / self._outputs))

    def _cool(self, width: float) -> None:
        """Rounds of less and less noise at one width."""
        scale = self._explained(width)
        for _ in range(_ROUNDS):
            if scale == 1 and width == 0:
                return
            self._minimize(width, scale, _STAGE_DONE, min(_STAGE_STEPS, self._steps_left()))
            explained = self._explained(width)
            if scale == 1 or (width > 0 and explained > scale / 2):
                return
            scale = max(1.0, min(scale / _STAGE_FACTOR, explained))

    def _minimize(self, width: float, scale: float, tolerance: float, steps: int) -> End:
        """Damped steps on one objective until the next one is short, or none is downhill."""
        damping = 0.0
        for _ in range(steps):
            fit, down = self._down(width, scale)
            loss = self._loss(fit, scale=scale)
            while True:
                move = self._linear.solve(self.z, down, width=width, scale=scale, damping=damping)
                slope = float(move @ down)
                self.left = math.sqrt(max(slope, 0.0) / self.z.size)
                if not math.isfinite(self.left):
                    return "nonfinite"
                short = self.left <= tolerance and damping == 0
                length = self._downhill(
                    move, slope, loss, width, scale, _LENGTHS[:1] if short else _LENGTHS
                )
                if length or short:
                    break
                damping = max(1.0, 10 * damping)
                if damping > _MAX_DAMPING:
                    return "stalled"
            self._move(length * move)
            if short:
                return "converged"
            damping = 0.0 if damping <= 1 or length < 1 else damping / 10
        return "max_steps"

    def _cross(self, end: End) -> End:
        """From a jump of the exact release: steps that see it, kept where the objective falls."""
        while self._steps_left() > 0 and self._fit(self.z) > 1.2 * self._outputs:
            loss = self._loss(self._fit(self.z))
            for width in _ACROSS:
                scale = self._explained(width)
                _, down = self._down(width, scale)
                move = self._linear.solve(self.z, down, width=width, scale=scale, damping=0.0)
                length = self._downhill(move, 0.0, loss, 0.0, 1.0, _LENGTHS)
                if length:
                    self._move(length * move)
                    break
            else:
                return end
            end = self._minimize(0.0, 1.0, self._settings.tolerance, self._steps_left())
        return end

    def _down(self, width: float, scale: float) -> tuple[float, np.ndarray]:
        """The misfit, and the direction of steepest descent."""
        fit, pulled = gradient(self._channel.smoothed(width), jnp.asarray(self.z, self._dtype))
        return float(fit), np.asarray(pulled, np.float64) / scale**2 - self.z

    def _downhill(
        self,
        move: np.ndarray,
        slope: float,
        loss: float,
        width: float,
        scale: float,
        lengths: tuple[float, ...],
    ) -> float:
        """The first length of a step that lowers the loss enough; 0 where none does."""
        for length in lengths:
            point = self.z + length * move
            value = self._loss(self._fit(point, width), point, scale)
            if math.isfinite(value) and value < loss - 1e-4 * length * slope:
                return length
        return 0.0

    def _move(self, step: np.ndarray) -> None:
        self.z = self.z + step
        self.losses.append(self._loss(self._fit(self.z)))
        self._tell(len(self.losses) - 1, self.losses[-1])
