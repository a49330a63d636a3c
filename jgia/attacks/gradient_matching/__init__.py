"""Gradient matching: search for images whose update is the client's.

:func:`attack` runs one of the published searches on an observation. Its parts are public:
:func:`make_problem`, then ``init``, ``step`` and ``finalize`` of
:mod:`~jgia.attacks.gradient_matching.search`, driven by :func:`run` or by a loop of your own.
"""

from jgia.attacks.gradient_matching import priors, search
from jgia.attacks.gradient_matching.attack import attack, attack_clients
from jgia.attacks.gradient_matching.checkpoint import CheckpointError
from jgia.attacks.gradient_matching.distances import distance, layer_names, layer_weights
from jgia.attacks.gradient_matching.drive import Event, run
from jgia.attacks.gradient_matching.objective import Problem, Variables, loss, make_problem
from jgia.attacks.gradient_matching.search import Info, State
from jgia.attacks.gradient_matching.settings import Settings, settings
from jgia.replay import simulated_update

__all__ = [
    "CheckpointError",
    "Event",
    "Info",
    "Problem",
    "Settings",
    "State",
    "Variables",
    "attack",
    "attack_clients",
    "distance",
    "layer_names",
    "layer_weights",
    "loss",
    "make_problem",
    "priors",
    "run",
    "search",
    "settings",
    "simulated_update",
]
