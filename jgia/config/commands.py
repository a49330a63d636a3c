"""What each command of the command line takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jgia import _checks
from jgia.config.ares import AresOptions
from jgia.config.client import ClientConfig, Protocol
from jgia.config.data import DataConfig
from jgia.config.defense import DefenseConfig
from jgia.config.imprint import ImprintOptions
from jgia.config.model import ModelConfig
from jgia.config.performance import PerformanceFlags

AttackName = Literal["ares", "rtf", "trap_weights", "qbi", "loki"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """One audit: whose data, which model, which round, which attack."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    defense: DefenseConfig = dataclasses.field(default_factory=DefenseConfig)
    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    imprint: ImprintOptions = dataclasses.field(default_factory=ImprintOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)

    attack: AttackName = "ares"
    """The attack to run: `ares`, or one of the baselines before it: `rtf` (Robbing the Fed; needs
    `--model imprint_cnn` or `imprint_mlp`), `trap_weights` and `qbi` (`--model mlp`), `loki`
    (`--model cnn`)."""

    batch: int = 32
    """Images the client holds."""

    seed: int = 0
    """Decides everything random: split, filters, order, probe."""

    lpips: bool = False
    """Also score LPIPS (needs the `lpips` extra)."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(AttackName), attack=self.attack)
        _checks.at_least(1, batch=self.batch)
        if self.client.num_clients > self.batch:
            raise ValueError(
                f"num_clients={self.client.num_clients} clients cannot share batch={self.batch} "
                "images: each needs at least one."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2^32 - 1, got {self.seed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CraftConfig:
    """Parameters that a malicious server would send, written to a file."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    ares: AresOptions = dataclasses.field(default_factory=AresOptions)

    seed: int = 0
    """Decides filters, query and head."""

    out: Path = Path("jgia-crafted")
    """Folder for `params.npz` (or .safetensors) and `victim.json`."""

    format: Literal["npz", "safetensors"] = "npz"
    """File format of the parameters."""

    layout: Literal["flax", "torch"] = "flax"
    """Names and axes: `flax` (conv1/kernel, HWIO) or `torch` (conv1.weight, OIHW)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """An update that was computed elsewhere on crafted parameters."""

    crafted: Path
    """Folder written by `jgia craft`."""

    update: Path
    """The client's update: .npz or .safetensors with the names of the parameters."""

    layout: Literal["flax", "torch"] = "flax"
    """Names and axes of the update."""

    protocol: Protocol = "fedsgd"
    """Whether the update is a gradient or a parameter difference; ARES reads both alike."""

    truth: str | None = None
    """Data specification of the client's images, if they are known, to score against."""

    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)

    seed: int = 0
    """Decides the rank probe."""

    out: Path = Path("jgia-report")
    """Folder for the report."""

    json: bool = False
    """Print result.json instead of the table."""
