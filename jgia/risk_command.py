"""``jgia risk``: from a configuration to a folder with an estimate."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import jax
import numpy as np

from jgia._clock import StageClock
from jgia._io import atomic_write_bytes
from jgia.audit import build_victim, environment, load_split, plain
from jgia.config import ModelConfig
from jgia.config.risk import RiskConfig
from jgia.data import Dataset
from jgia.explain.command import check_explanations, explain_inputs
from jgia.methods import Progress
from jgia.models import Victim, with_batch_norm
from jgia.risk import (
    SUCCESS_PSNR,
    EmbeddingRelease,
    Release,
    RiskReport,
    RiskSettings,
    invre,
)
from jgia.risk.configured import client_release, make_prior
from jgia.risk.figures import RiskPictures, risk_figures
from jgia.training import load_victim

PyTree = Any
SCHEMA_VERSION = "1.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskOutcome:
    """What a risk estimate leaves.

    Attributes:
      result: the content of ``risk.json``.
      report: the arrays.
      images: (N, together, H, W, C) what was estimated.
      labels: (N, together).
    """

    result: dict[str, Any]
    report: RiskReport
    images: np.ndarray
    labels: np.ndarray


def run_risk(
    config: RiskConfig | None = None,
    *,
    command: str = "jgia risk",
    progress: Progress | None = None,
) -> RiskOutcome:
    """Load images, make the release and the prior, estimate.

    Args:
      config: what to run; the default estimates 4 sample images under a LeNet.
      command: the exact command to reproduce, for ``risk.json``.
      progress: see :data:`jgia.methods.Progress`.

    Raises:
      ValueError: data, model or options do not fit; before anything expensive runs.
    """
    config = config or RiskConfig()
    report = progress or (lambda stage, done, total: None)
    clock = StageClock()
    key_params, key_risk = jax.random.split(jax.random.key(config.seed))
    report("loading images", 0, 1)
    with clock.stage("setup_s"):
        client, public = load_split(config.data, batch=config.images, seed=config.seed)
        victim, params = _sent(config, client, public, key_params)
        release = make_release(config, victim)
        images, labels = client.take(np.arange(len(client)))
        pixels, _ = public.take(np.arange(len(public)))
        prior = make_prior(config.prior, pixels, rank=config.prior_rank, shrinkage=config.shrinkage)
    groups = (config.images // config.together, config.together)
    if config.explain.explain:
        check_explanations(config, victim, release)
    inputs = images.reshape(*groups, *images.shape[1:])
    classes = labels.reshape(groups)
    if config.together == 1:
        inputs, classes = inputs[:, 0], classes[:, 0]
    report("estimating", 0, 1)
    with clock.stage("estimate_s"):
        found = invre(
            key_risk,
            release,
            params,
            inputs,
            classes,
            prior=prior,
            noise_std=config.noise_std / math.sqrt(config.rounds),
            settings=RiskSettings(
                route=config.route,
                labels_known=config.labels_known,
                per_layer=config.per_layer,
                spectrum=config.spectrum,
                chunk_size=config.chunk_size,
                memory_bytes=int(config.memory_gib * 2**30),
            ),
        )
    explanations = None
    if config.explain.explain:
        with clock.stage("explain_s"):
            explanations = explain_inputs(
                jax.random.fold_in(key_risk, 1),
                config,
                release,
                params,
                inputs,
                classes,
                prior,
                report,
            )
    result = {
        "version": SCHEMA_VERSION,
        "command": command,
        "config": plain(config),
        "environment": environment(),
        "timings": dict(clock.stages),
        "data": {
            "name": client.name,
            "provenance": client.provenance,
            "num_images": len(client),
            "num_public": len(public),
            "image_shape": list(victim.input_shape),
        },
        "release": {
            "kind": "embedding" if config.embedding else config.client.protocol,
            "victim": victim.name,
            "num_inputs": found.num_inputs,
            "num_outputs": found.num_outputs,
        },
        "prior": {
            "kind": config.prior,
            "rank": prior.rank,
            "pixel_std": math.sqrt(float(prior.variance)),
            "energy": found.energy,
        },
        "noise_std": config.noise_std,
        "rounds": config.rounds,
        "route": found.choice._asdict(),
        "risk": found.aggregate(classes if config.together == 1 else None),
        "inputs": [_row(found, index, classes[index]) for index in range(len(inputs))],
    }
    if explanations is not None:
        result["explanations"] = explanations
    return RiskOutcome(
        result=result,
        report=found,
        images=images.reshape(*groups, *images.shape[1:]),
        labels=labels.reshape(groups),
    )


def write_risk(outcome: RiskOutcome, config: RiskConfig) -> list[Any]:
    """Write ``risk.json``, ``risk.npz`` and the figures, each whole or not at all.

    Returns:
      The paths.
    """
    folder = config.out
    folder.mkdir(parents=True, exist_ok=True)
    estimates: Any = outcome.report.estimates  # NumPy arrays
    arrays = {name: value for name, value in estimates._asdict().items() if name != "diagnostics"}
    arrays |= estimates.diagnostics._asdict()
    packed = io.BytesIO()
    np.savez(packed, images=outcome.images, labels=outcome.labels, **arrays)
    content = {
        "risk.json": (json.dumps(outcome.result, indent=2, allow_nan=False) + "\n").encode(),
        "risk.npz": packed.getvalue(),
        **risk_figures(
            RiskPictures(
                images=outcome.images[:, 0],
                pixel_errors=estimates.pixel_errors.reshape(outcome.images.shape)[:, 0],
                risk=estimates.risk,
                sigma=None if np.isnan(estimates.sigma).any() else estimates.sigma,
                layers=outcome.report.layers,
                layer_risk=estimates.layer_risk,
            )
        ),
    }
    for name, data in content.items():
        atomic_write_bytes(folder / name, data)
    return [folder / name for name in content]


def make_release(config: RiskConfig, victim: Victim) -> Release:
    """What the configured client shares, as a function of its images."""
    if config.embedding is not None:
        return EmbeddingRelease(victim=victim, layer=config.embedding)
    return client_release(
        config.client,
        victim,
        num_examples=config.together,
        visible_layers=config.visible_layers,
        clip_norm=config.clip_norm,
    )


def _sent(
    config: RiskConfig, client: Dataset, public: Dataset, key: jax.Array
) -> tuple[Victim, PyTree]:
    if config.client.num_clients > 1 or config.client.share_batch_statistics:
        raise ValueError(
            "risk is that of one client's update without batch statistics; leave out "
            "--num-clients and --share-batch-statistics."
        )
    if config.trained is None:
        victim = build_victim(config.model, client, public, normalize=config.data.normalize)
        return victim, victim.init(key)
    if config.model != ModelConfig(model="lenet", batch_norm=config.model.batch_norm):
        raise ValueError(
            "--trained brings its own model; leave out --model and its options (but --batch-norm)."
        )
    victim, params = load_victim(config.trained)
    if config.model.batch_norm is not None:
        victim = with_batch_norm(victim, config.model.batch_norm)
    if victim.input_shape != client.image_shape or victim.num_classes < client.num_classes:
        raise ValueError(
            f"the trained model takes images of shape {victim.input_shape} in "
            f"{victim.num_classes} classes, the data have {client.image_shape} in "
            f"{client.num_classes}; give --image-size, or the data it was trained on."
        )
    return victim, params


def _row(report: RiskReport, index: int, labels: Any) -> dict[str, Any]:
    one = jax.tree.map(lambda leaf: leaf[index], report.estimates)
    skipped = ("pixel_errors", "sigma", "layer_risk", "success_rates", "diagnostics", "finite")
    row = {name: _number(value) for name, value in one._asdict().items() if name not in skipped}
    return {
        "labels": np.atleast_1d(labels).tolist(),
        **row,
        "success_rates": {
            f"{threshold:g}": float(rate)
            for threshold, rate in zip(SUCCESS_PSNR, one.success_rates, strict=True)
        },
        "layer_risk": {
            name: float(value) for name, value in zip(report.layers, one.layer_risk, strict=True)
        },
        "diagnostics": {
            "linearization_ratio": _number(one.diagnostics.linearization_ratio),
            "sign_flips": _number(one.diagnostics.sign_flips),
            "squared_safely": bool(one.diagnostics.squared_safely),
        },
    }


def _number(value: Any) -> float | None:
    """A finite number, or ``None`` for what was left out or is infinite: JSON has neither."""
    number = float(value)
    return number if math.isfinite(number) else None
