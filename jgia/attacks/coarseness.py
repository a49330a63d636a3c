"""What an update's own values tell of precision that was lost before it was shared."""

from __future__ import annotations

import dataclasses

import numpy as np

_SAMPLE = 4096
_FEWEST = 256  # entries without which nothing is concluded
_MOST_BITS = 22
_OFF_GRID = 0.02  # of a step
_RESOLVED = 2**14  # levels beyond which float32 does not resolve a hundredth of a step
_AT_THE_CUT = 0.02  # share of the entries that a cut leaves within twice its threshold


@dataclasses.dataclass(frozen=True)
class Coarseness:
    """How coarse the arrays of an update are.

    Attributes:
      levels: of a uniform grid between 0 and the largest magnitude of an array, or ``None``.
      threshold: magnitude below which entries were dropped, 0 where none were.
    """

    levels: int | None
    threshold: float

    def lost_std(self, values: np.ndarray) -> float:
        """Standard deviation of what one array's entries lost.

        Of rounding to one of the two neighboring levels at random, the mean over positions between
        them (``step / sqrt(6)``; rounding to the nearest loses ``step / sqrt(12)``). Of dropping,
        that of entries which are anywhere below the threshold.

        Args:
          values: any shape; an array of the update that was looked at.
        """
        values = np.asarray(values)
        step = dropped = 0.0
        if self.levels is not None:
            step = float(np.abs(values).max(initial=0.0)) / self.levels
        if self.threshold and values.size:
            dropped = self.threshold * float(np.sqrt(np.mean(values == 0)))
        return float(np.hypot(step / np.sqrt(6), dropped / np.sqrt(3)))


def coarseness(values: np.ndarray) -> Coarseness:
    """Look for a grid and for a cut in an array of many entries.

    An attacker sees the shared values, so that what quantization and sparsification took from them
    needs no telling: on a grid of ``2^(bits - 1) - 1`` levels up to the largest magnitude every
    entry is a multiple of the step. Where only the largest entries are shared, many are just above
    the smallest one and about as many are 0 among them, in rows and columns that are not all 0.

    Args:
      values: (..., K) finite entries of one array of the update, K neurons.

    Returns:
      Nothing lost where there are fewer than 256 entries other than 0, or neither shows.
    """
    sizes = np.abs(np.asarray(values))
    sizes = sizes.reshape(-1, sizes.shape[-1])
    present = sizes[sizes > 0]
    if present.size < _FEWEST:
        return Coarseness(None, 0.0)
    levels = _grid(present)
    if levels is not None:
        return Coarseness(levels, 0.0)
    active = int(sizes.any(axis=0).sum()) * int(sizes.any(axis=1).sum())
    return Coarseness(None, _cut(present, active - present.size))


def _grid(sizes: np.ndarray) -> int | None:
    top = float(sizes.max())
    some = sizes[:: max(1, sizes.size // _SAMPLE)].astype(np.float64)
    for bits in range(2, _MOST_BITS + 1):
        levels = 2 ** (bits - 1) - 1
        places = some / top * levels
        places = places[places < _RESOLVED]
        if places.size < _FEWEST // 4:
            return None
        if np.abs(places - np.round(places)).max() < _OFF_GRID:
            return levels
    return None


def _cut(sizes: np.ndarray, num_zeros: int) -> float:
    smallest = float(sizes.min())
    near = np.count_nonzero(sizes < 2 * smallest)
    return smallest if near > _AT_THE_CUT * sizes.size and num_zeros > near / 4 else 0.0
