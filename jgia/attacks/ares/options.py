"""Options of the ARES attack. No jax here: the command line is made from these."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jgia import _checks

FrontEnd = Literal["random", "signed", "direct"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AresOptions:
    """What changes the answer of the attack."""

    front_end: FrontEnd = "random"
    """First convolution: ``random`` unit-norm Gaussian filters (the paper), ``signed`` +/-
    identity pairs (an upper bound on what leaks), ``direct`` plain identity (what earlier
    attacks did; fails on normalized inputs)."""

    front_end_trials: int = 32
    """Random draws of the filters; the one that determines the public calibration images best
    is kept. 1 is the paper's single draw."""

    head_gain: float = 1.0
    """Scale of the head's weights: larger gradients survive absolute noise, smaller ones freeze
    the thresholds during local training."""

    spread_widening: float = 1.15
    """Factor on the fitted standard deviation of the query feature, since private data may
    spread wider than the public calibration data."""

    mixture_residual: float = 1e-3
    """A candidate whose relative least-squares residual exceeds this (or its own read-out
    noise, if larger) is a mixture of several samples."""

    lam_ratio: float = 1e-5
    """Last l1 weight of the sparse recovery, relative to the weight at which the solution is
    zero."""

    def __post_init__(self) -> None:
        _checks.one_of(("random", "signed", "direct"), front_end=self.front_end)
        _checks.at_least(1, front_end_trials=self.front_end_trials)
        _checks.positive(
            head_gain=self.head_gain,
            spread_widening=self.spread_widening,
            mixture_residual=self.mixture_residual,
        )
        _checks.fraction(lam_ratio=self.lam_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceFlags:
    """What changes only time and memory. Answers agree to rounding."""

    microbatch: int | None = None
    """Candidates inverted at once; chosen from the image size and the device when left out."""

    dtype: Literal["float32", "float64"] = "float32"
    """Arithmetic of the inversion. ``float64`` needs ``JAX_ENABLE_X64=1``."""

    def __post_init__(self) -> None:
        if self.microbatch is not None:
            _checks.at_least(1, microbatch=self.microbatch)
        _checks.one_of(("float32", "float64"), dtype=self.dtype)
