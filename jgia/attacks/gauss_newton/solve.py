"""The most probable image under a Gaussian prior and known noise, by damped Gauss-Newton."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jgia import _checks
from jgia.attacks.gauss_newton.channel import Channel, Whiten
from jgia.attacks.gauss_newton.coordinates import Coordinates
from jgia.attacks.gauss_newton.search import End, Search
from jgia.risk import Prior

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the search goes. Nothing here changes what is searched.

    Attributes:
      max_steps: in all, of one start.
      tolerance: root mean square length of the next step, in posterior standard deviations, below
        which the search ends.
      solver: ``"dense"``: conjugate gradients preconditioned by a Gram matrix, which is made anew
        where it no longer helps; ``"cg"``: without one; ``"auto"``: dense for up to 4,096
        unknowns.
      noise_stages: begin with the noise that explains the start's residual, and take it away.
      inner_steps: products with ``J' J`` in one step, at most.
      forcing: relative residual at which a step counts as solved.
      enough: mean squared residual, in noise variances, at which no further start is tried.
      chunk_size: directions at a time.
      max_entries: of a Jacobian in memory.
    """

    max_steps: int = 60
    tolerance: float = 1e-3
    solver: Literal["auto", "dense", "cg"] = "auto"
    noise_stages: bool = True
    inner_steps: int = 100
    forcing: float = 1e-2
    enough: float = 1.1
    chunk_size: int = 64
    max_entries: int = 2**27

    def __post_init__(self) -> None:
        _checks.one_of(("auto", "dense", "cg"), solver=self.solver)
        _checks.at_least(
            1,
            max_steps=self.max_steps,
            inner_steps=self.inner_steps,
            chunk_size=self.chunk_size,
            max_entries=self.max_entries,
        )
        _checks.positive(tolerance=self.tolerance)
        _checks.non_negative(enough=self.enough)
        _checks.fraction(forcing=self.forcing)


class Estimate(NamedTuple):
    """The best point of all starts.

    Attributes:
      images: in the input's shape; not clipped.
      objective: half the squared residual in noise standard deviations, plus half the squared
        length in prior standard deviations: minus the log posterior density, up to a constant.
      misfit: mean squared residual in noise variances: about 1 where the noise explains it.
      step_left: length of the step that would come next, root mean square over directions in
        posterior standard deviations.
      end: why the search ended.
      steps: of the start that won.
      losses: (steps + 1,) the objective along it (of the final noise).
      start: which start won.
      start_objectives: of all starts that were tried.
    """

    images: np.ndarray
    objective: float
    misfit: float
    step_left: float
    end: End
    steps: int
    losses: np.ndarray
    start: int
    start_objectives: tuple[float, ...]


def posterior_mode(
    fn: Callable[..., PyTree],
    observed: PyTree,
    prior: Prior,
    *,
    shape: tuple[int, ...],
    noise: float | Whiten,
    args: tuple[Any, ...] = (),
    smoothed: Callable[..., PyTree] | None = None,
    starts: ArrayLike | None = None,
    settings: Settings | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Estimate:
    r"""Minimize ``||W (o - G(x))||^2 / 2 + (x - mu)' Sigma^-1 (x - mu) / 2``.

    In the coordinates ``x = mu + L' z`` of the prior: ``F(z) = ||r(z)||^2 / 2 + ||z||^2 / 2``. A
    step solves ``(I + J'J + lam I) d = J' r - z`` with the Jacobian of the whitened release, tries
    shorter ones, and raises the damping lam where none is downhill.

    Args:
      fn: the release: ``fn(x, *args)`` to a pytree of floating-point arrays. It is a static
        argument of what is compiled: a function (or frozen dataclass) that lives on compiles once.
      observed: a pytree like ``fn``'s.
      prior: of one image, in its own units. A batch has independent images of it.
      shape: of x: that of one image, or (B, ...) of a batch.
      noise: standard deviation of independent noise on every entry; or, for noise of covariance C,
        the linear map ``C^(-1/2)`` from and to such a pytree.
      args: arrays that ``fn`` takes beside x.
      smoothed: ``smoothed(x, width, *args)``: the release with its kinks smoothed, by
        :func:`jgia.models.smooth_activations` for example, and exact at width 0. The search then
        begins with smooth kinks and sharpens them.
      starts: (S, *shape) images to start from; the prior's mean when left out.
      settings: how.
      progress: called after every step with (steps in all, objective).

    Returns:
      The start with the smallest objective: the truth plays no part.

    Raises:
      ValueError: noise that is not positive, shapes that do not fit, before any compute.

    Guarantees:
      The objective of the final noise never rises within the last stage. For a linear release the
      result is the posterior mean to rounding. Linear algebra runs on the host: no LAPACK call
      inside a compiled loop.

    Edge cases:
      A release with jumps (the gradient of a network with ReLU has them) has local minima beside
      every jump: ``end`` is ``"stalled"`` there.

    References:
      Nocedal and Wright, "Numerical Optimization" (2006), sections 10.3 and 7.1 (damped and
      inexact Gauss-Newton).
    """
    settings = settings or Settings()
    coordinates = Coordinates.of(prior, shape)
    channel = _channel(fn, observed, coordinates, noise, args)
    if smoothed is not None:
        channel = dataclasses.replace(channel, fn=smoothed, width=jnp.zeros((), prior.mean.dtype))
    first = _start_points(coordinates, starts)
    found = []
    for i, z in enumerate(first):
        tell = functools.partial(_tell, progress, i, settings)
        found.append(Search(channel, z, settings, tell).run())
        if found[-1].misfit <= settings.enough * _num_outputs(channel):
            break
    objectives = tuple(each.objective for each in found)
    best = int(np.argmin([v if math.isfinite(v) else math.inf for v in objectives]))
    z, won = jnp.asarray(found[best].z, prior.mean.dtype), found[best]
    return Estimate(
        images=np.asarray(coordinates.images(z)),
        objective=won.objective,
        misfit=won.misfit / _num_outputs(channel),
        step_left=won.step_left,
        end=won.end,
        steps=len(won.losses) - 1,
        losses=np.asarray(won.losses),
        start=best,
        start_objectives=objectives,
    )


def _tell(
    progress: Callable[[int, float], None] | None, start: int, s: Settings, n: int, loss: float
) -> None:
    if progress is not None:
        progress(start * s.max_steps + n, loss)


def _num_outputs(channel: Channel) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(channel.observed))


def _channel(
    fn: Callable[..., PyTree],
    observed: PyTree,
    coordinates: Coordinates,
    noise: float | Whiten,
    args: tuple[Any, ...],
) -> Channel:
    dtype = coordinates.prior.mean.dtype
    whiten = noise if callable(noise) else None
    if not callable(noise):
        _checks.positive(noise=float(noise))
    target = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), observed)
    like = jax.eval_shape(fn, jax.ShapeDtypeStruct(coordinates.shape, dtype), *args)
    shapes = [jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (like, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the observation must have the structure and shapes of the release, {shapes[0]}, got "
            f"{shapes[1]}."
        )
    return Channel(
        fn=fn,
        args=args,
        observed=target if whiten is None else whiten(target),
        noise_std=jnp.asarray(1.0 if callable(noise) else noise, dtype),
        coordinates=coordinates,
        whiten=whiten,
    )


def _start_points(coordinates: Coordinates, starts: ArrayLike | None) -> list[np.ndarray]:
    """Whitened coordinates of the starts."""
    if starts is None:
        return [np.zeros(coordinates.size)]
    images = np.asarray(starts, np.float64)
    if images.ndim != len(coordinates.shape) + 1 or images.shape[1:] != coordinates.shape:
        raise ValueError(
            f"starts must have shape (S, {', '.join(map(str, coordinates.shape))}), got "
            f"{images.shape}."
        )
    prior, count = coordinates.prior, coordinates.count
    centered = images.reshape(len(images) * count, -1) - np.asarray(prior.mean, np.float64)
    if prior.factor is None:
        rows = centered / math.sqrt(float(prior.variance))
    elif coordinates.whole:
        factor = np.asarray(prior.factor, np.float64)
        lengths = np.linalg.norm(factor, axis=1)
        basis, rest = factor / lengths[:, None], math.sqrt(float(prior.tail_variance))
        inside = centered @ basis.T
        rows = centered / rest + (inside * (1 / lengths - 1 / rest)) @ basis
    else:
        rows = np.linalg.lstsq(np.asarray(prior.factor, np.float64).T, centered.T, rcond=None)[0].T
    return list(rows.reshape(len(images), -1))
