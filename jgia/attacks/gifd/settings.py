"""What each preset does, as settings of one search."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jgia import _checks
from jgia.config.gifd import (
    GifdLabels,
    GifdOptions,
    GifdPreset,
    RadiusMode,
    Replay,
    SearchSpace,
    Skip,
    StageSelection,
    check_radius,
)
from jgia.config.gradient_matching import DistanceName
from jgia.generators.protocol import StagedGenerator

_WARMUP = 0.05  # share of a stage in which the learning rate rises
_DECAY = 0.75  # share in which it falls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a search, decided: :class:`~jgia.config.gifd.GifdOptions` has the meanings.

    ``num_steps`` is for one stage. Names without ``gifd_`` are those of the options with it;
    ``learning_rate`` is ``gifd_rate``, ``total_variation`` ``gifd_tv``, ``image_l2`` ``gifd_l2``.
    """

    last_stage: int
    num_steps: int = 300
    restarts: int = 4
    learning_rate: float = 0.1
    search: SearchSpace = "all"
    skip: Skip = "carry"
    radius_mode: RadiusMode = "per_element"
    radii: tuple[float, ...] = (0.07, 0.03, 0.01)
    side_radii: tuple[float, ...] = (0.11, 0.22, 0.33, 0.44)
    noise_radii: tuple[float, ...] = ()
    l1_scale: float = 1.0
    distance: DistanceName = "cosine"
    total_variation: float = 1e-4
    image_l2: float = 1e-6
    labels: GifdLabels = "auto"
    selection: StageSelection = "best"
    replay: Replay = "masks"
    budget_steps: int | None = None
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        _checks.at_least(0, last_stage=self.last_stage)
        _checks.at_least(1, num_steps=self.num_steps, restarts=self.restarts)
        for name in ("radii", "side_radii", "noise_radii"):
            for value in getattr(self, name):
                check_radius(name, value)
        if self.budget_steps is not None and self.budget_steps <= self.last_stage:
            raise ValueError(
                f"budget_steps={self.budget_steps} leave no step for some of "
                f"{self.last_stage + 1} stages; give more, or a smaller last_stage."
            )

    def steps_of(self, stage: int) -> int:
        """Steps of a stage; the first stages get what an even division leaves over.

        >>> [Settings(last_stage=2, budget_steps=8).steps_of(k) for k in range(3)]
        [3, 3, 2]
        """
        if self.budget_steps is None:
            return self.num_steps
        each, rest = divmod(self.budget_steps, self.last_stage + 1)
        return each + (stage < rest)

    def radii_of(self, stage: int) -> tuple[float, float, float]:
        """Radii (features, side inputs, noise) of a stage, scaled; infinite for no ball."""
        features = _at(self.radii, stage - 1)
        radii = features, _at(self.side_radii, stage), _at(self.noise_radii, stage)
        if self.radius_mode == "none":
            return math.inf, math.inf, math.inf
        first, second, third = (radius * self.l1_scale for radius in radii)
        return first, second, third


_PRESETS: dict[GifdPreset, Settings] = {
    "native32": Settings(last_stage=3),
    "native64": Settings(last_stage=4, radii=(0.07, 0.03, 0.01, 0.003)),
    # Fang et al. 2023, numbers of the released code: r_k = 2000 + 1000 (k - 1), and 1000 (k + 1)
    # for latent codes and each noise map.
    "paper_stylegan2_ffhq": Settings(
        last_stage=4,
        num_steps=1000,
        radius_mode="absolute",
        radii=(2000.0, 3000.0, 4000.0, 5000.0),
        side_radii=(1000.0, 2000.0, 3000.0, 4000.0, 5000.0),
        noise_radii=(1000.0, 2000.0, 3000.0, 4000.0, 5000.0),
    ),
    # r_k = 2000 + 500 (k - 1); the latent code has no ball.
    "paper_biggan_imagenet": Settings(
        last_stage=9,
        num_steps=1000,
        radius_mode="absolute",
        radii=tuple(2000.0 + 500.0 * k for k in range(9)),
        side_radii=(),
    ),
}
_SETTING = {
    "gifd_steps": "num_steps",
    "gifd_restarts": "restarts",
    "gifd_rate": "learning_rate",
    "gifd_distance": "distance",
    "gifd_tv": "total_variation",
    "gifd_l2": "image_l2",
    "gifd_labels": "labels",
    "gifd_selection": "selection",
}


def settings(
    options: GifdOptions | None = None, *, generator: StagedGenerator | None = None
) -> Settings:
    """The settings of a preset, with those options replaced that are given.

    Args:
      options: ``None`` fields keep what the preset does. Radii of another ``radius_mode`` than
        the preset's have to be given with it.
      generator: decides the stages where no preset is named: the last one searches features of a
        quarter of the image's side (``K = log2(resolution / 2) - 1``), and one block is left.

    Raises:
      ValueError: options exclude each other, or stages are asked for that the generator lacks.

    >>> settings(GifdOptions(preset="native32", gifd_steps=10)).num_steps
    10
    """
    options = options or GifdOptions()
    given = {
        _SETTING.get(name, name): value
        for name, value in vars(options).items()
        if value is not None and name != "preset"
    }
    chosen = _PRESETS[options.preset or "native32"]
    if options.preset is None and generator is not None:
        stages = min(round(math.log2(generator.resolution / 2)) - 1, generator.num_blocks - 1)
        chosen = dataclasses.replace(chosen, last_stage=max(stages, 0))
    mode = given.get("radius_mode", chosen.radius_mode)
    if mode not in ("none", chosen.radius_mode):
        missing = [name for name in ("radii", "side_radii") if name not in given]
        if missing:
            raise ValueError(
                f"radius_mode={mode!r} needs {' and '.join(missing)} too: the preset's are meant "
                f"for {chosen.radius_mode!r}."
            )
        given.setdefault("noise_radii", ())
    chosen = dataclasses.replace(chosen, **given)
    if generator is not None and chosen.last_stage >= generator.num_blocks:
        raise ValueError(
            f"last_stage={chosen.last_stage} needs a generator of more than that many blocks, and "
            f"this one has {generator.num_blocks}; the largest is {generator.num_blocks - 1}."
        )
    return chosen


def rates(progress: np.ndarray, learning_rate: float) -> np.ndarray:
    """Learning rates at parts of a stage: a linear rise in 5 %, a cosine's fall in the last 75 %.

    Args:
      progress: parts done, in [0, 1].
      learning_rate: the largest.

    >>> rates(np.array([0.0, 0.1, 1.0]), 0.1).tolist()
    [0.0, 0.1, 0.0]
    """
    left = np.minimum(1, (1 - np.clip(progress, 0, 1)) / _DECAY)
    ramp = 0.5 - 0.5 * np.cos(np.pi * left)
    return learning_rate * ramp * np.minimum(1, progress / _WARMUP)


def _at(values: tuple[float, ...], index: int) -> float:
    """The entry, or the last one; infinity where there is none."""
    return values[min(max(index, 0), len(values) - 1)] if values else math.inf
