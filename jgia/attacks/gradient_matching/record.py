"""What a run remembers: loss curve, images on the way, checkpoints, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from jgia._io import atomic_write, require_writable_folder
from jgia.attacks.gradient_matching import checkpoint, search
from jgia.attacks.gradient_matching.drive import Event
from jgia.attacks.gradient_matching.objective import Problem
from jgia.attacks.gradient_matching.search import State
from jgia.config.gradient_matching import RunOptions
from jgia.observation import History

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, smallest loss so far)."""

_GAIN = 1e-3  # part of the loss that has to be gained within the patience
_CURVE_POINTS = 200


class Recorder:
    """Called after every stretch of steps; keeps what the options ask for.

    Attributes:
      stretch: steps between two calls; everything else is rounded up to a multiple of it.
      stopped_early: whether the loss had stopped falling.
    """

    def __init__(
        self,
        problem: Problem,
        options: RunOptions,
        *,
        key: jax.Array,
        progress: Progress | None = None,
    ) -> None:
        self.stopped_early = False
        self._problem, self._options, self._progress = problem, options, progress
        self._total, self._patience = problem.settings.num_steps, problem.settings.patience
        self.stretch = min(options.report_every, self._total)
        self._losses = np.zeros((0, 0))
        self._frames: dict[int, np.ndarray] = {}
        ticks = math.ceil(self._total / self.stretch)
        wanted = np.linspace(0, ticks, min(options.frames, ticks) + 1)[1:].round()
        self._frame_steps = {min(int(t) * self.stretch, self._total) for t in wanted}
        self._done = 0
        if options.checkpoint is not None:
            require_writable_folder(options.checkpoint.parent)
            self._mark = checkpoint.fingerprint(problem, key)
        if options.dump is not None:
            require_writable_folder(options.dump)

    def resumed(self, states: list[State]) -> list[State]:
        """The states of the checkpoint if there is one, else those given."""
        if self._options.checkpoint is None:
            return states
        stored = checkpoint.load(self._options.checkpoint, states, mark=self._mark)
        if stored is None:
            return states
        states, self._losses, self._frames = stored
        self._done = self._losses.shape[1]
        return states

    def __call__(self, event: Event) -> bool:
        """Remember; returns whether to stop."""
        before, self._done = self._done, event.step
        if self._losses.size:
            self._losses = np.concatenate([self._losses, event.losses], axis=1)
        else:
            self._losses = event.losses
        if event.step in self._frame_steps:
            self._frames[event.step] = self._images(event.states)
        options = self._options
        if options.dump is not None and self._passed(before, options.dump_every):
            self._dump(event)
        if options.checkpoint is not None and self._passed(before, options.checkpoint_every):
            checkpoint.save(
                options.checkpoint, event.states, self._losses, self._frames, mark=self._mark
            )
        if self._progress is not None:
            self._progress(event.step, self._total, float(np.nanmin(self._finite_losses())))
        self.stopped_early = event.step < self._total and self._on_plateau()
        return self.stopped_early

    def stats(self, restart: int) -> dict[str, Any]:
        """The loss curve of a restart, thinned out, JSON-ready."""
        steps = self._curve_steps()
        losses = self._losses[restart, steps - 1]
        return {
            "curve_steps": steps.tolist(),
            "curve_losses": [float(v) if math.isfinite(v) else None for v in losses],
        }

    def history(self, restart: int) -> History:
        """Loss curve and images of a restart."""
        steps = self._curve_steps()
        kept = sorted(self._frames)
        return History(
            steps=steps,
            losses=self._losses[restart, steps - 1],
            frame_steps=np.asarray(kept, int),
            frames=np.stack([self._frames[step][restart] for step in kept])
            if kept
            else np.zeros((0, len(self._problem.labels), *self._problem.victim.input_shape)),
        )

    def _curve_steps(self) -> np.ndarray:
        count = self._losses.shape[1]
        return np.unique(np.linspace(1, count, min(count, _CURVE_POINTS)).round().astype(int))

    def _passed(self, before: int, interval: int) -> bool:
        return self._done // interval > before // interval or self._done == self._total

    def _images(self, states: list[State]) -> np.ndarray:
        """(R, B, H, W, C): the best images so far of every restart."""
        groups = []
        for state in states:
            for r in range(state.step.shape[0]):
                one = jax.tree.map(lambda leaf, r=r: leaf[r], state)
                groups.append(np.asarray(search.finalize(one, self._problem)[0], np.float32))
        return np.stack(groups)

    def _dump(self, event: Event) -> None:
        """One picture: restarts from top to bottom, images from left to right."""
        folder = self._options.dump
        if folder is None:
            return
        images = self._images(event.states)
        rows = [np.concatenate(list(row), axis=1) for row in images]
        pixels = np.round(np.concatenate(rows) * 255).astype(np.uint8)
        with atomic_write(folder / f"step-{event.step:06d}.png") as file:
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")

    def _finite_losses(self) -> np.ndarray:
        finite = np.where(np.isfinite(self._losses), self._losses, np.nan)
        return finite if np.isfinite(finite).any() else np.full((1, 1), np.inf)

    def _on_plateau(self) -> bool:
        """Whether no restart gained a thousandth in the last ``patience`` steps."""
        count = self._losses.shape[1]
        if not self._patience or count <= self._patience:
            return False
        finite = np.where(np.isfinite(self._losses), self._losses, np.inf)
        earlier = finite[:, : count - self._patience].min(axis=1)
        now = finite.min(axis=1)
        return bool(np.all(now > earlier * (1 - _GAIN)))
