"""Loss and accuracy of a victim on a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jgia.data import Dataset
from jgia.models import Victim, flatten_params, unflatten_params
from jgia.models.normalizing import EPSILON

PyTree = Any

_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over images.

    Attributes:
      loss: cross-entropy.
      accuracy: part of the images whose class has the largest logit, in [0, 1].
    """

    loss: float
    accuracy: float


def evaluate(victim: Victim, params: PyTree, dataset: Dataset) -> Metrics:
    """Loss and accuracy over all images, without augmentation.

    Args:
      victim: the model; batch normalizations in mode ``"eval"``, or what is computed depends on
        how the images fall into batches.
      params: its parameters.
      dataset: images of the victim's shape, labels below its number of classes.

    >>> from jgia.data import load_dataset
    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(32, 32, 3), num_classes=7, widths=(2,))
    >>> zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), victim.param_shapes())
    >>> round(evaluate(victim, zeros, load_dataset("sample", limit=20)).loss, 4)  # log 7
    1.9459
    """
    size = min(_BATCH, len(dataset))
    sums = []
    for start in range(0, len(dataset), size):
        rows = np.arange(start, start + size)
        counted = rows < len(dataset)
        rows = np.where(counted, rows, 0)  # one shape, so that nothing compiles twice
        batch = dataset.images[rows], dataset.labels[rows], counted
        sums.append(_sums(victim, params, *map(jnp.asarray, batch)))
    loss, correct = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return Metrics(loss=loss / len(dataset), accuracy=correct / len(dataset))


def in_unit_range(images: Array, dtype: jnp.dtype) -> Array:
    """Bytes or floats as pixels in [0, 1]."""
    if images.dtype == jnp.uint8:
        return images.astype(dtype) / jnp.asarray(255, dtype)
    return images.astype(dtype)


def folded(params: PyTree, statistics: Mapping[str, tuple[Array, Array]]) -> PyTree:
    """Parameters that make a victim without buffers compute what it would with them.

    ``scale (x - mean) / sqrt(var + eps) + bias`` is another scale and bias over
    ``(x - 0) / sqrt(1 + eps)``. Statistics then are arguments of a compiled function, where
    buffers are constants of it.

    Args:
      params: the parameters.
      statistics: means and variances of batch normalizations, by name.
    """
    flat = dict(flatten_params(params))
    for name, (mean, var) in statistics.items():
        ratio = flat[f"{name}/scale"] / jnp.sqrt(var + EPSILON)
        flat[f"{name}/bias"] = flat[f"{name}/bias"] - ratio * mean
        flat[f"{name}/scale"] = ratio * (1 + EPSILON) ** 0.5
    return unflatten_params(flat)


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    victim: Victim, params: PyTree, images: Array, labels: Array, counted: Array
) -> tuple[Array, Array]:
    dtype = next(iter(jax.tree.leaves(params))).dtype
    logits = victim.apply(params, victim.normalization.normalize(in_unit_range(images, dtype)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = counted & (logits.argmax(axis=1).astype(labels.dtype) == labels)
    return jnp.where(counted, losses, 0).sum(), correct.astype(dtype).sum()
