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
from jgia.config.gauss_newton import GaussNewtonOptions
from jgia.config.gifd import GifdOptions
from jgia.config.gifd_baselines import GglOptions, GiasOptions, LabelMappingOptions
from jgia.config.gradient_matching import MatchingOptions, RunOptions
from jgia.config.imprint import ImprintOptions
from jgia.config.knowledge import KnowledgeConfig
from jgia.config.model import ModelConfig
from jgia.config.performance import PerformanceFlags
from jgia.config.risk import AuditRiskOptions

AttackName = Literal[
    "ares",
    "rtf",
    "trap_weights",
    "qbi",
    "loki",
    "analytic",
    "gauss_newton",
    "dlg",
    "idlg",
    "inverting_gradients",
    "see_through",
    "gifd",
    "gias",
    "ggl",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """One audit: whose data, which model, which round, which attack."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    defense: DefenseConfig = dataclasses.field(default_factory=DefenseConfig)
    knowledge: KnowledgeConfig = dataclasses.field(default_factory=KnowledgeConfig)
    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    imprint: ImprintOptions = dataclasses.field(default_factory=ImprintOptions)
    matching: MatchingOptions = dataclasses.field(default_factory=MatchingOptions)
    gauss_newton: GaussNewtonOptions = dataclasses.field(default_factory=GaussNewtonOptions)
    gifd: GifdOptions = dataclasses.field(default_factory=GifdOptions)
    mapping: LabelMappingOptions = dataclasses.field(default_factory=LabelMappingOptions)
    gias: GiasOptions = dataclasses.field(default_factory=GiasOptions)
    ggl: GglOptions = dataclasses.field(default_factory=GglOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)
    risk: AuditRiskOptions = dataclasses.field(default_factory=AuditRiskOptions)

    attack: AttackName = "ares"
    """The attack to run. A malicious server: `ares`, or one of the baselines before it: `rtf`
    (Robbing the Fed; needs `--model imprint_cnn` or `imprint_mlp`), `trap_weights` and `qbi`
    (`--model mlp`), `loki` (`--model cnn`). An honest but curious one: `analytic` (exact, layer by
    layer), `gauss_newton` (most probable under the noise and a prior from public images),
    gradient matching: `dlg`, `idlg`, `inverting_gradients`, `see_through`, or with a generator that
    knows such images (`--prior`): `gifd`, or `gias` and `ggl` before it."""

    prior: str | None = None
    """The generator that `gifd`, `gias` and `ggl` search: the name of a bundled prior, or a folder
    written by `jgia train-prior` on other images than the client's."""

    trained: Path | None = None
    """Attack what honest training sends: a folder written by `jgia train-victim`, instead of
    `--model` with random parameters; `--batch-norm` may change its mode. Not for attacks that
    choose the parameters."""

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
        if self.risk.risk_images > self.batch:
            raise ValueError(
                f"risk_images={self.risk.risk_images} exceeds batch={self.batch}: they are among "
                "the client's images."
            )
        if self.risk.risk_images and self.client.num_clients > 1:
            raise ValueError("risk_images estimates one client's update; use num_clients=1.")
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
    """An update that was computed elsewhere."""

    method: AttackName = "ares"
    """The attack; also `jgia attack METHOD --update ...`."""

    update: Path
    """The client's update: .npz or .safetensors with the names of the parameters."""

    crafted: Path | None = None
    """Folder written by `jgia craft`, whose parameters were sent (ares)."""

    trained: Path | None = None
    """Folder written by `jgia train-victim`, whose parameters were sent (attacks of an honest but
    curious server)."""

    layout: Literal["flax", "torch"] = "flax"
    """Names and axes of the update."""

    protocol: Protocol = "fedsgd"
    """Whether the update is a gradient or a parameter difference; ARES reads both alike."""

    num_examples: int | None = None
    """Images behind the update. Gradient matching has to know."""

    labels: tuple[int, ...] | None = None
    """Their labels, if they are known."""

    local_steps: int | None = None
    """FedAvg: the client's optimizer steps, if they are known."""

    local_epochs: int = 1
    """FedAvg: passes over its images in these steps."""

    local_learning_rate: float | None = None
    """FedAvg: its learning rate, if it is known."""

    public: str | None = None
    """Data specification of public images that resemble the client's; `gauss_newton` has to have
    some."""

    prior: str | None = None
    """The generator that `gifd`, `gias` and `ggl` search: the name of a bundled prior, or a folder
    written by `jgia train-prior`."""

    truth: str | None = None
    """Data specification of the client's images, if they are known, to score against."""

    ares: AresOptions = dataclasses.field(default_factory=AresOptions)
    imprint: ImprintOptions = dataclasses.field(default_factory=ImprintOptions)
    matching: MatchingOptions = dataclasses.field(default_factory=MatchingOptions)
    gauss_newton: GaussNewtonOptions = dataclasses.field(default_factory=GaussNewtonOptions)
    gifd: GifdOptions = dataclasses.field(default_factory=GifdOptions)
    mapping: LabelMappingOptions = dataclasses.field(default_factory=LabelMappingOptions)
    gias: GiasOptions = dataclasses.field(default_factory=GiasOptions)
    ggl: GglOptions = dataclasses.field(default_factory=GglOptions)
    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    performance: PerformanceFlags = dataclasses.field(default_factory=PerformanceFlags)

    seed: int = 0
    """Decides the rank probe, and where searches start."""

    out: Path = Path("jgia-report")
    """Folder for the report."""

    json: bool = False
    """Print result.json instead of the table."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(AttackName), method=self.method)
        if (self.crafted is None) == (self.trained is None):
            raise ValueError(
                "give the parameters that were sent: --crafted with a folder from 'jgia craft', or "
                "--trained with one from 'jgia train-victim'."
            )
        if (self.method == "ares") != (self.crafted is not None):
            raise ValueError(
                f"method {self.method!r} does not read updates on "
                f"{'crafted' if self.crafted else 'trained'} parameters; ares needs --crafted, the "
                "attacks of an honest but curious server --trained."
            )
