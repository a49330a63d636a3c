"""The bundled sample: crops of public-domain photographs; see ``_sample/PROVENANCE.md``."""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import json

import numpy as np
from PIL import Image

from jgia.data import pixels
from jgia.data.dataset import DataError, Dataset

SIZES = (32, 64)
"""Widths in pixels for which crops are bundled; the first is the default."""


def load(
    size: str | None = None, *, image_size: int | None = None, limit: int | None = None
) -> Dataset:
    """Load the crops of one size; see :func:`jgia.data.load_dataset`.

    The client's crops and the public ones come from different parts of each photograph: no pixel
    of a photograph is in both.

    Args:
      size: what follows ``sample:``, or ``None``.
      image_size: 32 or 64, which must agree with ``size`` where both are given; smaller than both,
        crops are resized.
      limit: at most this many crops.

    Returns:
      The data set, with its ``public`` mask.

    Raises:
      DataError: a size that is not bundled and not smaller.
    """
    if image_size is not None and image_size < SIZES[0]:
        whole = load(size, limit=limit)
        return dataclasses.replace(
            whole,
            images=pixels.resize(whole.images, image_size),
            name=f"{whole.name} resized to {image_size}",
        )
    asked = {str(s) for s in (size, image_size) if s is not None} or {str(SIZES[0])}
    choices = [s for s in SIZES if asked == {str(s)}]
    if not choices:
        raise DataError(
            f"the bundled sample has no size {' and '.join(sorted(asked))!r}; use "
            f"{' or '.join(f'sample:{s}' for s in SIZES)}, or your own images with npz: or folder:."
        )
    (width,) = choices
    files = importlib.resources.files("jgia.data") / "_sample"
    facts = json.loads((files / f"sample_{width}.json").read_text(encoding="utf-8"))
    crops = facts["crops"][:limit]
    with Image.open(io.BytesIO((files / f"sample_{width}.png").read_bytes())) as sheet:
        tiles = np.asarray(sheet.convert("RGB"))
    rows, columns = tiles.shape[0] // width, tiles.shape[1] // width
    tiles = tiles.reshape(rows, width, columns, width, 3).transpose(0, 2, 1, 3, 4)
    return Dataset(
        images=tiles.reshape(-1, width, width, 3)[: len(crops)].copy(),
        labels=np.array([crop["label"] for crop in crops], np.int32),
        class_names=tuple(facts["class_names"]),
        name=f"sample:{width}",
        provenance=facts["provenance"],
        public=np.array([crop["pool"] == "public" for crop in crops]),
    )
