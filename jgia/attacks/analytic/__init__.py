"""Exact attacks on what an honest server sees anyway: linear algebra in place of a search.

:func:`attack` computes the image behind the update of one example, through fully connected layers
and through chains of convolutions, and reads off what single neurons isolate of several examples.
:func:`check` refuses other models; :func:`count_equations` says from the shapes alone what can be
determined.
"""

from jgia.attacks.analytic.attack import attack
from jgia.attacks.analytic.chain import Count, check, count_equations

__all__ = ["Count", "attack", "check", "count_equations"]
