"""Every option of the library as frozen data. No jax here: the command line is made from these."""

from jgia.config.ares import AresOptions, FirstLayer, FrontEnd, Inversion, SparseBasis
from jgia.config.client import ClientConfig, Optimizer, Protocol
from jgia.config.commands import AttackConfig, AttackName, AuditConfig, CraftConfig
from jgia.config.data import DataConfig
from jgia.config.defense import DefenseConfig, DefenseName
from jgia.config.gauss_newton import GaussNewtonOptions
from jgia.config.gifd import GifdOptions
from jgia.config.gifd_baselines import GglOptions, GiasOptions, LabelMappingOptions
from jgia.config.gradient_matching import MatchingOptions, RunOptions
from jgia.config.imprint import ImprintOptions
from jgia.config.knowledge import KnowledgeConfig
from jgia.config.model import ModelConfig, ModelName
from jgia.config.performance import PerformanceFlags
from jgia.config.prior import PriorOptions, TrainPriorConfig
from jgia.config.risk import AuditRiskOptions
from jgia.config.training import TrainConfig, TrainOptions

__all__ = [
    "AresOptions",
    "AttackConfig",
    "AttackName",
    "AuditConfig",
    "AuditRiskOptions",
    "ClientConfig",
    "CraftConfig",
    "DataConfig",
    "DefenseConfig",
    "DefenseName",
    "FirstLayer",
    "FrontEnd",
    "GaussNewtonOptions",
    "GglOptions",
    "GiasOptions",
    "GifdOptions",
    "ImprintOptions",
    "Inversion",
    "KnowledgeConfig",
    "LabelMappingOptions",
    "MatchingOptions",
    "ModelConfig",
    "ModelName",
    "Optimizer",
    "PerformanceFlags",
    "PriorOptions",
    "Protocol",
    "RunOptions",
    "SparseBasis",
    "TrainConfig",
    "TrainOptions",
    "TrainPriorConfig",
]
