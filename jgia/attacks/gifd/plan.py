"""What a run of stages searches, apart from how it is run: GIFD's own plan, and the protocol."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jgia.attacks.gifd import drive
from jgia.attacks.gifd.settings import Settings, rates
from jgia.attacks.gifd.stages import Anchor, Point, Stage, Weights, make_stage
from jgia.generators.protocol import GeneratorState, Side, StagedGenerator

PyTree = Any


@runtime_checkable
class Plan(Protocol):
    """Stages, one after the other; arrays have one entry per search in front.

    Attributes:
      steps: of every stage.
      weights: of the terms beside the distance.
      budget_seconds: for all stages, shared out in proportion to their steps; ``None`` for no end.
    """

    @property
    def steps(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def weights(self) -> Weights: ...  # noqa: D102
    @property
    def budget_seconds(self) -> float | None: ...  # noqa: D102

    def stage(self, index: int, side: Side) -> Stage:
        """What is static of a stage, given one search's side inputs, or their shapes."""
        ...

    def params(self, index: int) -> PyTree:
        """Parameters of the stage's generator."""
        ...

    def inputs(self, index: int, side: Side) -> Side:
        """Side inputs of a stage, from those that the stage before left."""
        ...

    def radii(self, index: int) -> tuple[float, float, float]:
        """Radii of the stage's balls: features, side inputs, noise."""
        ...

    def rates(self, index: int, parts: np.ndarray) -> np.ndarray:
        """Learning rates at parts of a stage in [0, 1]."""
        ...

    def leave(
        self, stage: Stage, anchor: Anchor, point: Point
    ) -> tuple[Side, GeneratorState | None]:
        """Side inputs, and what enters the block of the next stage."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeaturePlan:
    """GIFD's: side inputs alone, then the features that enter block 1, 2, ...

    Attributes:
      generator: whose features are searched.
      generator_params: its parameters.
      settings: of the search.
      factor: the generator's side over the victim's.
    """

    generator: StagedGenerator
    generator_params: PyTree
    settings: Settings
    factor: int

    @property
    def steps(self) -> tuple[int, ...]:
        """As the settings say."""
        return tuple(self.settings.steps_of(k) for k in range(self.settings.last_stage + 1))

    @property
    def weights(self) -> Weights:
        """As the settings say."""
        return Weights(self.settings.total_variation, self.settings.image_l2)

    @property
    def budget_seconds(self) -> float | None:
        """As the settings say."""
        return self.settings.budget_seconds

    def stage(self, index: int, side: Side) -> Stage:
        """Features that enter the block of this number, and the side inputs from there on."""
        return make_stage(self.generator, index, side, self.settings, self.factor)

    def params(self, index: int) -> PyTree:
        """The same in all stages."""
        del index
        return self.generator_params

    def inputs(self, index: int, side: Side) -> Side:
        """As they were left."""
        del index
        return side

    def radii(self, index: int) -> tuple[float, float, float]:
        """As the settings say."""
        return self.settings.radii_of(index)

    def rates(self, index: int, parts: np.ndarray) -> np.ndarray:
        """See :func:`jgia.attacks.gifd.settings.rates`."""
        del index
        return rates(parts, self.settings.learning_rate)

    def leave(self, stage: Stage, anchor: Anchor, point: Point) -> tuple[Side, GeneratorState]:
        """What the stage's block makes of the point."""
        return drive.leave(stage, self.generator_params, anchor, point)
