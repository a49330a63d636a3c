"""ARES: read activations out of a crafted fully connected layer, invert them to images."""

from jgia.attacks.ares.attack import attack
from jgia.attacks.ares.bounds import (
    RecoveryBound,
    basis_pursuit_bound,
    lasso_bound,
    lasso_lam,
    readout_noise_std,
    restricted_isometry_constant,
    rip_constants,
)
from jgia.attacks.ares.calibrate import fit_thresholds
from jgia.attacks.ares.candidates import Candidates
from jgia.attacks.ares.craft import craft, query_features
from jgia.attacks.ares.invert import invert, solve_candidates, solver_dtype
from jgia.attacks.ares.leak import leak
from jgia.attacks.ares.nonlinearity import (
    LassoConstants,
    constrained_lasso_error,
    generalized_lasso_rate,
    lasso_constants,
)
from jgia.attacks.ares.phase import (
    active_probability,
    active_second_moment,
    masked_recovery_probability,
    needed_neurons,
    statistical_dimension,
    sufficient_equations,
)
from jgia.attacks.ares.plan import Plan, attackable_layers, read_plan
from jgia.attacks.ares.theory import (
    example_isolation_rate,
    expected_singletons,
    qbi_bias,
    row_isolation_rate,
    rtf_bound,
    rtf_one_shot_bound,
    singleton_standard_deviation,
    two_layer_rate,
)
from jgia.attacks.ares.verdict import Inversion
from jgia.config import AresOptions, PerformanceFlags

__all__ = [
    "AresOptions",
    "Candidates",
    "Inversion",
    "LassoConstants",
    "PerformanceFlags",
    "Plan",
    "RecoveryBound",
    "active_probability",
    "active_second_moment",
    "attack",
    "attackable_layers",
    "basis_pursuit_bound",
    "constrained_lasso_error",
    "craft",
    "example_isolation_rate",
    "expected_singletons",
    "fit_thresholds",
    "generalized_lasso_rate",
    "invert",
    "lasso_bound",
    "lasso_constants",
    "lasso_lam",
    "leak",
    "masked_recovery_probability",
    "needed_neurons",
    "qbi_bias",
    "query_features",
    "read_plan",
    "readout_noise_std",
    "restricted_isometry_constant",
    "rip_constants",
    "row_isolation_rate",
    "rtf_bound",
    "rtf_one_shot_bound",
    "singleton_standard_deviation",
    "solve_candidates",
    "solver_dtype",
    "statistical_dimension",
    "sufficient_equations",
    "two_layer_rate",
]
