"""Solve for one step: conjugate gradients on the host, preconditioned by a Gram matrix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jgia.attacks.gauss_newton.channel import Channel, gram, product

_DENSE = 4096


class Linear:
    """``(I + J'J / scale^2 + damping I) d = b`` at one point after another.

    The Gram matrix of an earlier point preconditions the next ones; it is made anew once a solve
    takes more products than a new one costs.
    """

    def __init__(self, channel: Channel, settings: Any) -> None:
        self._channel, self._settings = channel, settings
        size, solver = channel.coordinates.size, settings.solver
        self._dense = solver == "dense" or (solver == "auto" and size <= _DENSE)
        self._dtype = channel.coordinates.prior.mean.dtype
        self._gram: np.ndarray | None = None
        self._at: tuple[Any, ...] = ()
        self.num_grams = self.num_products = 0

    def solve(
        self, z: np.ndarray, b: np.ndarray, *, width: float, scale: float, damping: float
    ) -> np.ndarray:
        """The step from ``z``, in float64."""
        channel = self._channel.smoothed(width)
        if not self._dense:
            return self._iterate(channel, z, b, scale, damping, None)[0]
        if self._gram is None:
            self._renew(channel, z, width)
        fresh = self._at == (z.tobytes(), width)
        patience = self._settings.inner_steps if fresh else max(4, z.size // 32)
        factor = self._factor(scale, damping)
        move, solved = self._iterate(channel, z, b, scale, damping, factor, steps=patience)
        if not solved and not fresh:  # by now a new Gram matrix costs less
            self._renew(channel, z, width)
            factor = self._factor(scale, damping)
            move, _ = self._iterate(channel, z, b, scale, damping, factor, move)
        return move

    def _renew(self, channel: Channel, z: np.ndarray, width: float) -> None:
        settings = self._settings
        made = gram(
            channel,
            jnp.asarray(z, self._dtype),
            chunk_size=settings.chunk_size,
            max_entries=settings.max_entries,
        )
        self._gram, self._at = np.asarray(made, np.float64), (z.tobytes(), width)
        self.num_grams += 1

    def _factor(self, scale: float, damping: float) -> Any:
        assert self._gram is not None
        matrix = self._gram / scale**2
        # Rounding leaves negative eigenvalues of about this size in float32.
        floor = float(np.finfo(self._dtype).eps) * float(np.abs(matrix).max())
        matrix[np.diag_indices_from(matrix)] += 1 + damping + floor
        try:
            return scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            diagonal = np.maximum(np.diagonal(matrix), 1.0)
            return np.sqrt(diagonal)

    def _iterate(
        self,
        channel: Channel,
        z: np.ndarray,
        b: np.ndarray,
        scale: float,
        damping: float,
        factor: Any,
        start: np.ndarray | None = None,
        steps: int | None = None,
    ) -> tuple[np.ndarray, bool]:
        """Preconditioned conjugate gradients; whether the residual fell enough."""
        point = jnp.asarray(z, self._dtype)

        def times(v: np.ndarray) -> np.ndarray:
            self.num_products += 1
            pulled = product(channel, point, jnp.asarray(v, self._dtype))
            return np.asarray(pulled, np.float64) / scale**2 + (1 + damping) * v

        def precondition(v: np.ndarray) -> np.ndarray:
            if factor is None:
                return v / (1 + damping)
            if isinstance(factor, np.ndarray):
                return v / factor**2
            return scipy.linalg.cho_solve(factor, v, check_finite=False)

        x = np.zeros_like(b) if start is None else start
        r = b.copy() if start is None else b - times(start)
        y = precondition(r)
        goal = self._settings.forcing**2 * float(b @ precondition(b))
        p, rho = y, float(r @ y)
        for _ in range(steps or self._settings.inner_steps):
            if not rho > goal:
                break
            q = times(p)
            curvature = float(p @ q)
            if not curvature > 0:
                break
            x = x + rho / curvature * p
            r = r - rho / curvature * q
            y = precondition(r)
            before, rho = rho, float(r @ y)
            p = y + rho / before * p
        return x, rho <= goal
