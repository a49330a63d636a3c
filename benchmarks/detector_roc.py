"""Does the client-side detector tell crafted parameters from benign ones?

    python benchmarks/detector_roc.py --out results/cpu
    python benchmarks/detector_roc.py --smoke

Benign: four architectures, freshly initialized and trained for some steps by four optimizers on the
bundled sample's images. Crafted: ARES with three front ends, as it is and with neurons permuted,
plus trap weights and quantile biases on a perceptron. Adaptive: noise on every crafted weight,
relative to the norm of its neuron, with what is left of the read-out beside the scores; and noise
hidden where the attack does not look.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from jgia._io import atomic_write_bytes
from jgia.attacks import ares
from jgia.config import AresOptions
from jgia.data import load_dataset
from jgia.defenses import THRESHOLDS, detect_crafted
from jgia.federated import client_update
from jgia.metrics.rates import wilson_interval
from jgia.models import Victim, make_victim

NOISES = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)
FRONT_ENDS = ("random", "signed", "direct")
OPTIMIZERS: dict[str, optax.GradientTransformation | None] = {
    "fresh": None,
    "sgd": optax.sgd(0.05),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, weight_decay=1e-2),
    "momentum, weight decay": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.02, 0.9)),
}
SIDE = 16
CLASSES = 10


def pools() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Client images and labels, and public images: central crops of the bundled sample."""
    dataset = load_dataset("sample")
    images, labels = dataset.take(np.arange(len(dataset)))
    top = (images.shape[1] - SIDE) // 2
    images = images[:, top : top + SIDE, top : top + SIDE]
    public = np.asarray(dataset.public)
    return images[~public], labels[~public] % CLASSES, images[public]


def victims() -> dict[str, Victim]:
    """One small model per architecture."""
    shape = (SIDE, SIDE, 3)
    return {
        "cnn": make_victim(
            "cnn", input_shape=shape, num_classes=CLASSES, widths=(12, 12), fc_width=128
        ),
        "mlp": make_victim("mlp", input_shape=shape, num_classes=CLASSES, widths=(128, 64)),
        "lenet": make_victim("lenet", input_shape=shape, num_classes=CLASSES),
        "convnet": make_victim("convnet", input_shape=shape, num_classes=CLASSES, widths=(16, 32)),
    }


def benign(
    seeds: int, num_steps: int, models: int, images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[str, Victim, Any]]:
    """Fresh and trained parameters: name, model, parameters."""
    for model, victim in list(victims().items())[:models]:
        init = jax.jit(victim.init)
        for name, optimizer in OPTIMIZERS.items():
            step = None if optimizer is None else _step(victim, optimizer)
            for seed in range(seeds):
                params = init(jax.random.key(seed))
                if step is not None and optimizer is not None:
                    state = optimizer.init(params)
                    rng = np.random.default_rng(seed)
                    for _ in range(num_steps):
                        chosen = rng.integers(len(images), size=32)
                        params, state = step(params, state, images[chosen], labels[chosen])
                yield f"{model}, {name}, seed {seed}", victim, params


def _step(victim: Victim, optimizer: optax.GradientTransformation) -> Any:
    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(victim.loss)(params, images, labels)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    return step


def imprints(seeds: int, public: np.ndarray) -> dict[tuple[str, int], Any]:
    """ARES parameters by front end and seed."""
    made = {}
    for front_end in FRONT_ENDS:
        options = AresOptions(front_end=front_end, front_end_trials=1)
        for seed in range(seeds):
            key = jax.random.key(seed)
            made[front_end, seed], _ = ares.craft(key, victims()["cnn"], public, options=options)
    return made


def crafted(made: dict[tuple[str, int], Any]) -> Iterator[tuple[str, Victim, Any]]:
    """ARES in three front ends, permuted or not, and two kinds of random rows."""
    victim, mlp = victims()["cnn"], victims()["mlp"]
    init = jax.jit(mlp.init)
    for seed in range(1 + max(seed for _, seed in made)):
        for front_end in FRONT_ENDS:
            params = made[front_end, seed]
            yield f"ares, {front_end}, seed {seed}", victim, params
            yield f"ares, {front_end}, permuted, seed {seed}", victim, permuted(params, seed)
        rng = np.random.default_rng(seed)
        for name, kernel, bias in (
            ("trap weights", *trap(rng, SIDE * SIDE * 3, 128)),
            ("quantile biases", *quantile(rng, SIDE * SIDE * 3, 128)),
        ):
            params = init(jax.random.key(seed))
            params["fc1"] = {"kernel": kernel, "bias": bias}
            yield f"{name}, seed {seed}", mlp, params


def permuted(params: Any, seed: int) -> Any:
    """The same function, with the fully connected layer's neurons in another order."""
    order = np.random.default_rng(seed).permutation(params["fc"]["bias"].shape[0])
    fc = {"kernel": params["fc"]["kernel"][:, order], "bias": params["fc"]["bias"][order]}
    return {
        **params,
        "fc": fc,
        "head": {**params["head"], "kernel": params["head"]["kernel"][order]},
    }


def trap(rng: np.random.Generator, inputs: int, neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of a neuron's weights negative, the others their magnitudes times 0.95."""
    magnitude = np.abs(rng.normal(0, 0.5, size=(inputs // 2, neurons)))
    kernel = np.concatenate([-magnitude, 0.95 * rng.permuted(magnitude, axis=0)])
    return rng.permuted(kernel, axis=0).astype(np.float32), np.zeros(neurons, np.float32)


def quantile(rng: np.random.Generator, inputs: int, neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal weights and the bias that switches on one example of 32."""
    kernel = rng.normal(size=(inputs, neurons)).astype(np.float32)
    return kernel, np.full(neurons, special.ndtri(1 / 32) * math.sqrt(inputs), np.float32)


def noisy(params: Any, ratio: float, seed: int) -> Any:
    """Noise of ``ratio`` times its norm on every neuron and filter."""
    rng = np.random.default_rng(seed)

    def leaf(x: Any) -> np.ndarray:
        value = np.asarray(x)
        if value.ndim < 2:
            return value
        axes = tuple(range(value.ndim - 1))
        noise = rng.normal(size=value.shape)
        scale = np.sqrt((value**2).sum(axes) / (noise**2).sum(axes))
        return (value + ratio * scale * noise).astype(value.dtype)

    return jax.tree.map(leaf, params)


def hidden(params: Any, ratio: float, seed: int) -> Any:
    """Noise where the attack does not look: on the weights of channels that are always zero.

    The signed front end fills 6 of the model's 12 channels; a larger noise hides the common
    direction of the neurons and shrinks their biases against their weights, at no cost.
    """
    kernel = np.asarray(params["fc"]["kernel"])
    channels = params["conv1"]["bias"].shape[0]
    dead = np.arange(len(kernel)) % channels >= 6
    noise = np.random.default_rng(seed).normal(size=kernel.shape) * dead[:, None]
    noise *= ratio * np.linalg.norm(kernel, axis=0) / np.linalg.norm(noise, axis=0)
    fc = {**params["fc"], "kernel": (kernel + noise).astype(kernel.dtype)}
    return {**params, "fc": fc}


def read_out(
    victim: Victim, params: Any, plan: ares.Plan, images: np.ndarray, labels: np.ndarray
) -> int:
    """Examples whose activation some candidate has to 1 %, on the parameters as they are."""
    seen = client_update(jax.random.key(0), victim, params, images, labels)
    candidates = ares.leak(seen, plan)
    conv = {name: params[name] for name in ("conv1", "conv2")}
    true = np.asarray(_features(conv, victim.normalization.normalize(jnp.asarray(images))))
    found = candidates.activations.reshape(len(candidates), -1)
    true = true.reshape(len(images), -1)[:, : found.shape[1]]
    return sum(
        bool(len(found))
        and float(np.linalg.norm(found - h, axis=1).min()) <= 1e-2 * float(np.linalg.norm(h))
        for h in true
    )


@jax.jit
def _features(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
    return x


def auc(benign_scores: np.ndarray, crafted_scores: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve with a 95 % interval (DeLong's variance; ties count one half)."""
    wins = (crafted_scores[:, None] > benign_scores) + 0.5 * (
        crafted_scores[:, None] == benign_scores
    )
    area = float(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / len(crafted_scores)
    variance += wins.mean(axis=0).var(ddof=1) / len(benign_scores)
    half = 1.96 * math.sqrt(float(variance))
    if half == 0 and area in (0.0, 1.0):  # no overlap: the rule of three, on the smaller sample
        half = 3 / min(len(crafted_scores), len(benign_scores))
    return {"auc": area, "low": max(0.0, area - half), "high": min(1.0, area + half)}


def rate(flags: list[bool]) -> dict[str, float]:
    """Share of flagged parameter sets, with Wilson's interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    share = sum(flags) / len(flags)
    return {"rate": share, "low": low, "high": high, "flagged": sum(flags), "total": len(flags)}


def curve(benign_scores: np.ndarray, crafted_scores: np.ndarray) -> list[list[float]]:
    """The ROC curve: (false-positive rate, true-positive rate) as the threshold falls."""
    cuts = np.unique(np.concatenate([benign_scores, crafted_scores, [np.inf]]))[::-1]
    points = [
        (float((benign_scores >= c).mean()), float((crafted_scores >= c).mean())) for c in cuts
    ]
    return [list(point) for point in dict.fromkeys(points)]


def figure(results: dict[str, Any], path: Path) -> None:
    """ROC curves per noise, and the flagged share beside what the attack still reads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for line in results["adaptive"]:
        points = np.array([[0, 0], *line["roc"], [1, 1]])
        label = f"noise {line['noise']:g}, AUC {line['auc']['auc']:.2f}"
        left.plot(points[:, 0], points[:, 1], drawstyle="steps-post", label=label)
    left.set(xlabel="benign flagged", ylabel="crafted flagged", title="ROC of the suspicion")
    left.legend()
    at = np.arange(len(results["adaptive"]))
    flagged = np.array(
        [[x["rate"][k] for k in ("rate", "low", "high")] for x in results["adaptive"]]
    )
    right.errorbar(
        at,
        flagged[:, 0],
        [flagged[:, 0] - flagged[:, 1], flagged[:, 2] - flagged[:, 0]],
        fmt="o-",
        label="flagged",
    )
    read = [x["read_out"]["rate"] for x in results["adaptive"]]
    right.plot(at, read, "s--", label="examples the attack still reads")
    right.set_xticks(at, [f"{x['noise']:g}" for x in results["adaptive"]])
    right.set(xlabel="noise relative to a neuron's norm", ylim=(-0.05, 1.05))
    right.legend()
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    plt.close(drawn)
    atomic_write_bytes(path, buffer.getvalue())
    print(f"wrote {path}")


def main() -> None:
    """Score every set, print the rates, write JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for detector_roc.{json,png}")
    parser.add_argument("--smoke", action="store_true", help="one model, one seed, two steps")
    parser.add_argument("--seeds", type=int, default=8, help="crafted, per front end")
    parser.add_argument("--steps", type=int, default=100, help="training steps of benign models")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    seeds, steps = (1, 2) if smoke else (arguments.seeds, arguments.steps)
    start = time.perf_counter()
    images, labels, public = pools()

    losses: dict[str, float] = {}
    sets: dict[str, list[tuple[str, Any]]] = {"benign": [], "crafted": []}
    models, benign_seeds = (1, 1) if smoke else (4, max(1, seeds // 2))
    for name, victim, params in benign(benign_seeds, steps, models, images, labels):
        sets["benign"].append((name, detect_crafted(params, victim)))
        if name.endswith("seed 0"):
            losses[name] = float(
                victim.loss(params, jnp.asarray(images[:256]), jnp.asarray(labels[:256]))
            )
    print(f"{len(sets['benign'])} benign sets, {time.perf_counter() - start:.0f} s", flush=True)
    made = imprints(seeds, public)
    for name, victim, params in crafted(made):
        sets["crafted"].append((name, detect_crafted(params, victim)))
    suspicion = {
        kind: np.array([report.suspicion for _, report in reports])
        for kind, reports in sets.items()
    }
    checks = {
        check: {
            "largest_benign": max(r.scores.get(check, 0.0) for _, r in sets["benign"]),
            "threshold": threshold,
            "benign_flagged": sum(r.scores.get(check, 0.0) >= threshold for _, r in sets["benign"]),
            "crafted_flagged": sum(
                r.scores.get(check, 0.0) >= threshold for _, r in sets["crafted"]
            ),
        }
        for check, threshold in THRESHOLDS.items()
        if check != "constant_loss"
    }
    results: dict[str, Any] = {
        "false_positives": rate([r.flagged for _, r in sets["benign"]]),
        "true_positives": rate([r.flagged for _, r in sets["crafted"]]),
        "auc": auc(suspicion["benign"], suspicion["crafted"]),
        "largest_benign_suspicion": float(suspicion["benign"].max()),
        "smallest_crafted_suspicion": float(suspicion["crafted"].min()),
        "flagged_benign": [name for name, r in sets["benign"] if r.flagged],
        "missed_crafted": [name for name, r in sets["crafted"] if not r.flagged],
        "checks": checks,
        "benign_losses": losses,
        "adaptive": [],
    }
    print(
        f"benign: {results['false_positives']}, largest {results['largest_benign_suspicion']:.3f}"
    )
    print(f"crafted: {results['true_positives']}, {results['auc']}")
    for check, line in checks.items():
        print(f"  {check}: {line}")

    victim = victims()["cnn"]
    for ratio in NOISES[-1:] if smoke else NOISES:
        reports, read, total = [], 0, 0
        for (front_end, seed), crafted_params in made.items():
            params = noisy(permuted(crafted_params, seed), ratio, seed)
            reports.append(detect_crafted(params, victim))
            if front_end == "random":
                plan = ares.read_plan(victim, params)
                read += read_out(victim, params, plan, images[:8], labels[:8])
                total += 8
        scores = np.array([report.suspicion for report in reports])
        line = {
            "noise": ratio,
            "rate": rate([report.flagged for report in reports]),
            "auc": auc(suspicion["benign"], scores),
            "roc": curve(suspicion["benign"], scores),
            "read_out": {"rate": read / total, "examples": total},
            "checks": {
                check: float(np.mean([r.scores.get(check, 0.0) >= t for r in reports]))
                for check, t in THRESHOLDS.items()
                if check != "constant_loss"
            },
        }
        results["adaptive"].append(line)
        print(
            f"noise {ratio:g}: {line['rate']}, {line['auc']}, read {line['read_out']}", flush=True
        )
    reports, read = [], 0
    for (front_end, seed), plain in made.items():
        if front_end == "signed":
            params, plan = hidden(plain, 10.0, seed), ares.read_plan(victim, plain)
            reports.append(detect_crafted(params, victim))
            read += read_out(victim, params, plan, images[:8], labels[:8])
    results["hidden"] = {
        "rate": rate([report.flagged for report in reports]),
        "read_out": {"rate": read / (8 * len(reports)), "examples": 8 * len(reports)},
        "checks": {
            check: float(np.mean([r.scores.get(check, 0.0) >= t for r in reports]))
            for check, t in THRESHOLDS.items()
            if check != "constant_loss"
        },
    }
    print(f"hidden: {results['hidden']}")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")
    if arguments.out:
        content = {
            "machine": harness.machine(),
            "options": {"seeds": seeds, "steps": steps},
            "seconds": seconds,
            **results,
        }
        harness.write_json(arguments.out / "detector_roc.json", content)
        figure(results, arguments.out / "detector_roc.png")


if __name__ == "__main__":
    main()
