"""Few bits per entry: uniform levels per array, nearest or stochastic rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from jgia.defenses._tree import in_units, leaf_keys, wide_dtype

PyTree = Any


class NearestState(NamedTuple):
    """State of :func:`quantize_nearest`.

    Attributes:
      step: per array, the distance of neighboring levels in the last update, 0 before any.
    """

    step: PyTree


class StochasticState(NamedTuple):
    """State of :func:`quantize_stochastic`.

    Attributes:
      key: for the next update.
      step: per array, the distance of neighboring levels in the last update, 0 before any.
    """

    key: PRNGKeyArray
    step: PyTree


def quantize_nearest(*, num_bits: int) -> optax.GradientTransformation:
    r"""Round every entry to the nearest of ``2^num_bits - 1`` levels, evenly spaced per array.

    With ``m`` the largest magnitude in an array and ``n = 2^(num_bits - 1) - 1``, the levels are
    ``k m / n`` for integers ``-n <= k <= n``; zero is one of them and ties go to even k.

    Args:
      num_bits: bits per entry, 2 to 32. One more number, m, travels with every array.

    Returns:
      A deterministic gradient transformation whose state is a :class:`NearestState`.

    Raises:
      ValueError: ``num_bits`` is out of range, or an update is not floating point.

    Guarantees:
      ``|error| <= step / 2`` with ``state.step = m / n``, up to rounding in the array's dtype. The
      largest entry and zeros are kept. Shapes and dtypes are kept; NaN stays NaN, and an array
      with an infinite entry becomes NaN.

    Edge cases:
      An array of zeros stays zero. Beyond the dtype's own precision (24 bits for float32) further
      bits change little. The result is biased: equal small entries all vanish together. Where
      the error may be taken as uniform, its standard deviation is ``step / sqrt(12)``.

    >>> update = {"w": jnp.array([1.0, 0.4, 0.2])}
    >>> three = quantize_nearest(num_bits=2)
    >>> [float(x) for x in three.update(update, three.init(update))[0]["w"]]
    [1.0, 0.0, 0.0]

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech 2014) is the origin of
      quantized updates; Alistarh et al. (below) of the unbiased kind.
    """
    positive = _positive_levels(num_bits)

    def init(params: PyTree) -> NearestState:
        return NearestState(_no_steps(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, NearestState]:
        del state, params
        wide_dtype(updates)
        shared = jax.tree.map(
            lambda leaf: _restored(jnp.round(_in_levels(leaf, positive)), leaf, positive), updates
        )
        return shared, NearestState(_steps(updates, positive))

    return optax.GradientTransformation(init, update)


def quantize_stochastic(key: PRNGKeyArray, *, num_bits: int) -> optax.GradientTransformation:
    r"""Round every entry to one of its two neighboring levels, so that the mean is the entry.

    The levels are those of :func:`quantize_nearest`. An entry at ``(k + f) step`` with
    ``0 <= f < 1`` goes up to ``k + 1`` with probability f and down to k otherwise.

    Args:
      key: random key; kept in the state, which carries a new one after every update.
      num_bits: bits per entry, 2 to 32.

    Returns:
      A gradient transformation whose state is a :class:`StochasticState`.

    Raises:
      ValueError: ``num_bits`` is out of range, or an update is not floating point.

    Guarantees:
      Unbiased: ``E[result] = entry``. ``|error| < step`` and the variance is ``f (1 - f) step^2 <=
      step^2 / 4``. The largest entry and zeros are kept. Shapes and dtypes are kept; NaN stays NaN,
      and an array with an infinite entry becomes NaN.

    Edge cases:
      As :func:`quantize_nearest`. Per array the error's variance is up to 3 times that of
      nearest rounding, the price for having no bias.

    >>> update = {"w": jnp.array([1.0, 0.0])}
    >>> rounding = quantize_stochastic(jax.random.key(0), num_bits=2)
    >>> [float(x) for x in rounding.update(update, rounding.init(update))[0]["w"]]
    [1.0, 0.0]

    References:
      Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding"
      (NeurIPS 2017, arXiv 1610.02132), section 3.1. Departure: levels are relative to the largest
      entry of an array, not to its l2 norm, which wastes fewer of them.
    """
    positive = _positive_levels(num_bits)

    def init(params: PyTree) -> StochasticState:
        return StochasticState(jax.random.clone(key), _no_steps(params))

    def rounded(leaf: Array, leaf_key: PRNGKeyArray) -> Array:
        position = _in_levels(leaf, positive)
        below = jnp.floor(position)
        # floor(position + uniform) would lose the uniform's low bits beside a large position.
        up = jax.random.uniform(leaf_key, leaf.shape, position.dtype) < position - below
        return _restored(below + up.astype(position.dtype), leaf, positive)

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, StochasticState]:
        del params
        wide_dtype(updates)
        next_key, draw = jax.random.split(state.key)
        shared = jax.tree.map(rounded, updates, leaf_keys(draw, updates))
        return shared, StochasticState(next_key, _steps(updates, positive))

    return optax.GradientTransformation(init, update)


def _positive_levels(num_bits: int) -> float:
    if not 2 <= num_bits <= 32:
        raise ValueError(f"num_bits must be between 2 and 32, got {num_bits}.")
    return float(2 ** (num_bits - 1) - 1)


def _top(leaf: Array) -> Array:
    wide = leaf.astype(wide_dtype(leaf))
    return jnp.max(jnp.abs(wide), initial=0)


def _in_levels(leaf: Array, positive: float) -> Array:
    """Entries in units of a step, without forming a step that could underflow."""
    top = _top(leaf)
    return in_units(leaf.astype(top.dtype), top) * positive


def _restored(level: Array, leaf: Array, positive: float) -> Array:
    return (level / positive * _top(leaf)).astype(leaf.dtype)


def _steps(updates: PyTree, positive: float) -> PyTree:
    return jax.tree.map(lambda leaf: _top(leaf) / positive, updates)


def _no_steps(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros((), wide_dtype(leaf)), params)
