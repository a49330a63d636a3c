"""The client's most probable images under known Gaussian noise and a Gaussian prior.

:func:`attack` takes an observation; :func:`posterior_mode` any differentiable release.
"""

from jgia.attacks.gauss_newton.attack import attack
from jgia.attacks.gauss_newton.coordinates import Coordinates
from jgia.attacks.gauss_newton.solve import Estimate, Settings, posterior_mode

__all__ = ["Coordinates", "Estimate", "Settings", "attack", "posterior_mode"]
