"""A trained victim as a folder: parameters, and the model they are for as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jgia._io import atomic_write_bytes
from jgia.config.model import ModelConfig
from jgia.federated import UpdateError, load_params, save_update
from jgia.models import Victim, make_victim, with_buffers
from jgia.normalization import Normalization
from jgia.training.train import TrainedVictim

PyTree = Any

_FORMAT = "jgia-victim-1"
_PARAMS, _VICTIM, _RECORD = "params.npz", "victim.json", "training.json"
_MAX_DESCRIPTION_BYTES = 16 << 20
_MAX_LAYERS = 256
_MAX_SIZE = 1 << 20


def save_victim(
    folder: str | os.PathLike[str],
    trained: TrainedVictim,
    *,
    model: ModelConfig,
    record: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``params.npz``, ``training.json`` and ``victim.json``, each atomically.

    Args:
      folder: made if need be; files of the same names are replaced.
      trained: what :func:`train_victim` returned.
      model: the options that the victim was made from.
      record: what else ``training.json`` is to say, JSON-ready.

    Returns:
      The paths of the three files.

    Raises:
      ValueError: the options do not make this victim.
      OSError: a file cannot be written.

    Guarantees:
      ``victim.json`` comes last and names the digest of ``params.npz``, so that files of two runs
      are never taken for one victim.
    """
    victim, place = trained.victim, Path(folder)
    description = {
        "format": _FORMAT,
        "model": model.model,
        "architecture": model.architecture(),
        "input_shape": victim.input_shape,
        "num_classes": victim.num_classes,
        "normalization": dataclasses.asdict(victim.normalization),
        "buffers": {
            name: {"mean": mean, "var": var}
            for name, mean, var in getattr(victim.module, "buffers", ())
        },
    }
    if _make(json.loads(json.dumps(description))) != victim:
        raise ValueError(
            f"the options of the model {model.model!r} do not make this victim; give save_victim "
            "the ModelConfig that it was made from."
        )
    save_update(place / _PARAMS, trained.params, victim=victim)
    description["params_sha256"] = _digest(place / _PARAMS)
    results = {
        "history": [dataclasses.asdict(epoch) for epoch in trained.history],
        "train": dataclasses.asdict(trained.train),
        "test": None if trained.test is None else dataclasses.asdict(trained.test),
    }
    lines = {
        _RECORD: json.dumps({**(record or {}), **results}, indent=1),
        _VICTIM: json.dumps(description),
    }
    for name, line in lines.items():
        atomic_write_bytes(place / name, (line + "\n").encode())
    return [place / name for name in (_PARAMS, _VICTIM, _RECORD)]


def load_victim(folder: str | os.PathLike[str]) -> tuple[Victim, PyTree]:
    """Read what ``jgia train-victim`` wrote; the folder may come from anybody.

    Args:
      folder: with ``victim.json`` and ``params.npz``.

    Returns:
      The victim, with the running statistics of its batch normalizations, and its parameters as a
      pytree of NumPy arrays.

    Raises:
      UpdateError: a :class:`ValueError` in one line: a file is missing, damaged, of another run,
        or does not fit the model. Nothing is unpickled, and sizes are checked before memory is
        allocated.
    """
    place = Path(folder)
    description = _read(place / _VICTIM)
    try:
        victim = _make(description)
        digest = str(description["params_sha256"])
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        reason = ascii(str(error))[1:-1][:200]
        raise UpdateError(
            f"{place / _VICTIM} is damaged ({type(error).__name__}: {reason}); run "
            "'jgia train-victim' again."
        ) from error
    params = load_params(place / _PARAMS, victim)
    if _digest(place / _PARAMS) != digest:
        raise UpdateError(
            f"{place / _PARAMS} is not the file that {_VICTIM} describes; run "
            "'jgia train-victim' again."
        )
    return victim, params


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
            raise UpdateError(f"{path} is too large to be a victim description.")
        description = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UpdateError(
            f"cannot read {path} ({error.strerror}); expected a folder from 'jgia train-victim'."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UpdateError):
            raise
        raise UpdateError(f"{path} is not valid JSON; run 'jgia train-victim' again.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UpdateError(
            f"{path} is not a {_FORMAT} description; expected a folder from 'jgia train-victim'."
        )
    return description


def _make(description: dict[str, Any]) -> Victim:
    architecture = description["architecture"]
    known = ModelConfig().architecture()
    if unknown := sorted(set(architecture) - set(known)):
        raise ValueError(f"the architecture has unknown options {unknown[:5]}")
    options = {name: _option(name, architecture.get(name, known[name])) for name in known}
    model = ModelConfig(model=description["model"], **options)
    if len(model.widths or ()) * (model.blocks or 1) > _MAX_LAYERS:
        raise ValueError(f"the model has more than {_MAX_LAYERS} blocks")
    height, width, channels = (_size(n) for n in description["input_shape"])
    normalization = Normalization(
        tuple(float(m) for m in description["normalization"]["mean"]),
        tuple(float(s) for s in description["normalization"]["std"]),
    )
    victim = make_victim(
        model.model,
        input_shape=(height, width, channels),
        num_classes=_size(description["num_classes"]),
        normalization=normalization,
        **model.architecture(),
    )
    buffers = {
        str(name): (np.asarray(found["mean"], np.float64), np.asarray(found["var"], np.float64))
        for name, found in description["buffers"].items()
    }
    return with_buffers(victim, buffers) if buffers else victim


def _option(name: str, value: Any) -> Any:
    """An option of the model as JSON keeps it: lists for tuples."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        if len(value) > _MAX_LAYERS:
            raise ValueError(f"{name} has {len(value)} entries")
        return tuple(_size(n) for n in value)
    return _size(value)


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"expected an integer from 1 to {_MAX_SIZE}, got {value!r}")
    return value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
