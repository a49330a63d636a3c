"""Options of the attacks that read a crafted linear layer directly."""

from __future__ import annotations

import dataclasses

from jgia import _checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprintOptions:
    """What changes the answer of the baselines rtf, trap_weights, qbi and loki."""

    pixel_slack: float = 0.02
    """A candidate whose pixels leave [0, 1] by more than this (and its noise) is a mixture."""

    same_image: float = 1e-3
    """Root mean square difference, in pixel units, up to which two candidates are one image."""

    min_agreement: int = 1
    """trap_weights and qbi: rows that must give the same image before it is returned. 2 returns
    far fewer mixtures, and misses what a single row isolates."""

    trap_scale: float | None = None
    """trap_weights: size of a row's positive weights relative to its negative ones. When left out
    it is chosen on public images so that a row is on for one example of the batch; the paper tunes
    it by hand (0.95 in its released code)."""

    def __post_init__(self) -> None:
        _checks.non_negative(pixel_slack=self.pixel_slack)
        _checks.positive(same_image=self.same_image)
        _checks.at_least(1, min_agreement=self.min_agreement)
        if self.trap_scale is not None:
            _checks.positive(trap_scale=self.trap_scale)
