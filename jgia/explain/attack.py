"""The most probable image given a release and its declared channel: an attack that knows both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jgia import _checks

_LEAST_DAMPING, _FIRST_DAMPING, _LARGEST_DAMPING = 1e-12, 1e-3, 1e9
_STAGES, _DEVIATIONS = 6, 6


class DeclaredChannel(NamedTuple):
    """What the attacker is told of a release: all NumPy, in float64.

    Attributes:
      value: from an image (d,) to what would be sent without noise (p,).
      linear: the same with its Jacobian, (p,) and (p, d).
      kept: (p,) which entries carry the value; the others carry noise alone.
      variance: (p,) > 0, of independent noise on every entry.
      factor: (p, m) of correlated noise, or ``None``.
    """

    value: Callable[[np.ndarray], np.ndarray]
    linear: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    kept: Bool[np.ndarray, " outputs"]
    variance: Float[np.ndarray, " outputs"]
    factor: Float[np.ndarray, "outputs parts"] | None


class MostProbable(NamedTuple):
    """The result of a search.

    Attributes:
      image: (d,) the estimate.
      objective: ``||C^(-1/2) (o - G(x))||^2 + ||z||^2`` there.
      num_steps: steps that were taken.
      converged: whether the next step would be short against the posterior, and what the image
        leaves of the observation is no more than the noise can be.
    """

    image: np.ndarray
    objective: float
    num_steps: int
    converged: bool


def most_probable(
    channel: DeclaredChannel,
    seen: Float[np.ndarray, " outputs"],
    mean: Float[np.ndarray, " inputs"],
    rows: Float[np.ndarray, "rank inputs"],
    *,
    num_steps: int = 60,
    tolerance: float = 1e-2,
) -> MostProbable:
    r"""Damped Gauss-Newton on the log posterior, from the prior's mean.

    Minimizes ``||C^(-1/2) (o - G(mu + L' z))||^2 + ||z||^2`` over z. For a linear release and
    Gaussian noise the first step is the posterior mean, whose expected error is InvLoss. A search
    that does not converge, or ends where the misfit is larger than the noise can make it, is made
    again with noise that explains the start, taken away in stages; the lower objective is kept.

    Args:
      channel: what is declared of the release.
      seen: o, what was shared.
      mean: of the prior.
      rows: L, (k, d) of the prior.
      num_steps: at most.
      tolerance: the search ends where the root mean square of the next step, in posterior standard
        deviations, is below this.

    Returns:
      The best point found. No random number is drawn, and no true image enters.

    Raises:
      ValueError: shapes do not fit, or a noise variance is not positive.

    Edge cases:
      A release that is not finite somewhere is not stepped to. Without a finite start the result
      is the prior's mean, not converged, with an infinite objective.

    References:
      Levenberg (1944) and Marquardt (1963); here with the diagonal of the normal matrix.
    """
    _check(channel, seen, mean, rows, num_steps, tolerance)
    problem = _Problem(channel, seen, mean, rows)
    found = problem.search(np.zeros(len(rows)), 1.0, num_steps, tolerance)
    # Where the model holds the misfit is chi-squared, whatever the prior makes of the image.
    largest = len(seen) + _DEVIATIONS * math.sqrt(2 * len(seen))

    def explained(end: _Found) -> bool:
        return end.converged and end.objective - float(end.z @ end.z) < largest

    if np.isfinite(found.objective) and not explained(found):
        last = found._replace(z=np.zeros(len(rows)))
        steps, excess = found.num_steps, problem.misfit(last.z) / len(seen)
        for heat in np.geomspace(max(1.0, excess), 1.0, _STAGES):
            last = problem.search(last.z, float(heat), num_steps, tolerance)
            steps += last.num_steps
        if last.objective < found.objective:
            found = last
        found = found._replace(num_steps=steps)
    image = mean + found.z @ rows
    return MostProbable(image, found.objective, found.num_steps, explained(found))


class _Found(NamedTuple):
    z: np.ndarray
    objective: float
    num_steps: int
    converged: bool


class _Problem:
    """The negative log posterior in the prior's coordinates, with the noise at some heat."""

    def __init__(
        self, channel: DeclaredChannel, seen: np.ndarray, mean: np.ndarray, rows: np.ndarray
    ) -> None:
        self._channel, self._seen, self._mean, self._rows = channel, seen, mean, rows
        self._whiten = _whitener(channel)

    def misfit(self, z: np.ndarray) -> float:
        """``||C^(-1/2) (o - G(x))||^2``; infinite where that is not finite."""
        value = self._channel.kept * self._channel.value(self._mean + z @ self._rows)
        found = float(np.sum(self._whiten((self._seen - value)[:, None]) ** 2))
        return found if np.isfinite(found) else np.inf

    def slopes(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whitened Jacobian in the prior's coordinates, and its product with the residual."""
        value, jacobian = self._channel.linear(self._mean + z @ self._rows)
        kept = self._channel.kept
        moved = self._whiten(kept[:, None] * (jacobian @ self._rows.T))
        left = self._whiten((self._seen - kept * value)[:, None])[:, 0]
        return moved, moved.T @ left

    def search(self, z: np.ndarray, heat: float, num_steps: int, tolerance: float) -> _Found:
        """Damped Gauss-Newton with the noise's variance times ``heat``."""

        def objective(z: np.ndarray) -> float:
            return self.misfit(z) / heat + float(z @ z)

        current, damping, steps = objective(z), _FIRST_DAMPING, 0
        if current == np.inf:
            return _Found(z, current, 0, converged=False)
        for steps in range(1, num_steps + 1):
            moved, pull = self.slopes(z)
            matrix = moved.T @ moved / heat + np.eye(len(z))
            pull = pull / heat - z
            if not (np.isfinite(matrix).all() and np.isfinite(pull).all()):
                return _Found(z, current, steps - 1, converged=False)
            half = np.linalg.solve(np.linalg.cholesky(matrix), pull)
            if half @ half < tolerance**2 * len(z):
                return _Found(z, current, steps - 1, converged=True)
            tried, step = np.inf, z
            while not tried < current and damping < _LARGEST_DAMPING:
                step = _solved(matrix + damping * np.diag(np.diagonal(matrix)), pull)
                tried = objective(z + step)
                damping *= 0.1 if tried < current else 10
            if not tried < current:
                break
            z, current, damping = z + step, tried, max(damping, _LEAST_DAMPING)
        return _Found(z, current, steps, converged=False)


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    lower = np.linalg.cholesky(matrix)
    return np.linalg.solve(lower.T, np.linalg.solve(lower, right))


def _whitener(channel: DeclaredChannel) -> Callable[[np.ndarray], np.ndarray]:
    """``C^(-1/2)`` of columns, ``C = D^(1/2) (I + U S^2 U') D^(1/2)``."""
    scale = 1 / np.sqrt(channel.variance)[:, None]
    if channel.factor is None:
        return lambda columns: scale * columns
    left, values, _ = np.linalg.svd(scale * channel.factor, full_matrices=False)
    shrink = (1 - 1 / np.sqrt(1 + values**2))[:, None]

    def whiten(columns: np.ndarray) -> np.ndarray:
        scaled = scale * columns
        return scaled - left @ (shrink * (left.T @ scaled))

    return whiten


def _check(
    channel: DeclaredChannel,
    seen: np.ndarray,
    mean: np.ndarray,
    rows: np.ndarray,
    num_steps: int,
    tolerance: float,
) -> None:
    _checks.at_least(1, num_steps=num_steps)
    _checks.positive(tolerance=tolerance)
    sizes = {len(seen), len(channel.kept), len(channel.variance)}
    if channel.factor is not None:
        sizes.add(len(channel.factor))
    if len(sizes) != 1 or rows.shape[1:] != mean.shape:
        raise ValueError(
            f"seen, kept, variance and factor must agree in their number of entries, got "
            f"{sorted(sizes)}, and rows {rows.shape} with the mean {mean.shape}."
        )
    if not np.all(channel.variance > 0):
        raise ValueError("every noise variance must be positive; give the floor of the noise.")
