"""The first layer of a multilayer perceptron: rows that isolate, and rows that measure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from jgia.config import AresOptions
from jgia.sparse import BlockDCT

_ON_PER_ROW = 2.0
_TAIL_COUNT = 8  # public images above an empirical quantile, below which a normal tail is fitted


def measurement_rows(
    key: Array, options: AresOptions, num_rows: int, inputs: Array, *, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of a fully connected first layer: (d, m) and (m,).

    A part of the rows (``options.isolating_fraction``) exceeds its bias for two examples of a
    batch on average, so that a row often isolates one, and together the rows tell all apart; the
    rest measures, in pairs ``+w, -w`` with bias 0. Exactly one of a pair is on, so every example
    leaves one linear equation per pair, and two activations of one pair prove a mixture.

    Measuring directions: ``"random"`` Gaussian (the paper), ``"principal"`` the block-DCT
    coefficients with the largest public variance, ``"signed"`` the pixels themselves (needs
    m >= 2 d), ``"direct"`` the pixels without their negatives (needs m >= d, no isolation).

    Args:
      key: PRNG key.
      options: see :class:`~jgia.config.AresOptions`.
      num_rows: m.
      inputs: (C, H, W, N) normalized public images.
      num_examples: the batch size to isolate from; a row is on with probability 2 / num_examples
        (one example per row maximizes what single rows isolate, two what they resolve jointly;
        Boenisch et al., arXiv 2112.02918; the quantile bias of Nowak et al., arXiv 2406.18745).

    Raises:
      ValueError: too few rows for the front end.
    """
    channels, height, width, _ = inputs.shape
    size = channels * height * width
    needed = {"signed": 2 * size, "direct": size}.get(options.front_end, 2)
    if num_rows < needed:
        raise ValueError(
            f"the {options.front_end!r} front end needs {needed} neurons in every hidden layer but "
            f"the last, the model passes {num_rows}; use front_end='random' or 'principal'."
        )
    key_rows, key_isolating = jax.random.split(key)
    if options.front_end == "direct":
        kernel = np.zeros((size, num_rows), np.float32)
        kernel[range(size), range(size)] = 1
        return kernel, np.zeros(num_rows, np.float32)
    spare = num_rows - 2 * size if options.front_end == "signed" else num_rows
    num_isolating = min(spare, round(options.isolating_fraction * num_rows))
    if options.front_end == "signed":
        measuring = _pairs(np.eye(size, dtype=np.float32))
    elif options.paired:
        num_pairs = (num_rows - num_isolating) // 2
        measuring = _pairs(_directions(key_rows, options.front_end, num_pairs, inputs))
    else:
        measuring = _directions(key_rows, options.front_end, num_rows - num_isolating, inputs)
    num_measuring = measuring.shape[1]
    isolating = _whitened_rows(key_isolating, num_rows - num_measuring, inputs)
    biases = -_exceeded_by_few(isolating, inputs, num_examples)
    kernel = np.concatenate([measuring, isolating], axis=1).astype(np.float32)
    bias = np.concatenate([np.zeros(num_measuring), biases]).astype(np.float32)
    return kernel, bias


def _pairs(directions: np.ndarray) -> np.ndarray:
    return np.concatenate([directions, -directions], axis=1)


def _directions(key: Array, front_end: str, number: int, inputs: Array) -> np.ndarray:
    """Measuring directions as unit columns, in the order of flattened (H, W, C) images."""
    shape = inputs.shape[:3]
    size = int(np.prod(shape))
    if front_end == "principal":
        basis = BlockDCT()
        variance = np.asarray(jnp.var(basis.analyze(inputs), axis=-1)).ravel()
        largest = np.argsort(-variance, kind="stable")[:number]
        # Past the last coefficient there is nothing new to measure: start again.
        chosen = np.resize(largest, number)
        atoms = np.zeros((size, number), np.float32)
        atoms[chosen, range(number)] = 1
        planes = basis.synthesize(jnp.asarray(atoms.reshape(*shape, number)))
        return _flatten(planes)
    gaussian = jax.random.normal(key, (size, number), jnp.float32)
    return np.asarray(gaussian / jnp.linalg.norm(gaussian, axis=0, keepdims=True))


def _whitened_rows(key: Array, number: int, inputs: Array) -> np.ndarray:
    """Unit columns whose outputs are shared evenly among public images.

    Plain Gaussian rows are ruled by the few smooth components that carry an image's energy, so
    that all rows are on for the same examples. Here every block-DCT coefficient contributes in
    proportion to the inverse of its public deviation.
    """
    basis = BlockDCT()
    deviation = jnp.std(basis.analyze(inputs), axis=-1, keepdims=True)
    weight = 1 / jnp.maximum(deviation, 0.1 * deviation.max())
    noise = jax.random.normal(key, (*inputs.shape[:3], number), inputs.dtype)
    rows = _flatten(basis.synthesize(noise * weight))
    return rows / np.linalg.norm(rows, axis=0, keepdims=True)


def _exceeded_by_few(rows: np.ndarray, inputs: Array, num_examples: int) -> np.ndarray:
    """Value of every row that two of ``num_examples`` images exceed on average: (R,)."""
    if rows.shape[1] == 0:
        return np.zeros(0)
    outputs = _flatten(inputs).T.astype(np.float64) @ rows
    level = 1 - min(0.5, _ON_PER_ROW / num_examples)
    if len(outputs) * (1 - level) >= _TAIL_COUNT:
        return np.quantile(outputs, level, axis=0)
    return outputs.mean(axis=0) + outputs.std(axis=0) * special.ndtri(level)


def _flatten(planes: Array) -> np.ndarray:
    """(C, H, W, N) to (H * W * C, N), as flax flattens an image."""
    moved = np.asarray(jnp.transpose(planes, (1, 2, 0, 3)))
    return moved.reshape(int(np.prod(moved.shape[:3])), moved.shape[3])
