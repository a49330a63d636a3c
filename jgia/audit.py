"""One call from data to scores: the composition that alone sees every part."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jgia._clock import StageClock
from jgia.attacks import ares
from jgia.audit_risk import audit_risk, with_attack
from jgia.audit_stages import staged_search
from jgia.config import AuditConfig, DataConfig, ModelConfig
from jgia.data import Dataset, load_dataset, split_client_public
from jgia.defenses import make_defense
from jgia.federated import local_order, simulate_clients
from jgia.methods import Job, Method, Progress, method, prior_words, read_prior
from jgia.metrics import score
from jgia.models import Victim, make_victim, with_batch_norm
from jgia.normalization import Normalization
from jgia.observation import Observation, Reconstruction, ThreatModel, Truth, restrict
from jgia.report import SCHEMA_VERSION
from jgia.training import load_victim

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOutcome:
    """What an audit leaves: the JSON-ready result, and the arrays behind it.

    Attributes:
      result: the documented schema of ``result.json`` (docs/result-schema.md).
      reconstruction: what the attack returned.
      truth: the client's examples, or ``None`` where they are not known.
      observation: what the attack was given.
      captions: class name of every true image, for the report.
      pixel_errors: (n, H, W, C) of the first n true images, what the best attack is expected to
        leave of every pixel, squared; ``None`` where no risk was estimated.
    """

    result: dict[str, Any]
    reconstruction: Reconstruction
    truth: Truth | None
    observation: Observation
    captions: tuple[str, ...] | None = None
    pixel_errors: np.ndarray | None = None


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
      progress: see :data:`jgia.methods.Progress`.

    Returns:
      An :class:`AuditOutcome`.

    Raises:
      ValueError: the data, the model or the options do not fit; before anything expensive runs.
      ImportError: likewise, an optional package is missing that the attack needs.
    """
    config = config or AuditConfig()
    chosen = method(config.attack)
    _check_options(config, chosen)
    report = progress or (lambda stage, done, total: None)
    clock = StageClock()
    key_craft, key_client, key_attack = jax.random.split(jax.random.key(config.seed), 3)
    key_risk = jax.random.fold_in(jax.random.key(config.seed), 3)

    report("loading images", 0, 1)
    with clock.stage("setup_s"):
        client, public = load_split(config.data, batch=config.batch, seed=config.seed)
        victim, params = _sent(config, client, public)
        chosen.check(victim)  # refuse an impossible attack before any compute
        prior = read_prior(config.attack, victim, config)
        images, labels = client.take(np.arange(len(client)))
        calibration, _ = public.take(np.arange(len(public)))
    report("crafting parameters" if chosen.craft else "making parameters", 0, 1)
    with clock.stage("setup_s"):
        plan = None
        if chosen.craft is not None:
            params, plan = chosen.craft(
                key_craft, victim, calibration, config, config.client, len(images)
            )
        elif params is None:
            params = victim.init(key_craft)

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
    known = public.provenance if prior is None else prior_words(prior)
    observation = _informed(observation, config, chosen, known, labels=labels, key=key_client)
    truth = Truth(images=images, labels=labels)
    job = Job(observation, plan, config, clock, report, calibration, prior)
    reconstruction = chosen.attack(key_attack, job)

    report("scoring", 0, 1)
    with clock.stage("score_s"):
        scores = score(
            reconstruction.images, images, pool=calibration, seed=config.seed, lpips=config.lpips
        )
    if reconstruction.labels is not None:
        scores["label_accuracy"] = _label_accuracy(reconstruction.labels, labels)
    risk = None
    if config.risk.risk_images:
        report("estimating the risk", 0, 1)
        with clock.stage("risk_s"):
            risk = audit_risk(
                key_risk,
                config,
                victim,
                params,
                images,
                labels,
                public=calibration,
                declared_noise_std=observation.threat_model.noise_std,
            )
    expected = None
    if plan is not None and plan.bin_masses is not None:
        expected = ares.expected_singletons(plan.bin_masses, len(images))
    result = assemble_result(
        command=command,
        config=plain(config),
        seed=config.seed,
        clock=clock,
        dataset=client,
        num_public=len(public),
        victim=victim,
        threat_model=observation.threat_model,
        attack_name=config.attack,
        reconstruction=reconstruction,
        expected=expected,
        scores=scores,
        originals=images,
    )
    if risk is not None:
        result["risk"] = with_attack(risk.record, scores["psnr"]["per_image"])
    return AuditOutcome(
        result=result,
        reconstruction=reconstruction,
        truth=truth,
        observation=observation,
        captions=tuple(client.class_names[label] for label in labels),
        pixel_errors=None if risk is None else risk.pixel_errors,
    )


def _label_accuracy(found: ArrayLike, true: ArrayLike) -> float:
    """The part of the true labels that was found, duplicates counted."""
    common = collections.Counter(np.asarray(found).tolist()) & collections.Counter(
        np.asarray(true).tolist()
    )
    return common.total() / len(np.asarray(true))


def _check_options(config: AuditConfig, chosen: Method) -> None:
    """Refuse what is not available before any compute."""
    ares.solver_dtype(config.performance)
    if config.trained is not None and chosen.server == "malicious":
        raise ValueError(
            f"the attack {config.attack!r} chooses the parameters itself; leave out --trained, or "
            "take an attack of an honest but curious server, such as inverting_gradients."
        )
    if config.trained is not None and config.model != ModelConfig(
        batch_norm=config.model.batch_norm
    ):
        raise ValueError(
            "--trained brings its own model; leave out --model and its options (but --batch-norm)."
        )
    if config.knowledge.order_known and config.client.num_clients > 1:
        raise ValueError("order_known says which images one client used; use num_clients=1.")


def _sent(config: AuditConfig, client: Dataset, public: Dataset) -> tuple[Victim, PyTree | None]:
    """The victim, and the parameters that honest training made if there are any."""
    if config.trained is None:
        return build_victim(config.model, client, public, normalize=config.data.normalize), None
    victim, params = load_victim(config.trained)
    if config.model.batch_norm is not None:
        victim = with_batch_norm(victim, config.model.batch_norm)
    if victim.input_shape != client.image_shape:
        raise ValueError(
            f"the trained model takes images of shape {victim.input_shape}, the data have "
            f"{client.image_shape}; give --image-size, or other data."
        )
    if victim.num_classes < client.num_classes:
        raise ValueError(
            f"the trained model knows {victim.num_classes} classes, the data have "
            f"{client.num_classes}; give the data it was trained on."
        )
    return victim, params


def _informed(
    observation: Observation,
    config: AuditConfig,
    chosen: Method,
    public_data: str,
    *,
    labels: np.ndarray,
    key: jax.Array,
) -> Observation:
    """The observation of an attacker who is told what the configuration says, and no more."""
    knowledge, client = config.knowledge, config.client
    threat = observation.threat_model
    changes: dict[str, Any] = {"server": chosen.server, "public_data": public_data}
    if knowledge.labels_known:
        changes["labels"] = tuple(int(label) for label in labels)
    if client.protocol == "fedavg" and not knowledge.training_known:
        changes |= {"local_steps": None, "local_learning_rate": None, "local_batch_size": None}
    elif client.protocol == "fedavg" and knowledge.order_known:
        changes["local_order"] = local_order(key, len(labels), client)
    observation = dataclasses.replace(
        observation, threat_model=dataclasses.replace(threat, **changes)
    )
    if knowledge.visible_layers is None:
        return observation
    return restrict(observation, knowledge.visible_layers)


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
    originals: np.ndarray | None = None,
) -> dict[str, Any]:
    """Put the documented ``result.json`` together."""
    stages = clock.stages
    run = sum(stages.get(name, 0.0) for name in ("client_s", "leak_s", "invert_s", "search_s"))
    counts: dict[str, int] = {}
    for candidate in reconstruction.candidates:
        counts[candidate["status"]] = counts.get(candidate["status"], 0) + 1
    stats, staged = staged_search(reconstruction, originals, scores)
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
            "stats": stats,
        },
        "scores": scores,
        **({} if staged is None else {"staged_search": staged}),
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
