"""GIFD: search a generator's latent codes, then its features, for images whose update matches.

:func:`attack` takes an observation and a prior, :func:`attack_clients` many observations of one
round; :func:`attack_with_label_mapping` is for a conditional prior of other classes than the
victim's. :func:`attack_gias` and :func:`attack_ggl` are baselines on the same prior. The parts are
public: :func:`matching_distance` (a jvp, then a vjp), :func:`project_l1` (Newton's method),
:func:`estimate_transform` (a defense as the update shows it), :func:`map_labels` (the classes that
images look like).
"""

from jgia.attacks.gifd.attack import attack, attack_clients
from jgia.attacks.gifd.ggl import attack_ggl, require_cmaes
from jgia.attacks.gifd.gias import attack_gias
from jgia.attacks.gifd.label_mapping import attack_with_label_mapping, map_labels
from jgia.attacks.gifd.matching import Matching, make_matching, matching_distance
from jgia.attacks.gifd.prepare import TrainedGenerator, check_prior
from jgia.attacks.gifd.projection import project_l1
from jgia.attacks.gifd.run import StageResult
from jgia.attacks.gifd.settings import Settings, settings
from jgia.attacks.gifd.transform import Transform, estimate_transform

__all__ = [
    "Matching",
    "Settings",
    "StageResult",
    "TrainedGenerator",
    "Transform",
    "attack",
    "attack_clients",
    "attack_ggl",
    "attack_gias",
    "attack_with_label_mapping",
    "check_prior",
    "estimate_transform",
    "make_matching",
    "map_labels",
    "matching_distance",
    "project_l1",
    "require_cmaes",
    "settings",
]
