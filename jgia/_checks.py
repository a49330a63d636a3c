"""Checks of arguments that run before any compute: what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable


def positive(**values: float) -> None:
    """Raise ``ValueError`` unless every named value is finite and > 0.

    >>> positive(lam=0.1)
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def non_negative(**values: float) -> None:
    """Raise ``ValueError`` unless every named value is finite and >= 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be zero or more and finite, got {value!r}.")


def at_least(minimum: int, **values: int) -> None:
    """Raise ``ValueError`` unless every named integer is >= ``minimum``."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}.")


def fraction(**values: float) -> None:
    """Raise ``ValueError`` unless every named value lies in (0, 1)."""
    for name, value in values.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}.")


def one_of(choices: Iterable[str], **values: str) -> None:
    """Raise ``ValueError`` unless every named value is one of ``choices``."""
    allowed = list(choices)
    for name, value in values.items():
        if value not in allowed:
            listed = ", ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{name} must be one of {listed}; got {value!r}.")
