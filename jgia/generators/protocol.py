"""What an attack needs of a generator: a chain of blocks that can be entered anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array

PyTree = Any
Side = Mapping[str, PyTree]
"""What blocks take beside the features, by name; every leaf has the batch as its first axis."""


class GeneratorState(NamedTuple):
    """What enters a block.

    Attributes:
      features: (B, h, w, C) feature maps.
      image: (B, h, w, channels) sum of the images that earlier blocks put out (the skip
        connection of StyleGAN2), at the features' resolution; ``None`` for generators without
        one.
    """

    features: Array
    image: Array | None


@runtime_checkable
class StagedGenerator(Protocol):
    """A generator ``blocks[n - 1] ∘ ... ∘ blocks[0]``, as pure functions of its parameters.

    Implementations are hashable: they are static arguments of compiled functions.

    Attributes:
      resolution: side of an image in pixels.
      channels: of an image.
      num_classes: that it is conditioned on; 0 for an unconditional one.
      num_blocks: blocks that can be entered.
    """

    @property
    def resolution(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102
    @property
    def num_blocks(self) -> int: ...  # noqa: D102

    def draw(
        self, params: PyTree, key: Array, num_images: int, labels: Array | None = None
    ) -> Side:
        """Random side inputs of so many images.

        Args:
          params: the generator's parameters.
          key: PRNG key.
          num_images: B.
          labels: (B,) classes of a conditional generator.
        """
        ...

    def run(
        self,
        params: PyTree,
        side: Side,
        state: GeneratorState | None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> GeneratorState:
        """What leaves block ``stop - 1`` when ``state`` enters block ``start``.

        ``state`` is ``None`` at the start 0; ``stop`` is ``num_blocks`` when left out, and at least
        1. Nothing below ``start`` is computed; with ``stop == start``, ``state`` is returned.

        Raises:
          ValueError: there are no such blocks, or a state is missing or given where none enters.
        """
        ...

    def image(self, params: PyTree, side: Side, state: GeneratorState) -> Array:
        """(B, resolution, resolution, channels), about [-1, 1], of what leaves the last block."""
        ...

    def free(self, side: Side, stage: int) -> Side:
        """The part of ``side`` that a stage searches; the rest keeps its values.

        The same structure, each leaf a bool. ``stage`` 0 searches side inputs alone, stage k the
        features that enter block k as well.
        """
        ...


def checked_stop(
    num_blocks: int, state: GeneratorState | None, start: int, stop: int | None
) -> int:
    """Where a run ends, ``num_blocks`` when left out: for what implements the protocol.

    Raises:
      ValueError: there are no such blocks, or a state is missing or given where none enters.
    """
    end = num_blocks if stop is None else stop
    if not 0 <= start <= end <= num_blocks or (state is None) != (start == 0) or end == 0:
        raise ValueError(
            "run enters block 0 without a state, or a later one with what left the one before: "
            f"0 <= start <= stop <= {num_blocks} and stop >= 1; got start={start}, stop={end}, "
            f"state={'None' if state is None else 'given'}."
        )
    return end
