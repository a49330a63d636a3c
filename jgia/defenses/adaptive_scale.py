"""Isotropic noise whose size gives every update the same error of the best attack."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jgia.defenses import _adaptive
from jgia.defenses._noise import additive_noise
from jgia.risk import _spectra


def scale_for_target(
    sigma: Float[Array, " d"],
    prior_variance: Float[Array, ""] | float,
    target: Float[Array, ""] | float,
) -> Float[Array, ""]:
    r"""Standard deviation of isotropic noise at which the best attack has a target error.

    The root tau of ``sum_i s^2 tau^2 / (s^2 sigma_i^2 + tau^2) = target``: the mean squared error,
    summed over d coordinates, of the posterior mean of ``x ~ N(mu, s^2 I)`` given ``J x + tau z``.
    It increases with tau, and is found by bisection of ``log tau^2``.

    Args:
      sigma: d singular values of the Jacobian, zeros included, in any order.
      prior_variance: s^2 > 0 of every coordinate, in squared pixel units.
      target: error to reach, in (0, d s^2).

    Returns:
      tau >= 0; 0 where the directions of singular value 0 alone have that error.

    Raises:
      ValueError: the arguments, where their values are known (outside compiled functions), are out
        of range, or ``sigma`` is not a vector.

    Guarantees:
      The error at the result is ``target`` up to rounding. It increases with the target. jit,
      vmap and first derivatives with respect to all three arguments pass through.

    Edge cases:
      In compiled functions a target above ``(1 - sqrt(eps)) d s^2`` is taken for that. The
      error is that of the linearized release and an average over the prior; it is no bound
      for one image, and **no differential privacy**: tau itself depends on the private data.

    >>> tau = scale_for_target(jnp.array([2.0, 1.0]), 0.5, 0.6)
    >>> error = 0.5 * tau**2 / (0.5 * jnp.array([4.0, 1.0]) + tau**2)
    >>> round(float(error.sum()), 6)
    0.6

    References:
      Derived here from the Gaussian posterior covariance; the idea of a scale of its own for every
      example is that of Hannun, Guo and van der Maaten, "Measuring Data Leakage in
      Machine-Learning Models with Fisher Information" (UAI 2021, arXiv 2102.11673).
    """
    sigma = jnp.asarray(sigma)
    _adaptive.check_spectrum(sigma)
    _adaptive.check_target(target, prior_variance, sigma.size)
    variance = jnp.asarray(prior_variance, sigma.dtype)
    squares = variance * jnp.square(sigma)
    unseen = jnp.sum(sigma == 0).astype(sigma.dtype)
    energy = jnp.asarray(sigma.size, sigma.dtype)
    share = jnp.asarray(target, sigma.dtype) / variance
    aim = _spectra.reachable(share, unseen, energy)
    needed = aim > unseen
    aim = jnp.where(needed, aim, energy / 2)
    top = jnp.max(squares)
    squares = jnp.where(needed, squares, 1)
    # Were all singular values the largest, this would be the root; so it is no smaller.
    high = jnp.where(needed, top, 1) * aim / (energy - aim)
    root = _spectra.root_in_log_scale(lambda t: jnp.sum(t / (squares + t)) - aim, high)
    return jnp.where(needed, jnp.sqrt(jnp.where(needed, root, 1)), 0)


def layer_scales_for_target(
    grams: Sequence[Float[Array, "d d"]] | Float[Array, "layers d d"],
    prior_variance: Float[Array, ""] | float,
    target: Float[Array, ""] | float,
) -> Float[Array, " layers"]:
    r"""Standard deviations per layer that share the noise in proportion to what layers leak.

    The Fisher information of a layer without its noise is ``tr K_l``. With ``tau_l^2 = c tr K_l /
    sum_m tr K_m`` every layer carries the same information ``tr K_l / tau_l^2`` about the input,
    and c is chosen so that all layers together leave the target error.

    Args:
      grams: ``K_l = J_l^T J_l`` of every layer's gradient.
      prior_variance: s^2 > 0.
      target: error to reach, in (0, d s^2).

    Returns:
      tau_l >= 0; 0 for a layer that does not depend on the input at all.

    Raises:
      ValueError: as :func:`scale_for_target`, or the Gram matrices have different shapes.

    Guarantees:
      ``tr (I / s^2 + sum_l K_l / tau_l^2)^{-1}`` is the target up to rounding. One layer gives
      :func:`scale_for_target`.

    Edge cases:
      Equal information is a choice, not the least energy. A direction that a Gram matrix does not
      see up to rounding counts with its rounding error here.

    >>> scales = layer_scales_for_target([4 * jnp.eye(2), jnp.eye(2)], 1.0, 1.0)
    >>> [round(float(x), 4) for x in scales]
    [2.8284, 1.4142]

    References:
      Derived here.
    """
    stack = jnp.stack([jnp.asarray(gram) for gram in grams])
    if stack.ndim != 3 or stack.shape[1] != stack.shape[2]:
        raise ValueError(
            f"grams must be square matrices, one per layer, got shape {stack.shape}; pass "
            "J_l^T J_l of every layer's gradient with respect to the flattened input."
        )
    _adaptive.check_target(target, prior_variance, stack.shape[1])
    traces = jnp.trace(stack, axis1=1, axis2=2)
    shares = traces / jnp.sum(traces)
    leaks = shares > 0
    weights = jnp.where(leaks, 1 / jnp.where(leaks, shares, 1), 0)
    mean = jnp.sum(stack * weights[:, None, None], axis=0)
    values = jnp.maximum(jnp.linalg.eigvalsh(_spectra.symmetrized(mean)), 0)
    seen = values > 0
    sigma = jnp.where(seen, jnp.sqrt(jnp.where(seen, values, 1)), 0)
    return scale_for_target(sigma, prior_variance, target) * jnp.sqrt(shares)


def adaptive_scale_noise(
    key: PRNGKeyArray,
    sigma: Float[Array, " d"],
    *,
    prior_variance: Float[Array, ""] | float,
    target: Float[Array, ""] | float,
) -> optax.GradientTransformation:
    r"""Gaussian noise on every entry, of the size that leaves the best attack a target error.

    ``u + tau z`` with tau from :func:`scale_for_target`. A fixed noise leaves the examples that
    leak most exposed; this one gives each its own.

    Args:
      key: random key; kept in the state, which carries a new one after every update.
      sigma: d singular values of the Jacobian of the update with respect to the input.
      prior_variance: s^2 > 0.
      target: error to leave, in (0, d s^2), summed over the d coordinates.

    Returns:
      A gradient transformation whose state is a :class:`jgia.defenses.NoiseState`:
      ``state.noise_std`` is tau.

    Raises:
      ValueError: as :func:`scale_for_target`, before anything is computed.

    Guarantees:
      As :func:`jgia.defenses.gaussian_noise`.

    Edge cases:
      **Not differential privacy**: tau depends on the private data, and telling the attacker tau
      tells it something of them. The target holds for one release; T releases of the same
      example add up, so ask for noise of T times the variance.

    >>> noise = adaptive_scale_noise(
    ...     jax.random.key(0), jnp.array([1.0, 1.0]), prior_variance=1.0, target=1.0
    ... )
    >>> update = {"w": jnp.zeros(3)}
    >>> _, state = noise.update(update, noise.init(update))
    >>> round(float(state.noise_std), 6)
    1.0

    References:
      As :func:`scale_for_target`.
    """
    scale = scale_for_target(sigma, prior_variance, target)
    return additive_noise(key, jax.random.normal, noise_std=scale, relative=False)
