"""Derivatives of a release along many directions: columns, blocks and Gram matrices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jgia import _checks

PyTree = Any
Fn = Callable[[Array], PyTree]

CHUNK = 64
"""Directions that are pushed through a release at once, unless said otherwise."""


class Sizes(NamedTuple):
    """What a release maps from and to.

    Attributes:
      num_inputs: entries of ``x``, d.
      num_outputs: entries of ``fn(x)``, p.
      leaves: entries of every leaf of ``fn(x)``, in order.
      names: the path of every leaf, joined by ``/``.
    """

    num_inputs: int
    num_outputs: int
    leaves: tuple[int, ...]
    names: tuple[str, ...]


def sizes(fn: Fn, x: Array) -> Sizes:
    """Check that ``fn`` can be differentiated at ``x``; nothing is computed.

    Raises:
      ValueError: ``x`` or an output is not float32 or float64, or there is no output.

    >>> sizes(lambda x: {"a": x.sum(), "b": 2 * x}, jnp.ones((2, 2)))
    Sizes(num_inputs=4, num_outputs=5, leaves=(1, 4), names=('a', 'b'))
    """
    _require_float("x", x.dtype)
    found = jax.tree_util.tree_leaves_with_path(jax.eval_shape(fn, x))
    if not found:
        raise ValueError("the release returns nothing; give a function with at least one array.")
    names = tuple("/".join(_key(entry) for entry in path) or "output" for path, _ in found)
    for name, (_, leaf) in zip(names, found, strict=True):
        _require_float(f"the output {name!r} of the release", leaf.dtype)
    leaves = tuple(leaf.size for _, leaf in found)
    return Sizes(x.size, sum(leaves), leaves, names)


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _require_float(what: str, dtype: Any) -> None:
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{what} must be float32 or float64, got {dtype}; cast it (half precision loses the "
            "small singular values, integers have no derivative)."
        )


def push(
    fn: Fn,
    x: Float[Array, "*shape"],
    directions: Float[Array, "directions inputs"] | None = None,
    *,
    chunk_size: int = CHUNK,
) -> PyTree:
    """Derivatives along directions, ``J l``: one forward-mode pass each, linearized once.

    Args:
      fn: a differentiable function to a pytree.
      x: where.
      directions: rows ``l`` in the order of ``x.ravel()``; the unit vectors when left out.
      chunk_size: directions at a time. Memory grows with it.

    Returns:
      A pytree like ``fn(x)`` whose leaves have a leading axis of directions.
    """
    _checks.at_least(1, chunk_size=chunk_size)
    return _push(fn, x, directions, chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _push(fn: Fn, x: Array, directions: Array | None, chunk_size: int) -> PyTree:
    _, derivative = jax.linearize(fn, x)
    if directions is None:
        directions = jnp.eye(x.size, dtype=x.dtype)
    return lax.map(
        lambda row: derivative(row.reshape(x.shape)),
        directions,
        batch_size=min(chunk_size, directions.shape[0]),
    )


def jacobian(
    fn: Fn, x: Float[Array, "*shape"], *, chunk_size: int = CHUNK
) -> Float[Array, "outputs inputs"]:
    """The Jacobian of the flattened outputs, in memory: ``p d`` entries.

    >>> jacobian(lambda x: {"a": x**2, "b": x.sum()}, jnp.array([1.0, 3.0])).tolist()
    [[2.0, 0.0], [0.0, 6.0], [1.0, 1.0]]
    """
    sizes(fn, x)
    return rows_of(push(fn, x, chunk_size=chunk_size)).T


def rows_of(pushed: PyTree) -> Float[Array, "directions outputs"]:
    """Leaves with a leading axis side by side, one row for each direction."""
    leaves = jax.tree.leaves(pushed)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def gram(
    fn: Fn,
    x: Float[Array, "*shape"],
    directions: Float[Array, "directions inputs"] | None = None,
    *,
    chunk_size: int = CHUNK,
) -> Float[Array, "directions directions"]:
    """``L J' J L'`` with the directions as rows of ``L``: ``J' J`` when they are left out.

    Forward over reverse, chunk by chunk: the Jacobian is never held. Forming a Gram matrix squares
    the condition number: singular values below ``sqrt(eps)`` of the largest are lost (spectra in
    float32 want route ``"qr"`` then; :func:`jgia.risk.choose_route`).

    Args:
      fn: the release.
      x: where.
      directions: as for :func:`push`.
      chunk_size: rows at a time.

    Returns:
      A symmetric matrix.

    >>> gram(lambda x: jnp.array([[1.0, 2.0]]) @ x, jnp.zeros(2)).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    _checks.at_least(1, chunk_size=chunk_size)
    sizes(fn, x)
    return _gram(fn, x, directions, chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _gram(fn: Fn, x: Array, directions: Array | None, chunk_size: int) -> Array:
    _, derivative = jax.linearize(fn, x)
    adjoint = jax.linear_transpose(derivative, x)
    basis = jnp.eye(x.size, dtype=x.dtype) if directions is None else directions
    pulled = lax.map(
        lambda row: adjoint(derivative(row.reshape(x.shape)))[0].reshape(-1),
        basis,
        batch_size=min(chunk_size, basis.shape[0]),
    )
    product = pulled if directions is None else pulled @ directions.T
    return (product + product.T) / 2


def gram_of_rows(rows: Float[Array, "directions outputs"]) -> Float[Array, "directions directions"]:
    """The Gram matrix of derivatives that are in memory: one product at the machine's full rate."""
    return rows @ rows.T


def triangular(
    fn: Fn,
    x: Float[Array, "*shape"],
    directions: Float[Array, "directions inputs"] | None = None,
    *,
    chunk_size: int = CHUNK,
    max_entries: int = 2**28,
) -> Float[Array, "directions directions"]:
    """``R`` with ``R' R = L J' J L'``, by orthogonal steps only: no squared condition number.

    Blocks of outputs are pushed, stacked under what is there and factored again (TSQR), so that
    the Jacobian is never held whole. Every block repeats the forward passes.

    Args:
      fn: the release.
      x: where.
      directions: as for :func:`push`.
      chunk_size: directions at a time.
      max_entries: of one block of the Jacobian.

    Returns:
      An upper triangular matrix, (k, k) for k directions.

    References:
      Demmel, Grigori, Hoemmen and Langou, "Communication-optimal parallel and sequential QR and LU
      factorizations" (SIAM J. Sci. Comput. 34, 2012, arXiv 0808.2664), section 2.
    """
    _checks.at_least(1, chunk_size=chunk_size, max_entries=max_entries)
    return _triangular(fn, x, directions, chunk_size, max_entries, sizes(fn, x).leaves)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _triangular(
    fn: Fn,
    x: Array,
    directions: Array | None,
    chunk_size: int,
    max_entries: int,
    leaves: tuple[int, ...],
) -> Array:
    count = x.size if directions is None else directions.shape[0]
    r = jnp.zeros((0, count), x.dtype)
    for part in blocks(leaves, max(1, max_entries // count)):
        rows = rows_of(
            push(functools.partial(_part_of, fn, part), x, directions, chunk_size=chunk_size)
        )
        r = jnp.linalg.qr(jnp.concatenate([r, rows.T.astype(x.dtype)]), mode="r")
    missing = max(0, count - r.shape[0])
    return jnp.pad(r, ((0, missing), (0, 0)))


Block = tuple[tuple[int, int, int], ...]
"""Pieces of flattened leaves: (leaf, start, stop)."""


def blocks(leaves: Sequence[int], largest: int) -> list[Block]:
    """Split leaves into groups of at most ``largest`` entries, in order.

    >>> blocks((3, 2, 4), 5)
    [((0, 0, 3), (1, 0, 2)), ((2, 0, 4),)]
    >>> blocks((5,), 2)
    [((0, 0, 2),), ((0, 2, 4),), ((0, 4, 5),)]
    """
    groups: list[list[tuple[int, int, int]]] = [[]]
    room = largest
    for leaf, size in enumerate(leaves):
        start = 0
        if size > room and size <= largest and groups[-1]:
            groups.append([])
            room = largest
        while start < size:
            if room == 0:
                groups.append([])
                room = largest
            stop = min(size, start + room)
            groups[-1].append((leaf, start, stop))
            room -= stop - start
            start = stop
    return [tuple(group) for group in groups if group]


def _part_of(fn: Fn, part: Block, x: Array) -> list[Array]:
    leaves = jax.tree.leaves(fn(x))
    return [leaves[leaf].reshape(-1)[start:stop] for leaf, start, stop in part]


def layer_names(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The leaves of every layer: those whose paths differ in the last part only.

    >>> layer_names(("conv1/bias", "conv1/kernel", "head/kernel"))
    {'conv1': (0, 1), 'head': (2,)}
    """
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        layer = name.rpartition("/")[0] or name
        found.setdefault(layer, []).append(index)
    return {layer: tuple(indices) for layer, indices in found.items()}


def slices_of(leaves: Sequence[int]) -> list[slice]:
    """Where every leaf lies among the flattened outputs."""
    ends = np.cumsum([0, *leaves]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]
