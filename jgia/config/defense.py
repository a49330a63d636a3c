"""What a client does against leakage before it shares anything."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jgia import _checks

DefenseName = Literal[
    "adaptive_scale",
    "augment",
    "clip",
    "dp_sgd",
    "dropout",
    "gaussian",
    "input_noise",
    "laplace",
    "quantize",
    "quantize_stochastic",
    "shaped",
    "top_k",
]
AugmentationName = Literal["crop", "flip", "rotate", "brightness", "contrast", "solarize"]
SparsityScope = Literal["global", "layer"]
NoiseShape = Literal["water_filling", "uniform"]

ON_SHARED = ("clip", "gaussian", "laplace", "quantize", "quantize_stochastic", "top_k")
"""Defenses that transform what is shared; the others act while a gradient is computed."""

ADAPTIVE = ("adaptive_scale", "input_noise", "shaped")
"""Defenses that adapt noise to a gradient as a function of its batch; FedSGD alone has that."""

_NAMES = ("augment", "dp_sgd", "dropout", *ADAPTIVE, *ON_SHARED)
READERS: dict[str, tuple[str, ...]] = {
    "noise_std": ("gaussian", "laplace"),
    "noise_relative": ("gaussian", "laplace"),
    "noise_known": ("gaussian", "laplace", "dp_sgd", "adaptive_scale", "shaped"),
    "clip_norm": ("clip", "dp_sgd"),
    "noise_multiplier": ("dp_sgd",),
    "num_bits": ("quantize", "quantize_stochastic"),
    "keep_fraction": ("top_k",),
    "sparsity_scope": ("top_k",),
    "dropout_rate": ("dropout",),
    "dropout_layer": ("dropout",),
    "augmentations": ("augment",),
    "crop_padding": ("augment",),
    "jitter": ("augment",),
    "target_error": ADAPTIVE,
    "prior_std": ADAPTIVE,
    "noise_rounds": ADAPTIVE,
    "noise_shape": ("shaped",),
    "noise_floor": ("shaped",),
}
"""Which defenses read a knob."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefenseConfig:
    """What a client does against leakage before it shares anything."""

    defense: tuple[DefenseName, ...] = ()
    """None when left out. `augment` changes the images, `dropout` masks the representation,
    `dp_sgd` clips per example and adds noise: in every local gradient. `adaptive_scale`, `shaped`
    and `input_noise` add noise of the size that leaves the best attack `target_error`, to the
    gradient of FedSGD or to its images; one of them at most, and not with `dp_sgd`. `clip`,
    `gaussian`, `laplace`, `quantize`, `quantize_stochastic` and `top_k` change what is shared,
    once, in the order given."""

    noise_std: float = 1e-3
    """Standard deviation of `gaussian` or `laplace` noise on every shared entry (a Laplace scale
    is this over the square root of 2)."""

    noise_relative: bool = False
    """Take `noise_std` as a multiple of the root mean square of the whole update."""

    noise_known: bool = True
    """Tell the attacker the noise's standard deviation; otherwise it has to estimate it."""

    clip_norm: float = 1.0
    """Largest l2 norm: of one example's gradient (`dp_sgd`) or of the whole update (`clip`)."""

    noise_multiplier: float = 1.0
    """`dp_sgd`: standard deviation of the noise on the sum of clipped gradients, over
    `clip_norm`."""

    num_bits: int = 8
    """Bits per entry of `quantize` (nearest level) and `quantize_stochastic` (unbiased)."""

    keep_fraction: float = 0.1
    """Share of the entries that `top_k` keeps: the largest in magnitude."""

    sparsity_scope: SparsityScope = "global"
    """Whether `top_k` compares all entries (`global`) or those of one array (`layer`)."""

    dropout_rate: float = 0.5
    """Probability with which `dropout` zeroes an input of the layer."""

    dropout_layer: str = "head"
    """Fully connected layer whose input `dropout` masks."""

    augmentations: tuple[AugmentationName, ...] = ("crop", "flip")
    """What `augment` does to every image, in this order, with new random draws each time."""

    crop_padding: int = 4
    """`crop` pads the image by this many black pixels and cuts it out at a random place."""

    jitter: float = 0.2
    """Largest change of `brightness` (added) and `contrast` (relative)."""

    target_error: float = 0.5
    """Mean squared error that `adaptive_scale`, `shaped` and `input_noise` aim to leave the best
    attack, as a share of the prior's variance, in (0, 1). Linearized but for `input_noise`, an
    average, and no differential privacy."""

    prior_std: float = 0.25
    """Standard deviation of a pixel that these take an attacker to know beforehand; a public
    figure, not measured on the client's images."""

    noise_rounds: int = 1
    """Rounds in which the client shares updates of the same images: these make the noise so large
    that all of them together leave `target_error`. Exact for equal rounds."""

    noise_shape: NoiseShape = "water_filling"
    """`shaped`: least energy for the target (`water_filling`), or equal noise on all pixel
    directions (`uniform`)."""

    noise_floor: float = 1.0
    """`shaped`: energy of the isotropic part over that of the shaped part; without any, the
    noise can be removed."""

    def __post_init__(self) -> None:
        for name in self.defense:
            _checks.one_of(_NAMES, defense=name)
        if len(set(self.defense)) != len(self.defense):
            raise ValueError(f"each defense may be named once, got {' '.join(self.defense)}.")
        alone = [name for name in self.defense if name in (*ADAPTIVE, "dp_sgd")]
        if len(alone) > 1:
            raise ValueError(
                f"{' and '.join(alone)} each replace the gradient's noise; name one of them."
            )
        _checks.non_negative(
            noise_std=self.noise_std,
            noise_multiplier=self.noise_multiplier,
            noise_floor=self.noise_floor,
        )
        _checks.positive(clip_norm=self.clip_norm, prior_std=self.prior_std)
        _checks.fraction(target_error=self.target_error)
        _checks.one_of(("water_filling", "uniform"), noise_shape=self.noise_shape)
        _checks.one_of(("global", "layer"), sparsity_scope=self.sparsity_scope)
        _checks.at_least(0, crop_padding=self.crop_padding)
        _checks.at_least(1, noise_rounds=self.noise_rounds)
        if not 2 <= self.num_bits <= 32:
            raise ValueError(f"num_bits must be between 2 and 32, got {self.num_bits}.")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must lie in (0, 1], got {self.keep_fraction!r}.")
        for name in ("dropout_rate", "jitter"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")
        for name in self.augmentations:
            _checks.one_of(
                ("crop", "flip", "rotate", "brightness", "contrast", "solarize"),
                augmentations=name,
            )
        self._refuse_idle_knobs()

    def _refuse_idle_knobs(self) -> None:
        """A knob that nothing reads would pass for a defense that is not there."""
        for field in dataclasses.fields(self):
            readers = READERS.get(field.name, self.defense)
            if getattr(self, field.name) != field.default and not set(readers) & set(self.defense):
                raise ValueError(
                    f"{field.name} has no effect without the defense that reads it; "
                    f"name {' or '.join(readers)} in defense, or leave {field.name} out."
                )

    def words(self) -> str:
        """Names and knobs in one line, for threat models and reports; ``"none"`` without any.

        >>> DefenseConfig(defense=("clip", "gaussian"), clip_norm=2.0).words()
        'clip(clip_norm=2), gaussian(noise_std=0.001)'
        >>> DefenseConfig().words()
        'none'
        """
        parts = []
        for name in self.defense:
            knobs = [
                f"{field.name}={_shown(getattr(self, field.name))}"
                for field in dataclasses.fields(self)
                if name in READERS.get(field.name, ())
                and (field.name in _ALWAYS or getattr(self, field.name) != field.default)
            ]
            parts.append(f"{name}({', '.join(knobs)})")
        return ", ".join(parts) or "none"


_ALWAYS = (
    "noise_std",
    "clip_norm",
    "noise_multiplier",
    "num_bits",
    "keep_fraction",
    "dropout_rate",
    "augmentations",
    "target_error",
)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)
