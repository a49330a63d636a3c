"""Options of the attacks that search for images whose update matches the client's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jgia import _checks

MatchingAttack = Literal["dlg", "idlg", "inverting_gradients", "see_through"]
DistanceName = Literal["l2", "l2_norm", "cosine", "layer_cosine", "max_layer"]
LayerWeights = Literal["equal", "linear", "exponential"]
MatchingOptimizer = Literal["adam", "signed_adam", "lbfgs"]
Schedule = Literal["constant", "step", "cosine", "warmup_cosine"]
Start = Literal["normal", "uniform", "gray"]
LabelMethod = Literal["auto", "joint", "idlg", "yin", "wainakh", "analytic", "llg"]
TotalVariation = Literal["l1", "l2", "zero_padded"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """What changes the answer of gradient matching. ``None`` takes what the attack's paper does.

    :func:`jgia.attacks.gradient_matching.settings` resolves it.
    """

    distance: DistanceName | None = None
    """Between the client's update and that of the images searched: `l2` (sum of squares), `l2_norm`
    (sum over layers of the norms), `cosine` (1 - cosine of all entries together), `layer_cosine`
    (weighted mean of each layer's), `max_layer` (the layer's that fits worst)."""

    layer_weights: LayerWeights | None = None
    """Weights of layers from first to last: `equal`, `linear` (falling to 1 / number), or
    `exponential` (a softmax that favors the first)."""

    total_variation: float | None = None
    """Weight of total variation of the normalized images."""

    tv_form: TotalVariation | None = None
    """`l1` (mean absolute differences), `l2` (mean length of the pixel's gradient), `zero_padded`
    (`l1` with zeros after the last row and column)."""

    image_l2: float | None = None
    """Weight of the length of the normalized images."""

    batch_norm_prior: float | None = None
    """Weight of the distance between the images' batch statistics and those that the client sent,
    or the running ones."""

    group_prior: float | None = None
    """Weight of the distance from the mean of all restarts; needs at least two."""

    search_optimizer: MatchingOptimizer | None = None
    """`adam`, `signed_adam` (Adam on the signs of the gradient), or `lbfgs` (fixed step)."""

    step_size: float | None = None
    """Largest learning rate of the search, in normalized units."""

    schedule: Schedule | None = None
    """`constant`; `step` (a tenth after 3/8, 5/8 and 7/8 of the steps); `cosine`; `warmup_cosine`
    (50 steps of warm-up)."""

    num_steps: int | None = None
    """Steps of the search."""

    restarts: int | None = None
    """Searches from different starts; that with the smallest gradient distance is returned."""

    box: bool | None = None
    """Keep pixels in [0, 1] after every step."""

    start: Start | None = None
    """`normal` or `uniform` random values, or `gray`, in normalized units."""

    label_inference: LabelMethod | None = None
    """How labels are found that are not given: `joint` optimizes them with the images, others infer
    them first (`auto` takes the best that the model allows)."""

    patience: int | None = None
    """Stop once the loss has not fallen by 0.1 % in this many steps; 0 never stops early."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("distance", DistanceName),
            ("layer_weights", LayerWeights),
            ("tv_form", TotalVariation),
            ("search_optimizer", MatchingOptimizer),
            ("schedule", Schedule),
            ("start", Start),
            ("label_inference", LabelMethod),
        ):
            if (value := getattr(self, name)) is not None:
                _checks.one_of(get_args(kind), **{name: value})
        for name in ("total_variation", "image_l2", "batch_norm_prior", "group_prior"):
            if (value := getattr(self, name)) is not None:
                _checks.non_negative(**{name: value})
        if self.step_size is not None:
            _checks.positive(step_size=self.step_size)
        for name, least in (("num_steps", 1), ("restarts", 1), ("patience", 0)):
            if (value := getattr(self, name)) is not None:
                _checks.at_least(least, **{name: value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a long run keeps on its way. Changes no answer."""

    checkpoint: Path | None = None
    """File that holds the search's state; a run that finds one of its own goes on from it."""

    checkpoint_every: int = 1000
    """Steps between checkpoints."""

    report_every: int = 100
    """Steps between entries of the loss curve, and between looks at a plateau."""

    frames: int = 8
    """Images kept on the way, evenly spaced, for the report."""

    dump: Path | None = None
    """Folder for a picture of the images every so many steps."""

    dump_every: int = 500
    """Steps between pictures."""

    def __post_init__(self) -> None:
        _checks.at_least(
            1,
            checkpoint_every=self.checkpoint_every,
            report_every=self.report_every,
            dump_every=self.dump_every,
        )
        _checks.at_least(0, frames=self.frames)
