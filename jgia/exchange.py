"""Crafted parameters out to a file, a client's update back in: audits of other frameworks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgia._clock import StageClock
from jgia._io import atomic_write_bytes
from jgia.attacks import ares
from jgia.audit import AuditOutcome, assemble_result, build_victim, load_images, plain
from jgia.config import AttackConfig, CraftConfig, ModelConfig
from jgia.data import Dataset, load_dataset
from jgia.federated import UpdateError, load_params, load_update, save_update
from jgia.methods import Job, Progress, method, prior_words, read_prior
from jgia.metrics import score
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import ThreatModel, Truth
from jgia.training import load_victim

PyTree = Any

_FORMAT = "jgia-crafted-1"
_MAX_DESCRIPTION_BYTES = 16 << 20
_MAX_LAYERS = 256
_MAX_SIZE = 1 << 20


def write_crafted(config: CraftConfig) -> list[Path]:
    """Craft parameters on public images and write ``params.*`` and ``victim.json``.

    Raises:
      ValueError: data or model do not fit the attack.
    """
    public = _public_part(load_images(config.data), config.data.num_public, config.seed)
    victim = build_victim(config.model, public, public, normalize=config.data.normalize)
    pixels, _ = public.take(np.arange(len(public)))
    params, plan = ares.craft(
        jax.random.key(config.seed), victim, pixels, options=config.ares, client=config.client
    )
    params_path = config.out / f"params.{config.format}"
    save_update(params_path, params, layout=config.layout, victim=victim)
    description = {
        "format": _FORMAT,
        "params": params_path.name,
        "layout": config.layout,
        "model": config.model.model,
        **config.model.architecture(),
        "input_shape": victim.input_shape,
        "num_classes": victim.num_classes,
        "normalization": {
            "mean": victim.normalization.mean,
            "std": victim.normalization.std,
        },
        "public_data": public.provenance,
        "num_public": len(public),
        "bin_masses": None if plan.bin_masses is None else plan.bin_masses.tolist(),
    }
    victim_path = config.out / "victim.json"
    atomic_write_bytes(victim_path, (json.dumps(description) + "\n").encode())
    return [params_path, victim_path]


def attack_update(
    config: AttackConfig, *, command: str = "jgia attack", progress: Progress | None = None
) -> AuditOutcome:
    """Attack an update file that was computed on crafted or honestly trained parameters.

    Raises:
      ValueError: a file is missing, damaged, or does not fit the model.
    """
    report = progress or (lambda stage, done, total: None)
    clock = StageClock()
    chosen = method(config.method)
    ares.solver_dtype(config.performance)
    report("reading the update", 0, 1)
    with clock.stage("setup_s"):
        if config.crafted is not None:
            victim, params, public_data, num_public = _read_crafted(config.crafted)
        else:
            victim, params = load_victim(str(config.trained))
            public_data, num_public = "none", 0
        chosen.check(victim)
        public = _public(config.public, victim)
        if public is not None:
            public_data, num_public = str(config.public), len(public)
        prior = read_prior(config.method, victim, config)
        if prior is not None:
            public_data = prior_words(prior)
        threat = ThreatModel(
            server=chosen.server,
            protocol=config.protocol,
            local_steps=1 if config.protocol == "fedsgd" else config.local_steps,
            local_epochs=config.local_epochs,
            local_learning_rate=config.local_learning_rate,
            num_examples=config.num_examples,
            labels=config.labels,
            public_data=public_data,
        )
        observation = load_update(
            config.update, victim, params, threat_model=threat, layout=config.layout
        )
        truth = _truth(config.truth, victim)
    plan = ares.read_plan(victim, params) if config.method == "ares" else None
    reconstruction = chosen.attack(
        jax.random.key(config.seed), Job(observation, plan, config, clock, report, public, prior)
    )
    scores = None
    if truth is not None:
        with clock.stage("score_s"):
            scores = score(reconstruction.images, truth.images, seed=config.seed)
    result = assemble_result(
        command=command,
        config=plain(config),
        seed=config.seed,
        clock=clock,
        dataset=None,
        num_public=num_public,
        victim=victim,
        threat_model=threat,
        attack_name=config.method,
        reconstruction=reconstruction,
        expected=None,
        scores=scores,
        originals=None if truth is None else truth.images,
    )
    return AuditOutcome(
        result=result, reconstruction=reconstruction, truth=truth, observation=observation
    )


def _read_crafted(folder: Path) -> tuple[Victim, PyTree, str, int]:
    """Victim, parameters, and what the server calibrated on: words and number of images."""
    description = _read_description(folder / "victim.json")
    victim = _victim(description)
    params = load_params(folder / description["params"], victim, layout=description["layout"])
    return victim, params, description["public_data"], int(description["num_public"])


def _public_part(dataset: Dataset, num_public: int, seed: int) -> Dataset:
    rows = np.arange(len(dataset))
    if dataset.public is not None:
        rows = rows[dataset.public]
    rows = np.random.default_rng(seed).permutation(rows)[:num_public]
    return dataset.subset(np.sort(rows))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
            raise UpdateError(f"{path} is too large to be a victim description.")
        description = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UpdateError(
            f"cannot read {path} ({error.strerror}); --crafted needs a folder from 'jgia craft'."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UpdateError):
            raise
        raise UpdateError(f"{path} is not valid JSON; run 'jgia craft' again.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UpdateError(f"{path} is not a {_FORMAT} description; run 'jgia craft' again.")
    return description


def _victim(description: dict[str, Any]) -> Victim:
    try:
        model = ModelConfig(
            model=description["model"],
            **{name: _option(description[name]) for name in ModelConfig().architecture()},
        )
        height, width, channels = (int(n) for n in description["input_shape"])
        normalization = Normalization(
            tuple(float(m) for m in description["normalization"]["mean"]),
            tuple(float(s) for s in description["normalization"]["std"]),
        )
        if Path(description["params"]).name != description["params"]:
            raise ValueError("'params' must be a file beside victim.json")
        if not isinstance(description["public_data"], str):
            raise ValueError("'public_data' must be a string")
        int(description["num_public"])
        if description["layout"] not in ("flax", "torch"):
            raise ValueError("'layout' must be flax or torch")
        return make_victim(
            model.model,
            input_shape=(height, width, channels),
            num_classes=int(description["num_classes"]),
            normalization=normalization,
            **model.architecture(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError(
            f"victim.json is damaged ({type(error).__name__}: {error}); run 'jgia craft' again."
        ) from error


def _option(value: Any) -> Any:
    """An option of the model as JSON keeps it: lists for tuples; sizes that can be meant."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) > _MAX_LAYERS:
            raise ValueError(f"a list of {len(value)} layers")
        return tuple(_option(size) for size in value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"expected an integer from 1 to {_MAX_SIZE}, got {value!r}")
    return value


def _truth(spec: str | None, victim: Victim) -> Truth | None:
    if spec is None:
        return None
    images, labels = _fitting(spec, victim, "true")
    return Truth(images=images, labels=labels)


def _public(spec: str | None, victim: Victim) -> np.ndarray | None:
    return None if spec is None else _fitting(spec, victim, "public")[0]


def _fitting(spec: str, victim: Victim, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a data set of the model's shape."""
    dataset = load_dataset(spec)
    if dataset.image_shape != victim.input_shape:
        raise ValueError(
            f"the {what} images have shape {dataset.image_shape}, the model takes "
            f"{victim.input_shape}."
        )
    return dataset.take(np.arange(len(dataset)))
