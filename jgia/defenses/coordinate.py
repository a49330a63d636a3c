"""Noise with a standard deviation of its own for every entry of an update: a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.defenses import _adaptive
from jgia.defenses._tree import global_norm, largest, leaf_keys, wide_dtype

PyTree = Any


class CoordinateNoise(NamedTuple):
    """Noise and the standard deviation of every entry.

    Attributes:
      noise: to be added to ``fn(x)``, whose structure it has.
      std: standard deviations, of the same structure.
    """

    noise: PyTree
    std: PyTree


def coordinate_noise(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Float[Array, "*shape"],
    *,
    energy: float,
    num_probes: int | None = None,
    floor: float = 1e-6,
) -> CoordinateNoise:
    r"""Independent noise of standard deviation ``c sqrt(||J_j|| / |g_j|)`` on entry j.

    With variances ``v_j`` the scalar Fisher bound on the error depends on ``sum_j ||J_j||^2 /
    v_j``, and the harm to training is taken to be ``sum_j g_j^2 v_j``. The least harm at a given
    bound has ``v_j`` in proportion to ``||J_j|| / |g_j|``, with ``J_j`` the row of the Jacobian of
    entry j of the update ``g = fn(x)``. The factor c makes ``sum_j v_j = energy``.

    Args:
      key: random key; also of the probes.
      fn: the release as a function of the input.
      x: input of any shape, d entries.
      energy: expected squared norm of the noise, > 0.
      num_probes: Gaussian directions z that estimate the norms of the rows, ``||J_j||^2 = E (J
        z)_j^2`` (relative standard deviation ``sqrt(2 / num_probes)`` of the square); ``None`` for
        all d unit vectors, which is exact. Each is one Jacobian-vector product.
      floor: smallest ``|g_j|`` over the largest, in (0, 1]: where an entry is zero its noise
        would have no bound.

    Returns:
      :class:`CoordinateNoise`.

    Raises:
      ValueError: an option is out of range or ``x`` is not floating point; nothing was computed.

    Guarantees:
      The squared deviations sum to ``energy``. Entries that do not depend on x get none. Memory
      is a few updates; the Jacobian is not formed.

    Edge cases:
      Where no entry depends on x, the noise is zero. Best among *diagonal* covariances for that
      scalar bound; :func:`jgia.defenses.shaped_noise` is the best of all of them for the whole
      spectrum. **Not differential privacy**: the deviations are a function of the private data.

    >>> fn = lambda x: {"w": jnp.array([1.0, 2.0]) * x}
    >>> made = coordinate_noise(jax.random.key(0), fn, jnp.array([1.0, 4.0]), energy=1.0)
    >>> [round(float(v), 4) for v in made.std["w"] ** 2]  # 1 / 1 and 2 / 8
    [0.8, 0.2]

    References:
      Chen, Gursoy and Lei, "Optimal Defenses Against Gradient Reconstruction Attacks" (2024, arXiv
      2411.03746): noise in proportion to ``sqrt(||J_j|| / |g_j|)``, row norms by Gaussian sketches.

    Departures:
      The scale is set by the total energy, so that it compares with other defenses; the floor under
      ``|g_j|`` is relative to the largest entry.
    """
    x = _adaptive.check_input(x)
    _checks.positive(energy=energy)
    if num_probes is not None:
        _checks.at_least(1, num_probes=num_probes)
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], got {floor!r}; it is relative to the largest.")
    key_noise, key_probes = jax.random.split(key)
    gradient, derivative = jax.linearize(fn, x)
    dtype = wide_dtype(gradient)
    squares = _row_squares(derivative, key_probes, x, num_probes)
    least = floor * largest(gradient)

    def variance(square: Array, leaf: Array) -> Array:
        size = jnp.maximum(jnp.abs(leaf).astype(dtype), jnp.maximum(least, jnp.finfo(dtype).tiny))
        return jnp.sqrt(jnp.sqrt(square.astype(dtype)) / size)

    roots = jax.tree.map(variance, squares, gradient)
    total = global_norm(roots)
    scale = jnp.where(total > 0, jnp.sqrt(energy) / jnp.where(total > 0, total, 1), 0)
    std = jax.tree.map(lambda root, leaf: (scale * root).astype(leaf.dtype), roots, gradient)
    noise = jax.tree.map(
        lambda s, k: s * jax.random.normal(k, s.shape, s.dtype), std, leaf_keys(key_noise, std)
    )
    return CoordinateNoise(noise, std)


def _row_squares(
    derivative: Callable[[Array], PyTree], key: PRNGKeyArray, x: Array, num_probes: int | None
) -> PyTree:
    """Squared norms of the rows of J: exact, or a mean over Gaussian probes."""
    if num_probes is None:
        probes: Array = jnp.arange(x.size)
    else:
        probes = jax.random.split(key, num_probes)

    def add(total: PyTree, probe: Array) -> tuple[PyTree, None]:
        if num_probes is None:
            direction = (jnp.arange(x.size) == probe).astype(x.dtype)
        else:
            direction = jax.random.normal(probe, (x.size,), x.dtype)
        moved = derivative(direction.reshape(x.shape))
        return jax.tree.map(lambda t, m: t + jnp.square(m), total, moved), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), derivative(x))
    total, _ = jax.lax.scan(add, zeros, probes)
    return total if num_probes is None else jax.tree.map(lambda leaf: leaf / num_probes, total)
