"""GIFD: search a generator's latent codes, then its features, for images whose update matches.

:func:`attack` takes an observation and a prior, :func:`attack_clients` many observations of one
round. The parts are public: :func:`matching_distance` (a jvp, then a vjp), :func:`project_l1`
(Newton's method), :func:`estimate_transform` (a defense as the update shows it).
"""

from jgia.attacks.gifd.attack import TrainedGenerator, attack, attack_clients
from jgia.attacks.gifd.matching import Matching, make_matching, matching_distance
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
    "estimate_transform",
    "make_matching",
    "matching_distance",
    "project_l1",
    "settings",
]
