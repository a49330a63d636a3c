"""The state of a search in a file: written atomically, read back only by the same search."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgia._io import atomic_write_bytes
from jgia.attacks.gradient_matching.objective import Problem
from jgia.attacks.gradient_matching.search import State

_FINGERPRINT = "fingerprint"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another search."""


def fingerprint(problem: Problem, key: jax.Array) -> str:
    """A digest of everything that decides a search: data, model, settings, key, versions."""
    return digest((problem.victim, problem.threat_model, problem.settings), problem, key)


def digest(statics: Any, arrays: Any, key: jax.Array) -> str:
    """A digest of what has a representation, of a pytree's arrays, of a key, and of versions."""
    found = hashlib.sha256(repr((statics, jax.__version__)).encode())
    found.update(np.asarray(jax.random.key_data(key)).tobytes())
    for leaf in jax.tree.leaves(arrays):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def save(
    path: Path,
    states: list[State],
    losses: np.ndarray,
    frames: Mapping[int, np.ndarray],
    *,
    mark: str,
) -> None:
    """Write all states, the losses so far (R, steps) and the images kept, by step."""
    leaves = enumerate(jax.tree.leaves(states))
    arrays: dict[str, Any] = {f"state/{i}": np.asarray(leaf) for i, leaf in leaves}
    arrays |= {f"frame/{step}": images for step, images in frames.items()}
    write(path, arrays | {"losses": losses}, mark=mark)


def write(path: Path, arrays: Mapping[str, Any], *, mark: str) -> None:
    """Write arrays by name, and whose they are."""
    content = io.BytesIO()
    everything: dict[str, Any] = {**arrays, _FINGERPRINT: np.asarray(mark)}
    np.savez(content, **everything)
    atomic_write_bytes(path, content.getvalue())


def read(path: Path, *, mark: str) -> dict[str, np.ndarray] | None:
    """What :func:`write` wrote; ``None`` where there is no file.

    Raises:
      CheckpointError: the file is damaged, or another search wrote it.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
            found = str(arrays.pop(_FINGERPRINT))
    except Exception as error:
        raise _damaged(path, error) from error
    if found != mark:
        raise CheckpointError(
            f"{path} belongs to another search (other data, model, settings, seed or version of "
            "jax); remove it to start anew, or name another file."
        )
    return arrays


def load(
    path: Path, like: list[State], *, mark: str
) -> tuple[list[State], np.ndarray, dict[int, np.ndarray]] | None:
    """What :func:`save` wrote; ``None`` where there is no file.

    Raises:
      CheckpointError: the file is damaged, or another search wrote it.
    """
    stored = read(path, mark=mark)
    if stored is None:
        return None
    leaves, structure = jax.tree.flatten(like)
    try:
        arrays: list[Any] = [stored[f"state/{i}"] for i in range(len(leaves))]
        losses = stored["losses"]
    except KeyError as error:
        raise _damaged(path, error) from error
    frames = {
        int(name.removeprefix("frame/")): images
        for name, images in stored.items()
        if name.startswith("frame/")
    }
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(arrays, leaves, strict=True)):
        raise CheckpointError(f"{path} does not fit this search; remove it to start anew.")
    states = jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])
    return states, losses, frames


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no checkpoint of a search ({type(error).__name__}); remove it to start anew."
    )
