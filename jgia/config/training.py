"""How a victim is trained before anybody attacks it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jgia import _checks
from jgia.config.data import DataConfig
from jgia.config.model import ModelConfig

_LEARNING_RATES = {"adam": 1e-3, "sgd": 0.05}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What decides the parameters that training ends with, beside model, data and seed."""

    epochs: int = 10
    """Passes over the training images."""

    batch_size: int = 128
    """Images per step; all of them if there are fewer. An epoch leaves out what would make a
    smaller last batch, other images in each."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """`adam` (weight decay apart from the gradient, as in AdamW) or `sgd` with momentum 0.9."""

    learning_rate: float | None = None
    """Step size at the start: 0.001 for adam, 0.05 for sgd when left out."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """The step size over the steps: half a cosine down to zero, or as it is."""

    weight_decay: float = 5e-4
    """Decay of the kernels; biases and the scales of normalizations are left alone."""

    flip: bool = True
    """Mirror half of the training images left to right. Leave it out for digits and letters."""

    crop: bool = True
    """Shift training images by up to an eighth of their side, zeros moving in."""

    risk_weight: float = 0.0
    """Weight, beside the cross-entropy, of the fraction of an image that the best attack recovers
    from its gradient (see `jgia risk`); 0 to train without."""

    risk_noise_std: float = 1e-2
    """Standard deviation of the noise that the gradient is thought to carry; only with
    `--risk-weight`, as the following."""

    risk_images: int = 2
    """Images of a batch whose gradients are considered."""

    risk_every: int = 4
    """Steps from one with the term to the next; it then weighs as much more."""

    risk_probes: int = 4
    """Random directions for each image: more of them, less variance."""

    risk_iterations: int = 60
    """Conjugate-gradient steps for each direction: fewer estimate more risk than there is."""

    def __post_init__(self) -> None:
        _checks.at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        _checks.at_least(
            1,
            risk_images=self.risk_images,
            risk_every=self.risk_every,
            risk_probes=self.risk_probes,
            risk_iterations=self.risk_iterations,
        )
        _checks.non_negative(risk_weight=self.risk_weight)
        _checks.positive(risk_noise_std=self.risk_noise_std)
        _checks.one_of(_LEARNING_RATES, optimizer=self.optimizer)
        _checks.one_of(("cosine", "constant"), schedule=self.schedule)
        _checks.non_negative(weight_decay=self.weight_decay)
        if self.learning_rate is not None:
            _checks.positive(learning_rate=self.learning_rate)

    @property
    def initial_learning_rate(self) -> float:
        """The learning rate, or the optimizer's own where none was given.

        >>> TrainOptions(optimizer="sgd").initial_learning_rate
        0.05
        """
        return self.learning_rate or _LEARNING_RATES[self.optimizer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """One training run: which images, which model, how, and where the result goes."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

    test: str | None = None
    """Data specification of the test images. When left out, a part of the data is held back."""

    test_fraction: float = 0.1
    """Part of the images that is held back for the test; 0 for no test. Not used where the data
    marks public images: those train, the others test."""

    seed: int = 0
    """Decides the split, the first parameters, the order and the augmentation."""

    out: Path = Path("jgia-victim")
    """Folder for `params.npz`, `victim.json` and `training.json`. The same command goes on where
    an interrupted one stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie in [0, 1), got {self.test_fraction!r}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2^32 - 1, got {self.seed}.")
        defaults = DataConfig()
        for name in ("calibration", "num_public"):
            if getattr(self.data, name) != getattr(defaults, name):
                raise ValueError(
                    f"training does not calibrate an attack: leave {name} out, or use --test and "
                    "--limit."
                )
