"""Baselines that read images off a crafted linear layer directly, as attacks did before ARES.

Each module has ``check``, ``craft`` and ``attack``: :mod:`~jgia.attacks.imprint.rtf`,
:mod:`~jgia.attacks.imprint.trap_weights`, :mod:`~jgia.attacks.imprint.qbi`,
:mod:`~jgia.attacks.imprint.loki`.
"""

from jgia.attacks.imprint import loki, qbi, rtf, trap_weights
from jgia.attacks.imprint.plan import ImprintPlan
from jgia.attacks.imprint.readout import ReadOut, read_bins, read_rows
from jgia.config.imprint import ImprintOptions

__all__ = [
    "ImprintOptions",
    "ImprintPlan",
    "ReadOut",
    "loki",
    "qbi",
    "read_bins",
    "read_rows",
    "rtf",
    "trap_weights",
]
