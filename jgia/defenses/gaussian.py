"""Gaussian noise on every shared entry."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PRNGKeyArray

from jgia.defenses._noise import additive_noise


def gaussian_noise(
    key: PRNGKeyArray, *, noise_std: float, relative: bool = False
) -> optax.GradientTransformation:
    r"""Add independent Gaussian noise to every entry of an update.

    ``u + s n`` with ``n ~ N(0, 1)`` per entry and ``s = noise_std``, or ``s = noise_std *
    rms(u)`` with the root mean square over all entries of the update where ``relative``.

    Args:
      key: random key; kept in the state, which carries a new one after every update.
      noise_std: standard deviation per entry, >= 0; absolute, or a multiple of the update's root
        mean square.
      relative: how ``noise_std`` is meant.

    Returns:
      A gradient transformation whose state is a :class:`NoiseState`: ``state.noise_std`` is the
      standard deviation that the last update received.

    Raises:
      ValueError: ``noise_std`` is negative or not finite, or an update is not floating point.

    Guarantees:
      The noise of different leaves, entries and updates is independent. Shapes and dtypes are
      kept. ``noise_std=0`` returns the values as they are. NaN stays NaN.

    Edge cases:
      The scale of a gradient is the server's choice when the server chooses the parameters: an
      absolute ``noise_std`` that hides one model's gradient is invisible in another's. Relative
      noise follows the update, but then the scale itself depends on the private data: it gives
      no differential privacy. For that, bound every example's influence first
      (:func:`jgia.defenses.dp_sgd_gradient`).

    >>> import jax.numpy as jnp
    >>> noise = gaussian_noise(jax.random.key(0), noise_std=0.1)
    >>> update = {"bias": jnp.zeros(3)}
    >>> shared, state = noise.update(update, noise.init(update))
    >>> shared["bias"].shape, round(float(state.noise_std), 3)
    ((3,), 0.1)

    References:
      Zhu, Liu and Han, "Deep Leakage from Gradients" (NeurIPS 2019, arXiv 1906.08935),
      section 5.1: additive noise as a defense, in absolute scale.
    """
    return additive_noise(key, jax.random.normal, noise_std=noise_std, relative=relative)
