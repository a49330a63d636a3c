"""Soft-thresholding: the public function and the choice of implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgia_kernels.soft_threshold.reference import shrink
from jgia_kernels.soft_threshold.rules import batched_as_one_call, differentiable

IMPLEMENTATIONS = ("auto", "xla", "pallas")
DTYPES = ("float32", "float64", "bfloat16")


def soft_threshold(
    x: Float[Array, "*shape"],
    lam: float | int | Float[Array, "*lam_shape"],
    *,
    implementation: str = "auto",
) -> Float[Array, "*shape"]:
    r"""Shrink every entry toward zero by ``lam``: the proximal map of the l1 norm.

    Solves, entry by entry,

    .. math:: \min_y \tfrac12 (y - x)^2 + \lambda |y|, \qquad
              y = \operatorname{sign}(x) \max(|x| - \lambda, 0).

    Args:
      x: any shape, of dtype float32, float64 or bfloat16.
      lam: threshold, zero or more. A Python number, or an array of ``x``'s dtype whose shape is
        ``()`` or has ``x``'s rank with 1 or ``x``'s size on every axis: ``(B, 1, 1, 1)`` gives
        each image of an NHWC batch its own. An axis is never added silently.
      implementation: ``"xla"`` is the reference. ``"pallas"`` runs the Mosaic GPU kernel where
        the computation is compiled for CUDA (compute capability 9.0 or later) and the TPU kernel
        where it is compiled for TPU, and the reference on every other platform; float32 only.
        ``"auto"`` takes what was measured fastest, which today is ``"xla"`` everywhere.

    Returns:
      An array of ``x``'s shape and dtype.

    Raises:
      ValueError: unknown ``implementation``, unsupported dtype, a ``lam`` of another dtype or
        shape, or a Python ``lam`` that is negative or NaN.

    Guarantees:
      The value is the formula with one rounding. The map is nonexpansive and ``x - y`` is ``lam``
      times a subgradient of the l1 norm at ``y``, up to that rounding. Works under ``jit``,
      ``vmap``, ``grad`` and ``jacfwd``, with 64-bit types on or off.

    Edge cases:
      Derivatives at the kink ``|x| = lam``, as inside it, are 0 for ``x`` and for ``lam``; second
      derivatives are 0 everywhere. NaN in ``x`` or ``lam`` gives NaN, in the value and in the
      derivative. A negative entry of an array ``lam``, which cannot be checked under ``jit``,
      gives NaN and not a number that looks right. ``lam = inf`` gives 0 for finite ``x``. An
      array without entries comes back as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0], jnp.float32), 1.0).tolist()
      [-2.0, 0.0, 1.0]
      >>> lam = jnp.array([[1.0], [0.0]], jnp.float32)
      >>> soft_threshold(jnp.array([[3.0], [3.0]], jnp.float32), lam).tolist()
      [[2.0], [3.0]]

    References:
      Donoho (1995), De-noising by soft-thresholding, IEEE Transactions on Information Theory
      41(3). Parikh and Boyd (2014), Proximal Algorithms, Foundations and Trends in Optimization
      1(3), section 6.5.2.
    """
    if implementation not in IMPLEMENTATIONS:
        listed = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {listed}; got {implementation!r}.")
    x = jnp.asarray(x)
    if x.dtype.name not in DTYPES:
        raise ValueError(f"x must have dtype {', '.join(DTYPES)}; got {x.dtype}: cast it first.")
    lam = _threshold(lam, x)
    if implementation != "pallas":
        return _xla(x, lam)
    if x.dtype != jnp.float32:
        raise ValueError(
            f"implementation='pallas' is for float32; got {x.dtype}: cast x, or use "
            "implementation='xla'."
        )
    return _pallas(x, lam) if x.size else _xla(x, lam)


def _threshold(lam: float | int | jax.Array, x: jax.Array) -> jax.Array:
    """Check ``lam`` against ``x`` and return it as an array of ``x``'s dtype."""
    if isinstance(lam, (int, float)):
        if not lam >= 0:
            raise ValueError(f"lam must be zero or more, got {lam!r}.")
        return jnp.asarray(lam, x.dtype)
    lam = jnp.asarray(lam)
    if getattr(lam, "weak_type", False):  # a Python number that went through jit
        lam = lax.convert_element_type(lam, x.dtype)
    if lam.dtype != x.dtype:
        raise ValueError(f"lam must have x's dtype {x.dtype}, got {lam.dtype}: cast it first.")
    fits = lam.ndim == x.ndim and all(
        size in (1, of_x) for size, of_x in zip(lam.shape, x.shape, strict=True)
    )
    if lam.ndim and not fits:
        raise ValueError(
            f"lam must have shape () or x's rank with 1 or x's size on every axis; x has shape "
            f"{x.shape}, lam {lam.shape}: reshape lam, e.g. to (B, 1, ..., 1) for one per sample."
        )
    return lam


def _pallas_forward(x: jax.Array, lam: jax.Array) -> jax.Array:
    # Imported here so that importing the package, or using the reference, loads no Pallas.
    from jgia_kernels.soft_threshold.pallas_gpu import soft_threshold_gpu
    from jgia_kernels.soft_threshold.pallas_tpu import soft_threshold_tpu

    return lax.platform_dependent(
        x, lam, cuda=soft_threshold_gpu, tpu=soft_threshold_tpu, default=shrink
    )


_xla = differentiable(shrink)
_pallas = differentiable(batched_as_one_call(_pallas_forward))
