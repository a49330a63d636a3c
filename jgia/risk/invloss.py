"""InvLoss in closed form from singular values, under five assumptions about the attack."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jgia import _checks

Form = Literal["mmse", "cramer_rao", "minimax", "opnorm"]


def invloss(
    sigma: Float[Array, "*batch values"],
    *,
    noise_std: float | Float[Array, "*batch"],
    prior_variance: float | Float[Array, ""],
    num_inputs: int,
    form: Form = "mmse",
    rank_tolerance: float | None = None,
) -> Float[Array, "*batch"]:
    r"""The smallest expected squared error of a reconstruction from ``J x + tau n``.

    With ``s^2`` the prior variance of a pixel, d the number of pixels and r the number of non-zero
    singular values, ``S = tau^2 sum_i sigma_i^-2`` over those:

    ============  ==========================================  ===================================
    form          attack                                      value
    ============  ==========================================  ===================================
    mmse          any; Gaussian prior                         sum_i s^2 / (1 + (s sigma_i / tau)^2)
    cramer_rao    unbiased where the release tells anything   S + s^2 (d - r)
    minimax       linear; worst image with ||x||^2 <= d s^2   d s^2 S / (d s^2 + S); d s^2 if r < d
    opnorm        the single worst direction                  tau^2 / sigma_min^2; infinite if r < d
    ============  ==========================================  ===================================

    A full prior covariance is ``"mmse"`` in its own coordinates: :func:`jgia.risk.invre`, or
    :func:`posterior_from_gram`.

    Args:
      sigma: (..., m) singular values of the release's Jacobian. Where fewer than d are given, the
        others are zero: the values have to be complete.
      noise_std: tau > 0, one or one for each of the leading axes.
      prior_variance: s^2 > 0, in the squared units of the input.
      num_inputs: d, at least m.
      form: see above.
      rank_tolerance: singular values up to this multiple of the largest count as zero, except in
        ``"mmse"``, which is continuous there; ``d eps`` when left out.

    Returns:
      In the squared units of the input, summed over pixels.

    Raises:
      ValueError: noise or variance not positive, or more singular values than inputs.

    Guarantees:
      Decreasing in every singular value and increasing in ``noise_std``; ``"mmse"`` and
      ``"minimax"`` are at most ``d s^2``. Every form but ``"mmse"`` jumps where the rank changes.

    Edge cases:
      All singular values zero: ``d s^2`` (``"opnorm"``: infinite), for d of them.

    >>> float(invloss(jnp.array([1.0, 0.0]), noise_std=1.0, prior_variance=1.0, num_inputs=2))
    1.5

    References:
      Xu et al., "From Risk to Resilience: Towards Assessing and Mitigating the Risk of Data
      Reconstruction Attacks in Federated Learning" (USENIX Security 2025, arXiv 2512.15460), which
      names InvLoss. These forms are derived here (docs/risk.md); they are no transcription.
    """
    _checks.one_of(get_args(Form), form=form)
    _check_positive(noise_std=noise_std, prior_variance=prior_variance)
    count = sigma.shape[-1]
    if num_inputs < count:
        raise ValueError(f"num_inputs={num_inputs} is below the number of singular values {count}.")
    tau2 = jnp.asarray(noise_std, sigma.dtype)[..., None] ** 2
    s2 = jnp.asarray(prior_variance, sigma.dtype)
    energy = num_inputs * s2
    squared = sigma**2
    if form == "mmse":
        seen = jnp.sum(s2 * tau2 / (s2 * squared + tau2), axis=-1)
        return seen + s2 * (num_inputs - count)
    eps = float(jnp.finfo(sigma.dtype).eps)
    tolerance = num_inputs * eps if rank_tolerance is None else rank_tolerance
    nonzero = sigma > tolerance * jnp.max(sigma, axis=-1, keepdims=True)
    inverse = jnp.where(nonzero, tau2 / jnp.where(nonzero, squared, 1), 0)
    rank = jnp.sum(nonzero, axis=-1)
    unbiased = jnp.sum(inverse, axis=-1)
    if form == "cramer_rao":
        return unbiased + s2 * (num_inputs - rank).astype(sigma.dtype)
    if form == "minimax":
        return jnp.where(rank < num_inputs, energy, energy * unbiased / (energy + unbiased))
    return jnp.where(rank < num_inputs, jnp.inf, jnp.max(inverse, axis=-1))


def flat_spectrum_bound(
    mean_square: Float[Array, "*batch"],
    *,
    noise_std: float | Float[Array, ""],
    prior_variance: float | Float[Array, ""],
    num_inputs: int,
) -> Float[Array, "*batch"]:
    """``d s^2 / (1 + s^2 dFIL)``: what is left of the mmse form when only ``tr(J' J)`` is known.

    With ``dFIL = tr(J' J) / (d tau^2)``. Never above the mmse form, and equal only for a flat
    spectrum: what is between them is what the spread of the spectrum hides from dFIL.

    Args:
      mean_square: ``tr(J' J) / d``.
      noise_std: tau > 0.
      prior_variance: s^2 > 0.
      num_inputs: d.

    References:
      Guo et al., "Bounding Training Data Reconstruction in Private (Deep) Learning" (ICML 2022,
      arXiv 2201.12383), theorem 2, with a Gaussian prior by van Trees' inequality.
    """
    _check_positive(noise_std=noise_std, prior_variance=prior_variance)
    fisher = mean_square / noise_std**2
    return num_inputs * prior_variance / (1 + prior_variance * fisher)


def recoverable_fraction(error: Array, energy: Array) -> Array:
    """``1 - InvLoss / E0``: the InvRE score in [0, 1]; 1 means that everything leaks."""
    return jnp.clip(1 - error / energy, 0, 1)


def predicted_psnr(error: Array, energy: Array, num_inputs: int) -> Array:
    """``10 log10(d / InvLoss)`` for pixels in [0, 1], at most 60 dB, at least the prior mean's.

    >>> float(predicted_psnr(jnp.array(1.0), jnp.array(10.0), 100))
    20.0
    """
    decibel = -10 * jnp.log10(jnp.maximum(error, 1e-12 * num_inputs) / num_inputs)
    floor = -10 * jnp.log10(energy / num_inputs)
    return jnp.clip(decibel, jnp.minimum(floor, 60.0), 60.0)


def _check_positive(**values: Any) -> None:
    """Refuse what is known before tracing."""
    known = {name: value for name, value in values.items() if isinstance(value, float | int)}
    _checks.positive(**known)
