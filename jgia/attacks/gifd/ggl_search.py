"""GGL's restarts, one after the other: rounds of CMA-ES, and their memory in a file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.gifd.run import Progress, StageResult
from jgia.attacks.gradient_matching import checkpoint
from jgia.attacks.gradient_matching.checkpoint import CheckpointError
from jgia.config.gifd_baselines import GglOptions
from jgia.config.gradient_matching import RunOptions
from jgia.observation import History

_WORST = 1e30  # instead of a loss that is not finite
_FRAMES = 8

Evaluate = Callable[[Array], tuple[Array, Array, Array]]
"""(losses, distances, pixels) of vectors; see :func:`jgia.attacks.gifd.ggl_space.evaluate`."""


class _Result(StageResult):
    """One stage, whose steps are rounds."""

    def name(self) -> str:
        """What was searched."""
        return "latent codes, by CMA-ES"


class _Memory:
    """What a restart found: the losses that CMA-ES was told, and the best candidate so far."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []
        self.loss, self.fit, self.seconds = math.inf, math.nan, 0.0
        self.images = np.zeros(())
        self.frames: dict[int, np.ndarray] = {}

    def look(self, losses: np.ndarray, fits: Array, pixels: Array) -> None:
        """Keep the best of some candidates, if it is better."""
        if not self.images.ndim:
            self.images = np.zeros(pixels.shape[1:], np.float32)
        least = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
        if losses[least] < self.loss:
            self.loss, self.fit = float(losses[least]), float(fits[least])
            self.images = np.asarray(pixels[least], np.float32)

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """All of it, by name."""
        frames = {f"{prefix}/frame/{done}": images for done, images in self.frames.items()}
        return frames | {
            f"{prefix}/told": np.stack(self.told),
            f"{prefix}/numbers": np.array([self.loss, self.fit, self.seconds]),
            f"{prefix}/images": self.images,
        }

    def restore(self, prefix: str, stored: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
        """Take over what :meth:`arrays` made; ``shape``: (most rounds, candidates of each)."""
        self.told = list(stored[f"{prefix}/told"])
        if len(self.told) > shape[0] or any(losses.shape != shape[1:] for losses in self.told):
            raise ValueError(f"{prefix} has other rounds")
        self.loss, self.fit, self.seconds = (float(v) for v in stored[f"{prefix}/numbers"])
        self.images = stored[f"{prefix}/images"]
        start = f"{prefix}/frame/"
        self.frames = {
            int(name.removeprefix(start)): images
            for name, images in stored.items()
            if name.startswith(start)
        }


class Search:
    """Runs restarts, and keeps the best candidate of each.

    A checkpoint holds no state of CMA-ES, which could only be pickled: it holds all losses. The
    same seeds draw the same candidates, and the same losses take CMA-ES to the same state.

    Args:
      cma: the package.
      options: see :class:`~jgia.config.gifd_baselines.GglOptions`.
      size: candidates evaluated at once.
      run_options: checkpoint, and rounds between two.
      mark: the search's digest, for its checkpoint.
      progress: called after every round.

    Attributes:
      rounds: done in all restarts.
      begun_anew: how often CMA-ES had converged.
      histories: of every restart.

    Raises:
      CheckpointError: the checkpoint is damaged, or another search wrote it.
    """

    def __init__(
        self,
        cma: Any,
        options: GglOptions,
        size: int,
        run_options: RunOptions,
        mark: str,
        progress: Progress | None,
    ) -> None:
        self.cma, self.options, self.size, self.progress = cma, options, size, progress
        self.run_options, self.mark = run_options, mark
        self.begun_anew = self.rounds = 0
        self.histories: list[History] = []
        self._memories: list[_Memory] = []
        self._stored = self._read()

    @property
    def evaluations(self) -> int:
        """Candidates that were evaluated."""
        return self.rounds * self.options.ggl_population

    def restart(self, evaluate: Evaluate, length: int, seed: int) -> None:
        """One search of vectors of so many entries."""
        options = self.options
        memory = self._memory(len(self.histories))
        share = math.inf
        if options.ggl_budget_seconds is not None:
            spent = sum(each.seconds for each in self._memories[: len(self.histories)])
            left = max(options.ggl_budget_seconds - spent, 0.0)
            share = left / (options.ggl_restarts - len(self.histories))
        seeds = np.random.SeedSequence(seed)
        strategy = self._strategy(length, seeds)
        shown = np.linspace(1, options.ggl_rounds, min(_FRAMES, options.ggl_rounds)).round()
        known = len(memory.told)
        for done in range(1, options.ggl_rounds + 1):
            began = time.monotonic()
            if done > known and done > 1 and memory.seconds >= share:
                break
            vectors = np.stack([strategy.ask() for _ in range(options.ggl_population)])
            if done > known:
                memory.told.append(self._values(evaluate, vectors, memory))
            losses = memory.told[done - 1]
            told = np.where(np.isfinite(losses), losses, _WORST).tolist()
            strategy.tell(list(zip(vectors, told, strict=True)))
            if strategy.should_stop():
                strategy = self._strategy(length, seeds)
                self.begun_anew += 1
            self.rounds += 1
            if done <= known:
                continue
            if done in shown:
                memory.frames[done] = memory.images
            memory.seconds += time.monotonic() - began
            if self.rounds % self.run_options.checkpoint_every == 0:
                self._save()
            self._tell()
        memory.frames[len(memory.told)] = memory.images
        if len(memory.told) > known:
            self._save()
        self.histories.append(_history(memory))

    def result(self) -> StageResult:
        """All restarts as one stage; curves of those that time cut short end in NaN."""
        longest = max(len(history.losses) for history in self.histories)
        curves = [
            np.pad(history.losses, (0, longest - len(history.losses)), constant_values=np.nan)
            for history in self.histories
        ]
        return _Result(
            distances=np.asarray([memory.fit for memory in self._memories]),
            images=np.stack([memory.images for memory in self._memories]),
            losses=np.stack(curves),
            alive=np.asarray([math.isfinite(memory.fit) for memory in self._memories]),
            shape=(),
            seconds=sum(memory.seconds for memory in self._memories),
        )

    def _strategy(self, length: int, seeds: np.random.SeedSequence) -> Any:
        (own,) = seeds.spawn(1)
        return self.cma.CMA(
            mean=np.zeros(length),
            sigma=self.options.ggl_sigma,
            population_size=self.options.ggl_population,
            seed=int(own.generate_state(1)[0]),
        )

    def _values(self, evaluate: Evaluate, vectors: np.ndarray, memory: _Memory) -> np.ndarray:
        """(P,) losses; the best candidate is kept."""
        collected = []
        for start in range(0, len(vectors), self.size):
            rows = vectors[start : start + self.size]
            short = self.size - len(rows)  # filled up, so that nothing compiles twice
            rows = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
            losses, fits, pixels = evaluate(jnp.asarray(rows, "float32"))
            losses = np.asarray(losses, np.float64)[: self.size - short]
            memory.look(losses, fits, pixels)
            collected.append(losses)
        return np.concatenate(collected)

    def _tell(self) -> None:
        if self.progress is not None:
            total = self.options.ggl_restarts * self.options.ggl_rounds
            self.progress(self.rounds, total, min(memory.loss for memory in self._memories))

    def _read(self) -> dict[str, np.ndarray] | None:
        path = self.run_options.checkpoint
        return None if path is None else checkpoint.read(path, mark=self.mark)

    def _memory(self, index: int) -> _Memory:
        """That of a restart, with what a checkpoint holds of it."""
        memory, stored = _Memory(), self._stored
        self._memories.append(memory)
        if stored is not None and f"{index}/told" in stored:
            try:
                rounds = self.options.ggl_rounds, self.options.ggl_population
                memory.restore(str(index), stored, rounds)
            except (KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{self.run_options.checkpoint} does not fit this search ({error}); remove it "
                    "to start anew."
                ) from error
        return memory

    def _save(self) -> None:
        path = self.run_options.checkpoint
        if path is None:
            return
        arrays: dict[str, np.ndarray] = {}
        for r, memory in enumerate(self._memories):
            arrays |= memory.arrays(str(r))
        checkpoint.write(path, arrays, mark=self.mark)


def _history(memory: _Memory) -> History:
    curve = [
        losses[np.isfinite(losses)].min() if np.isfinite(losses).any() else math.nan
        for losses in memory.told
    ]
    return History(
        steps=np.arange(1, len(curve) + 1),
        losses=np.asarray(curve, np.float32),
        frame_steps=np.asarray(list(memory.frames)),
        frames=np.stack(list(memory.frames.values())),
    )
