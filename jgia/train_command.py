"""``jgia train-victim``: from a configuration to a folder with a trained victim."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jgia.audit import build_victim, environment, load_images, plain
from jgia.config.training import TrainConfig
from jgia.data import Dataset
from jgia.training.files import save_victim
from jgia.training.train import Progress, TrainedVictim, train_victim

CHECKPOINT = "checkpoint.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a training run leaves.

    Attributes:
      trained: the victim and how it went.
      paths: the files that were written.
      num_train: images that were trained on.
      num_test: images that were only tested on.
    """

    trained: TrainedVictim
    paths: list[Path]
    num_train: int
    num_test: int


def run_training(
    config: TrainConfig | None = None,
    *,
    command: str = "jgia train-victim",
    progress: Progress | None = None,
) -> TrainingOutcome:
    """Load images, train a victim, write it; goes on from ``checkpoint.npz`` in the folder.

    Args:
      config: what to run; the default trains the default model on the bundled sample.
      command: the exact command to reproduce, for ``training.json``.
      progress: called with (stage in words, steps done, steps in all).

    Raises:
      ValueError: data, model or options do not fit, or training diverged.
    """
    config = config or TrainConfig()
    report = progress or (lambda stage, done, total: None)
    report("loading images", 0, 1)
    train, test = split_train_test(config)
    victim = build_victim(config.model, train, train, normalize=config.data.normalize)
    checkpoint = config.out / CHECKPOINT
    trained = train_victim(
        jax.random.key(config.seed),
        victim,
        train,
        config,
        test=test,
        checkpoint=checkpoint,
        progress=report,
    )
    report("writing the victim", 0, 1)
    record = {
        "command": command,
        "config": plain(config),
        "environment": environment(),
        "data": {
            "name": train.name,
            "provenance": train.provenance,
            "num_train": len(train),
            "test_name": None if test is None else test.name,
            "num_test": 0 if test is None else len(test),
            "class_names": list(train.class_names),
        },
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
    }
    paths = save_victim(config.out, trained, model=config.model, record=record)
    checkpoint.unlink(missing_ok=True)
    num_test = 0 if test is None else len(test)
    return TrainingOutcome(trained=trained, paths=paths, num_train=len(train), num_test=num_test)


def split_train_test(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The images to train on and those to test on; they share none.

    With ``config.test`` they are two sources. Otherwise the images that the data set marks as
    public train and the others test: those are what a client of an audit holds. Where nothing is
    marked, ``test_fraction`` of the images, drawn by the seed, are held back.

    Raises:
      ValueError: no image is left to train on, or the test images are of another size or classes.
    """
    dataset = load_images(config.data)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))
    held_back = rows[: round(config.test_fraction * len(dataset))]
    if dataset.public is not None:
        held_back = np.flatnonzero(~dataset.public)
    if config.test is None:
        kept = np.setdiff1d(rows, held_back)
        if len(kept) == 0:
            raise ValueError(
                f"{dataset.name!r} has {len(dataset)} images and none is left to train on; lower "
                "test_fraction, or use data with public images."
            )
        return dataset.subset(kept), dataset.subset(held_back) if len(held_back) else None
    if dataset.public is not None:
        dataset = dataset.subset(np.flatnonzero(dataset.public))
    test = load_images(dataclasses.replace(config.data, limit=None), spec=config.test)
    names = test.class_names
    if test.image_shape != dataset.image_shape or names != dataset.class_names[: len(names)]:
        raise ValueError(
            f"the test images have shape {test.image_shape} and classes {_few(names)}, the "
            f"training images {dataset.image_shape} and {_few(dataset.class_names)}; give "
            "--image-size, or other test data."
        )
    return dataset, test


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(ascii(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
