"""One call from data to scores: the composition that alone sees every part."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jgia._clock import StageClock
from jgia.attacks import ares, imprint
from jgia.config import AresOptions, AuditConfig, DataConfig, ModelConfig, PerformanceFlags
from jgia.data import Dataset, load_dataset, split_client_public
from jgia.defenses import make_defense
from jgia.federated import simulate_clients
from jgia.metrics import score
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Reconstruction, ThreatModel, Truth
from jgia.report import SCHEMA_VERSION

_BASELINES = {
    "rtf": imprint.rtf,
    "trap_weights": imprint.trap_weights,
    "qbi": imprint.qbi,
    "loki": imprint.loki,
}

Progress = Callable[[str, int, int], None]
"""Called with (stage in words, steps done, steps in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOutcome:
    """What an audit leaves: the JSON-ready result, and the arrays behind it.

    Attributes:
      result: the documented schema of ``result.json`` (docs/result-schema.md).
      reconstruction: what the attack returned.
      truth: the client's examples, or ``None`` where they are not known.
      observation: what the attack was given.
      captions: class name of every true image, for the report.
    """

    result: dict[str, Any]
    reconstruction: Reconstruction
    truth: Truth | None
    observation: Observation
    captions: tuple[str, ...] | None = None


def run_audit(
    config: AuditConfig | None = None,
    *,
    command: str = "jgia audit",
    progress: Progress | None = None,
) -> AuditOutcome:
    """Load data, craft parameters, simulate one client, attack its update, score.

    Args:
      config: what to run; the default audits the bundled sample.
      command: the exact command to reproduce, for the report.
      progress: see :data:`Progress`.

    Returns:
      An :class:`AuditOutcome`.

    Raises:
      ValueError: the data, the model or the options do not fit; before anything expensive runs.
    """
    config = config or AuditConfig()
    baseline = _BASELINES.get(config.attack)
    ares.solver_dtype(config.performance)  # refuse what is not available before any compute
    report = progress or (lambda stage, done, total: None)
    clock = StageClock()
    key_craft, key_client, key_attack = jax.random.split(jax.random.key(config.seed), 3)

    report("loading images", 0, 1)
    with clock.stage("setup_s"):
        client, public = load_split(config.data, batch=config.batch, seed=config.seed)
        victim = build_victim(config.model, client, public, normalize=config.data.normalize)
        check = baseline.check if baseline else ares.attackable_layers
        check(victim)  # refuse an impossible attack before any compute
        images, labels = client.take(np.arange(len(client)))
        calibration, _ = public.take(np.arange(len(public)))
    report("crafting parameters", 0, 1)
    with clock.stage("setup_s"):
        if baseline:
            params, plan = baseline.craft(
                key_craft, victim, calibration, options=config.imprint, num_examples=len(images)
            )
        else:
            params, plan = ares.craft(
                key_craft,
                victim,
                calibration,
                options=config.ares,
                num_examples=len(images),
                client=config.client,
            )

    report("client computes its update", 0, 1)
    with clock.stage("client_s"):
        observation = simulate_clients(
            key_client,
            victim,
            params,
            images,
            labels,
            config.client,
            defense=make_defense(config.defense),
        )
        jax.block_until_ready(observation.update)
    threat = dataclasses.replace(observation.threat_model, public_data=public.provenance)
    observation = dataclasses.replace(observation, threat_model=threat)
    truth = Truth(images=images, labels=labels)

    if isinstance(plan, ares.Plan):
        reconstruction = timed_ares(
            key_attack,
            observation,
            plan,
            options=config.ares,
            performance=config.performance,
            clock=clock,
            report=report,
        )
    else:
        report("reading images out of the update", 0, 1)
        with clock.stage("leak_s"):
            reconstruction = _BASELINES[plan.method].attack(
                key_attack,
                observation,
                plan=plan,
                options=config.imprint,
                noise_std=threat.noise_std,
            )

    report("scoring", 0, 1)
    with clock.stage("score_s"):
        scores = score(
            reconstruction.images, images, pool=calibration, seed=config.seed, lpips=config.lpips
        )
    expected = None
    if plan.bin_masses is not None:
        expected = ares.expected_singletons(plan.bin_masses, len(images))
    result = assemble_result(
        command=command,
        config=plain(config),
        seed=config.seed,
        clock=clock,
        dataset=client,
        num_public=len(public),
        victim=victim,
        threat_model=threat,
        attack_name=config.attack,
        reconstruction=reconstruction,
        expected=expected,
        scores=scores,
    )
    return AuditOutcome(
        result=result,
        reconstruction=reconstruction,
        truth=truth,
        observation=observation,
        captions=tuple(client.class_names[label] for label in labels),
    )


def timed_ares(
    key: jax.Array,
    observation: Observation,
    plan: ares.Plan,
    *,
    options: AresOptions,
    performance: PerformanceFlags,
    clock: StageClock,
    report: Progress,
) -> Reconstruction:
    """The attack's two halves, each timed as a stage, with progress per candidate."""
    report("reading activations out of the update", 0, 1)
    with clock.stage("leak_s"):
        candidates = ares.leak(
            observation,
            plan,
            noise_std=observation.threat_model.noise_std,
            first_layer=options.first_layer,
        )
    total = max(1, len(candidates))
    report("inverting activations", 0, total)
    with clock.stage("invert_s"):
        return ares.invert(
            key,
            candidates,
            plan,
            observation.victim,
            options=options,
            performance=performance,
            progress=lambda done: report("inverting activations", done, total),
        )


def load_split(config: DataConfig, *, batch: int, seed: int) -> tuple[Dataset, Dataset]:
    """The client's images and the server's public ones, disjoint; both may be the same source.

    Raises:
      ValueError: not enough images, or calibration images of another shape.
    """
    dataset = load_images(config)
    client, public = split_client_public(
        dataset, seed=seed, num_client=batch, num_public=config.num_public
    )
    if config.calibration != "holdout":
        public = load_images(config, spec=config.calibration, limit=config.num_public)
        if public.image_shape != client.image_shape:
            raise ValueError(
                f"calibration images have shape {public.image_shape}, the client's "
                f"{client.image_shape}; give --image-size, or other calibration data."
            )
    return client, public


def load_images(
    config: DataConfig, *, spec: str | None = None, limit: int | None = None
) -> Dataset:
    """The configured data set, or another one (``spec``) under the same loading options."""
    return load_dataset(
        spec or config.data,
        image_size=config.image_size,
        download=config.download,
        data_dir=config.data_dir,
        limit=limit or config.limit,
    )


def build_victim(
    config: ModelConfig, client: Dataset, public: Dataset, *, normalize: bool
) -> Victim:
    """The victim for a data set, normalized by public statistics only."""
    channels = client.image_shape[-1]
    if normalize:
        pixels, _ = public.take(np.arange(len(public)))
        normalization = Normalization.fit(pixels)
    else:
        normalization = Normalization.identity(channels)
    return make_victim(
        config.model,
        input_shape=client.image_shape,
        num_classes=max(2, client.num_classes),
        normalization=normalization,
        **config.architecture(),
    )


def assemble_result(
    *,
    command: str,
    config: dict[str, Any],
    seed: int,
    clock: StageClock,
    dataset: Dataset | None,
    num_public: int,
    victim: Victim,
    threat_model: ThreatModel,
    attack_name: str,
    reconstruction: Reconstruction,
    expected: float | None,
    scores: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put the documented ``result.json`` together."""
    stages = clock.stages
    run = sum(stages.get(name, 0.0) for name in ("client_s", "leak_s", "invert_s"))
    counts: dict[str, int] = {}
    for candidate in reconstruction.candidates:
        counts[candidate["status"]] = counts.get(candidate["status"], 0) + 1
    return {
        "version": SCHEMA_VERSION,
        "command": command,
        "config": config,
        "environment": environment(),
        "timings": {
            "setup_s": stages.get("setup_s", 0.0),
            "compile_s": clock.compile_s,
            "run_s": run,
            "total_s": sum(stages.values()) + clock.compile_s,
            **{name: value for name, value in stages.items() if name != "setup_s"},
        },
        "seed": seed,
        "data": {
            "name": dataset.name if dataset else "unknown",
            "provenance": dataset.provenance if dataset else "an update from a file",
            "num_client": len(dataset) if dataset else (threat_model.num_examples or 0),
            "num_public": num_public,
            "image_shape": list(victim.input_shape),
            "num_classes": victim.num_classes,
        },
        "threat_model": threat_model.record(),
        "attack": {
            "name": attack_name,
            "selected_by": reconstruction.selected_by,
            "expected_recovered": expected,
            "num_candidates": len(reconstruction.candidates),
            "candidates": [dict(candidate) for candidate in reconstruction.candidates],
            "status_counts": counts,
            "stats": dict(reconstruction.stats),
        },
        "scores": scores,
    }


def environment() -> dict[str, Any]:
    """Versions and device, for reports."""
    from jgia import __version__

    return {
        "jgia": __version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "threads": os.cpu_count() or 1,
    }


def plain(value: Any) -> Any:
    """Dataclasses to mappings, tuples to lists, paths to strings: what JSON reads back equal."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def reproduce_command(arguments: Sequence[str]) -> str:
    """The command line as one would type it again."""
    return shlex.join(["jgia", *arguments])
