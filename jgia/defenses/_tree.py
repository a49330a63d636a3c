"""What the transformations share: dtypes, norms that cannot overflow, keys per leaf."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

PyTree = Any


def wide_dtype(tree: PyTree) -> Any:
    """The widest dtype of the leaves, at least float32.

    Raises:
      ValueError: a leaf is not floating point.
    """
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"every entry of an update must be floating point, got {dtype}; a defense acts on "
                "gradients or parameter differences."
            )
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype("float32"))


def largest(tree: PyTree) -> Float[Array, ""]:
    """Largest magnitude of all entries; NaN where an entry is NaN, 0 for an empty tree."""
    dtype = wide_dtype(tree)
    zero = jnp.zeros((), dtype)
    tops = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, tops, zero)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """l2 norm of all entries together, in units of the largest: no square can overflow."""
    dtype, unit = wide_dtype(tree), largest(tree)
    squares = [
        jnp.sum(jnp.square(in_units(leaf.astype(dtype), unit))) for leaf in jax.tree.leaves(tree)
    ]
    return unit * jnp.sqrt(functools.reduce(jnp.add, squares, jnp.zeros((), dtype)))


def in_units(leaf: Array, unit: Array) -> Array:
    """``leaf / unit`` for ``|leaf| <= unit``; zeros where the unit is 0.

    Compiled code multiplies by the reciprocal, which is flushed to zero for the largest floats;
    a power of two in front changes no bit of the quotient and keeps it in range.
    """
    down = jnp.where(unit > 1, jnp.asarray(2.0**-40, unit.dtype), 1)
    return (leaf * down) / jnp.where(unit == 0, 1, unit * down)


def root_mean_square(tree: PyTree) -> Float[Array, ""]:
    """Root mean square of all entries together; 0 for an empty tree."""
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return global_norm(tree) / max(count, 1) ** 0.5


def leaf_keys(key: PRNGKeyArray, tree: PyTree) -> PyTree:
    """One independent key per leaf, in a tree of the same structure."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(list(jax.random.split(key, max(1, len(leaves))))[: len(leaves)])


def scaled(tree: PyTree, factor: Float[Array, ""]) -> PyTree:
    """Every leaf times a scalar, each in its own dtype."""
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), tree)
