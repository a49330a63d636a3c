"""One string names a data set: ``sample``, ``faces``, ``npz:PATH``, ``folder:PATH``, ``tfds:…``."""

from __future__ import annotations

from jgia.data import faces, folder, npz, sample, tfds
from jgia.data.dataset import DataError, Dataset

MAX_IMAGE_SIZE = 1024
"""Largest side to which images are resized."""


def load_dataset(
    spec: str,
    *,
    image_size: int | None = None,
    download: bool = False,
    data_dir: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load labeled images; nothing is fetched unless ``download=True``.

    Args:
      spec: one of

        - ``"sample"`` or ``"sample:64"``: crops of public-domain photographs that come with the
          package, 32 or 64 pixels wide;
        - ``"faces"``, ``"faces:NUMBER"``, ``"faces:STYLE"`` or ``"faces:STYLE:NUMBER"``: faces of
          persons who do not exist, drawn when asked for, 2,000 unless NUMBER says otherwise, every
          second one public; STYLE is ``photo`` (the default), ``cartoon`` or ``art``;
        - ``"npz:PATH"``: a NumPy archive with images ``x`` (or ``images``), integer labels ``y``
          (or ``labels``; missing labels become one class), and optional ``names`` (or
          ``class_names``) and ``public`` (bool). An archive with ``x_train``, ``x_test``, … is
          read from its ``train`` part, or from another with ``"npz:PATH:test"``;
        - ``"folder:PATH"``: one sub-folder of image files per class;
        - ``"tfds:NAME"`` or ``"tfds:NAME:SPLIT"``: a data set that TensorFlow Datasets has
          prepared on disk, for example ``"tfds:mnist:test[:1000]"``; TensorFlow itself is not
          needed. NAME may carry a configuration and a version: ``"tfds:NAME/CONFIG:1.0.0:test"``.
      image_size: resize to this many pixels squared: the centre square is cut out and resized
        with Pillow's Lanczos filter. For ``sample`` it chooses between 32 (the default) and 64, or
        makes the crops of 32 smaller. ``faces`` are drawn at this size, 16 to 64 (32 when left
        out).
      download: let TensorFlow Datasets fetch a missing data set; used by ``tfds:`` only.
      data_dir: where TensorFlow Datasets keeps its data; used by ``tfds:`` only.
      limit: load at most this many images: the first ones, or, for a folder, the first ones of
        each class in turn.

    Returns:
      The data set.

    Raises:
      DataError: the specification is unknown, or the data is missing or malformed; the message
        is one line that says what to do.

    >>> load_dataset("sample").image_shape
    (32, 32, 3)
    """
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"image_size must lie in 1..{MAX_IMAGE_SIZE}, got {image_size}.")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}.")
    kind, colon, rest = spec.partition(":")
    if kind == "sample":
        return sample.load(rest if colon else None, image_size=image_size, limit=limit)
    if kind == "faces":
        return faces.load(rest if colon else None, image_size=image_size, limit=limit)
    if kind in ("npz", "folder", "tfds") and rest:
        if kind == "npz":
            return npz.load(rest, image_size=image_size, limit=limit)
        if kind == "folder":
            return folder.load(rest, image_size=image_size, limit=limit)
        return tfds.load(
            rest, image_size=image_size, download=download, data_dir=data_dir, limit=limit
        )
    raise DataError(
        f"unknown data set {spec!r}; use sample, sample:64, faces[:STYLE][:NUMBER], npz:PATH, "
        "folder:PATH, or tfds:NAME[:split]."
    )
