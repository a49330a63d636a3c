"""A line of progress per stage of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PACE_SECONDS = 600.0  # that the remaining time is estimated from; searches report minutes apart


class StageProgress:
    """A rich progress line per stage, on standard error; silent when that is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=_PACE_SECONDS,
            disable=not console.is_terminal,
        )
        self._stage: str | None = None
        self._task: Any = None

    def __enter__(self) -> StageProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of a stage; a new stage finishes the last one.

        What follows a comma in the stage's words may change on the way.
        """
        name = stage.partition(",")[0]
        if name != self._stage:
            if self._task is not None:
                self._progress.update(self._task, completed=self._total)
            self._stage, self._task = name, self._progress.add_task(stage, total=total)
        self._total = total
        self._progress.update(self._task, completed=done, description=stage)
