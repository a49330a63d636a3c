"""The data set as plain arrays, and its division between client and attacker."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float32, Int32

MIN_PUBLIC = 16
"""Fewest public images on which an attacker can calibrate quantiles."""


class DataError(ValueError):
    r"""A data set cannot be used; the message is one line that says what to do.

    >>> str(DataError("first\n  second"))
    'first second'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labeled images on the host, all of one size; compared by identity.

    Attributes:
      images: (N, H, W, C) uint8, or float32 in [0, 1]; N >= 1 and C is 1 (grey) or 3 (RGB).
      labels: (N,) int32 in [0, num_classes).
      class_names: one name per class, at least two (a classifier needs two outputs).
      name: short name for reports.
      provenance: one sentence for the report: where the images came from.
      public: (N,) bool, or ``None``. ``True`` marks an image that may serve only as the
        attacker's public calibration data, ``False`` one that only a client may hold.

    Raises:
      DataError: an array has another shape, dtype or range than the above.

    >>> data = Dataset(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1], np.int32),
    ...                ("cat", "dog"), "demo", "Made of zeros.")
    >>> len(data), data.num_classes, data.image_shape
    (2, 2, (4, 4, 1))
    >>> images, labels = data.take([1])
    >>> images.dtype, labels.tolist()
    (dtype('float32'), [1])
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    provenance: str
    public: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.ndim != 4 or 0 in shape or shape[-1] not in (1, 3):
            raise DataError(
                "images must have shape (N, H, W, C) with N, H, W at least 1 and C of 1 or 3, "
                f"got {shape}."
            )
        if self.images.dtype == np.float32:
            low, high = float(self.images.min()), float(self.images.max())
            if not (low >= 0.0 and high <= 1.0):  # NaN fails both comparisons
                raise DataError(
                    f"float32 images must lie in [0, 1] and be finite, got {low:g} to {high:g}; "
                    "scale them, or pass uint8."
                )
        elif self.images.dtype != np.uint8:
            raise DataError(f"images must be uint8 or float32, got {self.images.dtype}.")
        if len(self.class_names) < 2:
            raise DataError(f"class_names needs at least two names, got {self.class_names!r}.")
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int32:
            raise DataError(
                f"labels must be int32 of shape ({shape[0]},), "
                f"got {self.labels.dtype} {self.labels.shape}."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"labels must lie in 0..{self.num_classes - 1} (there are {self.num_classes} "
                f"class names), got {low}..{high}."
            )
        if self.public is not None and (
            self.public.shape != shape[:1] or self.public.dtype != np.bool_
        ):
            raise DataError(
                f"public must be bool of shape ({shape[0]},), "
                f"got {self.public.dtype} {self.public.shape}."
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes, at least 2."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def take(
        self, indices: Iterable[SupportsIndex] | np.ndarray
    ) -> tuple[Float32[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """The images as float32 pixels in [0, 1] and their labels, in the order asked for.

        Bytes become ``v / 255``, correctly rounded to float32.

        Args:
          indices: integers in [0, N); repeats are allowed.

        Returns:
          Images (B, H, W, C) float32 in [0, 1] and labels (B,) int32, both copies.

        Raises:
          DataError: no index, or one outside [0, N).
        """
        rows = self._rows(indices)
        images = self.images[rows]
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / np.float32(255)
        return images, self.labels[rows]

    def subset(self, indices: Iterable[SupportsIndex] | np.ndarray) -> Dataset:
        """The data set of the given rows, in the order asked for.

        Args:
          indices: integers in [0, N); repeats are allowed.

        Returns:
          A data set with the same classes, name and provenance.

        Raises:
          DataError: no index, or one outside [0, N).
        """
        rows = self._rows(indices)
        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            public=None if self.public is None else self.public[rows],
        )

    def _rows(self, indices: Iterable[SupportsIndex] | np.ndarray) -> np.ndarray:
        try:
            rows = np.array([operator.index(i) for i in indices], np.int64)
        except TypeError as error:
            raise DataError(f"indices must be integers ({error}).") from error
        if rows.size == 0:
            raise DataError("no index was given; ask for at least one image.")
        if rows.min() < 0 or rows.max() >= len(self):
            raise DataError(
                f"indices must lie in 0..{len(self) - 1} for {self.name!r}, "
                f"got {rows.min()}..{rows.max()}."
            )
        return rows


def split_client_public(
    dataset: Dataset, *, seed: int, num_client: int, num_public: int = 1024
) -> tuple[Dataset, Dataset]:
    """Divide a data set into the client's private images and the attacker's public ones.

    Drawn without replacement with NumPy's PCG64 from ``seed``; the two parts share no row. Where
    ``dataset.public`` is set, the client is drawn from the rows where it is ``False`` and the
    public part from those where it is ``True``; otherwise both come from all rows. The client's
    rows do not depend on ``num_public``.

    Args:
      dataset: the images.
      seed: zero or more; the same seed gives the same parts.
      num_client: images that the client holds, at least 1.
      num_public: images that the attacker may calibrate on, at least 16. Fewer are returned, but
        never fewer than 16, where the data set has fewer.

    Returns:
      ``(client, public)``.

    Raises:
      DataError: ``num_client`` < 1, ``num_public`` < 16, a negative seed, or too few images.

    >>> data = Dataset(np.zeros((40, 4, 4, 1), np.uint8), np.zeros(40, np.int32),
    ...                ("cat", "dog"), "demo", "Made of zeros.")
    >>> client, public = split_client_public(data, seed=0, num_client=8)
    >>> len(client), len(public)
    (8, 32)
    """
    if num_client < 1:
        raise DataError(
            f"the client needs at least one image, got a batch of {num_client}; ask for 1 or more."
        )
    if num_public < MIN_PUBLIC:
        raise DataError(
            f"the attacker needs at least {MIN_PUBLIC} public images to calibrate on, "
            f"got num_public={num_public}; ask for {MIN_PUBLIC} or more."
        )
    if seed < 0:
        raise DataError(f"seed must be zero or more, got {seed}.")
    rng = np.random.Generator(np.random.PCG64(seed))
    if dataset.public is None:
        order = rng.permutation(len(dataset))
        private, shareable = order[:num_client], order[num_client:]
    else:
        private = rng.permutation(np.flatnonzero(~dataset.public))
        shareable = rng.permutation(np.flatnonzero(dataset.public))
    _require_enough(dataset, num_client, len(private), len(shareable))
    return dataset.subset(private[:num_client]), dataset.subset(shareable[:num_public])


def _require_enough(dataset: Dataset, num_client: int, private: int, shareable: int) -> None:
    if private >= num_client and shareable >= MIN_PUBLIC:
        return
    if dataset.public is None:
        most = len(dataset) - MIN_PUBLIC
        have = f"has {len(dataset)}"
    else:
        most = private if shareable >= MIN_PUBLIC else 0
        have = f"has {private} for the client and {shareable} public ones"
    advice = (
        f"use a batch of at most {most}, or a larger data set"
        if most > 0
        else "use a larger data set"
    )
    raise DataError(
        f"{dataset.name!r} {have}, but {num_client} for the client and at least {MIN_PUBLIC} "
        f"public images are needed; {advice}."
    )
