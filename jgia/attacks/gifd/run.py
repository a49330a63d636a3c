"""All stages of all searches, with a memory: checkpoints, budget, pictures on the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jgia._io import atomic_write, require_writable_folder
from jgia.attacks.gifd import drive
from jgia.attacks.gifd.drive import Group
from jgia.attacks.gifd.settings import Settings, rates
from jgia.attacks.gifd.stages import Anchor, Stage, State, Weights, make_stage
from jgia.attacks.gradient_matching import checkpoint
from jgia.attacks.gradient_matching.checkpoint import CheckpointError
from jgia.config.gradient_matching import RunOptions
from jgia.generators.protocol import GeneratorState, StagedGenerator

PyTree = Any
Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, smallest loss so far)."""

_STEPS_BETWEEN_CLOCKS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StageResult:
    """What a stage left, one row for each search.

    Attributes:
      distances: (S,) distances of updates of the images.
      images: (S, B, H, W, C) pixels in [0, 1].
      losses: (S, n) before each step.
      alive: (S,) whether all numbers were finite.
      shape: (h, w, C) of the features searched; empty in stage 0.
      seconds: that the stage took.
    """

    distances: np.ndarray
    images: np.ndarray
    losses: np.ndarray
    alive: np.ndarray
    shape: tuple[int, ...]
    seconds: float

    def name(self) -> str:
        """What was searched."""
        return "features " + "x".join(map(str, self.shape)) if self.shape else "latent codes"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """How searches are run; does not change what they find, but for a budget of seconds.

    Attributes:
      generator: whose features are searched.
      params: its parameters.
      settings: of the search.
      factor: the generator's side over the victim's.
      driver: of the steps' loop.
      options: what is kept on the way.
      mark: the search's digest, for its checkpoint.
      progress: called after every stretch of steps.
    """

    generator: StagedGenerator
    params: PyTree
    settings: Settings
    factor: int
    driver: Literal["python", "scan"]
    options: RunOptions
    mark: str
    progress: Progress | None = None

    def __call__(self, groups: list[Group]) -> list[StageResult]:
        """Take all groups through all stages; resumes from a checkpoint of the same search."""
        for folder in (self.options.dump, _parent(self.options.checkpoint)):
            if folder is not None:
                require_writable_folder(folder)
        weights = Weights(self.settings.total_variation, self.settings.image_l2)
        memory = self._memory(groups)
        while (index := len(memory.results)) <= self.settings.last_stage:
            stage = self._stage(memory.groups[0], index)
            self._search(stage, weights, memory)
            anchors, states = memory.begun
            images = [
                drive.images(stage, self.params, anchor, state.point)
                for anchor, state in zip(anchors, states, strict=True)
            ]
            fits = [
                drive.distances(weights, group.matching, pixels)
                for group, pixels in zip(memory.groups, images, strict=True)
            ]
            entering = memory.groups[0].state
            memory.results.append(
                StageResult(
                    distances=np.concatenate(jax.device_get(fits)),
                    images=np.concatenate(jax.device_get(images)).astype(np.float32),
                    losses=memory.losses,
                    alive=np.concatenate([np.asarray(state.alive) for state in states]),
                    shape=() if entering is None else entering.features.shape[2:],
                    seconds=memory.seconds - memory.stage_began,
                )
            )
            self._dump(index, memory.results[-1].images)
            if index < self.settings.last_stage:
                for i, (anchor, state) in enumerate(zip(anchors, states, strict=True)):
                    side, after = drive.leave(stage, self.params, anchor, state.point)
                    memory.groups[i] = Group(memory.groups[i].matching, side, after)
            memory.next_stage()
            self._save(memory)
        return memory.results

    def _stage(self, group: Group, index: int) -> Stage:
        one = jax.tree.map(lambda leaf: leaf[0], group.side)
        return make_stage(self.generator, index, one, self.settings, self.factor)

    def _search(self, stage: Stage, weights: Weights, memory: _Memory) -> None:
        """Advance all groups to the stage's end."""
        settings, options = self.settings, self.options
        total = settings.steps_of(stage.index)
        if not memory.begun[0]:
            memory.begun = self._begin(stage, memory.groups)
        anchors, states = memory.begun
        stretch = min(options.report_every, total)
        share = math.inf
        if settings.budget_seconds is not None:
            stretch = min(stretch, _STEPS_BETWEEN_CLOCKS)
            left = settings.budget_seconds - memory.stage_began
            share = max(left, 0.0) / (settings.last_stage + 1 - stage.index)
        pace = 0.0  # seconds of a step
        while (done := memory.losses.shape[1]) < total:
            spent = memory.seconds - memory.stage_began
            if done and spent >= share:
                break
            count = min(stretch - done % stretch, total - done)
            steps = np.arange(count)
            parts = np.maximum((done + steps) / total, (spent + steps * pace) / max(share, 1e-9))
            began = time.monotonic()
            losses = []
            for i, group in enumerate(memory.groups):
                states[i], values = drive.advance(
                    stage,
                    weights,
                    self.params,
                    group.matching,
                    anchors[i],
                    states[i],
                    rates(np.minimum(parts, 1), settings.learning_rate),
                    driver=self.driver,
                )
                losses.append(values)
            took = time.monotonic() - began
            if done:  # the first steps compile
                pace = took / count
            memory.seconds += took
            memory.losses = np.concatenate([memory.losses, np.concatenate(losses)], axis=1)
            now = done + count
            if done // options.checkpoint_every < now // options.checkpoint_every and now < total:
                self._save(memory)
            self._tell(memory, now)

    def _begin(self, stage: Stage, groups: Sequence[Group]) -> tuple[list[Anchor], list[State]]:
        radii = self.settings.radii_of(stage.index)
        begun = [drive.begin(stage, group.side, group.state, radii) for group in groups]
        return [anchor for anchor, _ in begun], [state for _, state in begun]

    def _tell(self, memory: _Memory, now: int) -> None:
        if self.progress is None:
            return
        last = self.settings.last_stage
        lengths = [self.settings.steps_of(k) for k in range(last + 1)]
        curves = [result.losses for result in memory.results] + [memory.losses]
        finite = [curve[np.isfinite(curve)] for curve in curves]
        least = min((float(curve.min()) for curve in finite if curve.size), default=math.inf)
        self.progress(sum(lengths[: len(memory.results)]) + now, sum(lengths), least)

    def _dump(self, index: int, images: np.ndarray) -> None:
        """One picture: searches from top to bottom, images from left to right."""
        if self.options.dump is None:
            return
        rows = [np.concatenate(list(row), axis=1) for row in images]
        pixels = np.round(np.nan_to_num(np.concatenate(rows)) * 255).astype(np.uint8)
        with atomic_write(self.options.dump / f"stage-{index}.png") as file:
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")

    def _memory(self, groups: list[Group]) -> _Memory:
        memory = _Memory(list(groups))
        path = self.options.checkpoint
        stored = None if path is None else checkpoint.read(path, mark=self.mark)
        if stored is None or path is None:
            return memory
        try:
            self._restore(memory, stored)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} does not fit this search ({error}); remove it to start anew."
            ) from error
        return memory

    def _restore(self, memory: _Memory, stored: dict[str, np.ndarray]) -> None:
        memory.seconds, memory.stage_began = (float(value) for value in stored["seconds"])
        memory.losses = stored["losses"]
        for k in range(int(stored["stages"])):
            fields = {name: stored[f"result/{k}/{name}"] for name in _FIELDS}
            shape, seconds = fields.pop("shape"), fields.pop("seconds")
            memory.results.append(
                StageResult(**fields, shape=tuple(map(int, shape)), seconds=float(seconds))
            )
        for i, group in enumerate(memory.groups):
            names = [name for name in ("features", "image") if f"group/{i}/{name}" in stored]
            parts = {name: jnp.asarray(stored[f"group/{i}/{name}"]) for name in names}
            state = GeneratorState(parts["features"], parts.get("image")) if parts else None
            side = _restored(group.side, stored, f"group/{i}/side")
            memory.groups[i] = Group(group.matching, side, state)
        if memory.losses.shape[1]:
            stage = self._stage(memory.groups[0], len(memory.results))
            anchors, states = self._begin(stage, memory.groups)
            states = [
                _restored(state, stored, f"group/{i}/search") for i, state in enumerate(states)
            ]
            memory.begun = anchors, states

    def _save(self, memory: _Memory) -> None:
        path = self.options.checkpoint
        if path is None:
            return
        arrays: dict[str, Any] = {
            "seconds": np.array([memory.seconds, memory.stage_began]),
            "losses": memory.losses,
            "stages": np.asarray(len(memory.results)),
        }
        for k, result in enumerate(memory.results):
            arrays |= {f"result/{k}/{name}": np.asarray(getattr(result, name)) for name in _FIELDS}
        for i, group in enumerate(memory.groups):
            arrays |= _named(group.side, f"group/{i}/side")
            for name in ("features", "image"):
                if (leaf := getattr(group.state, name, None)) is not None:
                    arrays[f"group/{i}/{name}"] = np.asarray(leaf)
        for i, state in enumerate(memory.begun[1]):
            arrays |= _named(state, f"group/{i}/search")
        checkpoint.write(path, arrays, mark=self.mark)


class _Memory:
    """What a run carries from stretch to stretch, and what its checkpoint holds."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.results: list[StageResult] = []
        self.seconds = 0.0
        self.next_stage()

    def next_stage(self) -> None:
        searches = sum(jax.tree.leaves(group.side)[0].shape[0] for group in self.groups)
        self.losses = np.zeros((searches, 0), np.float32)
        self.stage_began = self.seconds
        self.begun: tuple[list[Anchor], list[State]] = ([], [])


_FIELDS = ("distances", "images", "losses", "alive", "shape", "seconds")


def _parent(path: Path | None) -> Path | None:
    return None if path is None else path.parent


def _named(tree: PyTree, prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def _restored(like: PyTree, stored: dict[str, np.ndarray], prefix: str) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    found = [stored[f"{prefix}/{i}"] for i in range(len(leaves))]
    for old, new in zip(leaves, found, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(f"{prefix} has other shapes")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in found])
