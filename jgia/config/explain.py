"""What ``jgia risk --explain`` takes: defenses, and the knobs that they read."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jgia import _checks
from jgia.config.defense import (
    READERS,
    AugmentationName,
    DefenseConfig,
    DefenseName,
    NoiseShape,
    SparsityScope,
)

ExplainName = DefenseName | Literal["coordinate", "soteria"]

_NAMES = (*get_args(DefenseName), "coordinate", "soteria")
_RENAMED = {"noise_std": "defense_noise_std", "clip_norm": "defense_clip_norm"}
_OWN = {
    "defense_noise_std": ("gaussian", "laplace", "coordinate"),
    "defense_clip_norm": ("clip", "dp_sgd"),
    "soteria_layer": ("soteria",),
    "soteria_keep": ("soteria",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoteriaOptions:
    """Pruning of one layer's gradient (:func:`jgia.defenses.soteria`).

    Attributes:
      layer: fully connected layer whose rows are pruned.
      keep_fraction: share of its inputs that are kept, in (0, 1].
    """

    layer: str = "head"
    keep_fraction: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"soteria_keep must lie in (0, 1], got {self.keep_fraction!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateOptions:
    """Noise with a size of its own for every entry (:func:`jgia.defenses.coordinate_noise`).

    Attributes:
      noise_std: root mean square of the standard deviations over all entries, > 0.
    """

    noise_std: float = 1e-2

    def __post_init__(self) -> None:
        _checks.positive(noise_std=self.noise_std)


Explained = DefenseConfig | SoteriaOptions | CoordinateOptions
"""A defense that can be explained; a :class:`DefenseConfig` with exactly one name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Defenses to explain as transformations of the Jacobian and of the noise."""

    explain: tuple[ExplainName, ...] = ()
    """Also say what each of these defenses, on its own, does to the Jacobian and to the noise, what
    risk that predicts, and what an attack that knows it comes to. The knobs below are those of
    `jgia audit --defense`; `coordinate` and `soteria` are baselines."""

    explain_draws: int = 4
    """Attacked releases for each image, each with random draws of its own."""

    defense_noise_std: float = 1e-2
    """`gaussian`, `laplace`: standard deviation on every shared entry; `coordinate`: its root mean
    square. On top of `--noise-std`, which is there without a defense too."""

    defense_clip_norm: float = 1.0
    """`clip`, `dp_sgd`: largest l2 norm."""

    noise_relative: bool = False
    """`gaussian`, `laplace`: `defense_noise_std` is a multiple of the update's root mean square."""

    noise_multiplier: float = 1.0
    """`dp_sgd`: noise on the sum of clipped gradients, over the clip norm."""

    num_bits: int = 8
    """`quantize`, `quantize_stochastic`: bits per entry."""

    keep_fraction: float = 0.1
    """`top_k`: share of the entries that it keeps."""

    sparsity_scope: SparsityScope = "global"
    """`top_k`: compare all entries (`global`) or those of one array (`layer`)."""

    dropout_rate: float = 0.5
    """`dropout`: probability of a zero."""

    dropout_layer: str = "head"
    """`dropout`: fully connected layer whose input is masked."""

    augmentations: tuple[AugmentationName, ...] = ("crop", "flip")
    """`augment`: what is done to every image, in this order."""

    crop_padding: int = 4
    """`augment`: black pixels around the image that `crop` cuts from."""

    jitter: float = 0.2
    """`augment`: largest change of `brightness` and `contrast`."""

    target_error: float = 0.5
    """`adaptive_scale`, `shaped`, `input_noise`: error to leave, as a share of their own prior's
    variance."""

    prior_std: float = 0.25
    """Standard deviation of a pixel in that prior of theirs."""

    noise_rounds: int = 1
    """Rounds over which these keep the target."""

    noise_shape: NoiseShape = "water_filling"
    """`shaped`: `water_filling` or `uniform`."""

    noise_floor: float = 1.0
    """`shaped`: energy of the isotropic part over that of the shaped part."""

    soteria_layer: str = "head"
    """`soteria`: fully connected layer whose rows are pruned."""

    soteria_keep: float = 0.4
    """`soteria`: share of the layer's inputs that are kept."""

    def __post_init__(self) -> None:
        for name in self.explain:
            _checks.one_of(_NAMES, explain=name)
        if len(set(self.explain)) != len(self.explain):
            raise ValueError(f"each defense may be explained once, got {' '.join(self.explain)}.")
        _checks.at_least(2, explain_draws=self.explain_draws)
        _checks.positive(
            defense_noise_std=self.defense_noise_std, defense_clip_norm=self.defense_clip_norm
        )
        for field in dataclasses.fields(self):
            readers = _OWN.get(field.name, READERS.get(field.name, ()))
            if field.name == "explain" or getattr(self, field.name) == field.default:
                continue
            if not set(readers or self.explain) & set(self.explain):
                raise ValueError(
                    f"{field.name} has no effect without the defense that reads it; name "
                    f"{' or '.join(readers) or 'one'} in explain, or leave {field.name} out."
                )
        for name in self.explain:
            self.options(name)

    def options(self, name: ExplainName) -> Explained:
        """One defense with its knobs.

        >>> ExplainConfig(explain=("clip",), defense_clip_norm=2.0).options("clip").words()
        'clip(clip_norm=2)'
        """
        if name == "soteria":
            return SoteriaOptions(layer=self.soteria_layer, keep_fraction=self.soteria_keep)
        if name == "coordinate":
            return CoordinateOptions(noise_std=self.defense_noise_std)
        knobs = {
            knob: getattr(self, _RENAMED.get(knob, knob))
            for knob, readers in READERS.items()
            if name in readers and knob != "noise_known"
        }
        return DefenseConfig(defense=(name,), **knobs)
