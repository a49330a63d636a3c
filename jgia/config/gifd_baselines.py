"""Options of the attacks that GIFD is compared with, and of its label mapping."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jgia import _checks
from jgia.config.gifd import GifdLabels, Replay
from jgia.config.gradient_matching import DistanceName

WeightCopies = Literal["restart", "image"]
GglSpace = Literal["auto", "latent", "side"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiasOptions:
    """What changes the answer of `gias`; the defaults are the original's for a StyleGAN2."""

    gias_latent_steps: int = 1000
    """Steps of the search of latent codes."""

    gias_latent_rate: float = 0.03
    """Its first learning rate; a tenth after 3/8, 5/8 and 7/8 of the steps."""

    gias_weight_steps: int = 8000
    """Steps of the search of the generator's weights."""

    gias_weight_rate: float = 1e-3
    """Its first learning rate, which falls alike. The original takes 1e-5 for a BigGAN."""

    gias_copies: WeightCopies = "restart"
    """Generators: one per `restart`, which all images of an update share, or one per `image` of
    each restart, as the original has it."""

    gias_noise: bool = False
    """Search noise maps with the latent codes."""

    gias_restarts: int = 4
    """Searches from different starts."""

    gias_distance: DistanceName = "cosine"
    """Distance of updates; see `distance` of gradient matching."""

    gias_tv: float = 1e-4
    """Weight of total variation of the normalized images."""

    gias_labels: GifdLabels = "auto"
    """How labels are inferred that are not given."""

    gias_replay: Replay = "masks"
    """What is replayed of the client's defense; see `replay`."""

    gias_budget_seconds: float | None = None
    """Seconds in all, shared out in proportion to steps; learning rates follow."""

    def __post_init__(self) -> None:
        _checks.at_least(
            1,
            gias_latent_steps=self.gias_latent_steps,
            gias_weight_steps=self.gias_weight_steps,
            gias_restarts=self.gias_restarts,
        )
        _checks.positive(
            gias_latent_rate=self.gias_latent_rate, gias_weight_rate=self.gias_weight_rate
        )
        _checks.non_negative(gias_tv=self.gias_tv)
        _checks.one_of(get_args(WeightCopies), gias_copies=self.gias_copies)
        _checks.one_of(get_args(DistanceName), gias_distance=self.gias_distance)
        _checks.one_of(get_args(GifdLabels), gias_labels=self.gias_labels)
        _checks.one_of(get_args(Replay), gias_replay=self.gias_replay)
        if self.gias_budget_seconds is not None:
            _checks.positive(gias_budget_seconds=self.gias_budget_seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GglOptions:
    """What changes the answer of `ggl`; the defaults are the original's for CMA-ES."""

    ggl_space: GglSpace = "auto"
    """What is searched: the normal vector before StyleGAN2's mapping network (`latent`), or what
    stage 0 of GIFD searches, without noise maps, in units of its own spread (`side`: styles, or a
    BigGAN's normal vector). `auto` takes the first where the generator has one."""

    ggl_population: int = 50
    """Candidates of a round, at least four."""

    ggl_rounds: int = 800
    """Rounds of every restart."""

    ggl_restarts: int = 1
    """Searches with random numbers of their own."""

    ggl_sigma: float = 1.0
    """First standard deviation of the candidates."""

    ggl_tanh: bool = True
    """Search values whose tanh enters the generator, so that candidates stay among likely ones."""

    ggl_kld: float = 0.0
    """Weight of how far a latent vector's mean and deviation are from 0 and 1. The original has 0.1
    for its other optimizers, and none for CMA-ES."""

    ggl_distance: DistanceName = "l2"
    """Distance of updates; `l2` is divided by the number of arrays."""

    ggl_labels: GifdLabels = "auto"
    """How labels are inferred that are not given."""

    ggl_replay: Replay = "masks"
    """What is replayed of the client's defense; see `replay`. `all` for a client that clips: `l2`
    sees lengths."""

    ggl_budget_seconds: float | None = None
    """Seconds in all, shared out evenly among restarts."""

    def __post_init__(self) -> None:
        _checks.at_least(4, ggl_population=self.ggl_population)
        _checks.at_least(1, ggl_rounds=self.ggl_rounds, ggl_restarts=self.ggl_restarts)
        _checks.positive(ggl_sigma=self.ggl_sigma)
        _checks.non_negative(ggl_kld=self.ggl_kld)
        _checks.one_of(get_args(GglSpace), ggl_space=self.ggl_space)
        _checks.one_of(get_args(DistanceName), ggl_distance=self.ggl_distance)
        _checks.one_of(get_args(GifdLabels), ggl_labels=self.ggl_labels)
        _checks.one_of(get_args(Replay), ggl_replay=self.ggl_replay)
        if self.ggl_budget_seconds is not None:
            _checks.positive(ggl_budget_seconds=self.ggl_budget_seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelMappingOptions:
    """How `gifd` finds the class that a conditional prior is given, where its classes differ."""

    mapping_classifier: Path | None = None
    """Folder of a classifier of the prior's classes, from `jgia train-victim` on the prior's
    images. When left out, the prior is given the victim's labels."""

    mapping_coarse_steps: int = 100
    """Steps of every stage of the first pass, whose images are classified."""

    mapping_candidates: int = 1
    """Most likely classes to try in the second pass; the smallest gradient distance wins."""

    def __post_init__(self) -> None:
        _checks.at_least(
            1,
            mapping_coarse_steps=self.mapping_coarse_steps,
            mapping_candidates=self.mapping_candidates,
        )
