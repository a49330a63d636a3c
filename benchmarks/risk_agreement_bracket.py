"""Whether a real attack's error lies between the bounds on InvLoss, over many configurations."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from risk_agreement_cells import downsampled, parameters, victim_of

from jgia.attacks import gauss_newton
from jgia.attacks.labels import infer_labels
from jgia.models import Victim, smooth_activations
from jgia.observation import Observation, ThreatModel
from jgia.risk import Prior, UpdateRelease, invloss_bracket, prior_draws

SIDE, CLASSES, DRAWS, BOUND_DRAWS, STARTS = 8, 3, 6, 32, 2
_SURE = 2.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Grid:
    """The configurations: every combination."""

    models: Sequence[str] = ("mlp", "lenet_sigmoid", "lenet_relu", "cnn_pool")
    noise: Sequence[float] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    priors: Sequence[str] = ("gaussian", "isotropic")
    batches: Sequence[int] = (1, 2)
    labels_known: Sequence[bool] = (True, False)
    seeds: Sequence[int] = (0, 1, 2)
    side: int = SIDE

    def configurations(self) -> list[dict[str, Any]]:
        """Cheap ones first; the seed outermost, so that a part covers everything."""
        names = ("seed", "batch", "model", "prior", "labels_known", "noise")
        values = (
            self.seeds,
            self.batches,
            self.models,
            self.priors,
            self.labels_known,
            self.noise,
        )
        return [dict(zip(names, each, strict=True)) for each in itertools.product(*values)]


def gray_priors(data: np.ndarray | None, side: int) -> dict[str, Prior]:
    """Of gray images (N, H, W, C) in bytes; of made-up ones without."""
    if data is None:
        pixels = np.random.default_rng(0).uniform(size=(200, side, side, 1)).cumsum(1) / side
    else:
        pixels = downsampled(data.mean(-1, keepdims=True), side)
    pixels = pixels.astype(np.float32)
    full = Prior.from_data(pixels)
    flat = Prior.isotropic(full.num_inputs, variance=float(full.variance))
    return {
        "gaussian": full,
        "isotropic": dataclasses.replace(flat, mean=full.mean.astype("float32")),
    }


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """What an earlier run finished; a torn last line is dropped."""
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def run(grid: Grid, priors: dict[str, Prior], path: Path | None) -> list[dict[str, Any]]:
    """Every configuration that is not in the file yet, appended as it is done."""
    found = read_rows(path)
    names = ("seed", "batch", "model", "prior", "labels_known", "noise")
    done = {tuple(row[name] for name in names) for row in found}
    for i, each in enumerate(grid.configurations()):
        if tuple(each[name] for name in names) in done:
            continue
        row = each | _measure(each, priors[each["prior"]], grid.side, i)
        found.append(row)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        if i % 20 == 0:
            print(f"bracket {i}: {_words(row)}", flush=True)
    return found


def _measure(each: dict[str, Any], prior: Prior, side: int, index: int) -> dict[str, Any]:
    """The bracket, and the mean error of the attack over draws of images and noise."""
    model, count, tau = each["model"], each["batch"], each["noise"]
    victim = victim_of(model, (side, side, 1), CLASSES)
    params = parameters(model, victim, each["seed"])
    labels = jnp.arange(count) % CLASSES
    key_bounds, key_draws = jax.random.split(jax.random.key(index))
    whole = prior.repeat(count)
    low, linear, high = _bracket(UpdateRelease(victim=victim), count, whole.factor is None)(
        key_bounds, params, labels, whole, jnp.asarray(tau, "float32")
    )
    draws = np.asarray(prior_draws(key_draws, whole, DRAWS)).reshape(-1, count, side, side, 1)
    errors, means = [], []
    for i, images in enumerate(draws):
        error = _attacked(each, victim, params, images, prior, labels, i)
        errors.append(error)
        means.append(float(np.sum((images.reshape(-1) - np.asarray(whole.mean)) ** 2)))
    return {
        "energy": float(whole.energy),
        "lower": float(low),
        "linear": float(linear),
        "upper": float(high),
        "errors": errors,
        "prior_mean_errors": means,
    }


@functools.cache
def _bracket(release: UpdateRelease, count: int, isotropic: bool) -> Any:
    """Compiled once for a model, a batch size and a kind of prior."""
    del isotropic
    shape = (count, *release.victim.input_shape)

    def bounds(key: Array, params: Any, labels: Array, prior: Prior, tau: Array) -> Any:
        return tuple(
            invloss_bracket(
                key,
                lambda x: release(params, x, labels),
                prior.mean.reshape(shape),
                prior,
                noise_std=tau,
                num_draws=BOUND_DRAWS,
            )
        )

    return jax.jit(bounds)


def _attacked(
    each: dict[str, Any],
    victim: Victim,
    params: Any,
    images: np.ndarray,
    prior: Prior,
    labels: Array,
    draw: int,
) -> float:
    """Squared error of the most probable images; not clipped: those of the prior are not."""
    tau, shape = each["noise"], images.shape
    release, smoothed = _releases(UpdateRelease(victim=victim))
    update = _compiled(release)(jnp.asarray(images), params, labels)
    rng = np.random.default_rng([each["seed"], draw, round(1e6 * tau)])
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf) + (tau * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        update,
    )
    if not each["labels_known"]:
        threat = ThreatModel(server="honest_but_curious", num_examples=len(images), noise_std=tau)
        seen = Observation(update=noisy, params=params, victim=victim, threat_model=threat)
        labels = jnp.asarray(infer_labels(jax.random.key(draw), seen).labels, jnp.int32)
    starts = np.asarray(prior_draws(jax.random.key(draw), prior, STARTS * len(images)))
    starts = (starts.reshape(STARTS, *shape) + np.asarray(prior.mean).reshape(shape[1:])) / 2
    if len(images) == 1:
        starts[0] = np.asarray(prior.mean).reshape(shape)
    found = gauss_newton.posterior_mode(
        release,
        noisy,
        prior,
        shape=shape,
        noise=tau,
        args=(params, labels),
        smoothed=smoothed,
        starts=starts,
    )
    return float(np.sum((np.asarray(found.images, np.float64) - images) ** 2))


@functools.cache
def _releases(release: UpdateRelease) -> tuple[Any, Any]:
    """With the images first, as it is and with smoothed kinks."""

    def plain(images: Array, params: Any, labels: Array) -> Any:
        return release(params, images, labels)

    def smoothed(images: Array, width: Array, params: Any, labels: Array) -> Any:
        with smooth_activations(width):
            return release(params, images, labels)

    return plain, smoothed


@functools.cache
def _compiled(fn: Any) -> Any:
    return jax.jit(fn)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share inside, of all configurations and of parts of them."""
    if not rows:
        return {}
    parts: dict[str, list[dict[str, Any]]] = {"all": rows}
    for name in ("model", "prior", "batch", "labels_known", "noise"):
        for row in rows:
            parts.setdefault(f"{name}={row[name]}", []).append(row)
    return {name: _shares(part) for name, part in parts.items()}


def _shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [_judged(row) for row in rows]
    return {
        "configurations": len(rows),
        **{name: float(np.mean([each[name] for each in judged])) for name in judged[0]},
    }


def _judged(row: dict[str, Any]) -> dict[str, float]:
    """Inside as it is, and where the attack's own standard error allows it.

    The best attack is the better of the most probable image and the prior's mean.
    """
    errors = np.asarray(row["errors"])
    mean, spread = errors.mean(), _SURE * errors.std(ddof=1) / math.sqrt(len(errors))
    best = min(mean, row["energy"])
    above, below = best >= row["lower"], best <= row["upper"]
    return {
        "inside": above and below,
        "inside_within_2_standard_errors": mean + spread >= row["lower"]
        and min(mean - spread, row["energy"]) <= row["upper"],
        "above_lower": above,
        "below_upper": below,
        "map_alone_inside": row["lower"] <= mean <= row["upper"],
        "upper_is_trivial": row["upper"] >= 0.999 * row["energy"],
    }


def _words(row: dict[str, Any]) -> str:
    return (
        f"{row['model']} B={row['batch']} {row['prior']} noise {row['noise']:g}: lower "
        f"{row['lower']:.3g}, attack {np.mean(row['errors']):.3g}, upper {row['upper']:.3g}, "
        f"E0 {row['energy']:.3g}"
    )
