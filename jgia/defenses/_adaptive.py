"""Checks of the adaptive defenses: of values where they are known, of shapes in any case."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jgia import _checks

PyTree = Any


def known(value: Any) -> bool:
    """Whether a value can be looked at: not inside a function that is being transformed."""
    return not isinstance(value, Tracer)


def check_target(target: Any, prior: Any, size: int) -> None:
    """Raise ``ValueError`` unless ``0 < target < tr S`` and the prior is positive."""
    if not known(prior):
        return
    if jnp.ndim(prior) == 0:
        _checks.positive(prior_variance=float(prior))
        energy = size * float(prior)
    else:
        check_gram(prior, size, "prior")
        energy = float(np.trace(np.asarray(prior)))
        _checks.positive(prior_energy=energy)
    if known(target) and not 0 < float(target) < energy:
        raise ValueError(
            f"target must be an error between 0 and the prior energy {energy:.6g} ({size} "
            f"coordinates), got {float(target):.6g}; it is a sum over coordinates of squared "
            "errors, and no noise makes an attacker worse than the prior's mean."
        )


def _all_at_least(array: Any, low: float) -> bool:
    values = np.asarray(array)  # in NumPy: inside jit, jax.numpy would trace constants too
    return bool(np.all(np.isfinite(values) & (values >= low)))


def check_spectrum(sigma: Array) -> None:
    """Raise ``ValueError`` unless ``sigma`` is a vector of singular values."""
    if sigma.ndim != 1 or sigma.size == 0 or not jnp.issubdtype(sigma.dtype, jnp.floating):
        raise ValueError(
            f"sigma must be a vector of floating-point singular values, got shape {sigma.shape} of "
            f"{sigma.dtype}; pass the square roots of the Gram matrix's eigenvalues, zeros "
            "included."
        )
    if known(sigma) and not _all_at_least(sigma, 0.0):
        raise ValueError(
            "sigma must be finite and >= 0; clip eigenvalues of a Gram matrix at 0 before the root."
        )


def check_gram(gram: Any, size: int, name: str) -> None:
    """Raise ``ValueError`` unless a Gram matrix fits and, where known, is semidefinite."""
    if jnp.shape(gram) != (size, size):
        raise ValueError(
            f"{name} must have shape ({size}, {size}), one row per input coordinate, got "
            f"{jnp.shape(gram)}; pass J^T J with respect to the flattened input."
        )
    if known(gram):
        check_semidefinite(gram, name)


def check_semidefinite(matrix: Any, name: str) -> None:
    """Raise ``ValueError`` unless a known matrix is symmetric and positive semidefinite."""
    array = np.asarray(matrix, "float64")
    slack = 100 * float(jnp.finfo(jnp.asarray(matrix).dtype).eps) * math.sqrt(len(array))
    scale = float(np.max(np.abs(array), initial=0))
    if not math.isfinite(scale) or np.max(np.abs(array - array.T)) > slack * scale:
        raise ValueError(
            f"{name} must be finite and symmetric; average it with its transpose if rounding "
            "broke it."
        )
    values = np.linalg.eigvalsh((array + array.T) / 2)
    if values[0] < -slack * max(float(values[-1]), float(np.finfo(float).tiny)):
        raise ValueError(
            f"{name} must be positive semidefinite, got an eigenvalue of {values[0]:.6g} beside "
            f"{values[-1]:.6g}; a covariance or Gram matrix has none below 0."
        )


def check_factor(factor: Any, size: int) -> None:
    """Raise ``ValueError`` unless a covariance factor fits the input and is finite."""
    shape = jnp.shape(factor)
    if len(shape) != 2 or shape[0] != size or shape[1] == 0:
        raise ValueError(
            f"covariance_factor must have shape ({size}, k), one row per input coordinate, got "
            f"{shape}; take jgia.risk.shaping.covariance_factor of a covariance."
        )
    if known(factor) and not _all_at_least(factor, -math.inf):
        raise ValueError(
            "covariance_factor must be finite, got NaN or infinite entries; the target may be out "
            "of reach or the prior singular."
        )


def check_input(x: Any) -> Array:
    """An input as an array of floating-point numbers."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.size == 0:
        raise ValueError(
            f"x must be a floating-point array with at least one entry, got shape {array.shape} of "
            f"{array.dtype}; pass the pixels that the release is a function of."
        )
    return array
