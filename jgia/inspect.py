"""Check a file of parameters before training on it: the composition behind an inspection."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jgia.defenses import DetectionReport, detect_crafted
from jgia.federated import UpdateError, load_arrays
from jgia.models import unflatten_params


def inspect_parameters(
    path: str | os.PathLike[str], *, thresholds: Mapping[str, float] | None = None
) -> DetectionReport:
    """Read parameters from a file that may come from anybody and look for marks of an attack.

    No model is needed: layers are told by their names and ranks. Both layouts are read: this
    library's (``conv1/kernel``) and PyTorch's (``conv1.weight``, output axis first).

    Args:
      path: ``.npz`` or ``.safetensors``, or a folder written by ``jgia craft``.
      thresholds: overrides of :data:`jgia.defenses.THRESHOLDS`, by check.

    Returns:
      The report of :func:`jgia.defenses.detect_crafted`.

    Raises:
      UpdateError: the file cannot be read, or holds no layer with weights.
      ValueError: a parameter is not finite, or an unknown check.
    """
    file = _parameters_file(Path(path))
    arrays = load_arrays(file)
    flat: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            ours, value = _in_flax_layout(name, array)
            flat[ours] = value
    if not any(name.endswith("/kernel") and x.ndim in (2, 4) for name, x in flat.items()):
        raise UpdateError(
            f"{os.fspath(file)!a}: no convolution or fully connected layer found; expected "
            "names such as conv1/kernel or conv1.weight."
        )
    modules = {name.rpartition("/")[0] for name in flat}
    for name in flat:
        if name in modules or any(module.startswith(f"{name}/") for module in modules):
            raise UpdateError(
                f"{os.fspath(file)!a}: {name!a} is both an array and a module with arrays; "
                "export the parameters again."
            )
    return detect_crafted(unflatten_params(flat), thresholds=thresholds)


def inspection_lines(report: DetectionReport) -> list[str]:
    """The report as lines of text: the decision, its reasons, one line per check."""
    decision = (
        "These parameters look crafted: do not train on private data with them."
        if report.flagged
        else "No mark of a known attack. That is no proof that there is none."
    )
    rows = [
        f"{name:20} {score:.3f}  (flagged from {report.thresholds[name]:g}; "
        f"largest in {report.layers[name]})"
        for name, score in report.scores.items()
    ]
    return [decision, *report.reasons, "", *rows]


def _parameters_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    try:
        name = json.loads((path / "victim.json").read_text("utf-8"))["params"]
        inside = isinstance(name, str) and Path(name).name == name
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UpdateError(
            f"{os.fspath(path)!a}: a folder without a readable victim.json; expected one "
            "written by jgia craft, or a parameter file."
        ) from error
    if not inside:
        raise UpdateError(f"{os.fspath(path)!a}: victim.json names a file outside the folder.")
    return path / name


def _in_flax_layout(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """PyTorch's name and axes to this library's; the order of flattened inputs is left alone."""
    if "/" in name or "." not in name:
        return name, array
    *modules, leaf = name.split(".")
    if leaf == "weight" and array.ndim in (2, 4):
        leaf, array = "kernel", np.moveaxis(array, (0, 1), (-1, -2))
    return "/".join((*modules, leaf)), array
