"""Accuracy against risk of models that were trained with the leakage term.

    python benchmarks/risk_training.py --data-dir DIR --out results/cpu/risk_training.json
    python benchmarks/risk_training.py --smoke

Every model is trained by ``jgia train-victim --risk-weight W`` and its risk estimated by ``jgia
risk`` on images that it has not seen, both as a user would. Risk is given at the noise that
training assumed, and at noise in proportion to the norm of every model's median gradient: a term
that only made gradients small would look good at the first and do nothing at the second.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

from jgia import load_dataset
from jgia.config import DataConfig, ModelConfig
from jgia.config.risk import RiskConfig
from jgia.config.training import TrainConfig
from jgia.risk_command import run_risk
from jgia.train_command import run_training


class Case(NamedTuple):
    """A model, its images, and the weights that it is trained with."""

    name: str
    train: str
    test: str
    model: ModelConfig
    image_size: int | None
    epochs: int
    mirrored: bool
    noise_std: float
    weights: tuple[float, ...]


WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
RELATIVE = 0.01
"""Noise on every entry over the gradient's Euclidean norm."""


def cases(folder: Path, work: Path) -> tuple[Case, ...]:
    """A perceptron on MNIST and a ConvNet on CIFAR-10 of half the side."""
    with np.load(folder / "mnist_test10k.npz") as mnist:
        train, test = _halves(work, mnist["x"], mnist["y"], 8000)
    convnet = ModelConfig(model="convnet", widths=(16, 32))
    return (
        Case(
            "mnist_mlp",
            train,
            test,
            ModelConfig(model="mlp", widths=(128,)),
            image_size=None,
            epochs=8,
            mirrored=False,
            noise_std=1e-2,
            weights=WEIGHTS,
        ),
        Case(
            "cifar10_convnet",
            f"npz:{folder / 'cifar10_train20k.npz'}",
            f"npz:{folder / 'cifar10_test10k.npz'}",
            convnet,
            image_size=16,
            epochs=10,
            mirrored=True,
            noise_std=1e-2,
            weights=WEIGHTS,
        ),
    )


def smoke(work: Path) -> tuple[Case, ...]:
    """A tiny perceptron on every fourth pixel of the bundled sample."""
    sample = load_dataset("sample")
    train, test = _halves(work, sample.images[:, ::4, ::4], sample.labels, len(sample) // 2)
    model = ModelConfig(model="mlp", widths=(8,))
    return (Case("sample", train, test, model, None, 1, True, 0.1, (0.0, 1.0)),)


def _halves(work: Path, images: np.ndarray, labels: np.ndarray, at: int) -> tuple[str, str]:
    """Two files that share no image: their specifications."""
    found = []
    for name, rows in (("train", slice(0, at)), ("test", slice(at, None))):
        np.savez(work / f"{name}.npz", x=images[rows], y=labels[rows])
        found.append(f"npz:{work / f'{name}.npz'}")
    return found[0], found[1]


def measure(case: Case, weight: float, images: int, limit: int | None) -> dict[str, Any]:
    """Train, then estimate on images that were held back."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        outcome = run_training(
            TrainConfig(
                data=DataConfig(data=case.train, image_size=case.image_size, limit=limit),
                model=case.model,
                test=case.test,
                epochs=case.epochs,
                flip=case.mirrored,
                risk_weight=weight,
                risk_noise_std=case.noise_std,
                out=Path(folder),
            )
        )
        seconds = time.perf_counter() - begin
        config = RiskConfig(
            data=DataConfig(data=case.test, image_size=case.image_size, num_public=1024),
            trained=Path(folder),
            images=images,
            noise_std=case.noise_std,
            per_layer=False,
            spectrum=False,
        )
        absolute = run_risk(config)
        norms = absolute.report.estimates.release_norm
        own = RELATIVE * float(np.median(norms))
        relative = run_risk(dataclasses.replace(config, noise_std=own))
    test = outcome.trained.test
    assert test is not None
    return {
        "case": case.name,
        "weight": weight,
        "accuracy": test.accuracy,
        "loss": test.loss,
        "noise_std": case.noise_std,
        "risk": np.asarray(absolute.report.estimates.risk, np.float64).tolist(),
        "mean_risk": float(np.mean(absolute.report.estimates.risk)),
        "mean_psnr": float(np.mean(absolute.report.estimates.predicted_psnr)),
        "median_norm": float(np.median(norms)),
        "own_noise_std": own,
        "mean_risk_own_noise": float(np.mean(relative.report.estimates.risk)),
        "training_risk": outcome.trained.history[-1].risk,
        "train_s": seconds,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:16s} weight {row['weight']:5g}: accuracy {row['accuracy']:.1%}, "
        f"risk {row['mean_risk']:.3f} ({row['mean_psnr']:.1f} dB predicted), with noise in "
        f"proportion {row['mean_risk_own_noise']:.3f}, norm {row['median_norm']:.2g}, "
        f"{row['train_s']:.0f} s"
    )


def main() -> None:
    """Run all cases, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(
        description="Accuracy against risk of models trained with the leakage term."
    )
    parser.add_argument("--smoke", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=32, help="whose risk is estimated")
    parser.add_argument("--limit", type=int, help="training images at most")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    images, limit = (2, 64) if given.smoke else (given.images, given.limit)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for case in smoke(work) if given.smoke else cases(given.data_dir, work):
            for weight in case.weights:
                rows.append(measure(case, weight, images, limit))
                print(_line(rows[-1]), flush=True)
    if given.out:
        content = {"rows": rows, "smoke": given.smoke, "machine": harness.machine()}
        harness.write_json(given.out, content)


if __name__ == "__main__":
    main()
