"""What the linear operators share: registration as a pytree, exact products, pairs of sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia import _checks

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, eq_default=False)
def pytree_dataclass(cls: type[_T]) -> type[_T]:
    """A frozen dataclass whose fields are pytree children, except those marked static.

    A field is static, part of the tree's structure, when its metadata say ``{"static": True}``.
    Unflattening does not call ``__init__``: JAX puts placeholders in the place of arrays, which
    no check of a constructor would let pass.
    """
    made: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(made)
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    data = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, n) for n in data), tuple(getattr(node, n) for n in static)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, aux = flatten(node)
        keys = (jax.tree_util.GetAttrKey(n) for n in data)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux: Sequence[Any], children: Iterable[Any]) -> Any:
        node = object.__new__(made)
        for name, value in (*zip(data, children, strict=True), *zip(static, aux, strict=True)):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in the precision of the dtype.

    Accelerators round to TF32 or bfloat16 unless told not to; recovery needs every bit.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def transposed_matmul(a: Array, b: Array) -> Array:
    """``a.T @ b`` without writing ``a.T`` to memory."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def pair(**value: int | tuple[int, int]) -> tuple[int, int]:
    """A positive side given once for both axes, or for each.

    >>> pair(stride=2), pair(stride=(1, 2))
    ((2, 2), (1, 2))
    """
    ((name, given),) = value.items()
    both = (given, given) if isinstance(given, int) else tuple(given)
    if len(both) != 2:
        raise ValueError(f"{name} must be one integer or a pair of them, got {given!r}.")
    for side in both:
        _checks.at_least(1, **{name: side})
    return both
