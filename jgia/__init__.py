"""Measure how much of federated-learning clients' data leaks through shared updates.

Names are imported on first use, so that ``import jgia`` costs nothing until something runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jgia.attacks.labels import infer_labels as infer_labels
    from jgia.audit import AuditOutcome as AuditOutcome
    from jgia.audit import run_audit as run_audit
    from jgia.config import AresOptions as AresOptions
    from jgia.config import AttackConfig as AttackConfig
    from jgia.config import AuditConfig as AuditConfig
    from jgia.config import ClientConfig as ClientConfig
    from jgia.config import CraftConfig as CraftConfig
    from jgia.config import DataConfig as DataConfig
    from jgia.config import DefenseConfig as DefenseConfig
    from jgia.config import KnowledgeConfig as KnowledgeConfig
    from jgia.config import MatchingOptions as MatchingOptions
    from jgia.config import ModelConfig as ModelConfig
    from jgia.config import PerformanceFlags as PerformanceFlags
    from jgia.config import RunOptions as RunOptions
    from jgia.config import TrainOptions as TrainOptions
    from jgia.config.imprint import ImprintOptions as ImprintOptions
    from jgia.config.risk import RiskConfig as RiskConfig
    from jgia.data import Dataset as Dataset
    from jgia.data import load_dataset as load_dataset
    from jgia.defenses import detect_crafted as detect_crafted
    from jgia.defenses import make_defense as make_defense
    from jgia.explain import explain_defense as explain_defense
    from jgia.federated import client_update as client_update
    from jgia.federated import load_update as load_update
    from jgia.federated import save_update as save_update
    from jgia.federated import simulate_clients as simulate_clients
    from jgia.inspect import inspect_parameters as inspect_parameters
    from jgia.metrics import score as score
    from jgia.models import Victim as Victim
    from jgia.models import make_victim as make_victim
    from jgia.normalization import Normalization as Normalization
    from jgia.observation import Observation as Observation
    from jgia.observation import Reconstruction as Reconstruction
    from jgia.observation import Status as Status
    from jgia.observation import ThreatModel as ThreatModel
    from jgia.observation import Truth as Truth
    from jgia.observation import restrict as restrict
    from jgia.report import write_report as write_report
    from jgia.risk import EmbeddingRelease as EmbeddingRelease
    from jgia.risk import Prior as Prior
    from jgia.risk import RiskSettings as RiskSettings
    from jgia.risk import UpdateRelease as UpdateRelease
    from jgia.risk import invre as invre
    from jgia.risk_command import run_risk as run_risk
    from jgia.sweep import run_sweep as run_sweep
    from jgia.training import load_victim as load_victim
    from jgia.training import train_victim as train_victim

_EXPORTS = {
    "AresOptions": "jgia.config",
    "AttackConfig": "jgia.config",
    "AuditConfig": "jgia.config",
    "AuditOutcome": "jgia.audit",
    "ClientConfig": "jgia.config",
    "CraftConfig": "jgia.config",
    "DataConfig": "jgia.config",
    "Dataset": "jgia.data",
    "DefenseConfig": "jgia.config",
    "EmbeddingRelease": "jgia.risk",
    "ImprintOptions": "jgia.config.imprint",
    "KnowledgeConfig": "jgia.config",
    "MatchingOptions": "jgia.config",
    "ModelConfig": "jgia.config",
    "Normalization": "jgia.normalization",
    "Observation": "jgia.observation",
    "PerformanceFlags": "jgia.config",
    "Prior": "jgia.risk",
    "Reconstruction": "jgia.observation",
    "RiskConfig": "jgia.config.risk",
    "RiskSettings": "jgia.risk",
    "RunOptions": "jgia.config",
    "Status": "jgia.observation",
    "ThreatModel": "jgia.observation",
    "TrainOptions": "jgia.config",
    "Truth": "jgia.observation",
    "UpdateRelease": "jgia.risk",
    "Victim": "jgia.models",
    "client_update": "jgia.federated",
    "explain_defense": "jgia.explain",
    "infer_labels": "jgia.attacks.labels",
    "detect_crafted": "jgia.defenses",
    "inspect_parameters": "jgia.inspect",
    "invre": "jgia.risk",
    "load_dataset": "jgia.data",
    "load_update": "jgia.federated",
    "load_victim": "jgia.training",
    "make_defense": "jgia.defenses",
    "make_victim": "jgia.models",
    "restrict": "jgia.observation",
    "run_audit": "jgia.audit",
    "run_risk": "jgia.risk_command",
    "run_sweep": "jgia.sweep",
    "save_update": "jgia.federated",
    "score": "jgia.metrics",
    "simulate_clients": "jgia.federated",
    "train_victim": "jgia.training",
    "write_report": "jgia.report",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'jgia' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
