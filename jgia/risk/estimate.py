"""What one release tells about one image: the estimate behind InvRE, compiled once."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jgia import _checks
from jgia.risk.diagnostics import Diagnostics, diagnose
from jgia.risk.invloss import (
    Form,
    flat_spectrum_bound,
    invloss,
    predicted_psnr,
    recoverable_fraction,
)
from jgia.risk.jacobian import CHUNK
from jgia.risk.krylov import spectral_norm
from jgia.risk.posterior import Posterior, success_rates
from jgia.risk.prior import Prior
from jgia.risk.release import Release
from jgia.risk.spectrum import SAFE_NOISE, Route
from jgia.risk.whitened import Whitened, whitened

PyTree = Any
SUCCESS_PSNR = (18.0, 25.0, 30.0, 40.0)
"""PSNR in dB at which a reconstruction counts, as in the reports of attacks."""

_LARGEST_SPECTRUM = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskSettings:
    """What an estimate holds, and how it is computed. Hashable: a static argument.

    Attributes:
      route: ``"auto"``, or one of :func:`jgia.risk.choose_route`'s but ``"krylov"``.
      labels_known: whether the attacker holds the labels; otherwise they are unknown
        probabilities that have to be estimated with the image.
      per_layer: also the score of every layer alone.
      spectrum: also singular values; ``None`` for up to 1,024 directions.
      diagnostics: also whether the linearization can be trusted, by random draws.
      num_draws: Monte Carlo draws of the success curve.
      chunk_size: directions at a time.
      memory_bytes: for the choice of the route.
    """

    route: Route | Literal["auto"] = "auto"
    labels_known: bool = True
    per_layer: bool = True
    spectrum: bool | None = None
    diagnostics: bool = True
    num_draws: int = 2000
    chunk_size: int = CHUNK
    memory_bytes: int = 2**31

    def __post_init__(self) -> None:
        _checks.one_of(("auto", "svd", "qr", "rows", "gram", "structured"), route=self.route)
        _checks.at_least(
            1, num_draws=self.num_draws, chunk_size=self.chunk_size, memory_bytes=self.memory_bytes
        )

    def with_spectrum(self, rank: int) -> bool:
        """Whether singular values are computed for so many directions."""
        return rank <= _LARGEST_SPECTRUM if self.spectrum is None else self.spectrum


class RiskEstimate(NamedTuple):
    """What one release tells about an image (or a batch of them, as one input).

    What was left out is NaN.

    Attributes:
      risk: the InvRE score ``1 - InvLoss / E0`` in [0, 1]: 1 means that all of it leaks.
      invloss: smallest expected squared error of any attack on the linearized release, summed
        over pixels, under the prior; for a low-rank prior with all of its rest counted as lost.
      invloss_lower: the same if the rest of a low-rank prior were known; else ``invloss``.
      invloss_upper: for a low-rank prior what an attacker reaches who takes the rest for noise,
        of the largest size it can have in the release; else ``invloss``.
      invloss_isotropic: under independent pixels of the prior's mean variance.
      invloss_cramer_rao: of unbiased attacks (:func:`jgia.risk.invloss`).
      invloss_minimax: for the worst image of the prior's energy.
      invloss_opnorm: along the worst direction.
      predicted_psnr: of the mean squared error ``invloss / d``, in dB.
      success_rates: (thresholds,) how often the best attack reaches :data:`SUCCESS_PSNR`.
      dimensions: recoverable dimensions.
      information: nats that the release tells of the image.
      pixel_errors: (d,) expected squared error of every pixel.
      sigma: (k,) singular values of the Jacobian in the prior's coordinates over the noise's
        standard deviation, largest first; their squares are signal-to-noise ratios.
      layer_risk: (layers,) the score of every layer alone.
      fil: Fisher information loss ``sigma_max(J) / tau``.
      dfil: ``tr(J' J) / (d tau^2)``.
      dfil_bound: ``d s^2 / (1 + s^2 dFIL)``: never above ``invloss_isotropic``.
      i2f_bound: ``tau sqrt(tr(J' J)) / sigma_max^2``: the inversion influence function's lower
        bound, with its noise averaged.
      release_norm: Euclidean norm of what is shared.
      relative_noise: ``1 / sigma[0]``: the noise against the largest signal.
      diagnostics: whether to trust the linearization.
      finite: whether ``invloss`` and ``information`` are.
    """

    risk: Array
    invloss: Array
    invloss_lower: Array
    invloss_upper: Array
    invloss_isotropic: Array
    invloss_cramer_rao: Array
    invloss_minimax: Array
    invloss_opnorm: Array
    predicted_psnr: Array
    success_rates: Array
    dimensions: Array
    information: Array
    pixel_errors: Array
    sigma: Array
    layer_risk: Array
    fil: Array
    dfil: Array
    dfil_bound: Array
    i2f_bound: Array
    release_norm: Array
    relative_noise: Array
    diagnostics: Diagnostics
    finite: Array


def estimate(
    key: Array,
    release: Release,
    params: PyTree,
    images: Array,
    labels: Array,
    prior: Prior,
    noise_std: Array,
    settings: RiskSettings,
) -> RiskEstimate:
    """The estimate of one input; :func:`jgia.risk.invre` maps it over images.

    Args:
      key: random key of the success curve and the diagnostics.
      release: what is shared.
      params: the parameters.
      images: the input: one image (H, W, C) in [0, 1], or the batch behind one update.
      labels: its labels.
      prior: of the flattened input.
      noise_std: () tau > 0.
      settings: with a route (not ``"auto"``).
    """
    whole = whitened(
        release,
        params,
        images,
        labels,
        prior,
        noise_std,
        route=settings.route,
        labels_known=settings.labels_known,
        per_layer=settings.per_layer,
        chunk_size=settings.chunk_size,
    )
    rows = prior.rows()
    posterior = whole.posterior(rows)
    top = whole.largest()
    key_success, key_diagnose, key_tail = jax.random.split(key, 3)

    def fn(x: Array) -> PyTree:
        return release(params, x, labels)

    thresholds = images.size * 10 ** (-jnp.asarray(SUCCESS_PSNR, rows.dtype) / 10)
    error = posterior.error + prior.tail_energy
    upper = error
    if prior.rank < prior.num_inputs:
        norm = spectral_norm(key_tail, fn, images)
        more = prior.tail_variance * norm**2
        upper = whole.scaled(noise_std**2 / (noise_std**2 + more)).posterior(rows).error
        upper = upper + prior.tail_energy
    squared = settings.route in ("rows", "gram", "structured") and rows.dtype == jnp.float32
    safe = 1 / top >= SAFE_NOISE if squared else jnp.ones((), bool)
    if settings.diagnostics:
        checks = diagnose(
            key_diagnose,
            fn,
            images,
            posterior,
            victim=getattr(release, "victim", None),
            params=params,
            squared_safely=safe,
        )
    else:
        checks = Diagnostics(_nan(rows), _nan(rows), safe)
    value = jax.tree.leaves(fn(images))
    sigma = whole.singular_values() if settings.with_spectrum(prior.rank) else None
    return RiskEstimate(
        risk=recoverable_fraction(error, prior.energy),
        invloss=error,
        invloss_lower=posterior.error,
        invloss_upper=jnp.minimum(upper, prior.energy),
        predicted_psnr=predicted_psnr(error, prior.energy, images.size),
        success_rates=success_rates(
            key_success, posterior, thresholds, num_draws=settings.num_draws
        ),
        dimensions=posterior.dimensions,
        information=posterior.information,
        pixel_errors=posterior.pixel_errors + prior.tail_pixels,
        sigma=_nan(rows)[None] if sigma is None else sigma,
        layer_risk=jnp.stack(
            [
                recoverable_fraction(part.posterior(rows).error + prior.tail_energy, prior.energy)
                for part in whole.layers
            ]
        )
        if whole.layers
        else jnp.zeros((0,), rows.dtype),
        release_norm=jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in value)),
        relative_noise=1 / top,
        diagnostics=checks,
        finite=jnp.isfinite(error) & jnp.isfinite(posterior.information),
        **_isotropic(whole, prior, posterior, sigma),
    )


def _isotropic(
    whole: Whitened, prior: Prior, posterior: Posterior, sigma: Array | None
) -> dict[str, Array]:
    """What depends on the Jacobian in pixels, not in the prior's coordinates.

    Args:
      whole: in the prior's coordinates.
      prior: its prior.
      posterior: under that prior.
      sigma: singular values of ``whole`` where they are wanted.
    """
    nothing = _nan(whole.matrix)
    forms: dict[str, Form] = {
        "isotropic": "mmse",
        "cramer_rao": "cramer_rao",
        "minimax": "minimax",
        "opnorm": "opnorm",
    }
    found = {f"invloss_{name}": nothing for name in forms}
    found |= dict.fromkeys(("fil", "dfil", "dfil_bound", "i2f_bound"), nothing)
    if prior.rank < prior.num_inputs:
        return found
    count = prior.num_inputs
    pixels = (
        whole.scaled(1 / prior.variance) if prior.factor is None else whole.unwhitened(prior.factor)
    )
    mean_square, largest = pixels.trace() / count, pixels.largest()
    found |= {
        "fil": largest,
        "dfil": mean_square,
        "dfil_bound": flat_spectrum_bound(
            mean_square, noise_std=1.0, prior_variance=prior.variance, num_inputs=count
        ),
        "i2f_bound": jnp.sqrt(pixels.trace()) / largest**2,
    }
    if prior.factor is None:
        found["invloss_isotropic"] = posterior.error
    if sigma is None:
        return found
    flat = prior.factor is None
    sigma = sigma / jnp.sqrt(prior.variance) if flat else pixels.singular_values()
    for name, form in forms.items():
        found[f"invloss_{name}"] = invloss(
            sigma, noise_std=1.0, prior_variance=prior.variance, num_inputs=count, form=form
        )
    return found


def _nan(like: Array) -> Array:
    return jnp.full((), jnp.nan, like.dtype)
