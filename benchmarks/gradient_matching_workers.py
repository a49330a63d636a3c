"""Contenders in processes of their own that take turns: fair ratios on a machine that is shared."""

from __future__ import annotations

import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

_HERE = Path(__file__).resolve().parent
_PAUSE_S = 0.3  # threads of the contender before spin for a while


class Failed(RuntimeError):
    """A contender said that it cannot, or did not answer in time."""


class Worker:
    """One contender: commands as JSON lines, one answer each.

    Args:
      script: ``"ours"`` or ``"peer"``.
      python: its interpreter.
      threads: 1 or 2; 0 for as many as there are.
      environment: set on top of the machine's.
      benchmark: whose script: the first part of its name.
    """

    def __init__(
        self,
        script: str,
        python: str = sys.executable,
        *,
        threads: int = 2,
        environment: Mapping[str, str] | None = None,
        benchmark: str = "gradient_matching",
    ) -> None:
        self.threads = threads
        own = {}
        if threads:
            own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if script == "ours":
            paths = [str(_HERE.parent), str(_HERE.parent / "kernels"), str(_HERE)]
            own |= {"PYTHONPATH": os.pathsep.join(paths)}
        self._errors: collections.deque[str] = collections.deque(maxlen=20)
        self._process = subprocess.Popen(
            [python, str(_HERE / f"{benchmark}_{script}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own | dict(environment or {}),
        )
        if threads:
            _limit_cores(self._process.pid, threads)
        self._lines: queue.Queue[str] = queue.Queue()
        for read in (self._read, self._read_errors):
            threading.Thread(target=read, daemon=True).start()

    def ask(self, timeout_s: float | None = None, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
          Failed: it failed, ended, or was too late; it is stopped then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty as error:
            self.close()
            raise Failed(f"no answer in {timeout_s:.0f} s") from error
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            last = [text for text in self._errors if text.strip()][-1:] or ["no message"]
            raise Failed(f"the process ended: {last[0].strip()[:300]}")
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)


class Turn(NamedTuple):
    """A contender's part in a round: its process, the command, and how long the first may take."""

    name: str
    worker: Worker
    command: dict[str, Any]
    limit_s: float = 900.0


def rounds(turns: list[Turn], *, repeats: int) -> dict[str, dict[str, Any]]:
    """First call of each, then repeats in turn: seconds and processor seconds by name."""
    firsts: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {turn.name: [] for turn in turns}
    failed: dict[str, str] = {}
    for turn in turns:
        try:
            firsts[turn.name] = turn.worker.ask(turn.limit_s, **turn.command)["seconds"]
        except Failed as error:
            failed[turn.name] = str(error)
    for _ in range(repeats):
        for turn in turns:
            if turn.name in failed:
                continue
            time.sleep(_PAUSE_S)
            reply = turn.worker.ask(turn.limit_s, **turn.command)
            times[turn.name].append((reply["seconds"], reply["cpu_s"]))
    found: dict[str, dict[str, Any]] = {
        name: {"failed": message} for name, message in failed.items()
    }
    for name, pairs in times.items():
        if pairs:
            seconds, cpu = (np.asarray(v) for v in zip(*pairs, strict=True))
            found[name] = {
                "first_s": firsts[name],
                "best_s": float(seconds.min()),
                "median_s": float(np.median(seconds)),
                "cpu_best_s": float(cpu.min()),
                "repeats": len(pairs),
            }
    return found


def _limit_cores(process: int, count: int) -> None:
    """As many cores as threads, since XLA takes no heed of how many it is told to use."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process, cores[:count])
