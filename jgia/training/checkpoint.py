"""The state of a training run in a file: written atomically, read back only by the same run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgia._io import atomic_write_bytes
from jgia.config.training import TrainOptions
from jgia.data import Dataset
from jgia.models import Victim

PyTree = Any


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another training run."""


def fingerprint(
    key: jax.Array,
    victim: Victim,
    options: TrainOptions,
    datasets: Sequence[Dataset | None],
) -> str:
    """A digest of everything that decides a run: key, model, options, images, versions."""
    statics = (victim, options, jax.__version__, np.__version__)
    digest = hashlib.sha256(repr(statics).encode())
    digest.update(np.asarray(jax.random.key_data(key)).tobytes())
    for dataset in datasets:
        if dataset is None:
            continue
        for array in (dataset.images, dataset.labels):
            digest.update(repr((array.shape, array.dtype)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save(path: Path, state: PyTree, history: Sequence[dict[str, Any]], *, mark: str) -> None:
    """Write the state after some epochs and what their records say."""
    leaves = enumerate(jax.tree.leaves(state))
    arrays: dict[str, Any] = {f"state/{i}": np.asarray(leaf) for i, leaf in leaves}
    record = np.asarray(json.dumps({"fingerprint": mark, "history": list(history)}))
    content = io.BytesIO()
    np.savez(content, **arrays, record=record)
    atomic_write_bytes(path, content.getvalue())


def load(path: Path, like: PyTree, *, mark: str) -> tuple[PyTree, list[dict[str, Any]]] | None:
    """The state and the records of the epochs behind it; ``None`` where there is no file.

    Raises:
      CheckpointError: the file is damaged, or another run wrote it.
    """
    if not path.exists():
        return None
    leaves, structure = jax.tree.flatten(like)
    try:
        # From memory: NumPy leaves a file open that it cannot read.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            record = json.loads(str(stored["record"]))
            arrays = [stored[f"state/{i}"] for i in range(len(leaves))]
            found, history = record["fingerprint"], list(record["history"])
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a training run ({type(error).__name__}); remove it to "
            "start anew."
        ) from error
    if found != mark:
        raise CheckpointError(
            f"{path} belongs to another training run (other images, model, options, seed or "
            "versions); finish that one, remove the file to start anew, or name another folder."
        )
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(arrays, leaves, strict=True)):
        raise CheckpointError(f"{path} does not fit this training run; remove it to start anew.")
    return jax.tree.unflatten(structure, [jax.numpy.asarray(array) for array in arrays]), history
