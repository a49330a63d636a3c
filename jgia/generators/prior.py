"""A trained generator as a folder: parameters, and what they are for as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgia import _checks
from jgia._io import atomic_write, atomic_write_bytes
from jgia.federated import UpdateError
from jgia.federated._safetensors import read_safetensors, write_safetensors
from jgia.generators.protocol import StagedGenerator
from jgia.generators.stylegan2 import StyleGAN2
from jgia.models import flatten_params, unflatten_params

PyTree = Any

PARAMS, DESCRIPTION = "prior.safetensors", "prior.json"
_FORMAT = "jgia-prior-1"
_MAX_DESCRIPTION_BYTES = 16 << 20
_MAX_SIZE = 1 << 16
_MAX_PARAMETERS = 1 << 30
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"}


class PriorError(ValueError):
    """A prior cannot be read, or its files do not belong together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prior:
    """A generator with its parameters.

    Attributes:
      name: what it is called.
      generator: the network; see :class:`~jgia.generators.StagedGenerator`.
      params: its parameters.
      record: what is known of it, JSON-ready: ``data``, ``license``, ``metrics``, ``training``.
    """

    name: str
    generator: StagedGenerator
    params: PyTree
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def bundled_priors() -> tuple[str, ...]:
    """The names of the priors that come with the package.

    >>> bundled_priors()
    ('faces32',)
    """
    place = importlib.resources.files("jgia.generators") / "_priors"
    names = (entry.name for entry in place.iterdir() if (entry / DESCRIPTION).is_file())
    return tuple(sorted(names))


def save_prior(folder: str | os.PathLike[str], prior: Prior) -> list[Path]:
    """Write ``prior.safetensors`` and ``prior.json``, each atomically.

    Args:
      folder: made if need be; files of the same names are replaced.
      prior: of a :class:`~jgia.generators.StyleGAN2`.

    Returns:
      The paths of both files.

    Raises:
      ValueError: parameters are not finite, or not those of the generator.
      OSError: a file cannot be written.

    Guarantees:
      ``prior.json`` comes last and names the digest of the parameters.
    """
    if not isinstance(prior.generator, StyleGAN2):
        raise ValueError(
            f"only StyleGAN2 priors are written, got a {type(prior.generator).__name__}."
        )
    place = Path(folder)
    flat = {name: np.asarray(leaf) for name, leaf in flatten_params(prior.params).items()}
    _check_params(prior.generator, flat)
    with atomic_write(place / PARAMS) as file:
        write_safetensors(file, flat)
    description = {
        "format": _FORMAT,
        "name": prior.name,
        "generator": {"kind": "stylegan2", **dataclasses.asdict(prior.generator)},
        "params_sha256": _digest(place / PARAMS),
        **prior.record,
    }
    atomic_write_bytes(place / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    return [place / PARAMS, place / DESCRIPTION]


def load_prior(spec: str | os.PathLike[str]) -> Prior:
    """Read a prior; the folder may come from anybody.

    Args:
      spec: the name of a bundled prior (:func:`bundled_priors`), or a folder written by
        ``jgia train-prior``; also one of the files in it.

    Returns:
      The prior, its parameters as a pytree of float32 NumPy arrays.

    Raises:
      PriorError: a :class:`ValueError` in one line: there is none of that name, a file is
        missing, damaged or of another prior, or does not fit the generator. Nothing is unpickled,
        and sizes are checked before memory is allocated.

    >>> load_prior("faces32").generator.resolution
    32
    """
    place = _place(spec)
    description = _read(place / DESCRIPTION)
    try:
        generator = _generator(description["generator"])
        digest, name = str(description["params_sha256"]), str(description["name"])
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        reason = ascii(str(error))[1:-1][:200]
        raise PriorError(
            f"{place / DESCRIPTION} is damaged ({type(error).__name__}: {reason}); run "
            "'jgia train-prior' again."
        ) from error
    params = place / PARAMS
    try:
        if _digest(params) != digest:
            raise PriorError(
                f"{params} is not the file that {DESCRIPTION} describes (its SHA-256 differs: "
                "truncated, damaged or of another prior); copy both files again."
            )
        flat = read_safetensors(params, 4 * _MAX_PARAMETERS)
        _check_params(generator, flat)
    except PriorError:
        raise
    except OSError as error:
        raise PriorError(f"cannot read {params} ({error.strerror}).") from error
    except (UpdateError, ValueError) as error:
        raise PriorError(f"{params}: {error}") from error
    known = ("format", "name", "generator")
    record = {key: value for key, value in description.items() if key not in known}
    tree = unflatten_params({n: np.asarray(leaf, np.float32) for n, leaf in flat.items()})
    return Prior(name=name, generator=generator, params=tree, record=record)


def _place(spec: str | os.PathLike[str]) -> Path:
    path = Path(spec)
    if path.suffix in _PICKLES:
        raise PriorError(
            f"{path} may hold pickled code, which is never run; convert it where you trust it: "
            "load it there, build a jgia.generators.Prior and call save_prior, which writes "
            "safetensors."
        )
    if str(spec) in bundled_priors():
        bundled = importlib.resources.files("jgia.generators") / "_priors" / str(spec)
        with importlib.resources.as_file(bundled) as folder:
            return Path(folder)
    if path.is_dir():
        return path
    if path.name in (PARAMS, DESCRIPTION) and path.is_file():
        return path.parent
    raise PriorError(
        f"there is no prior {str(spec)!r}; give a folder from 'jgia train-prior', or a bundled "
        f"one: {', '.join(bundled_priors())}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
            raise PriorError(f"{path} is too large to be a prior's description.")
        description = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PriorError(
            f"cannot read {path} ({error.strerror}); expected a folder from 'jgia train-prior'."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, PriorError):
            raise
        raise PriorError(f"{path} is not valid JSON; run 'jgia train-prior' again.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise PriorError(
            f"{path} is not a {_FORMAT} description; expected a folder from 'jgia train-prior'."
        )
    return description


def _generator(given: Mapping[str, Any]) -> StyleGAN2:
    options = dict(given)
    if (kind := options.pop("kind")) != "stylegan2":
        raise ValueError(f"the generator is of an unknown kind {kind!r}")
    fields = {field.name: field.type for field in dataclasses.fields(StyleGAN2)}
    if unknown := sorted(set(options) - set(fields)):
        raise ValueError(f"the generator has unknown options {unknown[:5]}")
    for name, value in options.items():
        if name != "dtype" and not (type(value) is int and 0 <= value <= _MAX_SIZE):
            raise ValueError(f"{name} must be an integer up to {_MAX_SIZE}, got {value!r}")
    _checks.one_of(("float32", "bfloat16"), dtype=options.get("dtype", "float32"))
    return StyleGAN2(**options)


def _check_params(generator: StyleGAN2, flat: Mapping[str, np.ndarray]) -> None:
    expected = flatten_params(jax.eval_shape(generator.init, jax.random.key(0)))
    if set(expected) != set(flat):
        missing, more = sorted(set(expected) - set(flat)), sorted(set(flat) - set(expected))
        raise ValueError(
            f"the parameters are not those of the generator: missing {missing[:3]}, unknown "
            f"{more[:3]}."
        )
    for name, leaf in flat.items():
        if leaf.shape != expected[name].shape or leaf.dtype.kind != "f":
            raise ValueError(
                f"{name} must have shape {expected[name].shape} of floats, got {leaf.shape} of "
                f"{leaf.dtype}."
            )
        if not np.isfinite(leaf).all():
            raise ValueError(f"{name} holds numbers that are not finite.")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
