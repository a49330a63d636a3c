"""What the command line parses: one class per command, with its help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jgia.config import AttackConfig, AuditConfig, CraftConfig, TrainConfig, TrainPriorConfig
from jgia.config.risk import RiskConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Measure how much of a client's images one shared update gives away.

    Loads images, lets a malicious server craft the model's parameters, simulates one client
    update on a private batch, runs the attack on that update alone, scores the result against
    the private images, and writes report.html, result.json, reconstructions.npz and grid.png.

    With no options it audits 32 sample images that ship with the package, in about a minute.
    """

    config: AuditConfig = dataclasses.field(default_factory=AuditConfig)

    out: Path = Path("jgia-report")
    """Folder for the report; made if it is missing."""

    save_update: Path | None = None
    """Also write the client's update to this .npz or .safetensors file."""

    json: bool = False
    """Print result.json to standard output instead of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Craft:
    """Write the parameters a malicious server would send, to try on your own client.

    Your framework loads them, computes one update on its own images, and `jgia attack` reads
    that update. Parameters come in this library's layout or in PyTorch's.
    """

    config: CraftConfig = dataclasses.field(default_factory=CraftConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """Attack an update that was computed elsewhere.

    It belongs to parameters from `jgia craft` (ares) or from `jgia train-victim` (the others).

    Without an update, `jgia attack METHOD ...` simulates the client: it is short for
    `jgia audit --attack METHOD ...` and takes the same options.
    """

    config: AttackConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Risk:
    """Estimate, without attacking, how much of each image one shared update gives away.

    From the singular values of the update's Jacobian: the smallest error that any attack can have,
    as a score from 0 (nothing leaks) to 1, per image, pixel and layer. Writes risk.json, risk.npz
    and figures.
    """

    config: RiskConfig = dataclasses.field(default_factory=RiskConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainVictim:
    """Train a victim on images, so that attacks meet parameters as an honest server has them.

    Writes params.npz, victim.json (the model, with the running statistics of its batch
    normalizations) and training.json (loss and accuracy of every epoch). Killed and started again
    with the same options, it goes on after the last whole epoch, to the same result.
    """

    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPrior:
    """Train a generator of images such as clients hold, for attacks that search one.

    Writes prior.safetensors and prior.json, samples.png and log.csv, all of them at every
    checkpoint. Killed and started again with the same options, it goes on from the last one.
    Train it on other images than those of the clients that are audited.
    """

    config: TrainPriorConfig = dataclasses.field(default_factory=TrainPriorConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Run many audits from one TOML file, into one table; killed and started again, it goes on.

    Every cell is one `jgia audit`. OUT gets a record for every cell, results.csv, figures/*.png and
    sweep.json. Cells that the library refuses are recorded with the reason.
    """

    config: tyro.conf.Positional[Path]
    """TOML file: [base] options, [axes] to cross, [[zip]] groups, single [[cells]], seeds."""

    out: Path = Path("jgia-sweep")
    """Folder for the results; finished cells that it holds are not run again."""

    dry_run: bool = False
    """Check the file and list the cells; run nothing."""

    retry_failed: bool = False
    """Run cells again that failed. Refused ones would be refused again."""

    minutes: float | None = None
    """Start no cell later than this; the next call goes on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look for marks of an attack in parameters that a server sent, before training on them.

    Needs no model and no data. Prints the decision with its reasons, and every check's score
    beside the score at which it flags. The exit code is 0 whatever was found.
    """

    params: tyro.conf.Positional[Path]
    """.npz or .safetensors file in this library's layout or PyTorch's, or a folder written by
    `jgia craft`."""

    json: bool = False
    """Print the report as JSON instead of lines."""


Command = (
    Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Craft, tyro.conf.subcommand("craft")]
    | Annotated[Attack, tyro.conf.subcommand("attack")]
    | Annotated[Risk, tyro.conf.subcommand("risk")]
    | Annotated[TrainVictim, tyro.conf.subcommand("train-victim")]
    | Annotated[TrainPrior, tyro.conf.subcommand("train-prior")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)
"""Any of them: what `jgia` parses."""
