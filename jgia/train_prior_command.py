"""``jgia train-prior``: from images to a folder with a trained generator."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jgia._io import atomic_write, atomic_write_bytes, require_writable_folder
from jgia.audit import environment, load_images, plain
from jgia.config.prior import TrainPriorConfig
from jgia.data import Dataset
from jgia.generators.prior import Prior, save_prior
from jgia.generators.quality import features, kernel_distance
from jgia.generators.stylegan2 import PRESETS, StyleGAN2
from jgia.generators.training import Report, TrainedGenerator, train_generator
from jgia.training.train import Progress

PyTree = Any

CHECKPOINT, SAMPLES, LOG = "checkpoint.npz", "samples.png", "log.csv"
_GRID = 10
_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorOutcome:
    """What a training run leaves.

    Attributes:
      prior: the generator and what is known of it.
      trained: how it went.
      paths: the files that were written.
    """

    prior: Prior
    trained: TrainedGenerator
    paths: list[Path]


def run_prior_training(
    config: TrainPriorConfig | None = None,
    *,
    command: str = "jgia train-prior",
    progress: Progress | None = None,
) -> PriorOutcome:
    """Load images, train a generator on the public ones, write it.

    Goes on from ``checkpoint.npz`` in the folder. At every checkpoint, ``samples.png`` shows random
    images of the averaged generator and ``log.csv`` gets a line; both are there while it trains.
    The prior is written at every checkpoint too, so that it can be tried out.

    Args:
      config: what to run; the default trains ``tiny32`` on drawn faces.
      command: the exact command to reproduce, for ``prior.json``.
      progress: called with (stage in words, steps done, steps in all).

    Raises:
      ValueError: data or options do not fit, or training diverged.
    """
    config = config or TrainPriorConfig()
    report = progress or (lambda stage, done, total: None)
    out = require_writable_folder(config.out)
    report("loading images", 0, 1)
    dataset = training_images(config)
    scribe = _Scribe(config, dataset, command)
    trained = train_generator(
        jax.random.key(config.seed),
        dataset,
        config,
        minutes=config.minutes,
        checkpoint=out / CHECKPOINT,
        checkpoint_minutes=config.checkpoint_minutes,
        look=scribe.look,
        progress=report,
    )
    prior = scribe.prior(trained.generator, trained.params, trained.history)
    paths = [*save_prior(out, prior), out / SAMPLES, out / LOG]
    return PriorOutcome(prior=prior, trained=trained, paths=paths)


def training_images(config: TrainPriorConfig) -> Dataset:
    """The images to train on: the public ones where the data set marks some.

    Resized to the generator's resolution, unless ``image_size`` says otherwise.
    """
    size = config.resolution or PRESETS[config.size]().resolution
    data = config.data
    if data.image_size is None:
        data = dataclasses.replace(data, image_size=size)
    dataset = load_images(data)
    if dataset.public is not None:
        dataset = dataset.subset(np.flatnonzero(dataset.public))
    return dataset


class _Scribe:
    """Writes down how a run goes, at every checkpoint."""

    def __init__(self, config: TrainPriorConfig, dataset: Dataset, command: str) -> None:
        self._config, self._dataset, self._command = config, dataset, command
        self._lines: list[Report] = []
        self._real = None
        if config.kid_images:
            rows = np.random.default_rng(config.seed).permutation(len(dataset))
            images, _ = dataset.take(rows[: config.kid_images])
            self._real = features(np.asarray(images, np.float32))

    def look(self, generator: StyleGAN2, params: PyTree, report: Report) -> Report:
        config = self._config
        count = max(_GRID**2, config.kid_images)
        images = random_images(generator, params, jax.random.key(config.seed), count)
        with atomic_write(config.out / SAMPLES) as file:
            Image.fromarray(grid(images[: _GRID**2])).save(file, format="PNG")
        if self._real is not None:
            kid, _ = kernel_distance(features(images[: config.kid_images]), self._real)
            report = dataclasses.replace(report, kid=kid)
        self._log(report)
        save_prior(config.out, self.prior(generator, jax.device_get(params), (report,)))
        return report

    def prior(self, generator: StyleGAN2, params: PyTree, history: tuple[Report, ...]) -> Prior:
        config, dataset, last = self._config, self._dataset, history[-1]
        options = plain(config)
        options.pop("out", None)
        data = options.pop("data", {})
        record = {
            "license": config.license,
            "data": {
                "name": dataset.name,
                "provenance": dataset.provenance,
                "num_images": len(dataset),
                "class_names": list(dataset.class_names) if generator.num_classes else [],
                "image_size": data.get("image_size"),
            },
            "metrics": {"kernel_distance": last.kid, "features": "fixed random network"},
            "training": {
                "options": options,
                "kimg": last.kimg,
                "seconds": last.seconds,
                "images_per_second": 1000 * last.kimg / last.seconds,
                "environment": environment(),
            },
        }
        return Prior(
            name=config.name or config.out.resolve().name,
            generator=generator,
            params=params,
            record=record,
        )

    def _log(self, report: Report) -> None:
        path, names = self._config.out / LOG, [f.name for f in dataclasses.fields(Report)]
        earlier = path.read_text("utf-8") if path.exists() else ",".join(names) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(dataclasses.astuple(report))
        atomic_write_bytes(path, (earlier + line.getvalue()).encode())


def random_images(generator: StyleGAN2, params: PyTree, key: jax.Array, count: int) -> np.ndarray:
    """(count, H, W, C) bytes of random images, of classes in turn for a conditional generator."""
    parts = []
    for i in range(0, count, _BATCH):
        labels = None
        if generator.num_classes:
            labels = jax.numpy.arange(i, i + _BATCH) % generator.num_classes
        images = _generated(generator, params, jax.random.fold_in(key, i), labels)
        parts.append(np.asarray(images))
    pixels = (np.clip(np.concatenate(parts)[:count], -1, 1) + 1) * 127.5
    return np.round(pixels).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _generated(
    generator: StyleGAN2, params: PyTree, key: jax.Array, labels: jax.Array | None
) -> jax.Array:
    return generator.generate(params, key, _BATCH, labels=labels)


def grid(images: np.ndarray) -> np.ndarray:
    """Square images as one, row by row, for a picture: (rows H, columns W) or with 3 channels."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    _, height, width, channels = images.shape
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    return sheet[..., 0] if channels == 1 else sheet
