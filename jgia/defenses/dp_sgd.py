"""DP-SGD: every example's gradient clipped, the sum made noisy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, PRNGKeyArray

from jgia import _checks
from jgia.defenses._tree import global_norm, leaf_keys, scaled, wide_dtype
from jgia.defenses.clipping import clip_scale

PyTree = Any

_CHUNK_BYTES = 1 << 28


class DpSgdStats(NamedTuple):
    """What happened to the examples; **not** private, for diagnosis only.

    Attributes:
      num_clipped: examples whose gradient was longer than ``clip_norm``.
      num_nonfinite: examples whose gradient had NaN or infinite entries; they contribute zero.
      noise_std: standard deviation of the noise on every entry of the mean gradient.
    """

    num_clipped: Int[Array, ""]
    num_nonfinite: Int[Array, ""]
    noise_std: float


def dp_sgd_noise_std(*, clip_norm: float, noise_multiplier: float, num_examples: int) -> float:
    r"""Standard deviation per entry of the noise on the *mean* gradient: ``z C / B``.

    The sum of clipped gradients has l2 sensitivity ``C`` when one example is added or removed and
    gets noise ``z C``; dividing by the batch size divides both. (Noise ``z C`` on the mean would
    be B times too much, ``z`` alone does not follow the clip norm.)

    Args:
      clip_norm: C > 0.
      noise_multiplier: z >= 0.
      num_examples: B >= 1, the divisor, which must not depend on the data.

    >>> dp_sgd_noise_std(clip_norm=2.0, noise_multiplier=1.5, num_examples=10)
    0.3
    """
    _checks.positive(clip_norm=clip_norm)
    _checks.non_negative(noise_multiplier=noise_multiplier)
    _checks.at_least(1, num_examples=num_examples)
    return noise_multiplier * clip_norm / num_examples


def dp_sgd_gradient(
    key: PRNGKeyArray,
    loss_fn: Callable[..., Array],
    params: PyTree,
    examples: tuple[Any, ...],
    *,
    clip_norm: float,
    noise_multiplier: float,
    microbatch: int | None = None,
) -> tuple[PyTree, DpSgdStats]:
    r"""The mean of clipped per-example gradients with Gaussian noise.

    .. code-block:: text

        g_i = grad loss(theta; x_i)
        result = (sum_i g_i min(1, C / ||g_i||) + z C N(0, 1)) / B

    Args:
      key: random key; decides the noise and nothing else.
      loss_fn: ``loss_fn(params, *examples)`` on a batch of one; must be hashable and the same
        object from call to call, or it is traced again.
      params: floating-point parameters.
      examples: pytrees whose leaves share the leading axis B, such as ``(images, labels)``.
      clip_norm: C > 0, largest l2 norm of one example's gradient over all parameters.
      noise_multiplier: z >= 0, the noise's standard deviation on the sum over C.
      microbatch: examples whose gradients exist at once; as many as fit in 256 MiB when left
        out.

    Returns:
      The private gradient, with the structure and dtypes of ``params``, and
      :class:`DpSgdStats`.

    Raises:
      ValueError: an option is out of range or the examples do not share a leading axis.

    Guarantees:
      The l2 sensitivity of the mean to adding or removing one example, with B fixed, is
      ``clip_norm / B`` up to rounding; replacing one moves it by at most twice that. Noise on
      every entry has the standard deviation ``stats.noise_std``. An example whose gradient is not
      finite contributes zero, and is counted. Memory beyond the result is ``microbatch + 1``
      gradients. ``microbatch`` changes the order of summation only.

    Edge cases:
      A zero gradient stays zero. With ``noise_multiplier=0`` and a clip norm above every norm the
      result is the ordinary mean gradient up to rounding. Microbatches are driven from Python,
      since XLA runs convolutions inside ``scan`` slowly on CPU; a shorter last one compiles once
      more. Noise is drawn in floating point, so the guarantee holds for real-valued arithmetic
      and not against attacks on the low bits (Mironov 2012).

    >>> def loss(params, x):
    ...     return jnp.mean(x @ params)
    >>> gradient, stats = dp_sgd_gradient(
    ...     jax.random.key(0), loss, jnp.zeros(2), (jnp.array([[3.0, 4.0], [0.0, 0.5]]),),
    ...     clip_norm=1.0, noise_multiplier=0.0,
    ... )
    >>> [round(float(x), 3) for x in gradient], int(stats.num_clipped)
    ([0.3, 0.65], 1)

    References:
      Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016, arXiv 1607.00133),
      algorithm 1. Departure: the mean is over the examples that came, B, not over an expected lot
      size; with Poisson sampling divide by the expected size instead.
    """
    num_examples = _num_examples(examples)
    std = dp_sgd_noise_std(
        clip_norm=clip_norm, noise_multiplier=noise_multiplier, num_examples=num_examples
    )
    wide_dtype(params)
    size = _microbatch(params) if microbatch is None else microbatch
    _checks.at_least(1, microbatch=size)
    total, clipped, nonfinite = None, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    for start in range(0, num_examples, size):
        chunk = jax.tree.map(lambda leaf, a=start: leaf[a : a + size], examples)
        part, *counts = _clipped_sum(loss_fn, params, chunk, clip_norm)
        total = part if total is None else _add(total, part)
        clipped, nonfinite = clipped + counts[0], nonfinite + counts[1]
    gradient = _noisy_mean(key, total, num_examples, std)
    return gradient, DpSgdStats(clipped, nonfinite, std)


@functools.partial(jax.jit, static_argnums=0)
def _clipped_sum(
    loss_fn: Callable[..., Array], params: PyTree, examples: Any, clip_norm: Array
) -> tuple[PyTree, Array, Array]:
    def one(example: Any) -> tuple[PyTree, Array, Array]:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        gradient = jax.grad(loss_fn)(params, *alone)
        norm = global_norm(gradient)
        finite = jnp.isfinite(norm)
        scale = clip_scale(norm, clip_norm)
        clipped = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), scaled(gradient, scale))
        return clipped, finite & (scale < 1), ~finite

    gradients, clipped, nonfinite = jax.vmap(one)(examples)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), gradients)
    return total, jnp.sum(clipped, dtype=jnp.int32), jnp.sum(nonfinite, dtype=jnp.int32)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, part: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, part)


@functools.partial(jax.jit, donate_argnums=1)
def _noisy_mean(key: PRNGKeyArray, total: PyTree, num_examples: Array, std: Array) -> PyTree:
    def noisy(leaf: Array, leaf_key: PRNGKeyArray) -> Array:
        draw = jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
        return leaf / num_examples.astype(leaf.dtype) + std.astype(leaf.dtype) * draw

    return jax.tree.map(noisy, total, leaf_keys(key, total))


def _num_examples(examples: tuple[Any, ...]) -> int:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(examples)}
    if len(sizes) != 1 or not (size := next(iter(sizes))) or size[0] == 0:
        raise ValueError(
            "the examples must share one leading axis with at least one entry, got leading sizes "
            f"{sorted(sizes)}."
        )
    return size[0]


def _microbatch(params: PyTree) -> int:
    per_example = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return max(1, min(64, math.floor(_CHUNK_BYTES / max(per_example, 1))))
