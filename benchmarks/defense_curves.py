"""What each defense costs the attacker and what it costs the model, over its whole range.

    python benchmarks/defense_curves.py --data npz:cifar10.npz --train npz:mnist.npz --out folder
    python benchmarks/defense_curves.py --smoke

Per setting: (a) the share of 32 images that ARES recovers through ``run_audit``, at 18 and 40 dB,
and (b) the test accuracy of a small network trained with every gradient going through the
defense. Every cell is a file of its own, written when it is finished; a second run skips those.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jgia import (
    AuditConfig,
    AuditOutcome,
    DataConfig,
    ModelConfig,
    load_dataset,
    make_victim,
    run_audit,
    score,
)
from jgia._io import atomic_write_bytes
from jgia.config import DefenseConfig
from jgia.defenses import Defense, gaussian_epsilon, make_defense
from jgia.federated import client_images, client_update

BATCH, DELTA = 32, 1e-5

# Name of the curve, the knob on its axis, fixed knobs, values from weak to strong.
CURVES: tuple[tuple[str, str, dict[str, Any], tuple[Any, ...]], ...] = (
    ("gaussian", "noise_std", {"noise_relative": True}, (1e-4, 1e-3, 1e-2, 1.0, 10.0)),
    ("laplace", "noise_std", {"noise_relative": True}, (1e-4, 1e-3, 1e-2, 0.1, 1.0)),
    ("dp_sgd", "noise_multiplier", {"clip_norm": 1.0}, (1e-6, 1e-5, 1e-4, 1.0, 10.0)),
    ("quantize", "num_bits", {}, (20, 16, 12, 8, 2)),
    ("quantize_stochastic", "num_bits", {}, (20, 16, 12, 8, 2)),
    ("top_k", "keep_fraction", {}, (0.9, 0.5, 0.2, 0.1, 0.01)),
    ("dropout", "dropout_rate", {}, (0.1, 0.3, 0.5, 0.7, 0.9)),
    ("augment", "crop_padding", {"augmentations": ("crop",)}, (1, 2, 4, 6, 8)),
)

LABELS = {
    "at_18_db": "recovered, 18 dB or more",
    "at_40_db": "recovered, 40 dB or more",
    "augmented_at_40_db": "augmented images, 40 dB",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of one curve; ``None`` of everything for no defense."""

    curve: str
    knob: str
    value: Any
    config: DefenseConfig

    @property
    def name(self) -> str:
        """Stem of the cell's file."""
        return self.curve if self.curve == "none" else f"{self.curve}-{self.value:g}"


def settings(*, smoke: bool) -> list[Setting]:
    """No defense first, then every curve."""
    points = [Setting("none", "", None, DefenseConfig())]
    for curve, knob, fixed, values in CURVES:
        for value in values[-1:] if smoke else values:
            config = DefenseConfig(defense=(curve,), **fixed, **{knob: value})  # pyright: ignore[reportArgumentType]
            points.append(Setting(curve, knob, value, config))
    return points


def attacked(config: DefenseConfig, *, data: str, smoke: bool) -> dict[str, Any]:
    """(a) What ARES recovers from one defended update."""
    start = time.perf_counter()
    audit = AuditConfig(
        data=DataConfig(data=data, num_public=64 if smoke else 256),
        model=ModelConfig(fc_width=64 if smoke else 512),
        defense=config,
        batch=4 if smoke else BATCH,
    )
    outcome = run_audit(audit)
    result, scores = outcome.result, outcome.result["scores"]
    return {
        **against_augmented(audit, outcome),
        "at_18_db": scores["success_rate"]["18"],
        "at_40_db": scores["success_rate"]["40"],
        "median_psnr_all": scores["psnr"]["median_all"],
        "candidates": result["attack"]["num_candidates"],
        "noise_std": result["threat_model"]["noise_std"],
        "seconds": time.perf_counter() - start,
    }


def against_augmented(audit: AuditConfig, outcome: AuditOutcome) -> dict[str, Any]:
    """Success rates against the images that the client in fact used, where they differ."""
    defense, truth, seen = make_defense(audit.defense), outcome.truth, outcome.observation
    if defense is None or truth is None or "augment" not in audit.defense.defense:
        return {}
    key = jax.random.split(jax.random.key(audit.seed), 3)[1]
    again = client_update(
        key, seen.victim, seen.params, truth.images, truth.labels, audit.client, defense
    )
    if not jax.tree.all(jax.tree.map(np.array_equal, again.update, seen.update)):
        raise SystemExit("this is not the key of the audited client: run_audit derives it anew")
    used = np.asarray(client_images(jax.random.clone(key), truth.images, defense))
    rates = score(outcome.reconstruction.images, used, seed=audit.seed)["success_rate"]
    return {"augmented_at_18_db": rates["18"], "augmented_at_40_db": rates["40"]}


def trained(
    config: DefenseConfig, images: np.ndarray, labels: np.ndarray, *, smoke: bool
) -> dict[str, Any]:
    """(b) Test accuracy after training with the defense in every step; the last fifth is tested."""
    start = time.perf_counter()
    steps, batch, learning_rate = (3, 32, 0.3) if smoke else (200, 64, 0.3)
    split = len(images) * 4 // 5
    victim = make_victim(
        "mlp", input_shape=images.shape[1:], num_classes=int(labels.max()) + 1, widths=(32,)
    )
    defense = make_defense(config) or Defense()
    key_params, key_data, key_defense = jax.random.split(jax.random.key(0), 3)
    params = victim.init(key_params)
    optimizer = optax.sgd(learning_rate, 0.9)
    state = optimizer.init(params)

    @jax.jit
    def apply(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    for step in range(steps):
        chosen = np.asarray(
            jax.random.choice(jax.random.fold_in(key_data, step), split, (batch,), replace=False)
        )
        key_local, key_shared = jax.random.split(jax.random.fold_in(key_defense, step))
        gradient, _ = defense.gradient(
            key_local, victim, params, jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])
        )
        gradient, _ = defense.share(key_shared, gradient)
        params, state = apply(params, state, gradient)
    tested = victim.apply(params, victim.normalization.normalize(jnp.asarray(images[split:])))
    right = np.asarray(jnp.argmax(tested, axis=1)) == labels[split:]
    return {
        "accuracy": float(right.mean()),
        "standard_error": float(np.sqrt(right.mean() * (1 - right.mean()) / len(right))),
        "finite": bool(np.all(np.isfinite(np.asarray(tested)))),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seconds": time.perf_counter() - start,
    }


def private(config: DefenseConfig) -> float | None:
    """Epsilon of the one release that is attacked, for DP-SGD."""
    if "dp_sgd" not in config.defense or config.noise_multiplier < 1e-3:
        return None  # tens of millions and more: no guarantee in any sense
    return gaussian_epsilon(delta=DELTA, noise_multiplier=config.noise_multiplier)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The figures without their spreads, as CSV."""
    text = io.StringIO()
    columns = ["curve", "knob", "value", "at_18_db", "at_40_db", "median_psnr", "accuracy"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "epsilon"])
    for row in rows:
        attack = row["attack"]
        figures = (attack["at_18_db"]["rate"], attack["at_40_db"]["rate"])
        psnr, accuracy = attack["median_psnr_all"], row["training"]["accuracy"]
        writer.writerow(
            [row["curve"], row["knob"], row["value"], *figures, psnr, accuracy, row["epsilon"]]
        )
    atomic_write_bytes(path, text.getvalue().encode())


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel per defense: recovered share (with its interval) and accuracy over the knob."""
    plain = next(row for row in rows if row["curve"] == "none")
    curves = [
        (name, list(group))
        for name, group in itertools.groupby(rows, key=lambda row: row["curve"])
        if name != "none"
    ]
    width = math.ceil(len(curves) / 2)
    figure, axes = plt.subplots(
        2, width, figsize=(3.2 * width, 5.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, group) in zip(axes.flat, curves, strict=False):
        places = range(len(group))  # from weak to strong, whichever way the knob runs
        drawn = [("at_18_db", "tab:orange"), ("at_40_db", "tab:red")]
        if "augmented_at_40_db" in group[0]["attack"]:
            drawn.append(("augmented_at_40_db", "tab:green"))
        for column, color in drawn:
            rates = [row["attack"][column] for row in group]
            middle = [rate["rate"] for rate in rates]
            below = [max(0.0, rate["rate"] - rate["low"]) for rate in rates]
            above = [max(0.0, rate["high"] - rate["rate"]) for rate in rates]
            axis.errorbar(
                places, middle, [below, above], color=color, marker="o", capsize=2,
                label=LABELS[column],
            )  # fmt: skip
        accuracy = [row["training"]["accuracy"] for row in group]
        axis.plot(places, accuracy, "s-", color="tab:blue", label="test accuracy")
        axis.axhline(plain["training"]["accuracy"], color="tab:blue", ls=":", lw=1)
        axis.axhline(plain["attack"]["at_40_db"]["rate"], color="tab:red", ls=":", lw=1)
        axis.set_xticks(places, [f"{row['value']:g}" for row in group], fontsize=8)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(group[0]["knob"].replace("_", " "), fontsize=9)
        axis.set_ylim(-0.02, 1.02)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    entries = {}  # one legend, below the panels, where it covers nothing
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("weak to strong; dotted: without a defense", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    atomic_write_bytes(path, image.getvalue())


def run(arguments: argparse.Namespace) -> None:
    """All cells, then the three files that sum them up."""
    dataset = load_dataset(arguments.train)
    count = len(dataset) if arguments.smoke else min(len(dataset), 5000)
    images, labels = dataset.take(np.arange(count))
    rows = []
    for setting in settings(smoke=arguments.smoke):
        cell = arguments.out / "cells" / f"{setting.name}.json"
        if not cell.exists():
            row = {
                "curve": setting.curve,
                "knob": setting.knob,
                "value": setting.value,
                "defense": setting.config.words(),
                "epsilon": private(setting.config),
                "attack": attacked(setting.config, data=arguments.data, smoke=arguments.smoke),
                "training": trained(setting.config, images, labels, smoke=arguments.smoke),
                "data": arguments.data.rsplit("/", 1)[-1],
                "train": arguments.train.rsplit("/", 1)[-1],
                "smoke": arguments.smoke,
            }
            harness.write_json(cell, row)
        row = json.loads(cell.read_text("utf-8"))
        if row["smoke"] != arguments.smoke:
            raise SystemExit(f"{cell} is of another size; choose another --out")
        rows.append(row)
        print(
            f"{setting.name}: recovered {row['attack']['at_40_db']['rate']:.2f} at 40 dB, "
            f"{row['attack']['at_18_db']['rate']:.2f} at 18 dB, "
            f"accuracy {row['training']['accuracy']:.3f}",
            flush=True,
        )
    harness.write_json(
        arguments.out / "defense_curves.json", {"machine": harness.machine(), "rows": rows}
    )
    write_table(arguments.out / "defense_curves.csv", rows)
    draw(arguments.out / "defense_curves.png", rows)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="sample", help="images that are attacked")
    parser.add_argument("--train", default="sample", help="images that the small network learns")
    parser.add_argument("--out", type=Path, help="folder; a temporary one when left out")
    parser.add_argument("--smoke", action="store_true", help="the end of each curve, tiny")
    arguments = parser.parse_args()
    if arguments.out is None:
        with tempfile.TemporaryDirectory() as folder:
            arguments.out = Path(folder)
            run(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
