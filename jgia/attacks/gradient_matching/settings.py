"""What each published attack does, as settings of one search."""

from __future__ import annotations

import dataclasses
from typing import Any

from jgia import _checks
from jgia.config.gradient_matching import (
    DistanceName,
    LabelMethod,
    LayerWeights,
    MatchingAttack,
    MatchingOptimizer,
    MatchingOptions,
    Schedule,
    Start,
    TotalVariation,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a search, decided: :class:`MatchingOptions` says what they mean.

    ``optimizer``, ``learning_rate`` and ``labels`` are its ``search_optimizer``, ``step_size`` and
    ``label_inference``, which share a command line with the client's.

    The defaults minimize the cosine distance alone.
    """

    distance: DistanceName = "cosine"
    layer_weights: LayerWeights = "equal"
    total_variation: float = 0.0
    tv_form: TotalVariation = "l1"
    image_l2: float = 0.0
    batch_norm_prior: float = 0.0
    group_prior: float = 0.0
    optimizer: MatchingOptimizer = "adam"
    learning_rate: float = 0.1
    schedule: Schedule = "constant"
    num_steps: int = 1000
    restarts: int = 1
    box: bool = True
    start: Start = "normal"
    labels: LabelMethod = "auto"
    patience: int = 0

    def __post_init__(self) -> None:
        if self.group_prior and self.restarts < 2:
            raise ValueError(
                f"group_prior={self.group_prior} pulls restarts together and needs at least 2, "
                f"got restarts={self.restarts}."
            )


_SETTING = {
    "search_optimizer": "optimizer",
    "step_size": "learning_rate",
    "label_inference": "labels",
}

_PRESETS = {
    # Zhu, Liu, Han 2019, section 4: L-BFGS with learning rate 1, labels optimized too.
    "dlg": Settings(
        distance="l2",
        optimizer="lbfgs",
        learning_rate=1.0,
        num_steps=1200,
        box=False,
        labels="joint",
    ),
    # Zhao, Mopuri, Bilen 2020 (arXiv 2001.02610), algorithm 1: the same with inferred labels.
    "idlg": Settings(
        distance="l2",
        optimizer="lbfgs",
        learning_rate=1.0,
        num_steps=1200,
        box=False,
        labels="idlg",
    ),
    # Geiping et al. 2020, section 4 and appendix; numbers as in the paper's code.
    "inverting_gradients": Settings(
        total_variation=0.1,
        optimizer="signed_adam",
        schedule="step",
        num_steps=4800,
    ),
    # Yin et al. 2021, section 4.1, without the registration of restarts.
    "see_through": Settings(
        distance="l2_norm",
        total_variation=1e-4,
        tv_form="l2",
        image_l2=1e-6,
        batch_norm_prior=0.1,
        group_prior=0.01,
        schedule="warmup_cosine",
        num_steps=20000,
        restarts=4,
        labels="yin",
    ),
}


def settings(attack: MatchingAttack, options: MatchingOptions | None = None) -> Settings:
    """The published settings of an attack, with those options replaced that are given.

    Args:
      attack: ``"dlg"``, ``"idlg"``, ``"inverting_gradients"`` or ``"see_through"``.
      options: ``None`` fields keep what the attack does. ``restarts=1`` turns the group prior off.

    Raises:
      ValueError: an unknown attack, or options that exclude each other.

    >>> settings("inverting_gradients", MatchingOptions(num_steps=10)).num_steps
    10
    """
    _checks.one_of(_PRESETS, attack=attack)
    preset, given = _PRESETS[attack], _given(options)
    if given.get("restarts") == 1:
        given.setdefault("group_prior", 0.0)
    return dataclasses.replace(preset, **given)


def _given(options: MatchingOptions | None) -> dict[str, Any]:
    if options is None:
        return {}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return {_SETTING.get(name, name): value for name, value in given.items()}
