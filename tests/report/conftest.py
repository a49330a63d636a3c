"""A small, self-consistent result with its arrays, built by hand for the report's tests."""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest


class Case(NamedTuple):
    result: dict[str, Any]
    originals: np.ndarray
    reconstructions: np.ndarray
    scores: np.ndarray
    statuses: list[str]
    aligned: list[np.ndarray | None]


def _wilson(count: int, total: int) -> dict[str, float]:
    z = 1.959963984540054
    share, spread = count / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + spread)
    return {
        "rate": share,
        "low": min(share, max(0.0, center - half)),
        "high": max(share, min(1.0, center + half)),
    }


def _scores(originals: np.ndarray, images: np.ndarray, matching: list[int | None]) -> dict:
    errors = [
        None if m is None else float(np.mean((originals[i] - images[m]) ** 2))
        for i, m in enumerate(matching)
    ]
    psnr = [None if e is None else 200.0 if e == 0 else -10 * math.log10(e) for e in errors]
    found = [value for value in psnr if value is not None]
    total = len(originals)

    def quantile(level: int) -> float | None:
        return float(np.quantile(found, level / 100)) if found else None

    rates = {t: _wilson(sum(v >= float(t) for v in found), total) for t in ("18", "25", "30", "40")}
    return {
        "num_true": total,
        "num_reconstructed": len(images),
        "num_recovered": sum(value >= 18 for value in found),
        "mse": float(np.mean([e for e in errors if e is not None])) if found else None,
        "psnr": {
            "per_image": psnr,
            "median": quantile(50),
            "mean_capped": float(np.mean(np.minimum(found, 60))) if found else None,
            "of_mean_mse": 17.0 if found else None,
            "median_all": quantile(50),
            "quantiles": {str(level): quantile(level) for level in (5, 25, 50, 75, 95)},
        },
        "ssim": {
            "per_image": [None if m is None else 0.5 for m in matching],
            "median": 0.5 if found else None,
        },
        "success_rate": rates,
        "baselines": {
            "dataset_mean": {
                "median": 11.0,
                "mean_capped": 11.5,
                "success_rate": copy.deepcopy(rates),
            },
            "random": {"median": 8.0, "mean_capped": 8.5},
        },
        "matching": matching,
    }


def build(
    num_true: int = 4, shape: tuple[int, int, int] = (8, 8, 3), *, unmatched: int = 1
) -> Case:
    """First image identical, then noisier ones in reverse order, the last ``unmatched`` missing."""
    rng = np.random.default_rng(7)
    originals = rng.integers(0, 256, (num_true, *shape)).astype(np.float32) / np.float32(255)
    count = num_true - unmatched
    images = np.zeros((count, *shape), np.float32)
    matching: list[int | None] = [None] * num_true
    for true in range(count):
        noise = rng.normal(size=shape).astype(np.float32) * np.float32(0.05 * true)
        matching[true] = count - 1 - true
        images[count - 1 - true] = np.clip(originals[true] + noise, 0, 1)
    statuses = ["exact" if i == count - 1 else "regularised" for i in range(count)]
    candidates = [
        {"status": status, "score": 1.0 - 0.1 * i, "bin": i, "residual": None}
        for i, status in enumerate([*statuses, "mixture", "duplicate"])
    ]
    result = {
        "version": "1.4",
        "command": "jgia audit --data digits --seed 3",
        "config": {"attack": {"num_bins": 64, "layers": ["conv1", "fc"]}, "dtype": "float32"},
        "environment": {
            "jgia": "0.1.0",
            "jax": "0.10.2",
            "jaxlib": "0.10.2",
            "numpy": "2.3.0",
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "device": "cpu",
            "threads": 2,
        },
        "timings": {"setup_s": 0.5, "compile_s": 2.25, "run_s": 75.0, "total_s": 78.0, "leak_s": 0},
        "seed": 3,
        "data": {
            "name": "digits",
            "provenance": "made up",
            "num_client": num_true,
            "num_public": 100,
            "image_shape": list(shape),
            "num_classes": 10,
        },
        "threat_model": {
            "server": "malicious",
            "protocol": "fedsgd",
            "local_steps": 1,
            "local_learning_rate": None,
            "num_examples": None,
            "labels_known": False,
            "public_data": "100 images",
        },
        "attack": {
            "name": "ARES",
            "selected_by": "residual",
            "expected_recovered": 2.5,
            "num_candidates": len(candidates),
            "candidates": candidates,
            "status_counts": dict(collections.Counter(c["status"] for c in candidates)),
            "stats": {"iterations": 40, "gap": 1e-6},
        },
        "scores": _scores(originals, images, matching),
    }
    aligned = [None if m is None else images[m] for m in matching]
    return Case(result, originals, images, np.linspace(1, 0, count), statuses, aligned)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return build


@pytest.fixture
def case() -> Case:
    return build()
