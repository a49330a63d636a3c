"""Label inference: the part of a batch's labels that each method finds, by batch size and model.

Every batch is drawn anew from the images that no trained model has seen, and every untrained model
too. Accuracy is the overlap of the two multisets of labels over the batch size; intervals are 95 %,
from the spread over batches.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np

from jgia.attacks.labels import calibrate, infer_labels
from jgia.data import Dataset, load_dataset
from jgia.federated import client_update
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.training import load_victim

METHODS = ("idlg", "yin", "wainakh", "analytic", "llg")
SIZES = (1, 2, 4, 8, 16, 32, 64)
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"widths": (128,)},
    "lenet": {},
    "convnet": {"widths": (16, 32, 64)},
}


def overlap(found: np.ndarray, labels: np.ndarray) -> float:
    """The part of the labels that was found, duplicates counted."""
    counts = (np.bincount(values, minlength=1 + int(labels.max())) for values in (found, labels))
    one, other = counts
    size = min(len(one), len(other))
    return float(np.minimum(one[:size], other[:size]).sum() / len(labels))


def measure(
    victims: list[tuple[Victim, Any]], dataset: Dataset, size: int, batches: int, seed: int
) -> list[dict[str, Any]]:
    """One row per method; the victims take turns."""
    rng = np.random.default_rng(seed)
    scores: dict[str, list[float]] = {name: [] for name in (*METHODS, "random")}
    key = jax.random.key(seed)
    calibrations = [calibrate(key, victim, params) for victim, params in victims]
    for batch in range(batches):
        victim, params = victims[batch % len(victims)]
        rows = rng.choice(len(dataset), size, replace=False)
        images, labels = dataset.take(np.sort(rows))
        seen = client_update(jax.random.fold_in(key, batch), victim, params, images, labels)
        for method in METHODS:
            found = infer_labels(
                key, seen, method=method, calibration=calibrations[batch % len(victims)]
            )
            scores[method].append(overlap(found.labels, labels))
        guess = rng.integers(0, dataset.num_classes, size)
        scores["random"].append(overlap(guess, labels))
    return [
        {
            "method": name,
            "accuracy": float(np.mean(values)),
            "interval": 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5,
            "batches": len(values),
        }
        for name, values in scores.items()
    ]


def main() -> None:
    """Measure, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="sample", help="images of the batches")
    parser.add_argument(
        "--trained", nargs="*", default=[], metavar="FOLDER", help="from jgia train-victim"
    )
    parser.add_argument("--batches", type=int, default=24, help="per model and size")
    parser.add_argument("--smoke", action="store_true", help="one model, two sizes, few batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes, names, batches = SIZES, tuple(MODELS), arguments.batches
    if arguments.smoke:
        sizes, names, batches = (1, 8), ("mlp",), 4
    start = time.perf_counter()
    dataset = load_dataset(arguments.data)
    pixels, _ = dataset.take(np.arange(min(512, len(dataset))))
    groups: dict[str, list[tuple[Victim, Any]]] = {}
    for name in names:
        victim = make_victim(
            name,  # pyright: ignore[reportArgumentType]
            input_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            normalization=Normalization.fit(pixels),
            **MODELS[name],
        )
        keys = jax.random.split(jax.random.key(arguments.seed + 1), 4)
        groups[f"{name}, untrained"] = [(victim, victim.init(key)) for key in keys]
    for folder in arguments.trained:
        victim, params = load_victim(folder)
        groups[f"{victim.name}, trained"] = [(victim, params)]
    rows = []
    print(f"{'model':<20} {'B':>3} " + " ".join(f"{name:>9}" for name in (*METHODS, "random")))
    for group, victims in groups.items():
        for size in sizes:
            found = measure(victims, dataset, size, batches, arguments.seed)
            rows += [{"model": group, "batch": size, **row} for row in found]
            print(
                f"{group:<20} {size:>3} " + " ".join(f"{row['accuracy']:>9.3f}" for row in found),
                flush=True,
            )
    if arguments.out is not None:
        content = {
            "machine": harness.machine(),
            "data": dataset.name.rpartition("/")[2],
            "rows": rows,
            "seconds_in_all": time.perf_counter() - start,
        }
        harness.write_json(arguments.out, content)


if __name__ == "__main__":
    main()
