"""An attacker who knows the covariance of shaped noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.defenses import shaped_noise
from jgia.risk.shaping import covariance_factor, expected_error, shaped_covariance

D, P, PRIOR, ROUNDS, STARTS, STEPS = 4, 24, 0.25, 200, 7, 60
RNG = np.random.default_rng(0)
WEIGHTS, SHIFT = RNG.normal(size=(P, D)), RNG.normal(size=P)


def release(x):
    return jnp.tanh(jnp.asarray(WEIGHTS) @ x + jnp.asarray(SHIFT))


@functools.partial(jax.jit, static_argnums=1)
def one_round(key, floor):
    """A private input, what is seen of it, the noise's covariance, and the predicted error."""
    key_input, key_noise = jax.random.split(key)
    x = PRIOR**0.5 * jax.random.normal(key_input, (D,))
    jacobian = jax.jacfwd(release)(x)
    gram = jacobian.T @ jacobian
    covariance = shaped_covariance(gram, PRIOR, 0.5 * D * PRIOR, shape="uniform")
    made = shaped_noise(
        key_noise, release, x, covariance_factor(covariance), gram=gram, floor=floor
    )
    total = jacobian @ covariance @ jacobian.T + made.floor_std**2 * jnp.eye(P)
    predicted = expected_error(gram, covariance, PRIOR, noise_std=made.floor_std)
    return x, release(x) + made.noise, total, predicted


def most_probable(seen, total):
    """Damped Gauss-Newton in NumPy, all rounds and starts at once; the best start of each."""
    whiten = np.linalg.inv(np.linalg.cholesky(total))[:, None]
    z = PRIOR**0.5 * np.random.default_rng(1).normal(size=(len(seen), STARTS, D))
    z[:, 0] = 0
    damping = np.full(z.shape[:2], 1e-2)

    def residual(z):
        misfit = seen[:, None] - np.tanh(z @ WEIGHTS.T + SHIFT)
        return np.concatenate([(whiten @ misfit[..., None])[..., 0], z / PRIOR**0.5], axis=-1)

    def slopes(z):
        bent = 1 - np.tanh(z @ WEIGHTS.T + SHIFT) ** 2
        top = -whiten @ (bent[..., None] * WEIGHTS)
        return np.concatenate(
            [top, np.broadcast_to(np.eye(D) / PRIOR**0.5, (*z.shape, D))], axis=-2
        )

    for _ in range(STEPS):
        r, rows = residual(z), slopes(z)
        matrix = rows.swapaxes(-1, -2) @ rows
        lifted = matrix + damping[..., None, None] * (matrix * np.eye(D))
        pull = (rows.swapaxes(-1, -2) @ r[..., None])[..., 0]
        moved = z - np.linalg.solve(lifted, pull[..., None])[..., 0]
        better = np.sum(residual(moved) ** 2, -1) < np.sum(r**2, -1)
        damping = np.where(better, damping / 3, damping * 4)
        z = np.where(better[..., None], moved, z)
    best = np.argmin(np.sum(residual(z) ** 2, -1), axis=1)
    return z[np.arange(len(z)), best]


def informed_error(floor: float) -> tuple[float, float]:
    """Error of an attacker who knows the covariance, and its prediction, for a curved release."""
    rounds = [one_round(key, floor) for key in jax.random.split(jax.random.key(1), ROUNDS)]
    x, seen, total, predicted = (np.stack(part) for part in zip(*rounds, strict=True))
    errors = np.sum((most_probable(seen, total) - x) ** 2, axis=1)
    return float(errors.mean()), float(predicted.mean())


@pytest.mark.slow
def test_noise_without_a_floor_is_breakable_and_a_floor_helps():
    """What the documents say of it: the prediction is worth nothing without a floor."""
    broken, predicted = informed_error(1e-6)
    assert broken < 0.02 * predicted
    held, predicted = informed_error(1.0)
    assert 0.6 * predicted < held < 1.2 * predicted
