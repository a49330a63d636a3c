"""An attacker who knows the covariance of shaped noise."""

import jax
import jax.numpy as jnp
import numpy as np

from jgia.defenses import shaped_noise
from jgia.risk.shaping import covariance_factor, expected_error, shaped_covariance

D = 4


def informed_error(floor: float, rounds: int = 200) -> tuple[float, float]:
    """Error of an attacker who knows the covariance, and its prediction, for a curved release.

    The attacker takes the most probable input by damped Gauss-Newton steps from several starts.
    """
    rng = np.random.default_rng(0)
    weights, shift = jnp.asarray(rng.normal(size=(24, D))), jnp.asarray(rng.normal(size=24))
    prior = 0.25

    def fn(x):
        return jnp.tanh(weights @ x + shift)

    def attacked(key):
        key_input, key_noise, key_starts = jax.random.split(key, 3)
        x = jnp.sqrt(prior) * jax.random.normal(key_input, (D,))
        jacobian = jax.jacfwd(fn)(x)
        gram = jacobian.T @ jacobian
        covariance = shaped_covariance(gram, prior, 0.5 * D * prior, shape="uniform")
        factor = covariance_factor(covariance)
        made = shaped_noise(key_noise, fn, x, factor, gram=gram, floor=floor)
        total = jacobian @ covariance @ jacobian.T + made.floor_std**2 * jnp.eye(24)
        lower = jnp.linalg.cholesky(total)
        seen = fn(x) + made.noise

        def residual(z):
            misfit = jax.scipy.linalg.solve_triangular(lower, seen - fn(z), lower=True)
            return jnp.concatenate([misfit, z / jnp.sqrt(prior)])

        def step(carry, _):
            z, damping = carry
            rows, r = jax.jacfwd(residual)(z), residual(z)
            matrix = rows.T @ rows
            moved = z - jnp.linalg.solve(matrix + damping * jnp.diag(jnp.diag(matrix)), rows.T @ r)
            better = jnp.sum(residual(moved) ** 2) < jnp.sum(r**2)
            damping = jnp.where(better, damping / 3, damping * 4)
            return (jnp.where(better, moved, z), damping), None

        def run(start):
            (z, _), _ = jax.lax.scan(step, (start, jnp.asarray(1e-2)), None, length=60)
            return z, jnp.sum(residual(z) ** 2)

        starts = jnp.sqrt(prior) * jax.random.normal(key_starts, (6, D))
        found, cost = jax.vmap(run)(jnp.concatenate([jnp.zeros((1, D)), starts]))
        error = jnp.sum((found[jnp.argmin(cost)] - x) ** 2)
        return error, expected_error(gram, covariance, prior, noise_std=made.floor_std)

    errors, predicted = jax.jit(jax.vmap(attacked))(jax.random.split(jax.random.key(1), rounds))
    return float(errors.mean()), float(predicted.mean())


def test_noise_without_a_floor_is_breakable_and_a_floor_helps():
    """What the documents say of it: the prediction is worth nothing without a floor."""
    broken, predicted = informed_error(1e-6)
    assert broken < 0.02 * predicted
    held, predicted = informed_error(1.0)
    assert 0.6 * predicted < held < 1.2 * predicted
