"""Data sets that TensorFlow Datasets has prepared on disk, read without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jgia.data import pixels
from jgia.data.dataset import DataError, Dataset
from jgia.data.tfrecord import read_records

_CHUNK = 256
_VERSION = re.compile(r"(\d+|\*)\.(\d+|\*)\.(\d+|\*)")


def load(
    spec: str,
    *,
    image_size: int | None = None,
    download: bool = False,
    data_dir: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load ``NAME[/CONFIG][:VERSION][:SPLIT]``; see :func:`jgia.data.load_dataset`.

    Random-access files (``array_record``) are read through ``tfds.data_source``; the default
    TFRecord files by :func:`jgia.data.tfrecord.read_records` and the data set's own
    ``features.deserialize_example_np``. The split defaults to ``train``, or to the only one.

    Raises:
      DataError: ``tensorflow_datasets`` cannot be imported; the data set is not on disk and
        ``download`` was not given; it has no image or no class label; a file is damaged.
    """
    name, split = _parse(spec)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    with _quiet():
        tfds = _import_tfds()
        builder = _find(tfds, name, data_dir)
    if builder is None:
        if not download:
            where = data_dir or tfds.core.constants.DATA_DIR
            raise DataError(
                f"{name} is not in {where}; run again with --download (needs network), or use "
                "npz:/folder:."
            )
        builder = _download(tfds, name, data_dir)
    with _quiet():
        split_name, instructions = _select(builder, split)
        image_key, label_key = _keys(tfds, builder)
        count = sum(item.take for item in instructions)
        count = count if limit is None else min(limit, count)
        if count == 0:
            raise DataError(f"{name} split {split_name!r} is empty; choose another split.")
        examples = _examples(builder, split_name, instructions, count)
        images, labels = _collect(examples, image_key, label_key, image_size, count, name)
    class_names = builder.info.features[label_key].names
    labels, names = pixels.as_labels(labels, class_names, len(images), f"labels of {name}")
    return Dataset(
        images=images,
        labels=labels,
        class_names=names,
        name=f"{name}:{split_name}",
        provenance=f"TensorFlow Datasets {builder.info.full_name}, split {split_name}.",
    )


def _parse(spec: str) -> tuple[str, str | None]:
    """Part name and split.

    >>> _parse("mnist"), _parse("mnist:3.0.1"), _parse("mnist:3.*.*:test[:10]")
    (('mnist', None), ('mnist:3.0.1', None), ('mnist:3.*.*', 'test[:10]'))
    """
    name, _, rest = spec.partition(":")
    head, _, tail = rest.partition(":")
    if _VERSION.fullmatch(head):
        return f"{name}:{head}", tail or None
    return name, rest or None


@contextlib.contextmanager
def _quiet(*, keep_output: bool = False) -> Iterator[None]:
    """Keep the library's banners, warnings and log lines away from the user's terminal.

    With ``keep_output`` what it prints goes to the error stream: progress, not results.
    """
    stdout = sys.stderr if keep_output else io.StringIO()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(stdout):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _import_tfds() -> Any:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        importlib.import_module("tensorflow_datasets.core.read_only_builder")
    except Exception as error:  # a broken dependency of it raises anything
        raise DataError(
            f"tensorflow_datasets cannot be imported ({_line(error)}); run pip install "
            "tensorflow-datasets, or use npz:/folder:."
        ) from error
    return tfds


def _find(tfds: Any, name: str, data_dir: str | None) -> Any | None:
    """A builder from the files on disk, which asks no network, or ``None``."""
    try:
        # tfds.builder() would construct the registered class, which looks for metadata online.
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        return None
    except Exception as error:
        raise DataError(
            f"cannot open the data set {name!r} ({_line(error)}); check its name (NAME, "
            "NAME/CONFIG, NAME:VERSION) and its folder."
        ) from error


def _download(tfds: Any, name: str, data_dir: str | None) -> Any:
    try:
        with _quiet(keep_output=True):
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare(file_format="array_record")
            return builder
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"TensorFlow Datasets knows no {name!r}; check the name, or use npz:/folder:."
        ) from error
    except ModuleNotFoundError as error:
        raise DataError(
            f"preparing {name} needs the module {_module(error)}; run pip install "
            f"{_module(error)}, or copy the prepared folder from elsewhere."
        ) from error
    except Exception as error:  # network, disk, checksums, the builder's own code
        raise DataError(
            f"downloading {name} failed ({_line(error)}); check the network, or use npz:/folder:."
        ) from error


def _select(builder: Any, split: str | None) -> tuple[str, Sequence[Any]]:
    splits = builder.info.splits
    if not splits:
        raise DataError(f"{builder.info.full_name} has no splits on disk; prepare it again.")
    if split is None:
        split = "train" if "train" in splits else next(iter(splits))
    try:
        instructions = splits[split].file_instructions
    except Exception as error:
        raise DataError(
            f"{builder.info.full_name} has no split {split!r}; its splits are "
            f"{', '.join(sorted(splits))}, or a part such as {next(iter(splits))}[:100]."
        ) from error
    for item in instructions:
        if not Path(item.filename).is_file():
            raise DataError(f"{item.filename} is missing; prepare {builder.info.name} again.")
    return split, instructions


def _keys(tfds: Any, builder: Any) -> tuple[str, str]:
    features = builder.info.features
    supervised = builder.info.supervised_keys
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [
        k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel) and v.num_classes
    ]
    if supervised and supervised[0] in images and supervised[-1] in labels:
        return supervised[0], supervised[-1]
    if not images or not labels:
        raise DataError(
            f"{builder.info.full_name} has {'no class label' if images else 'no image'} among "
            f"its features ({', '.join(features)}); choose an image classification data set."
        )
    return images[0], labels[0]


def _examples(
    builder: Any, split: str, instructions: Sequence[Any], count: int
) -> Iterator[dict[str, Any]]:
    formats = {item.value for item in builder.info.available_file_formats()}
    if "array_record" in formats:
        source = builder.as_data_source(split, file_format="array_record")
        for start in range(0, count, _CHUNK):
            yield from source.__getitems__(list(range(start, min(start + _CHUNK, count))))
    elif "tfrecord" in formats:
        for item in instructions:
            for record in read_records(item.filename, skip=item.skip, take=min(item.take, count)):
                yield builder.info.features.deserialize_example_np(record)
            count -= item.take
            if count <= 0:
                return
    else:
        raise DataError(
            f"{builder.info.full_name} is stored as {', '.join(sorted(formats)) or 'nothing'}; "
            "prepare it with file_format='array_record'."
        )


def _collect(
    examples: Iterator[dict[str, Any]],
    image_key: str,
    label_key: str,
    image_size: int | None,
    count: int,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[Any] = []
    try:
        for example in examples:
            image = pixels.as_images(np.asarray(example[image_key])[None], f"images of {name}")
            image = pixels.resize(image, image_size)[0]
            if not images:
                pixels.require_memory(count * image.nbytes, name)
            elif image.shape != images[0].shape:
                raise DataError(
                    f"image sizes differ in {name}: {images[0].shape} and {image.shape}; give "
                    "image_size (--image-size) to resize all."
                )
            images.append(image)
            labels.append(example[label_key])
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"reading {name} needs the module {_module(error)}; run pip install "
            f"{_module(error)}, or prepare the data set in the tfrecord format."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"an image of {name} is too large to be decoded; prepare it smaller."
        ) from error
    except Exception as error:  # damaged files: parsers of three formats, each with its own kinds
        raise DataError(
            f"cannot decode example {len(images)} of {name} ({type(error).__name__}: "
            f"{_line(error)}); prepare the data set again."
        ) from error
    if len(images) != count:
        raise DataError(
            f"{name} has {len(images)} examples where {count} were expected; prepare it again."
        )
    return np.stack(images), np.asarray(labels)


def _module(error: BaseException) -> str:
    """The package that an import error is about; the library's wrappers lose its name."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.name:
            return cause.name.split(".")[0]
        cause = cause.__cause__ or cause.__context__
    return "tensorflow"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
