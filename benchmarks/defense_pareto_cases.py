"""Models and images of ``defense_pareto.py``: few enough pixels for exact Jacobians."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jgia import load_dataset
from jgia.data import Dataset
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization


class Case(NamedTuple):
    """A model and its images."""

    name: str
    victim: Victim
    train: Dataset
    test: Dataset
    rounds: int
    rate: float


def cases(folder: Path, rounds: int) -> list[Case]:
    """A perceptron on MNIST, a LeNet on CIFAR-10, both on reduced images."""
    mnist = load_dataset(f"npz:{folder / 'mnist_test10k.npz'}", image_size=14)
    train = load_dataset(f"npz:{folder / 'cifar10_train20k.npz'}", image_size=8)
    test = load_dataset(f"npz:{folder / 'cifar10_test10k.npz'}", image_size=8)
    rows = np.arange(len(mnist))
    return [
        _case("mnist_mlp", mnist.subset(rows[:8000]), mnist.subset(rows[8000:]), rounds, 0.3),
        _case("cifar10_lenet", train, test.subset(np.arange(2000)), rounds, 0.1),
    ]


def smoke() -> list[Case]:
    """The bundled sample in few pixels."""
    sample = load_dataset("sample")
    small = Dataset(
        sample.images[:, ::8, ::8], sample.labels, sample.class_names, "sample", "reduced"
    )
    half = len(small) // 2
    rows = np.arange(len(small))
    return [_case("mnist_mlp", small.subset(rows[:half]), small.subset(rows[half:]), 2, 0.1)]


def _case(name: str, train: Dataset, test: Dataset, rounds: int, rate: float) -> Case:
    pixels, _ = train.take(np.arange(min(2000, len(train))))
    options: dict[str, Any] = {"widths": (64,)} if name.endswith("mlp") else {}
    victim = make_victim(
        "mlp" if name.endswith("mlp") else "lenet",
        input_shape=train.image_shape,
        num_classes=max(2, train.num_classes),
        normalization=Normalization.fit(pixels),
        **options,
    )
    return Case(name, victim, train, test, rounds, rate)
