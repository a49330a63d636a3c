"""How a generative prior is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jgia import _checks
from jgia.config.data import DataConfig

PriorSize = Literal["tiny32", "small32", "mid32", "small64", "mid64"]
Augmentation = Literal["none", "diffaugment", "adaptive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """What decides the parameters that training ends with, beside images and seed."""

    size: PriorSize = "tiny32"
    """Resolution and features: `tiny32` (0.3 million parameters; minutes to hours on a CPU),
    `small32` (1.1), `mid32` (4.2; for accelerators), `small64` (1.4), `mid64` (5.6)."""

    resolution: int | None = None
    """Side in pixels, a power of two; that of the size when left out."""

    base: int | None = None
    """Features times resolution, up to the largest number of features."""

    max_features: int | None = None
    """Most features of a block."""

    latent_dim: int | None = None
    """Length of the normal vector."""

    style_dim: int | None = None
    """Length of the style vector."""

    mapping_layers: int | None = None
    """Layers from one to the other."""

    conditional: bool = False
    """Condition on the images' classes."""

    discriminator: Literal["residual", "plain"] = "residual"
    """Blocks with or without a shortcut."""

    kimg: float = 200.0
    """Length of training in thousands of real images shown."""

    prior_batch: int = 32
    """Images of a step."""

    learning_rate: float = 2.5e-3
    """Adam's step size, of both networks."""

    r1_gamma: float = 0.1
    """Weight of the squared gradient of the logits of real images."""

    r1_every: int = 16
    """Steps from one with this penalty to the next; it then weighs as much more."""

    path_length_weight: float = 0.0
    """Weight of the deviation of path lengths in style space from their mean; 0 for none."""

    path_length_every: int = 4
    """Steps from one with this penalty to the next."""

    ema_kimg: float = 10.0
    """Half-life, in thousands of images, of the average of the generator's parameters that is kept;
    at most a twentieth of what was shown."""

    flip: bool = True
    """Mirror half of the images left to right. Leave it out for digits and letters."""

    augmentation: Augmentation = "none"
    """What the discriminator sees: images as they are, `diffaugment` (color, translation, cutout;
    for fewer than some 30,000 images), or these with a probability that is adapted to how much it
    overfits (`adaptive`)."""

    adaptive_target: float = 0.6
    """Mean sign of the logits of real images that `adaptive` aims at."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of features; `auto` takes bfloat16 on accelerators. Parameters are float32."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(PriorSize), size=self.size)
        _checks.one_of(("residual", "plain"), discriminator=self.discriminator)
        _checks.one_of(get_args(Augmentation), augmentation=self.augmentation)
        _checks.one_of(("auto", "float32", "bfloat16"), precision=self.precision)
        _checks.positive(kimg=self.kimg, learning_rate=self.learning_rate, ema_kimg=self.ema_kimg)
        _checks.non_negative(r1_gamma=self.r1_gamma, path_length_weight=self.path_length_weight)
        _checks.at_least(
            1,
            prior_batch=self.prior_batch,
            r1_every=self.r1_every,
            path_length_every=self.path_length_every,
        )
        _checks.fraction(adaptive_target=self.adaptive_target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPriorConfig(PriorOptions):
    """One training run: which images, how, and where the prior goes."""

    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(data="faces:40000"))

    name: str | None = None
    """What the prior is called; the name of the output folder when left out."""

    license: str = "not stated"
    """Under which the images are, and the parameters with them; written into the prior."""

    seed: int = 0
    """Decides the first parameters, the order, latents and augmentation."""

    minutes: float | None = None
    """Stop after so long; the same command then goes on."""

    checkpoint_minutes: float = 5.0
    """Time between checkpoints, with a grid of samples and a line of measurements each."""

    kid_images: int = 1000
    """Generated and real images that are compared at each checkpoint; 0 for no comparison."""

    out: Path = Path("jgia-prior")
    """Folder for `prior.safetensors`, `prior.json`, `samples.png` and `log.csv`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(checkpoint_minutes=self.checkpoint_minutes)
        if self.minutes is not None:
            _checks.positive(minutes=self.minutes)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2^32 - 1, got {self.seed}.")
        if self.kid_images:
            _checks.at_least(100, kid_images=self.kid_images)
        defaults = DataConfig()
        for name in ("calibration", "num_public", "normalize"):
            if getattr(self.data, name) != getattr(defaults, name):
                raise ValueError(f"a prior is not calibrated or normalized: leave {name} out.")
