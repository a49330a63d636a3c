"""What real attacks reach on single images, beside what was predicted without attacking."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array

from jgia.attacks import gauss_newton, gradient_matching
from jgia.config import GaussNewtonOptions, MatchingOptions
from jgia.models import Conv, Dense, Layer, Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, ThreatModel
from jgia.risk import Prior, RiskSettings, UpdateRelease, invre

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MODELS = ("lenet_sigmoid", "mlp", "lenet_relu", "cnn_pool", "resnet18_gn")
NOISE = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BASELINES = ("fil", "dfil", "dfil_bound", "i2f_bound", "release_norm")
STARTS = 4


class LeNetRelu(nn.Module):
    """The LeNet of :mod:`jgia.models` with ReLU in place of the sigmoid."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Inputs (B, H, W, C) to logits."""
        for i, stride in enumerate((2, 2, 1), start=1):
            layer = nn.Conv(12, (5, 5), (stride, stride), padding=((2, 2), (2, 2)), name=f"conv{i}")
            x = nn.relu(layer(x))
        return nn.Dense(self.num_classes, name="head")(x.reshape((x.shape[0], -1)))

    def describe(self) -> tuple[Layer, ...]:
        """The layers in order."""
        convs = (Conv(f"conv{i}", (5, 5), 12, s, "relu") for i, s in enumerate((2, 2, 1), start=1))
        return (*convs, Dense("head", self.num_classes, "none"))


def victim_of(model: str, shape: tuple[int, int, int], num_classes: int = 10) -> Victim:
    """A model of the benchmark by name."""
    channels = shape[-1]
    normalization = CIFAR if channels == 3 else Normalization((0.48,), (0.25,))
    sizes: dict[str, Any] = {
        "input_shape": shape,
        "num_classes": num_classes,
        "normalization": normalization,
    }
    if model == "mlp":
        return make_victim("mlp", widths=(64,), **sizes)
    if model == "lenet_sigmoid":
        return make_victim("lenet", **sizes)
    if model == "lenet_relu":
        return Victim(LeNetRelu(num_classes), shape, num_classes, normalization, model)
    if model == "cnn_pool":
        return make_victim("cnn", widths=(8, 16), pool="max", fc_width=32, **sizes)
    small = make_victim(
        "resnet", widths=(8, 8, 16, 16), blocks=2, head="pool", norm="group", **sizes
    )
    return dataclasses.replace(small, name=model)


def parameters(model: str, victim: Victim, seed: int = 0) -> Any:
    """Fresh ones. LeNet's with sigmoid are uniform in [-1/2, 1/2], as Zhu et al. 2019 start it."""
    params = victim.init(jax.random.key(seed))
    if model != "lenet_sigmoid":
        return params
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(-0.5, 0.5, leaf.shape), leaf.dtype), params
    )


def downsampled(images: np.ndarray, side: int) -> np.ndarray:
    """Bytes (N, H, W, C) to pixels in [0, 1] of a smaller square, by means over areas."""
    factor = images.shape[1] // side
    if factor * side != images.shape[1]:
        raise ValueError(f"side={side} must divide {images.shape[1]}.")
    count, _, _, channels = images.shape
    blocks = images.reshape(count, side, factor, side, factor, channels)
    return (blocks.mean((2, 4)) / 255).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Data:
    """Images that are attacked, and the prior from others."""

    images: np.ndarray
    labels: np.ndarray
    prior: Prior


def load(folder: Path | None, side: int, count: int) -> Data:
    """CIFAR-10: test images to attack, training images for the prior; or made-up ones."""
    if folder is None:
        rng = np.random.default_rng(0)
        pixels = rng.uniform(size=(300, side, side, 3)).cumsum(axis=1) / side
        pixels = np.clip(pixels, 0, 1).astype(np.float32)
        return Data(pixels[:count], np.arange(count) % 10, Prior.from_data(pixels[count:]))
    with np.load(folder / "cifar10_test10k.npz") as test:
        chosen = np.sort(np.random.default_rng(0).permutation(len(test["x"]))[:count])
        images, labels = downsampled(test["x"][chosen], side), test["y"][chosen].astype(int)
    with np.load(folder / "cifar10_train20k.npz") as train:
        prior = Prior.from_data(downsampled(train["x"], side))
    return Data(images, labels, prior)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run."""

    models: Sequence[str] = MODELS
    noise: Sequence[float] = NOISE
    side: int = 8
    images: int = 100
    matching_steps: int = 300
    newton_steps: int = 60

    def key(self) -> dict[str, Any]:
        """What cells of one file have in common."""
        return {
            "side": self.side,
            "matching_steps": self.matching_steps,
            "newton_steps": self.newton_steps,
            "newton_starts": STARTS,
        }


def read_cells(path: Path | None, plan: Plan) -> list[dict[str, Any]]:
    """Cells that an earlier run finished under the same plan; a torn last line is dropped."""
    if path is None or not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if cell["plan"] == plan.key() and cell["model"] in plan.models:
            found.append(cell)
    return found


def run(plan: Plan, data: Data, path: Path | None) -> list[dict[str, Any]]:
    """Every cell that is not in the file yet, appended as it is done."""
    cells = read_cells(path, plan)
    done = {(cell["model"], cell["image"], cell["noise"]) for cell in cells}
    for cell in _cells(plan, data, done):
        cells.append(cell)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(cell, allow_nan=False) + "\n")
    return cells


def _cells(plan: Plan, data: Data, done: set[tuple[str, int, float]]) -> Iterator[dict[str, Any]]:
    for model in plan.models:
        everything = [(i, tau) for i in range(plan.images) for tau in plan.noise]
        if all((model, i, tau) in done for i, tau in everything):
            continue
        victim = victim_of(model, data.images.shape[1:])
        params = parameters(model, victim)
        start = time.perf_counter()
        predicted = {tau: _predict(victim, params, data, tau) for tau in plan.noise}
        print(f"{model}: predicted in {time.perf_counter() - start:.0f} s", flush=True)
        for i, tau in everything:
            if (model, i, tau) in done:
                continue
            cell = {"plan": plan.key(), "model": model, "image": i, "noise": tau}
            cell |= {"energy": float(data.prior.energy), "predicted": predicted[tau][i]}
            cell["attacks"] = _attack(plan, victim, params, data, i, tau)
            yield cell
            _say(cell)


def _predict(victim: Victim, params: Any, data: Data, tau: float) -> list[dict[str, float]]:
    report = invre(
        jax.random.key(0),
        UpdateRelease(victim=victim),
        params,
        data.images,
        data.labels,
        prior=data.prior,
        noise_std=tau,
        settings=RiskSettings(per_layer=False, spectrum=False, num_draws=10),
    )
    found = report.estimates
    values = {name: np.asarray(getattr(found, name)) for name in ("invloss", *BASELINES)}
    values["linearization"] = np.asarray(found.diagnostics.linearization_ratio)
    return [
        {name: float(value[i]) for name, value in values.items()} for i in range(len(data.images))
    ]


def observe(
    victim: Victim, params: Any, images: np.ndarray, labels: np.ndarray, tau: float, seed: int
) -> Observation:
    """The gradient of some images plus noise, as an honest-but-curious server has it."""
    release = _released(UpdateRelease(victim=victim))
    update = release(params, jnp.asarray(images), jnp.asarray(labels))
    rng = np.random.default_rng([seed, round(1e6 * tau)])
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf) + (tau * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        update,
    )
    threat = ThreatModel(
        server="honest_but_curious",
        num_examples=len(images),
        labels=tuple(int(label) for label in labels),
    )
    return Observation(update=noisy, params=params, victim=victim, threat_model=threat)


@functools.cache
def _released(release: UpdateRelease) -> Any:
    return jax.jit(release)


def _attack(
    plan: Plan, victim: Victim, params: Any, data: Data, i: int, tau: float
) -> dict[str, dict[str, Any]]:
    """Squared error and posterior objective of every attack's image."""
    images, labels = data.images[i : i + 1], data.labels[i : i + 1]
    seen = observe(victim, params, images, labels, tau, seed=i)
    found: dict[str, dict[str, Any]] = {}
    for name in ("dlg", "inverting_gradients", "gauss_newton"):
        start = time.perf_counter()
        if name == "gauss_newton":
            result = gauss_newton.attack(
                jax.random.key(i),
                seen,
                prior=data.prior,
                options=GaussNewtonOptions(
                    assumed_noise=tau, newton_steps=plan.newton_steps, newton_starts=STARTS
                ),
            )
        else:
            dlg = name == "dlg"
            result = gradient_matching.attack(
                jax.random.key(i),
                seen,
                method="dlg" if dlg else "inverting_gradients",
                options=MatchingOptions(
                    num_steps=plan.matching_steps, total_variation=0.0 if dlg else 1e-3
                ),
            )
        pixels = np.asarray(result.images, np.float32)
        if not len(pixels):
            found[name] = {"error": None, "objective": None}
            continue
        objective = _objective(victim, params, data, pixels, labels, seen, tau)
        found[name] = {
            "error": float(np.sum((pixels.astype(np.float64) - images) ** 2)),
            "objective": objective if math.isfinite(objective) else None,
            "seconds": round(time.perf_counter() - start, 3),
        }
        if name == "gauss_newton":
            stats = result.stats
            found[name] |= {
                "misfit": stats["misfit"],
                "end": stats["end"],
                "starts": len(stats["start_objectives"]),
            }
    return found


def _objective(
    victim: Victim,
    params: Any,
    data: Data,
    pixels: np.ndarray,
    labels: np.ndarray,
    seen: Observation,
    tau: float,
) -> float:
    """Minus the log posterior density of an image, up to a constant; the truth plays no part."""
    release = _released(UpdateRelease(victim=victim))
    there = release(params, jnp.asarray(pixels), jnp.asarray(labels))
    square = jax.tree.map(
        lambda a, b: float(np.sum((np.asarray(a, np.float64) - b) ** 2)), seen.update, there
    )
    away = np.asarray(pixels, np.float64).reshape(-1) - np.asarray(data.prior.mean, np.float64)
    root = np.asarray(data.prior.factor, np.float64).T
    whitened = scipy.linalg.solve_triangular(root, away, lower=True)
    return (sum(jax.tree.leaves(square)) / tau**2 + float(whitened @ whitened)) / 2


def _say(cell: dict[str, Any]) -> None:
    if cell["image"] % 10:
        return
    errors = ", ".join(
        f"{name} {value['error']:.3g}"
        for name, value in cell["attacks"].items()
        if value["error"] is not None
    )
    print(
        f"{cell['model']} image {cell['image']} noise {cell['noise']:g}: predicted "
        f"{cell['predicted']['invloss']:.3g}, {errors}",
        flush=True,
    )
