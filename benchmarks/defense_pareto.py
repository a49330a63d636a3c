"""What noise costs and what it stops: isotropic, adaptive, shaped, coordinate-wise, DP-SGD.

    python benchmarks/defense_pareto.py --data-dir DIR --out results/cpu/defense_pareto.json
    python benchmarks/defense_pareto.py --smoke

Two parts, on models of a few hundred pixels, so that every client's Jacobian can be had exactly.

*Attacks*: updates of images that the model has not seen, defended so that the linearized error of
the best attack is a target share of the prior's energy; then the error of a real attack that knows
the noise's covariance (``jgia.attacks.gauss_newton``, kinks smoothed, from the prior's mean).
Energy is the expected squared norm of the noise. The energy that isotropic noise needs
for the same *realised* error is interpolated between its own rows.

*Training*: federated SGD, a client with one image each, every update defended; test accuracy after
the same rounds, for every target.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from defense_pareto_cases import Case, cases, smoke
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jgia.attacks.gauss_newton import Settings, posterior_mode
from jgia.defenses import coordinate_noise, scale_for_target
from jgia.models import smooth_activations
from jgia.risk import Prior, UpdateRelease
from jgia.risk.configured import make_prior
from jgia.risk.shaping import covariance_factor, shaped_covariance

PyTree = Any
TARGETS = (0.05, 0.2, 0.5, 0.8)
METHODS = ("isotropic", "shaped", "uniform", "input", "coordinate")
FLOOR = 1.0


class Setup(NamedTuple):
    """How much of it."""

    images: int
    clients: int
    targets: tuple[float, ...]
    seeds: int


# ---- the defended update of one client


class Sent(NamedTuple):
    """A defended update with what an informed attacker knows of its noise.

    Attributes:
      update: flat.
      root: (p, k) of the noise's covariance ``root root' + std^2``; no columns for plain noise.
      std: (p,) of the independent part.
      energy: expected squared norm of the noise.
    """

    update: Array
    root: Array
    std: Array
    energy: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 7))
def defended(
    release: UpdateRelease,
    method: str,
    key: Array,
    params: PyTree,
    image: Array,
    label: Array,
    target: Array,
    informed: bool,
    variance: Array,
) -> Sent:
    """One client's update under a defense that aims at an error of ``target`` (summed)."""

    def fn(x: Array) -> Array:
        leaves = jax.tree.leaves(release(params, x.reshape(image.shape), label))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    x = image.ravel()
    size = x.size
    value, derivative = jax.linearize(fn, x)
    jacobian = lax.map(derivative, jnp.eye(size, dtype=x.dtype), batch_size=64).T
    gram = jacobian.T @ jacobian
    sigma = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0))
    tau = scale_for_target(sigma, variance, target)
    count = value.size
    none = jnp.zeros((count, 0), x.dtype)
    key_shape, key_floor = jax.random.split(key)
    white = jax.random.normal(key_floor, (count,), x.dtype)
    if method == "isotropic":
        return Sent(value + tau * white, none, jnp.full(count, tau), count * tau**2)
    if method == "coordinate":
        made = coordinate_noise(key_shape, fn, x, energy=1.0)
        least = 1e-3 / jnp.sqrt(count)  # of unit energy; where nothing depends on x it is 0
        shares = jnp.maximum(made.std, least)
        scaled = jacobian / shares[:, None]
        seen = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(scaled.T @ scaled), 0))
        scale = scale_for_target(seen, variance, target)
        energy = scale**2 * jnp.sum(shares**2)
        return Sent(value + scale * shares * white, none, scale * shares, energy)
    shape = "water_filling" if method == "shaped" else "uniform"
    factor = covariance_factor(shaped_covariance(gram, variance, target, shape=shape))
    moved = factor @ jax.random.normal(key_shape, (size,), x.dtype)
    root = jacobian @ factor if informed else none
    energy = jnp.sum(factor * (gram @ factor))
    if method == "input":
        noisy = fn(x + moved)
        std = jnp.sqrt(1e-4 * energy / count)  # the attacker's model error; nothing is added
        return Sent(noisy, root, jnp.full(count, std), jnp.sum((noisy - value) ** 2))
    std = jnp.sqrt(FLOOR * energy / count)
    noise = derivative(moved) + std * white
    return Sent(value + noise, root, jnp.full(count, std), (1 + FLOOR) * energy)


# ---- attacks


def attacks(case: Case, params: PyTree, setup: Setup) -> list[dict[str, Any]]:
    """Realised error of an informed attacker, per method and target."""
    release = UpdateRelease(victim=case.victim)
    pixels, _ = case.train.take(np.arange(min(1000, len(case.train))))
    images, labels = case.test.take(np.arange(setup.images))
    prior = make_prior("isotropic", pixels)
    energy = float(prior.energy)
    rows = []
    for method in METHODS:
        for target in setup.targets:
            errors, energies = [], []
            for index in range(setup.images):
                key = jax.random.fold_in(jax.random.key(5), index)
                sent = defended(
                    release,
                    method,
                    key,
                    params,
                    jnp.asarray(images[index]),
                    jnp.asarray(labels[index]),
                    jnp.asarray(target * energy, jnp.float32),
                    True,
                    jnp.asarray(prior.variance, jnp.float32),
                )
                found = _estimate(release, params, sent, labels[index], prior, images.shape[1:])
                errors.append(float(np.sum((found - images[index]) ** 2)) / energy)
                energies.append(float(sent.energy))
            rows.append(
                {
                    "case": case.name,
                    "method": method,
                    "target": target,
                    "realised": float(np.mean(errors)),
                    "realised_error": float(np.std(errors) / np.sqrt(len(errors))),
                    "energy": float(np.mean(energies)),
                    "per_image": errors,
                }
            )
            print(_attack_line(rows[-1]), flush=True)
    return _with_isotropic(rows)


def _estimate(
    release: UpdateRelease, params: PyTree, sent: Sent, label: Any, prior: Prior, shape: Any
) -> np.ndarray:
    basis, spread = np.zeros((len(sent.update), 0)), np.zeros(0)
    if sent.root.shape[1]:
        weighted = np.asarray(sent.root) / np.asarray(sent.std)[:, None]
        basis, spread, _ = np.linalg.svd(weighted, full_matrices=False)
    shrink = jnp.asarray(1 - 1 / np.sqrt(1 + spread**2), jnp.float32)
    whitener = Whitener(jnp.asarray(basis, jnp.float32), shrink, sent.std)
    found = posterior_mode(
        _flat(release),
        whitener(sent.update),
        prior.astype("float32"),
        shape=tuple(shape),
        noise=1.0,
        args=(params, jnp.asarray(label), whitener),
        smoothed=_smooth(release),
        settings=Settings(max_steps=60),
    )
    return np.clip(found.images, 0, 1)


class Whitener(NamedTuple):
    """``C^(-1/2)`` of ``std (U s^2 U' + I) std``."""

    basis: Array
    shrink: Array
    std: Array

    def __call__(self, update: Array) -> Array:
        """The update in coordinates in which its noise is standard normal."""
        scaled = update / self.std
        return scaled - self.basis @ (self.shrink * (self.basis.T @ scaled))


@functools.lru_cache(maxsize=8)
def _flat(release: UpdateRelease) -> Any:
    def fn(image: Array, params: PyTree, label: Array, whitener: Whitener) -> Array:
        leaves = jax.tree.leaves(release(params, image, label))
        return Whitener(*whitener)(jnp.concatenate([leaf.ravel() for leaf in leaves]))

    return fn


@functools.lru_cache(maxsize=8)
def _smooth(release: UpdateRelease) -> Any:
    def fn(image: Array, width: Array, params: PyTree, label: Array, whitener: Whitener) -> Array:
        with smooth_activations(width):
            return _flat(release)(image, params, label, whitener)

    return fn


def _with_isotropic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the energy that isotropic noise needs for each row's realised error."""
    plain = sorted((row["realised"], row["energy"]) for row in rows if row["method"] == "isotropic")
    realised, energies = (np.asarray(values) for values in zip(*plain, strict=True))
    for row in rows:
        inside = realised[0] <= row["realised"] <= realised[-1]
        needed = np.exp(np.interp(row["realised"], realised, np.log(energies)))
        row["isotropic_over_energy"] = float(needed / row["energy"]) if inside else None
    return rows


def _attack_line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:14s} {row['method']:10s} target {row['target']:.2f}: informed attack "
        f"{row['realised']:.3f} +- {row['realised_error']:.3f}, energy {row['energy']:.3g}"
    )


# ---- training


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round(
    release: UpdateRelease,
    method: str,
    key: Array,
    params: PyTree,
    images: Array,
    labels: Array,
    target: Array,
    variance: Array,
    rate: Array,
) -> PyTree:
    """One round: a client for every image, the mean of their updates, a step."""

    def one(inputs: tuple[Array, Array, Array]) -> Array:
        key, image, label = inputs
        if method == "none":
            leaves = jax.tree.leaves(release(params, image, label))
            return jnp.concatenate([leaf.ravel() for leaf in leaves])
        return defended(release, method, key, params, image, label, target, False, variance).update

    updates = lax.map(one, (jax.random.split(key, len(images)), images, labels))
    mean = ravel_pytree(params)[1](updates.mean(axis=0))
    return jax.tree.map(lambda p, g: p - rate * g, params, mean)


def training(case: Case, setup: Setup) -> list[dict[str, Any]]:
    """Test accuracy after the same rounds, per method and target."""
    pixels, _ = case.train.take(np.arange(min(1000, len(case.train))))
    variance = float(pixels.var(0).mean())
    energy = variance * pixels[0].size
    plans = [("none", 0.0)]
    plans += [(method, target) for method in METHODS for target in setup.targets]
    rows = []
    for method, target in plans:
        begin = time.perf_counter()
        accuracy = [_train(case, setup, method, target * energy, variance, s)
                    for s in range(setup.seeds)]  # fmt: skip
        rows.append(
            {
                "case": case.name,
                "method": method,
                "target": target,
                "accuracy": float(np.mean(accuracy)),
                "per_seed": accuracy,
                "seconds": time.perf_counter() - begin,
            }
        )
        print(
            f"{case.name:14s} {method:10s} target {target:.2f}: accuracy "
            f"{rows[-1]['accuracy']:.1%}, {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    return rows


def _train(
    case: Case, setup: Setup, method: str, target: float, variance: float, seed: int
) -> float:
    key_init, key_rounds = jax.random.split(jax.random.key(seed))
    params = case.victim.init(key_init)
    release = UpdateRelease(victim=case.victim)
    rng = np.random.default_rng(seed)
    for key in jax.random.split(key_rounds, case.rounds):
        images, labels = case.train.take(rng.choice(len(case.train), setup.clients, replace=False))
        params = _round(
            release,
            method,
            key,
            params,
            jnp.asarray(images),
            jnp.asarray(labels),
            jnp.asarray(target, jnp.float32),
            jnp.asarray(variance, jnp.float32),
            jnp.asarray(case.rate, jnp.float32),
        )
    images, labels = case.test.take(np.arange(len(case.test)))
    logits = jax.jit(case.victim.apply)(params, case.victim.normalization.normalize(images))
    return float(np.mean(np.asarray(logits).argmax(axis=1) == labels))


def main() -> None:
    """Run both parts of every case, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description="What noise costs and what it stops.")
    parser.add_argument("--smoke", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=16, help="attacked")
    parser.add_argument("--clients", type=int, default=16, help="of a round")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    setup = Setup(given.images, given.clients, TARGETS, given.seeds)
    chosen = smoke() if given.smoke else cases(given.data_dir, given.rounds)
    if given.smoke:
        setup = Setup(2, 2, (0.2, 0.5), 1)
    content: dict[str, Any] = {"attacks": [], "training": []}
    for case in chosen:
        if given.only and case.name not in given.only:
            continue
        params = case.victim.init(jax.random.key(0))
        content["attacks"] += attacks(case, params, setup)
        content["training"] += training(case, setup)
    if given.out:
        content |= {"floor": FLOOR, "smoke": given.smoke, "machine": harness.machine()}
        harness.write_json(given.out, content)


if __name__ == "__main__":
    main()
