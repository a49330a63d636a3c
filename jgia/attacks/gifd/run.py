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
from jgia.attacks.gifd.plan import Plan
from jgia.attacks.gifd.stages import Anchor, Stage, State
from jgia.attacks.gradient_matching import checkpoint
from jgia.attacks.gradient_matching.checkpoint import CheckpointError
from jgia.config.gradient_matching import RunOptions
from jgia.generators.protocol import GeneratorState, Side

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
      plan: what is searched.
      driver: of the steps' loop.
      options: what is kept on the way.
      mark: the search's digest, for its checkpoint.
      progress: called after every stretch of steps.
    """

    plan: Plan
    driver: Literal["python", "scan"]
    options: RunOptions
    mark: str
    progress: Progress | None = None

    def __call__(self, groups: list[Group]) -> list[StageResult]:
        """Take all groups through all stages; resumes from a checkpoint of the same search."""
        plan, last = self.plan, len(self.plan.steps) - 1
        check_folders(self.options)
        memory = self._memory(groups)
        while (index := len(memory.results)) <= last:
            stage, params = self._stage(memory.groups[0], index), plan.params(index)
            self._search(index, stage, memory)
            anchors, states = memory.begun
            images = [
                drive.images(stage, params, anchor, state.point)
                for anchor, state in zip(anchors, states, strict=True)
            ]
            fits = [
                drive.distances(plan.weights, group.matching, pixels)
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
            if self.options.dump is not None:
                draw_images(self.options.dump / f"stage-{index}.png", memory.results[-1].images)
            if index < last:
                for i, (anchor, state) in enumerate(zip(anchors, states, strict=True)):
                    side, after = plan.leave(stage, anchor, state.point)
                    memory.groups[i] = Group(memory.groups[i].matching, side, after)
            memory.next_stage()
            self._save(memory)
        return memory.results

    def _stage(self, group: Group, index: int) -> Stage:
        def one(side: Side) -> Side:
            return jax.tree.map(lambda leaf: leaf[0], self.plan.inputs(index, side))

        return self.plan.stage(index, jax.eval_shape(one, group.side))

    def _search(self, index: int, stage: Stage, memory: _Memory) -> None:
        """Advance all groups to the stage's end."""
        plan, options = self.plan, self.options
        total, params = plan.steps[index], plan.params(index)
        if not memory.begun[0]:
            memory.begun = self._begin(index, stage, memory.groups)
        anchors, states = memory.begun
        stretch = min(options.report_every, total)
        share = math.inf
        if plan.budget_seconds is not None:
            stretch = min(stretch, _STEPS_BETWEEN_CLOCKS)
            left = max(plan.budget_seconds - memory.stage_began, 0.0)
            share = left * total / sum(plan.steps[index:])
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
                    plan.weights,
                    params,
                    group.matching,
                    anchors[i],
                    states[i],
                    plan.rates(index, np.minimum(parts, 1)),
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

    def _begin(
        self, index: int, stage: Stage, groups: Sequence[Group]
    ) -> tuple[list[Anchor], list[State]]:
        plan, radii = self.plan, self.plan.radii(index)
        begun = [
            drive.begin(stage, plan.inputs(index, group.side), group.state, radii)
            for group in groups
        ]
        return [anchor for anchor, _ in begun], [state for _, state in begun]

    def _tell(self, memory: _Memory, now: int) -> None:
        if self.progress is None:
            return
        lengths = self.plan.steps
        curves = [result.losses for result in memory.results] + [memory.losses]
        finite = [curve[np.isfinite(curve)] for curve in curves]
        least = min((float(curve.min()) for curve in finite if curve.size), default=math.inf)
        self.progress(sum(lengths[: len(memory.results)]) + now, sum(lengths), least)

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
            index = len(memory.results)
            stage = self._stage(memory.groups[0], index)
            anchors, states = self._begin(index, stage, memory.groups)
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


def check_folders(options: RunOptions) -> None:
    """Make the folders that a run writes into.

    Raises:
      ValueError: one cannot be written.
    """
    parent = None if options.checkpoint is None else options.checkpoint.parent
    for folder in (options.dump, parent):
        if folder is not None:
            require_writable_folder(folder)


def draw_images(path: Path, images: np.ndarray) -> None:
    """One picture of (S, B, H, W, C): searches from top to bottom, images from left to right."""
    rows = [np.concatenate(list(row), axis=1) for row in images]
    pixels = np.round(np.nan_to_num(np.concatenate(rows)) * 255).astype(np.uint8)
    with atomic_write(path) as file:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")


def _named(tree: PyTree, prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


def _restored(like: PyTree, stored: dict[str, np.ndarray], prefix: str) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    found = [stored[f"{prefix}/{i}"] for i in range(len(leaves))]
    for old, new in zip(leaves, found, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(f"{prefix} has other shapes")
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in found])
