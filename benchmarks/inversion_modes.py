"""From true activations to images: inversion mode x equations per unknown x basis, and ROC curves.

    python benchmarks/inversion_modes.py --data npz:PATH --out results/cpu
    python benchmarks/inversion_modes.py --smoke

A Gaussian first layer with ReLU sees central 16 x 16 crops of color images (768 unknowns); every
mode gets the same float32 activations. Quality is the median PSNR over the images with a
bootstrap interval. The second part asks how well each test of a single example tells mixtures:
the active fraction and the pair conflict of perceptrons, the residual of convolutions, and the
misprediction behind average pooling. Finished cells are kept in OUT/inversion_modes.cells.json
and not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Literal

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jgia.attacks import ares
from jgia.attacks.ares.candidates import measured_candidates
from jgia.attacks.ares.predict import front_params, imprint_inputs, misprediction
from jgia.audit import load_images
from jgia.config import AresOptions, DataConfig, PerformanceFlags
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization

SIDE = 16
RATIOS = (1 / 6, 1 / 3, 2 / 3, 1.0, 2.0, 4.0)
MODES = ("masked_onesided", "masked_eq", "klasso_mu", "pinv", "activation_matching")
BASES = ("block_dct", "block_dct_gray", "global_dct", "haar", "db4", "pixel")
WITH_BASIS = MODES[:3]
QUANTITIES = {
    "active fraction (perceptron)": "active_excess",
    "pair conflict (perceptron)": "conflict",
}


def main() -> None:
    arguments = _parse()
    images, public = load(arguments.data, 8 if arguments.smoke else 128)
    ratios = RATIOS[2:3] if arguments.smoke else RATIOS
    bases = BASES[:2] if arguments.smoke else BASES
    store = arguments.out / "inversion_modes.cells.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(store.read_text("utf-8")) if store.exists() else {}
    for ratio in ratios:
        for mode in MODES:
            for basis in bases if mode in WITH_BASIS else bases[:1]:
                name = f"{mode}/{ratio:.3g}/{basis}/{len(images)}"
                if name not in cells:
                    cells[name] = cell(images, public, mode, ratio, basis)
                    harness.write_json(store, cells)
                _print_row(name, cells[name])
    roc = {name: curve(*values) for name, values in statistics(images, public).items()}
    for name, entry in roc.items():
        print(f"{name:40s} AUC {entry['auc']:.4f}  at no false alarm {entry['tpr_at_0']:.3f}")
    content = {"machine": harness.machine(), "cells": cells, "mixture_tests": roc}
    harness.write_json(arguments.out / "inversion_modes.json", content)
    if not arguments.smoke:
        draw(arguments.out / "inversion_modes.png", cells, roc)


def load(spec: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Central crops: (number, 16, 16, 3) private images, 512 public ones."""
    dataset = load_images(DataConfig(data=spec))
    rows = np.random.default_rng(0).permutation(len(dataset))
    crops = []
    for part in (rows[:number], rows[number : number + 512]):
        images, _ = dataset.take(np.sort(part))
        top, left = ((n - SIDE) // 2 for n in images.shape[1:3])
        crops.append(images[:, top : top + SIDE, left : left + SIDE])
    return crops[0], crops[1]


def perceptron(public: np.ndarray, rows: int, *, paired: bool) -> tuple[Victim, ares.Plan]:
    """A crafted perceptron whose first layer only measures."""
    victim = make_victim(
        "mlp",
        input_shape=public.shape[1:],
        num_classes=10,
        normalization=Normalization.fit(public),
        widths=(rows, 64),
    )
    options = AresOptions(paired=paired, isolating_fraction=0.0)
    _, plan = ares.craft(jax.random.key(0), victim, public, options=options)
    return victim, plan


def activations(victim: Victim, plan: ares.Plan, images: np.ndarray) -> np.ndarray:
    """True activations (N, H', W', F), rounded to float32 as a gradient would give them."""
    planes = jnp.asarray(victim.normalization.normalize(images).transpose(3, 1, 2, 0), jnp.float32)
    measured = plan.measurement(victim)
    outputs = measured.operator.apply(planes) + jnp.asarray(measured.bias)[..., None]
    return np.moveaxis(np.maximum(np.asarray(outputs), 0), (0, 3), (3, 0)).astype(np.float64)


def as_candidates(plan: ares.Plan, h: np.ndarray) -> ares.Candidates:
    """Activations as if each had been read out of a bin of its own."""
    q = np.einsum("jhwf,hwf->j", h, plan.query.astype(float))
    bins = np.clip(np.searchsorted(plan.thresholds, q) - 1, 0, None)
    rounding = np.finfo(np.float32).eps * np.abs(h).max(axis=(1, 2, 3))
    zeros = np.zeros(len(h))
    return measured_candidates(
        plan, h, bins=bins, signals=zeros + 1, noise=rounding, scale_error=zeros, signal_floor=0.0
    )


def cell(
    images: np.ndarray, public: np.ndarray, mode: str, ratio: float, basis: str
) -> dict[str, Any]:
    """Median PSNR of one mode, with a bootstrap interval."""
    rows = round(ratio * SIDE * SIDE * 3)
    victim, plan = perceptron(public, rows, paired=False)
    candidates = as_candidates(plan, activations(victim, plan, images))
    options = AresOptions(inversion=mode, basis=basis)  # pyright: ignore[reportArgumentType]
    begin = time.perf_counter()
    inversion = ares.solve_candidates(
        jax.random.key(1),
        candidates,
        plan,
        victim,
        options=options,
        performance=PerformanceFlags(),
    )
    seconds = time.perf_counter() - begin
    pixels = np.clip(inversion.images, 0, 1)
    solved = np.isfinite(inversion.residual)
    db = harness.psnr(np.mean((pixels - images) ** 2, axis=(1, 2, 3)))[solved]
    draws = np.random.default_rng(0).choice(db, (2000, len(db)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median_psnr": float(np.median(db)),
        "interval": [float(low), float(high)],
        "q10": float(np.percentile(db, 10)),
        "num_images": len(db),
        "seconds": round(seconds, 2),
    }


def statistics(images: np.ndarray, public: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every test's statistic on single examples and on mixtures of two and three."""
    found = {}
    for name, attribute in QUANTITIES.items():
        victim, plan = perceptron(public, 256, paired=attribute == "conflict")
        h = activations(victim, plan, images)
        single, mixed = (as_candidates(plan, a) for a in (h, mixtures(h)))
        found[name] = getattr(single, attribute), getattr(mixed, attribute)
    layers: list[tuple[str, tuple[int, ...], Literal["none", "average"]]] = [
        ("residual (convolution)", (12, 12), "none"),
        ("misprediction (average pooling)", (32,), "average"),
    ]
    for name, widths, pool in layers:
        victim = make_victim(
            "cnn",
            input_shape=public.shape[1:],
            num_classes=10,
            normalization=Normalization.fit(public),
            widths=widths,
            fc_width=64,
            pool=pool,
        )
        _, plan = ares.craft(jax.random.key(0), victim, public)
        h = true_inputs(victim, plan, images)
        values = []
        for part in (h, mixtures(h)):
            candidates = as_candidates(plan, part)
            # The bracket and sign tests come first; here the later test is judged alone.
            candidates.in_bracket[:] = True
            candidates.non_negative[:] = True
            inversion = ares.solve_candidates(
                jax.random.key(1),
                candidates,
                plan,
                victim,
                options=AresOptions(),
                performance=PerformanceFlags(),
            )
            values.append(
                inversion.residual
                if pool == "none"
                else misprediction(candidates, inversion.images, plan, victim)
            )
        found[name] = values[0], values[1]
    return found


def true_inputs(victim: Victim, plan: ares.Plan, images: np.ndarray) -> np.ndarray:
    """What really enters the imprint layer, averages of rectified entries included."""
    inputs = jnp.asarray(victim.normalization.normalize(images), jnp.float32)
    seen = imprint_inputs(victim, plan.fc_name, front_params(victim, plan), inputs)
    shape = (len(images), *plan.query.shape[:2], -1)
    return np.asarray(seen, np.float64).reshape(shape)[..., : len(plan.channels)]


def mixtures(h: np.ndarray) -> np.ndarray:
    """As many convex mixtures of two and of three as there are examples."""
    rng = np.random.default_rng(1)
    mixed = np.empty_like(h)
    for i in range(len(h)):
        count = 2 + i % 2
        rows = rng.choice(len(h), count, replace=False)
        mixed[i] = np.tensordot(rng.dirichlet([2] * count), h[rows], 1)
    return mixed


def curve(single: np.ndarray, mixed: np.ndarray) -> dict[str, Any]:
    """Area under the ROC curve (mixtures score higher), and detection without false alarms."""
    wins = np.mean(mixed[:, None] > single[None]) + np.mean(mixed[:, None] == single[None]) / 2
    return {
        "auc": float(wins),
        "tpr_at_0": float(np.mean(mixed > single.max())),
        "largest_single": float(single.max()),
        "smallest_mixture": float(mixed.min()),
        "single": np.sort(single).round(6).tolist(),
        "mixed": np.sort(mixed).round(6).tolist(),
    }


def draw(path: Path, cells: dict[str, Any], roc: dict[str, Any]) -> None:
    """PSNR over equations per unknown, one line per mode; ROC curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for mode in MODES:
        rows = sorted(
            (float(name.split("/")[1]), entry)
            for name, entry in cells.items()
            if name.split("/")[0] == mode and name.split("/")[2] == "block_dct"
        )
        ratio = [r for r, _ in rows]
        median = np.array([entry["median_psnr"] for _, entry in rows])
        bounds = np.array([entry["interval"] for _, entry in rows]).T
        left.errorbar(ratio, median, np.abs(bounds - median), label=mode, marker="o", capsize=2)
    left.set_xscale("log", base=2)
    left.set_xticks(RATIOS, ["1/6", "1/3", "2/3", "1", "2", "4"])
    left.set(xlabel="neurons per unknown", ylabel="median PSNR (dB), cut at 62", ylim=(5, 62))
    left.legend(fontsize=8)
    for name, entry in roc.items():
        single, mixed = np.asarray(entry["single"]), np.asarray(entry["mixed"])
        levels = np.concatenate([[np.inf], np.sort(np.concatenate([single, mixed]))[::-1]])
        right.plot(
            [np.mean(single >= v) for v in levels],
            [np.mean(mixed >= v) for v in levels],
            label=f"{name}: AUC {entry['auc']:.3f}",
        )
    right.set(xlabel="singles taken for mixtures", ylabel="mixtures found")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def _print_row(name: str, entry: dict[str, Any]) -> None:
    low, high = entry["interval"]
    print(f"{name:45s} {entry['median_psnr']:6.1f} dB [{low:.1f}, {high:.1f}]", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="sample", help="color images, at least 16 x 16")
    parser.add_argument("--out", type=Path, default=Path("results/cpu"))
    parser.add_argument("--smoke", action="store_true", help="one ratio, few images, no figure")
    return parser.parse_args()


if __name__ == "__main__":
    main()
