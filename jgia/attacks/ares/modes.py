"""Other ways from activations to images, kept for comparison: the paper's eq. 7, and baselines."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy import special

from jgia.attacks.ares.measurement import Measurement
from jgia.attacks.ares.nonlinearity import lasso_constants
from jgia.attacks.ares.recovery import Recovered, undetermined
from jgia.sparse import Basis, BlockDCT, LinearOperator, lasso, masked_least_squares

MASKED = ("masked_onesided", "masked_eq")
"""Inversion modes that take the rectifier for what it is: exact where on, a bound where off."""

_MATCHING_STEPS = 1000
_MATCHING_RATE = 0.05
_PSEUDOINVERSE_ITERATIONS = 200


def baseline(
    mode: str, measured: Measurement, h: Array, probe: Array, basis: Basis | None = None
) -> Recovered:
    """Images (normalized) from activations by one of the modes that are not masked.

    Args:
      mode: ``"klasso_mu"``, ``"pinv"`` or ``"activation_matching"``.
      measured: the linear map and its biases; entries that are not exact are left out.
      h: (F, H', W', J) rectified activations.
      probe: (C, H, W, 1) random image, where gradient descent starts (scaled down).
      basis: where ``"klasso_mu"`` takes images to be sparse; 8 x 8 cosines when left out.

    Returns:
      :class:`~jgia.attacks.ares.recovery.Recovered`; nothing counts as determined, and the
      residual is zero: these modes have no test of a single example.
    """
    bias = jnp.asarray(measured.bias, h.dtype)[..., None]
    mask = jnp.broadcast_to(jnp.asarray(measured.exact)[..., None], h.shape)
    channels, height, width = probe.shape[:3]
    shape = (channels, height, width)
    if mode == "pinv":
        x = pseudoinverse(measured.operator, h - bias, mask)
    elif mode == "activation_matching":
        start = 0.1 * jnp.broadcast_to(probe, (*shape, h.shape[-1]))
        x = match_activations(measured.operator, h, bias, mask, start)
    else:
        x = klasso_mu(measured, h, mask, shape, basis)
    return undetermined(h, shape)._replace(x=x)


@jax.jit
def pseudoinverse(operator: LinearOperator, y: Array, mask: Array) -> Array:
    """The least-squares solution of least norm of ``M x = y``, the rectifier ignored."""
    return masked_least_squares(operator, y, mask, max_iterations=_PSEUDOINVERSE_ITERATIONS).x


@jax.jit
def match_activations(
    operator: LinearOperator, h: Array, bias: Array, mask: Array, start: Array
) -> Array:
    """Minimize ``||mask * (ReLU(M x + b) - h)||^2`` by Adam from a small random image."""

    def loss(x: Array) -> Array:
        misfit = jax.nn.relu(operator.apply(x) + bias) - h
        return jnp.sum(jnp.where(mask, misfit, 0) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(_MATCHING_RATE, _MATCHING_STEPS))

    def step(
        carry: tuple[Array, optax.OptState], _: None
    ) -> tuple[tuple[Array, optax.OptState], None]:
        x, state = carry
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            change, state = optimizer.update(jax.grad(loss)(x), state)
        return (x + jnp.asarray(change, x.dtype), state), None

    (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=_MATCHING_STEPS)
    return x


def klasso_mu(
    measured: Measurement,
    h: Array,
    mask: Array,
    shape: tuple[int, int, int],
    basis: Basis | None = None,
) -> Array:
    """The paper's model: ``h = mu (M x + b) + noise``, the rectifier a factor and noise.

    Lasso on all rows with the universal weight ``sigma sqrt(2 log d)`` per unit column, where mu
    and sigma come from :func:`~jgia.attacks.ares.nonlinearity.lasso_constants` for rows whose
    outputs are Gaussian. Their scale, which the model needs wherever a bias is not zero, is
    estimated from the rows without bias. The mean of the noise, which is known, is subtracted.

    References:
      ARES (IEEE S&P 2026, arXiv 2603.17623), eq. 5-7.
    """
    bias = np.asarray(measured.bias, np.float64)
    plain = jnp.asarray((bias == 0) if np.any(bias == 0) else np.ones(bias.shape, bool))
    rows = mask & plain[..., None]
    energy = jnp.mean(h**2, axis=(0, 1, 2), where=rows, keepdims=True)
    scale = jnp.sqrt(2 * energy)  # E[ReLU(s xi)^2] = s^2 / 2
    relative = bias / max(float(jnp.median(scale)), 1e-12)
    constants = lasso_constants(lambda t: np.maximum(t, 0.0), relative, intercept=True)
    # What is not linear in the input, E[ReLU(s xi + b)] - mu b, has to go first.
    offset = _mean_output(relative) - constants.mu * relative
    y = (h - jnp.asarray(offset, h.dtype)[..., None] * scale) / constants.mu
    y = y - jnp.asarray(bias, h.dtype)[..., None]
    noise = scale * constants.sigma / constants.mu
    return _universal_lasso(measured.operator, y, mask, noise[0, 0, 0], shape, basis or BlockDCT())


@functools.partial(jax.jit, static_argnums=(4, 5))
def _universal_lasso(
    operator: LinearOperator,
    y: Array,
    mask: Array,
    noise: Array,
    shape: tuple[int, int, int],
    basis: Basis,
) -> Array:
    size = int(np.prod(shape))
    column = jnp.sqrt(jnp.sum(operator.adjoint(jnp.ones_like(y[..., :1])) ** 2) / size)
    lam = noise * column * jnp.sqrt(2 * jnp.log(jnp.asarray(size, y.dtype)))
    return lasso(operator, y, lam, mask=mask, basis=basis).x


def _mean_output(bias: np.ndarray) -> np.ndarray:
    """``E[ReLU(xi + b)]`` for a standard normal xi."""
    density = np.exp(-(bias**2) / 2) / np.sqrt(2 * np.pi)
    return density + bias * special.ndtr(bias)
