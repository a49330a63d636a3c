r"""How noise must lie for a given error of the best attack at the least energy.

A release ``o = G(x) + n`` of an input with prior covariance ``S`` is linearized, ``o - c = J x +
n``. Noise ``n = J xi`` with ``xi ~ N(0, Xi)`` costs ``tr(K Xi)``, ``K = J^T J``, and leaves the
error ``tr(S - S (S + Xi)^{-1} S)``, the trace of the parallel sum of ``S`` and ``Xi``. No other
noise of that error costs less (:func:`shaped_covariance`). Only mathematics is here; what a
client does with it is in :mod:`jgia.defenses`.

All errors are sums over the d input coordinates of squared errors in the units of the prior
(pixels in [0, 1] throughout this package), all of them *linearized* and *average* errors: they
are not bounds for one image, and no differential privacy.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve
from jaxtyping import Float

from jgia import _checks
from jgia.risk import _spectra
from jgia.risk.weighted_shaping import optimal_noise

Shape = Literal["water_filling", "uniform", "maxmin", "protect"]
SHAPES: tuple[Shape, ...] = ("water_filling", "uniform", "maxmin", "protect")


def water_level(
    sigma: Float[Array, " d"],
    prior_variance: Float[Array, ""] | float,
    target: Float[Array, ""] | float,
    *,
    noise_std: Float[Array, ""] | float = 0.0,
) -> Float[Array, ""]:
    r"""Level to which noise fills the singular directions: the least energy for a target error.

    The level ``kappa`` of ``min sum_i sigma_i^2 xi_i`` subject to ``sum_i s^2 (sigma_i^2 xi_i +
    t^2) / (sigma_i^2 (s^2 + xi_i) + t^2) >= target`` and ``xi >= 0``, where ``t = noise_std`` is
    isotropic noise that is there in any case:

    .. code-block:: text

        xi_i = (s^2 (kappa / sigma_i - 1) - t^2 / sigma_i^2)_+
        noise along u_i:  c_i = max(t^2, s^2 sigma_i (kappa - sigma_i))
        error along v_i:  s^2 (1 - sigma_i / kappa) where xi_i > 0, e_i otherwise,
                          e_i = s^2 t^2 / (s^2 sigma_i^2 + t^2)
        kappa = sum_active sigma_i / (m + sum_rest e_i / s^2 - target / s^2),  m active directions

    Direction i is active when ``kappa`` exceeds ``sigma_i + t^2 / (s^2 sigma_i)``. Sorted by that
    figure, the error at each of them is one prefix sum: the answer is exact, without iteration.

    Args:
      sigma: d singular values of the Jacobian in any order, >= 0; **all d of them**, so that a
        release of fewer than d numbers has zeros in the list.
      prior_variance: s^2 > 0 of every coordinate.
      target: error to reach, in [0, d s^2).
      noise_std: t >= 0.

    Returns:
      kappa >= 0; 0 where the error is at least ``target`` without noise.

    Guarantees:
      The error at ``water_filling`` is ``target`` up to rounding, when it lies between the error
      that is there without noise and ``d s^2``. The level increases with the target. jit, vmap
      and derivatives pass through (the derivative is that of the active set).

    Edge cases:
      Directions with ``sigma_i = 0`` are unseen: they contribute s^2 each, get no noise and cost
      none. A target below the error without noise gives level 0. No finite noise reaches ``d
      s^2``: a target above ``(1 - sqrt(eps)) d s^2`` is taken for that, with ``eps`` of the dtype.
      NaN stays NaN. Rounding errors in place of zeros are harmless for the energy, but see
      :func:`shaped_covariance` for what is then seen.

    >>> sigma = jnp.array([3.0, 1.0, 0.0])
    >>> float(water_level(sigma, 1.0, 1.5))  # 1 from the unseen one, 1 - 1 / 2 from the next
    2.0
    >>> float(water_level(sigma, 1.0, 0.9))
    0.0

    References:
      Derived here from the stationarity condition ``sigma_i^2 = nu s^4 / (s^2 + xi_i)^2`` with
      ``kappa = sqrt(nu)``; water filling as in Cover and Thomas, "Elements of Information Theory"
      (2006), section 9.4.
    """
    sigma = _spectrum(sigma)
    variance = jnp.asarray(prior_variance, sigma.dtype)
    floor = jnp.square(jnp.asarray(noise_std, sigma.dtype)) / variance
    safe = jnp.where(sigma > 0, sigma, 1)
    threshold = jnp.where(sigma > 0, safe + floor / safe, jnp.inf)
    order = jnp.argsort(threshold)
    threshold, sigma, safe = threshold[order], sigma[order], safe[order]
    idle = jnp.where(sigma > 0, floor / (safe * safe + floor), 1)  # e_i / s^2
    energy = jnp.asarray(sigma.size, sigma.dtype)
    least = jnp.sum(idle)
    aim = _spectra.reachable(jnp.asarray(target, sigma.dtype) / variance, least, energy)
    # Error over s^2 at the level where each direction is about to become active.
    before = jnp.cumsum(sigma) - sigma
    rest = jnp.cumsum(idle[::-1])[::-1]
    at = jnp.arange(sigma.size, dtype=sigma.dtype) - before / threshold + rest
    active = (sigma > 0) & (at < aim) & (aim > least)
    count = jnp.sum(active).astype(sigma.dtype)
    lack = count + jnp.sum(jnp.where(active, 0, idle)) - aim
    filled = count > 0
    level = jnp.sum(jnp.where(active, sigma, 0)) / jnp.where(filled, lack, 1)
    return jnp.where(filled | jnp.isnan(aim), level + 0 * aim, 0)


def water_filling(
    sigma: Float[Array, " d"],
    prior_variance: Float[Array, ""] | float,
    target: Float[Array, ""] | float,
    *,
    noise_std: Float[Array, ""] | float = 0.0,
) -> Float[Array, " d"]:
    """Variance ``xi_i`` of input-space noise along every right singular vector.

    ``(s^2 (kappa / sigma_i - 1) - t^2 / sigma_i^2)_+`` at the level of :func:`water_level`, with
    the same arguments, guarantees and edge cases; zero where ``sigma_i = 0``. The noise that is
    shared has variance ``sigma_i^2 xi_i`` along the left singular vector.

    >>> water_filling(jnp.array([3.0, 1.0, 0.0]), 1.0, 1.5).tolist()
    [0.0, 1.0, 0.0]
    """
    sigma = _spectrum(sigma)
    level = water_level(sigma, prior_variance, target, noise_std=noise_std)
    variance = jnp.asarray(prior_variance, sigma.dtype)
    floor = jnp.square(jnp.asarray(noise_std, sigma.dtype))
    safe = jnp.where(sigma > 0, sigma, 1)
    filled = variance * (level / safe - 1) - floor / (safe * safe)
    return jnp.where(sigma > 0, jnp.maximum(filled, 0), 0)


def shaped_covariance(
    gram: Float[Array, "d d"],
    prior: Float[Array, ""] | Float[Array, "d d"] | float,
    target: Float[Array, ""] | float,
    *,
    shape: Shape = "water_filling",
    weight: Float[Array, "d d"] | None = None,
    ridge: float = 0.0,
) -> Float[Array, "d d"]:
    r"""Input-space covariance ``Xi`` of noise ``n = J xi`` that leaves a target error.

    For any noise covariance C the information ``Phi = J^T C^{-1} J`` fixes the error, and ``C >= J
    Phi^{-1} J^T`` (Gauss and Markov), so that noise of the form ``J xi`` is the cheapest. With the
    posterior covariance ``P = S - S (S + Xi)^{-1} S``:

    - ``"water_filling"``: least energy ``tr(K Xi)`` with ``tr P = target``. Weak directions are
      filled first, the strongest get none. For a scalar prior :func:`water_filling`, otherwise
      :func:`optimal_noise`.
    - ``"uniform"``: ``Xi = t I`` on the directions that are seen.
    - ``"maxmin"``: ``Xi = c S``, that is ``P = rho S``: every direction, not only every singular
      one, keeps the same share of its prior variance; no other noise of that ``tr P`` has a larger
      least share. The same as ``"uniform"`` for a scalar prior.
    - ``"protect"``: least energy with ``tr(weight P) = target``, for a region, a band of
      frequencies or any other quadratic form of the error; :func:`optimal_noise`.

    Args:
      gram: ``K = J^T J`` of the release, of a prior mean or of public examples.
      prior: variance s^2 > 0 of every coordinate, or a positive definite covariance S.
      target: error to reach, in (error without noise, ``tr S``); of ``"protect"``, ``tr(weight P)``
        below ``tr(weight S)``.
      shape: see above.
      weight: positive semidefinite, for ``"protect"`` only.
      ridge: adds ``ridge tr(K) / d`` to every eigenvalue of ``gram``, so that no direction counts
        as unseen. Needed where ``gram`` is not that of the release itself.

    Returns:
      Symmetric positive semidefinite; zero on directions that the Gram matrix does not see.

    Raises:
      ValueError: shapes do not fit, ``shape`` is unknown, or ``weight`` is missing or unused.

    Guarantees:
      :func:`expected_error` at the result is ``target`` up to rounding (of ``"protect"``, its
      weighted form). Where ``Xi`` is positive definite and ``gram`` of full rank the error depends
      on ``Xi`` and S alone: noise shaped with another Gram matrix still reaches the target, at
      another energy. Compiles; vmaps. Derivatives with respect to ``target`` and a scalar prior;
      those with respect to ``gram`` need distinct eigenvalues.

    Edge cases:
      Eigenvalues below ``8 sqrt(d) eps`` of the largest count as unseen: such a direction is taken
      for hidden, gets no noise and costs none. That is true of the linearized release with any
      noise larger than ``sigma_i s``, and false without: add an isotropic floor, or a ``ridge``.
      In float32 this threshold hides singular values below about 1e-3 to 1e-2 of the largest. A
      target that is met without noise gives zeros, one out of reach is taken as in
      :func:`water_level`.

    >>> gram = jnp.diag(jnp.array([9.0, 1.0, 0.0]))
    >>> jnp.diag(shaped_covariance(gram, 1.0, 1.5)).tolist()
    [0.0, 1.0, 0.0]

    References:
      Derived here. The coordinate-diagonal special case (every entry of the update its own
      variance) is Chen, Gursoy and Lei (2024, arXiv 2411.03746).
    """
    _checks.one_of(SHAPES, shape=shape)
    _checks.non_negative(ridge=ridge)
    gram = jnp.asarray(gram)
    _spectra.check_square(gram=gram, **({} if weight is None else {"weight": weight}))
    if (weight is not None) != (shape == "protect"):
        raise ValueError(
            f"shape {shape!r} takes {'a' if shape == 'protect' else 'no'} weight, got "
            f"{'none' if weight is None else 'one'}; weights are what shape='protect' protects."
        )
    if ridge:
        lift = ridge * jnp.trace(gram) / gram.shape[0]
        gram = gram + lift * jnp.eye(gram.shape[0], dtype=gram.dtype)
    scalar = jnp.ndim(prior) == 0
    if shape == "protect" or (shape == "water_filling" and not scalar):
        return optimal_noise(gram, prior, target, weight=weight).covariance
    seen = _spectra.seen_through(gram, prior)
    if shape == "water_filling":
        sigma = jnp.where(seen.mask, jnp.sqrt(seen.eigenvalues), 0)
        inner = jnp.diag(water_filling(sigma, prior, target))
    else:
        inner = _one_parameter(seen, target, uniform=shape == "uniform")
    return _spectra.symmetrized(seen.basis @ inner @ seen.basis.T)


def expected_error(
    gram: Float[Array, "d d"],
    covariance: Float[Array, "d d"],
    prior: Float[Array, ""] | Float[Array, "d d"] | float,
    *,
    noise_std: Float[Array, ""] | float = 0.0,
) -> Float[Array, ""]:
    r"""Mean squared error of the best attack on ``J (x + xi) + t z``, summed over coordinates.

    With the seen directions V (columns), their Gram eigenvalues L and ``D = V^T (S + Xi) V + t^2
    L^{-1}`` it is ``tr S - tr(S V D^{-1} V^T S)``: the trace of the parallel sum ``S - S (S +
    Xi)^{-1} S`` when everything is seen and ``t = 0``, and the invertibility loss of isotropic
    noise when ``Xi = 0``.

    Args:
      gram: ``K = J^T J``.
      covariance: Xi, positive semidefinite.
      prior: variance or covariance S, positive definite.
      noise_std: t >= 0, isotropic noise on the release.

    Returns:
      The error, between 0 and ``tr S``. Exact for a linear release and a Gaussian prior; for any
      prior of that covariance, the error of the best *linear* attack.

    Raises:
      ValueError: shapes do not fit.

    Edge cases:
      Directions that the Gram matrix does not see (:func:`shaped_covariance`) keep their
      conditional prior variance. A prior that is not positive definite gives NaN.

    >>> gram = jnp.diag(jnp.array([9.0, 1.0, 0.0]))
    >>> float(expected_error(gram, jnp.eye(3), 1.0))
    2.0
    >>> round(float(expected_error(gram, jnp.zeros((3, 3)), 1.0, noise_std=1.0)), 6)
    1.6
    """
    gram, covariance = jnp.asarray(gram), jnp.asarray(covariance)
    _spectra.check_square(gram=gram, covariance=covariance)
    seen = _spectra.seen_through(gram, prior)
    noise = seen.basis.T @ covariance @ seen.basis
    floor = jnp.square(jnp.asarray(noise_std, gram.dtype)) / seen.eigenvalues
    total = _spectra.block(seen, seen.prior + _spectra.symmetrized(noise), 1.0)
    total = total + jnp.diag(jnp.where(seen.mask, floor, 0))
    gain = cho_solve((jnp.linalg.cholesky(total), True), seen.cross)
    return jnp.trace(seen.prior) - jnp.sum(seen.cross * gain)


def noise_energy(gram: Float[Array, "d d"], covariance: Float[Array, "d d"]) -> Float[Array, ""]:
    """Expected squared norm ``tr(K Xi)`` of the noise ``J xi``, ``xi ~ N(0, Xi)``.

    Raises:
      ValueError: shapes do not fit.

    >>> float(noise_energy(jnp.diag(jnp.array([9.0, 1.0])), jnp.eye(2)))
    10.0
    """
    gram, covariance = jnp.asarray(gram), jnp.asarray(covariance)
    _spectra.check_square(gram=gram, covariance=covariance)
    return jnp.sum(gram * covariance)


def covariance_factor(covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """A factor F with ``F F^T`` the positive semidefinite part of a covariance.

    ``V sqrt(lam)_+`` from its eigendecomposition, so that singular covariances have one too.

    Raises:
      ValueError: the shape is not square.

    >>> covariance_factor(jnp.diag(jnp.array([4.0, 0.0]))).tolist()
    [[0.0, 2.0], [0.0, 0.0]]
    """
    covariance = jnp.asarray(covariance)
    _spectra.check_square(covariance=covariance)
    values, basis = jnp.linalg.eigh(_spectra.symmetrized(covariance))
    return basis * jnp.sqrt(jnp.maximum(values, 0))[None, :]


def _spectrum(sigma: Array) -> Array:
    sigma = jnp.asarray(sigma)
    if sigma.ndim != 1 or sigma.size == 0:
        raise ValueError(
            f"sigma must hold one singular value per input coordinate, got shape {sigma.shape}; "
            "pass the square roots of the Gram matrix's eigenvalues, zeros included."
        )
    if not jnp.issubdtype(sigma.dtype, jnp.floating):
        raise ValueError(f"sigma must be floating point, got {sigma.dtype}; convert it first.")
    return sigma


def _one_parameter(seen: _spectra.Seen, target: Array | float, *, uniform: bool) -> Array:
    """``t I`` or ``c S`` on the seen directions, with the one unknown fixed by the target."""
    own = _spectra.block(seen, seen.prior)
    values, basis = jnp.linalg.eigh(_spectra.block(seen, seen.prior, 1.0))
    shares = jnp.sum(jnp.square(basis.T @ seen.cross), axis=1)
    energy = jnp.trace(seen.prior)
    visible = jnp.sum(shares / values)  # what an attacker removes without noise
    aim = _spectra.reachable(jnp.asarray(target, energy.dtype), energy - visible, energy)
    left = energy - aim
    needed = visible - left > 0
    safe = jnp.where(needed, left, 1)
    if not uniform:
        return jnp.where(needed, visible / safe - 1, 0) * own
    level = _spectra.root_in_log_scale(
        lambda t: safe - jnp.sum(shares / (values + t)), jnp.sum(shares) / safe
    )
    return jnp.where(needed, level, 0) * jnp.diag(jnp.where(seen.mask, 1, 0).astype(own.dtype))
