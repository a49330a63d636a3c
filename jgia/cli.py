"""The command line: ``jgia audit``, ``risk``, ``craft``, ``attack`` and the others."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jgia._commands import (
    Audit,
    Craft,
    Inspect,
    Risk,
    Sweep,
    TrainPrior,
    TrainVictim,
)
from jgia._commands import (
    Command as _Command,
)
from jgia._io import require_writable_folder
from jgia._progress import StageProgress
from jgia.config import AttackConfig, CraftConfig, TrainPriorConfig
from jgia.config.risk import RiskConfig
from jgia.config.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from jgia.audit import AuditOutcome

_DESCRIPTION = (
    "jgia measures how much of federated-learning clients' data leaks through the updates they "
    "share. Use it on clients you own or are allowed to audit."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 after a finished run (whatever was or was not recovered or found), 1 after a sweep in which
    a cell failed, 2 for bad input with one clear line on standard error, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_parse(argv), argv)
    except KeyboardInterrupt:
        print("interrupted; earlier results are as they were", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> Any:
    """The command of the arguments; exits with 2 and one line where a value is out of range."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                _Command,  # pyright: ignore[reportArgumentType]
                prog="jgia",
                description=_DESCRIPTION,
                args=_named(argv),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    finally:
        sys.stderr.write(_plain_complaint(complaint.getvalue()))


def _named(argv: list[str]) -> list[str]:
    """``attack METHOD ...`` as options: of an audit, or of an attack on the update that is given.

    >>> _named(["attack", "dlg", "--batch", "1"])
    ['audit', '--attack', 'dlg', '--batch', '1']
    """
    if argv[:1] != ["attack"] or argv[1:2] == [] or argv[1].startswith("-"):
        return argv
    if any(argument.partition("=")[0] == "--update" for argument in argv):
        return ["attack", "--method", *argv[1:]]
    return ["audit", "--attack", *argv[1:]]


def _plain_complaint(text: str) -> str:
    """What tyro says, but the checks of the options (a box in tyro's words) as one line."""
    unboxed = _one_line(re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]|-{4,}", " ", text))
    message = re.search(r"Error parsing __\S+: (.*?) For full helptext, ", unboxed)
    return f"error: {message[1]}\n" if message else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _run(command: Any, argv: list[str]) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    if isinstance(command, Audit):
        return _audit(command, argv, console)
    if isinstance(command, Craft):
        return _craft(command.config, console)
    if isinstance(command, Risk):
        return _risk(command.config, argv, console)
    if isinstance(command, TrainVictim):
        return _train_victim(command.config, argv, console)
    if isinstance(command, TrainPrior):
        return _train_prior(command.config, argv, console)
    if isinstance(command, Sweep):
        return _sweep(command, console)
    if isinstance(command, Inspect):
        return _inspect(command)
    return _attack(command.config, argv, console)


def _audit(command: Audit, argv: list[str], console: Console) -> int:
    if command.save_update is not None and command.save_update.suffix not in (
        ".npz",
        ".safetensors",
    ):
        raise ValueError(
            f"--save-update needs a .npz or .safetensors file, got {str(command.save_update)!r}."
        )
    require_writable_folder(command.out)
    from jgia.audit import reproduce_command, run_audit

    with StageProgress(console) as progress:
        outcome = run_audit(
            command.config, command=reproduce_command(argv), progress=progress.update
        )
        if command.save_update is not None:
            from jgia.federated import save_update

            save_update(command.save_update, outcome.observation.update)
        progress.update("writing the report", 0, 1)
        paths = _write(command.out, outcome)
    _show(outcome, paths, as_json=command.json)
    return 0


def _craft(config: CraftConfig, console: Console) -> int:
    require_writable_folder(config.out)
    from jgia.exchange import write_crafted

    with StageProgress(console) as progress:
        progress.update("crafting parameters", 0, 1)
        paths = write_crafted(config)
    for path in paths:
        print(path)
    return 0


def _attack(config: AttackConfig, argv: list[str], console: Console) -> int:
    require_writable_folder(config.out)
    from jgia.audit import reproduce_command
    from jgia.exchange import attack_update

    with StageProgress(console) as progress:
        outcome = attack_update(config, command=reproduce_command(argv), progress=progress.update)
        paths = _write(config.out, outcome)
    _show(outcome, paths, as_json=config.json)
    return 0


def _risk(config: RiskConfig, argv: list[str], console: Console) -> int:
    require_writable_folder(config.out)
    from jgia.audit import reproduce_command
    from jgia.risk_command import run_risk, write_risk

    with StageProgress(console) as progress:
        outcome = run_risk(config, command=reproduce_command(argv), progress=progress.update)
        paths = write_risk(outcome, config)
    if config.json:
        print(json.dumps(outcome.result, indent=2))
        return 0
    from rich.console import Console

    from jgia.report.console import print_risk

    print_risk(Console(), outcome.result, paths)
    return 0


def _train_victim(config: TrainConfig, argv: list[str], console: Console) -> int:
    require_writable_folder(config.out)
    from jgia.audit import reproduce_command
    from jgia.train_command import run_training

    with StageProgress(console) as progress:
        outcome = run_training(config, command=reproduce_command(argv), progress=progress.update)
    trained = outcome.trained
    for part, metrics, count in (
        ("training", trained.train, outcome.num_train),
        ("test", trained.test, outcome.num_test),
    ):
        if metrics is not None:
            print(f"{metrics.accuracy:.1%} of {count} {part} images right, loss {metrics.loss:.3f}")
    if (risk := trained.history[-1].risk) is not None:
        noise = config.risk_noise_std
        print(f"{risk:.1%} of an image recoverable from its gradient at noise {noise:g} (estimate)")
    for path in outcome.paths:
        print(path)
    return 0


def _train_prior(config: TrainPriorConfig, argv: list[str], console: Console) -> int:
    require_writable_folder(config.out)
    from jgia.audit import reproduce_command
    from jgia.train_prior_command import run_prior_training

    with StageProgress(console) as progress:
        outcome = run_prior_training(
            config, command=reproduce_command(argv), progress=progress.update
        )
    last = outcome.trained.history[-1]
    shown = f"{last.kimg:g} thousand images shown in {last.seconds / 60:.1f} minutes"
    if last.kid is not None:
        shown += f"; kernel distance {last.kid:.4f} from the training images"
    print(shown)
    for path in outcome.paths:
        print(path)
    return 0


def _sweep(command: Sweep, console: Console) -> int:
    from jgia.config.sweep import read_sweep

    sweep = read_sweep(command.config)
    from rich.console import Console

    from jgia.sweep import run_sweep
    from jgia.sweep.console import SweepLine, print_cells, print_results

    if command.dry_run:
        print_cells(Console(), sweep, command.out, retry_failed=command.retry_failed)
        return 0
    with SweepLine(console) as line:
        results = run_sweep(
            sweep,
            command.out,
            retry_failed=command.retry_failed,
            minutes=command.minutes,
            progress=line.update,
        )
    print_results(Console(), results, command.out)
    return 1 if results.counts()["failed"] else 0


def _inspect(command: Inspect) -> int:
    from jgia.inspect import inspect_parameters, inspection_lines

    report = inspect_parameters(command.params)
    if command.json:
        fields = {**dataclasses.asdict(report), "suspicion": report.suspicion}
        print(json.dumps(fields, indent=2))
    else:
        print("\n".join(map(_printable, inspection_lines(report))))
    return 0


def _printable(line: str) -> str:
    """A line that may hold names from a file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _write(folder: Path, outcome: AuditOutcome) -> dict[str, Path]:
    import numpy as np

    from jgia.report import SearchHistory, write_report

    reconstruction, truth = outcome.reconstruction, outcome.truth
    return write_report(
        folder,
        outcome.result,
        originals=None if truth is None else np.asarray(truth.images),
        reconstructions=np.asarray(reconstruction.images),
        scores=np.asarray(reconstruction.scores),
        statuses=[str(status) for status in reconstruction.statuses],
        labels=outcome.captions,
        classes=None if reconstruction.labels is None else np.asarray(reconstruction.labels),
        history=None
        if (history := reconstruction.history) is None
        else SearchHistory(**vars(history)),
        pixel_errors=outcome.pixel_errors,
    )


def _show(outcome: AuditOutcome, paths: dict[str, Path], *, as_json: bool) -> None:
    if as_json:
        from jgia.report import to_json

        sys.stdout.write(to_json(outcome.result))
        return
    from rich.console import Console

    from jgia.report import print_summary

    print_summary(Console(), outcome.result, paths)
