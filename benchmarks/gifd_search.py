"""One search of the GIFD benchmark: every restart scored, time without compilation."""

from __future__ import annotations

import importlib.util
import math
import time
from typing import Any

import jax
import numpy as np
from gifd_cases import KEY, Case, GaussianStart, Method, Problem

from jgia.attacks import gradient_matching
from jgia.attacks.gifd.attack import attack_clients
from jgia.config.gifd import GifdOptions
from jgia.config.gifd_baselines import GglOptions, GiasOptions
from jgia.config.gradient_matching import MatchingOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.prior import Prior
from jgia.generators.stylegan2 import StyleGAN2
from jgia.metrics import PSNR_CAP_DB, score
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction

PyTree = Any

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_POPULATION = 16  # of CMA-ES: its own default in 64 dimensions
_GIFD_PIXEL = {"search_optimizer": "adam", "total_variation": 1e-4, "box": True}
"""Inverting Gradients as GIFD's comparison runs it; without these, as its own paper does."""


def pixel(name: str, steps: int, **options: Any) -> Method:
    """Inverting Gradients; ``published=True`` takes its own paper's options."""
    published = options.pop("published", False)
    return Method(name, "pixel", steps, ({} if published else dict(_GIFD_PIXEL)) | options)


def gifd(name: str, steps: int, **options: Any) -> Method:
    """GIFD, all stages together taking so many steps."""
    return Method(name, "gifd", steps, options)


def available(method: Method) -> bool:
    """Whether what a method needs is installed."""
    return method.kind != "ggl" or importlib.util.find_spec("cmaes") is not None


class Compilation:
    """Seconds that JAX has spent on compiling, and how many programs it compiled."""

    def __init__(self) -> None:
        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event in _COMPILING:
            self.seconds += duration_secs
            self.programs += event == _COMPILING[-1]


def run_case(
    problem: Problem,
    case: Case,
    index: int,
    *,
    restarts: int,
    microbatch: int | None,
    compilation: Compilation,
    lpips: bool = False,
    classifier: tuple[Victim, PyTree] | None = None,
) -> dict[str, Any]:
    """Attack one client and score every restart.

    Every restart is a search of its own from a key of its own, so that each can be scored. What
    one call with as many restarts returns is the one of the smallest gradient distance, ``best``.
    """
    images, labels = problem.client(case.data, case.batch, index)
    taught = labels if case.method.kind != "mapping" else _permuted(labels, problem.victim)
    observation = problem.observe(images, taught, case.defense)
    key = jax.random.fold_in(jax.random.key(KEY), index)
    compiled, programs = compilation.seconds, compilation.programs
    wall, cpu = time.perf_counter(), time.process_time()
    if case.method.kind == "mapping":
        found = _mapped(problem.prior, case.method, key, observation, labels, restarts, classifier)
    else:
        found = search(problem.prior, case.method, key, observation, restarts, microbatch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    compiled = compilation.seconds - compiled
    row = _scored(found, images, lpips)
    known = [sorted(np.asarray(one.labels).tolist()) == sorted(taught.tolist()) for one in found]
    return row | {
        "case": case.name,
        "client": index,
        "labels_right": float(np.mean(known)),
        "seconds": round(max(wall - compiled, 0.0), 4),
        "cpu_s": round(cpu, 4),
        "compile_s": round(compiled, 3),
        "programs": compilation.programs - programs,
    }


def search(
    prior: Prior,
    method: Method,
    key: jax.Array,
    observation: Observation,
    restarts: int,
    microbatch: int | None,
) -> list[Reconstruction]:
    """One reconstruction per restart."""
    steps, options = method.steps, dict(method.options)
    performance = PerformanceFlags(microbatch=microbatch)
    if method.kind == "pixel":
        chosen = MatchingOptions(num_steps=steps, restarts=1, **options)
        return gradient_matching.attack_clients(
            key,
            [observation] * restarts,
            method="inverting_gradients",
            options=chosen,
            performance=PerformanceFlags(microbatch=1 if microbatch is None else microbatch),
        )
    if method.kind == "gifd":
        if options.pop("start", "mapped") == "gaussian":
            assert isinstance(prior.generator, StyleGAN2)
            generator = GaussianStart(**vars(prior.generator))
            prior = Prior(name=prior.name, generator=generator, params=prior.params)
        chosen = GifdOptions(budget_steps=steps, gifd_restarts=1, **options)
        observations = [observation] * restarts
        return attack_clients(key, observations, prior, options=chosen, performance=performance)
    keys = jax.random.split(key, restarts)
    if method.kind == "gias":
        from jgia.attacks.gifd.gias import attack_gias

        # The original takes a ninth for latent codes, of 9,000 steps; of few, they need more.
        latent = min(max(steps // 3, 1), 1000)
        gias = GiasOptions(
            gias_latent_steps=latent,
            gias_weight_steps=max(steps - latent, 1),
            gias_restarts=1,
            **options,
        )
        return [attack_gias(k, observation, prior, options=gias) for k in keys]
    from jgia.attacks.gifd.ggl import attack_ggl

    population = min(_POPULATION, steps)
    ggl = GglOptions(ggl_population=population, ggl_rounds=max(steps // population, 1), **options)
    return [attack_ggl(k, observation, prior, options=ggl) for k in keys]


def _mapped(
    prior: Prior,
    method: Method,
    key: jax.Array,
    observation: Observation,
    labels: np.ndarray,
    restarts: int,
    classifier: tuple[Victim, PyTree] | None,
) -> list[Reconstruction]:
    """GIFD where the victim's classes are not the prior's; ``options["told"]`` says what is done.

    ``victim``: the prior is given the victim's classes; ``truth``: its own, which no attacker
    knows; ``mapped``: those that a classifier finds.
    """
    told = method.options["told"]
    chosen = GifdOptions(budget_steps=method.steps, gifd_restarts=1)
    if told == "mapped":
        from jgia.attacks.gifd.label_mapping import attack_with_label_mapping

        assert classifier is not None
        # A first pass of half the second's length: of four stages, 100 of 300 steps.
        coarse = max(method.steps // 12, 1)
        return [
            attack_with_label_mapping(
                k, observation, prior, *classifier, options=chosen, coarse_steps=coarse
            )
            for k in jax.random.split(key, restarts)
        ]
    classes = [labels] * restarts if told == "truth" else None
    return attack_clients(
        key, [observation] * restarts, prior, options=chosen, generator_labels=classes
    )


def _permuted(labels: np.ndarray, victim: Victim) -> np.ndarray:
    return (labels + 3) % victim.num_classes


# ---- the scorer: alone in knowing the truth


def _scored(found: list[Reconstruction], images: np.ndarray, lpips: bool) -> dict[str, Any]:
    """Means over a client's images for every restart, and after each of its stages."""
    row: dict[str, Any] = {"psnr": [], "ssim": [], "distance": []}
    if lpips:
        row["lpips"] = []
    staged = bool(found[0].stats.get("stage_names"))
    if staged:
        row |= {"stage": [], "stage_psnr": [], "stage_distance": []}
    for one in found:
        scores = score(one.images, images, lpips=lpips)
        row["psnr"].append(_mean(scores["psnr"]))
        row["ssim"].append(_mean(scores["ssim"]))
        if lpips:
            row["lpips"].append(_mean(scores["lpips"], missing=1.0))
        row["distance"].append(_distance(one))
        if staged:
            frames = [] if one.history is None else one.history.frames
            if len(frames) != len(one.stats["stage_names"]):
                frames = []  # of points on the way, not of stages
            row["stage"].append(one.stats["stage"])
            row["stage_psnr"].append([_mean(score(_clean(f), images)["psnr"]) for f in frames])
            row["stage_distance"].append([_short(line[0]) for line in one.stats["stage_distances"]])
    distances = [math.inf if d is None else d for d in row["distance"]]
    return row | {"best": int(np.argmin(distances))}


def _clean(frames: np.ndarray) -> np.ndarray:
    return np.clip(np.nan_to_num(frames), 0, 1)


def _mean(block: dict[str, Any], missing: float = 0.0) -> float | None:
    """Of a client's images, each limited to the cap; ``None`` where images are too small."""
    if "note" in block:
        return None
    filled = [missing if v is None else min(v, PSNR_CAP_DB) for v in block["per_image"]]
    return _short(float(np.mean(filled)))


def _distance(one: Reconstruction) -> float | None:
    """Of updates; of the cosine where the method searched another."""
    if not len(one.images):
        return None
    if (cosine := one.stats.get("cosine_distance")) is not None:
        return _short(cosine)
    return _short(-float(one.scores[0]))


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
