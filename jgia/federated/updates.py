"""Updates and parameters as files: names, layouts, and checks of everything that is read."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors

from jgia import _checks
from jgia._io import atomic_write
from jgia.federated._errors import UpdateError
from jgia.federated._npz import read_npz, write_npz
from jgia.federated._safetensors import read_safetensors, write_safetensors
from jgia.federated.torch_layout import from_torch_layout, to_torch_layout, torch_names
from jgia.models import Victim, flatten_params
from jgia.observation import Observation, ThreatModel, check_array, check_params, checked_tree

PyTree = Any
Layout = Literal["flax", "torch"]

_WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}
_READERS = {".npz": read_npz, ".safetensors": read_safetensors}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle")
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    safetensors.SafetensorError,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # zipfile: encryption and unknown compression (NotImplementedError)
    ValueError,
)


def save_update(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    layout: Layout = "flax",
    victim: Victim | None = None,
) -> None:
    """Write an update or parameters to ``.npz`` or ``.safetensors`` (by suffix), atomically.

    Nothing is written that :func:`load_update` would refuse: entries must be finite float32 or
    float64. Equal trees give equal bytes. Arrays are streamed, so memory holds one copy
    (``layout="torch"`` needs a second, with the axes permuted).

    Args:
      path: the file; its folder is made if need be, an existing file is replaced.
      tree: nested dictionaries of arrays, as in ``Observation.update``.
      layout: ``"flax"`` (``"conv1/kernel"``, this library's axes) or ``"torch"``
        (``"conv1.weight"``, see :func:`to_torch_layout`).
      victim: the model; needed for ``layout="torch"``. When given, names and shapes are checked.

    Raises:
      UpdateError: an unknown suffix, or arrays that are not a usable update.
      OSError: the file cannot be written; an existing one is left as it was.
    """
    _checks.one_of(("flax", "torch"), layout=layout)
    if layout == "torch" and victim is None:
        raise ValueError("layout='torch' needs victim=: the model gives the order of axes.")
    writer = _WRITERS[_suffix(Path(path), _WRITERS)]
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_params(tree).items()}
    try:
        if victim is not None:
            checked_tree(arrays, victim)
        else:
            for name, array in arrays.items():
                check_array(name, array, array.shape)
    except ValueError as error:
        raise UpdateError(str(error)) from error
    if layout == "torch" and victim is not None:
        arrays = to_torch_layout(arrays, victim)
    with atomic_write(path) as file:
        writer(file, arrays)


def load_arrays(
    path: str | os.PathLike[str], *, max_bytes: int = 16 << 30
) -> dict[str, np.ndarray]:
    """Read every array of a ``.npz`` or ``.safetensors`` file that may come from anybody.

    Declared sizes are compared with the file before memory is allocated; pickled objects are
    refused without being opened; no header is evaluated.

    Args:
      path: a regular file.
      max_bytes: the most bytes that all arrays together may declare.

    Returns:
      ``{name: array}`` in the file's names and layout: floating point, integer or boolean, in
      native byte order. Values are not looked at.

    Raises:
      UpdateError: one line: what is wrong with the file and what to do.

    >>> load_arrays("update.pt")
    Traceback (most recent call last):
      ...
    jgia.federated._errors.UpdateError: 'update.pt': a .pt file is a pickle, which runs code when \
it is read; expected .npz or .safetensors (numpy.savez or safetensors.torch.save_file).
    """
    _checks.at_least(0, max_bytes=max_bytes)
    file = Path(path)
    if file.is_dir():
        raise UpdateError(f"{_quoted(file)}: a folder; expected a .npz or .safetensors file.")
    reader = _READERS[_suffix(file, _READERS)]
    if not file.is_file():  # also keeps a pipe from blocking for ever
        raise UpdateError(f"{_quoted(file)}: no such file, or not a regular one; check the path.")
    try:
        return reader(file, max_bytes)
    except UpdateError as error:
        raise UpdateError(f"{_quoted(file)}: {error}") from error
    except _DAMAGE as error:
        reason = ascii(str(error) or type(error).__name__)[1:-1][:200]
        raise UpdateError(
            f"{_quoted(file)}: not a readable {file.suffix} file ({reason}); it is damaged, "
            "truncated or of another format. Export it again."
        ) from error


def load_update(
    path: str | os.PathLike[str],
    victim: Victim,
    params: PyTree,
    *,
    threat_model: ThreatModel | None = None,
    layout: Layout = "flax",
) -> Observation:
    """Read a client's update from a file and check it against the model.

    Args:
      path: ``.npz`` or ``.safetensors``.
      victim: the model that client and server train.
      params: the parameters that the server sent.
      threat_model: defaults to a malicious FedSGD server. Exactly the arrays of its
        ``visible_layers`` are expected (in Flax layout, if those are not all).
      layout: names and axes in the file: ``"flax"`` or ``"torch"``.

    Returns:
      An observation whose update is a pytree of NumPy arrays in this library's layout.

    Raises:
      UpdateError: the file is unreadable, larger than the model (nothing is allocated then), or
        its names, shapes, dtypes or values do not fit; the message names the array.
      ValueError: ``params`` do not fit the model, or the layout is unknown.

    Edge cases:
      A square dense kernel in the wrong layout under the right name cannot be told apart.
    """
    check_params(params, victim)
    threat = threat_model or ThreatModel()
    if threat.visible_layers is not None and layout == "torch":
        raise ValueError(
            "layout='torch' needs the arrays of every layer; give an update of some layers "
            "(visible_layers) in layout='flax'."
        )
    return Observation(
        update=_load_tree(path, victim, layout, threat.visible_layers),
        params=params,
        victim=victim,
        threat_model=threat,
    )


def load_params(path: str | os.PathLike[str], victim: Victim, *, layout: Layout = "flax") -> PyTree:
    """Read parameters from a file with the checks of :func:`load_update`.

    Args:
      path: ``.npz`` or ``.safetensors``.
      victim: the model that the parameters are for.
      layout: names and axes in the file: ``"flax"`` or ``"torch"``.

    Returns:
      A pytree of NumPy arrays in the structure of ``victim.init``.

    Raises:
      UpdateError: as :func:`load_update`.
    """
    return _load_tree(path, victim, layout)


def _load_tree(
    path: str | os.PathLike[str],
    victim: Victim,
    layout: str,
    layers: Sequence[str] | None = None,
) -> PyTree:
    _checks.one_of(("flax", "torch"), layout=layout)
    shapes = flatten_params(victim.param_shapes())
    needed = 8 * sum(math.prod(leaf.shape) for leaf in shapes.values())
    arrays = load_arrays(path, max_bytes=needed)
    try:
        if layout == "torch":
            arrays = from_torch_layout(arrays, victim)
        elif set(arrays) == torch_names(victim):
            raise UpdateError(
                "the names are PyTorch's: read it with layout='torch' (--layout torch)."
            )
        return checked_tree(arrays, victim, layers=layers)
    except ValueError as error:
        raise UpdateError(f"{_quoted(path)}: {error}") from error


def _suffix(path: Path, known: Mapping[str, Any]) -> str:
    suffix = path.suffix.lower()
    if suffix in known:
        return suffix
    found = f"a {suffix} file is not one that can be read" if suffix else "no suffix"
    if suffix in _PICKLES:
        found = f"a {suffix} file is a pickle, which runs code when it is read"
    raise UpdateError(
        f"{_quoted(path)}: {found}; expected .npz or .safetensors "
        "(numpy.savez or safetensors.torch.save_file)."
    )


def _quoted(path: str | os.PathLike[str]) -> str:
    return ascii(os.fspath(path))
