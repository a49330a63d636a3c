"""ARES: read activations out of a crafted fully connected layer, invert them to images."""

from jgia.attacks.ares.attack import attack
from jgia.attacks.ares.craft import craft, fit_thresholds, query_features
from jgia.attacks.ares.invert import invert, solve_candidates, solver_dtype
from jgia.attacks.ares.leak import Candidates, leak
from jgia.attacks.ares.plan import Plan, attackable_layers, read_plan
from jgia.attacks.ares.theory import (
    expected_singletons,
    rtf_bound,
    singleton_standard_deviation,
)
from jgia.attacks.ares.verdict import Inversion
from jgia.config import AresOptions, PerformanceFlags

__all__ = [
    "AresOptions",
    "Candidates",
    "Inversion",
    "PerformanceFlags",
    "Plan",
    "attack",
    "attackable_layers",
    "craft",
    "expected_singletons",
    "fit_thresholds",
    "invert",
    "leak",
    "query_features",
    "read_plan",
    "rtf_bound",
    "singleton_standard_deviation",
    "solve_candidates",
    "solver_dtype",
]
