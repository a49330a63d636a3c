"""Options of the attack that searches a generator's features, stage by stage."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from jgia import _checks
from jgia.config.gradient_matching import DistanceName

GifdPreset = Literal["native32", "native64", "paper_stylegan2_ffhq", "paper_biggan_imagenet"]
RadiusMode = Literal["per_element", "relative", "absolute", "none"]
Skip = Literal["carry", "drop", "optimize"]
SearchSpace = Literal["features", "features_styles", "all"]
StageSelection = Literal["best", "last"]
Replay = Literal["none", "masks", "all"]
GifdLabels = Literal["auto", "idlg", "yin", "wainakh", "analytic", "llg"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GifdOptions:
    """What changes the answer of `gifd`. ``None`` takes what the preset does.

    :func:`jgia.attacks.gifd.settings` resolves it.
    """

    preset: GifdPreset | None = None
    """`native32` and `native64`: for a generator of the victim's own size; `paper_stylegan2_ffhq`
    and `paper_biggan_imagenet`: numbers of the paper's code, with radii that are meant for those
    two generators. When left out, a native one whose stages follow the generator's size."""

    gifd_steps: int | None = None
    """Steps of every stage, for every restart."""

    gifd_restarts: int | None = None
    """Searches from different starts, each through all stages."""

    gifd_rate: float | None = None
    """Largest learning rate; every stage warms up to it and falls to 0."""

    last_stage: int | None = None
    """The last stage: 0 searches latent codes alone, k features that enter block k as well."""

    search: SearchSpace | None = None
    """What later stages search: `features` alone, with styles (`features_styles`; noise is never
    searched then), or `all` that the generator frees."""

    skip: Skip | None = None
    """The image that earlier blocks have put out: `carry` it along, `drop` it as the paper's code
    does, or `optimize` it with the features."""

    radius_mode: RadiusMode | None = None
    """What radii of the l1 balls count in: mean change of an entry (`per_element`), parts of the
    start's own l1 norm (`relative`), plain numbers (`absolute`); or `none` for no balls."""

    radii: tuple[float, ...] | None = None
    """Radii of features in stages 1, 2, ...; the last one stays."""

    side_radii: tuple[float, ...] | None = None
    """Radii of latent codes and styles in stages 0, 1, ...; the last one stays."""

    noise_radii: tuple[float, ...] | None = None
    """Radii of each noise map in stages 0, 1, ...; the last one stays."""

    l1_scale: float | None = None
    """Factor on all radii."""

    gifd_distance: DistanceName | None = None
    """Distance of updates; see `distance` of gradient matching."""

    gifd_tv: float | None = None
    """Weight of total variation of the normalized images."""

    gifd_l2: float | None = None
    """Weight of the length of the normalized images."""

    gifd_labels: GifdLabels | None = None
    """How labels are inferred that are not given; `auto` takes the best that the model allows."""

    gifd_selection: StageSelection | None = None
    """The image returned: of the stage with the smallest distance (`best`) or of the `last`
    stage."""

    replay: Replay | None = None
    """What is done to the images' updates as the client's defense did, as far as the shared update
    shows it: `none`, `masks` of entries that were removed, `all` (also a bound on lengths)."""

    budget_steps: int | None = None
    """Steps in all, shared out evenly among stages, instead of `gifd_steps`."""

    budget_seconds: float | None = None
    """Seconds in all, compilation included, shared out evenly among stages; a stage ends with its
    steps or its time, whichever is first, and the learning rate follows."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("preset", GifdPreset),
            ("search", SearchSpace),
            ("skip", Skip),
            ("radius_mode", RadiusMode),
            ("gifd_distance", DistanceName),
            ("gifd_labels", GifdLabels),
            ("gifd_selection", StageSelection),
            ("replay", Replay),
        ):
            if (value := getattr(self, name)) is not None:
                _checks.one_of(get_args(kind), **{name: value})
        for name, least in (
            ("gifd_steps", 1),
            ("gifd_restarts", 1),
            ("last_stage", 0),
            ("budget_steps", 1),
        ):
            if (value := getattr(self, name)) is not None:
                _checks.at_least(least, **{name: value})
        for name in ("gifd_tv", "gifd_l2"):
            if (value := getattr(self, name)) is not None:
                _checks.non_negative(**{name: value})
        for name in ("gifd_rate", "l1_scale", "budget_seconds"):
            if (value := getattr(self, name)) is not None:
                _checks.positive(**{name: value})
        for name in ("radii", "side_radii", "noise_radii"):
            for value in getattr(self, name) or ():
                check_radius(name, value)


def check_radius(name: str, value: float) -> None:
    """Raise ``ValueError`` unless a radius is positive; infinity means no ball."""
    if math.isnan(value) or value <= 0:
        raise ValueError(
            f"every one of {name} must be positive, got {value!r}; leave all out (an empty list, "
            "or radius_mode='none') for no ball."
        )
