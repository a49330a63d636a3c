"""The attack as one call: prior, labels and noise from an observation, then the search."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia import _checks
from jgia.attacks.gauss_newton.solve import Estimate, Settings, posterior_mode
from jgia.attacks.labels import infer_labels
from jgia.config.gauss_newton import GaussNewtonOptions
from jgia.models import smooth_activations
from jgia.observation import History, Observation, Reconstruction, Status
from jgia.replay import minibatches
from jgia.risk import Prior, UpdateRelease, prior_draws

PyTree = Any
Progress = Callable[[int, int, float], None]

SELECTED_BY = "posterior density of the images under the prior and the noise"

_LARGEST_GAUSSIAN = 3072
_LABELS_FROM = 16  # public images that label inference asks for
_ROUNDING = 4.0  # times what one rounding of the update leaves


def attack(
    key: Array,
    observation: Observation,
    *,
    public: ArrayLike | None = None,
    prior: Prior | None = None,
    options: GaussNewtonOptions | None = None,
    num_examples: int | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """The client's images that are most probable given its update, its noise and public images.

    Minimizes ``||update(x, y) - observed||^2 / (2 tau^2) + (x - mu)' Sigma^-1 (x - mu) / 2`` by
    damped Gauss-Newton (:func:`~jgia.attacks.gauss_newton.posterior_mode`): what a Bayesian
    attacker with a Gaussian prior would do, and what ``jgia risk`` predicts the error of.

    Args:
      key: PRNG key: label inference, and starts drawn from the prior.
      observation: update, parameters that were sent, model, threat model. The server may be honest
        but curious. FedSGD, or FedAvg with known steps and learning rate; any visible layers.
      public: (N, H, W, C) pixels in [0, 1] that resemble the client's and are not its own: the
        prior's mean and covariance come from them.
      prior: of one image, instead of ``public``.
      options: prior, noise and steps.
      num_examples: how many images the update covers where the threat model does not tell.
      progress: called with (steps done, steps at most, objective).

    Returns:
      All images of the start with the largest posterior density: with status ``matched`` where the
      search converged, ``not_converged`` where it ended early or beside a jump; none, with status
      ``nonfinite``, for updates that are not finite. The score is minus the objective. In
      ``stats``, ``misfit`` is the mean squared residual in noise variances: about 1 where the
      images explain the update, far above it where the search failed.

    Raises:
      ValueError: neither public images nor a prior, shapes that do not fit, or a client whose
        update the attacker cannot compute; before any step.

    Guarantees:
      The same key gives the same bits on the same device. A second client of the same model and
      batch compiles nothing.

    Edge cases:
      The noise is what the threat model declares, at least what rounding leaves. Noise that is
      declared too small makes the search follow it; give ``assumed_noise``. Images of one batch
      come in no order.
    """
    options = options or GaussNewtonOptions()
    threat, victim = observation.threat_model, observation.victim
    count = _num_examples(observation, num_examples)
    release = _release(observation, count)
    chosen = _prior(prior, public, options, victim.input_shape)
    dtype = next(iter(jax.tree.leaves(observation.params))).dtype
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(observation.update)]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        return _nothing(observation, "the update has NaN or infinite entries")
    key_labels, key_starts = jax.random.split(key)
    labels, labels_by = _labels(key_labels, observation, count, public)
    noise = max(threat.noise_std, _rounding(observation, leaves, dtype))
    if options.assumed_noise is not None:
        noise = options.assumed_noise
    chosen = chosen.astype(str(dtype))
    shape = (count, *victim.input_shape)
    settings = Settings(
        max_steps=options.newton_steps,
        tolerance=options.newton_tolerance,
        solver=options.newton_solver,
        noise_stages=options.noise_stages,
    )
    found = posterior_mode(
        _release_of(release),
        observation.update,
        chosen,
        shape=shape,
        noise=noise,
        args=(observation.params, jnp.asarray(labels, jnp.int32)),
        smoothed=_smoothed_release_of(release),
        starts=_starts(key_starts, chosen, count, options.newton_starts, shape),
        settings=settings,
        progress=None
        if progress is None
        else lambda n, loss: progress(n, options.newton_steps * options.newton_starts, loss),
    )
    return _reconstruction(observation, found, labels, labels_by, noise, options, chosen)


@functools.lru_cache(maxsize=64)
def _release_of(release: UpdateRelease) -> Callable[..., PyTree]:
    """The release with the images first; one function per release, so that it compiles once."""

    def fn(images: Array, params: PyTree, labels: Array) -> PyTree:
        return release(params, images, labels)

    return fn


@functools.lru_cache(maxsize=64)
def _smoothed_release_of(release: UpdateRelease) -> Callable[..., PyTree]:
    def fn(images: Array, width: Array, params: PyTree, labels: Array) -> PyTree:
        with smooth_activations(width):
            return release(params, images, labels)

    return fn


def _num_examples(observation: Observation, given: int | None) -> int:
    known = observation.threat_model.num_examples
    count = known if given is None else given
    if count is None:
        raise ValueError(
            "the attack searches for a fixed number of images, and the threat model does not tell "
            "how many; give num_examples=."
        )
    if known is not None and count != known:
        raise ValueError(f"num_examples={count} contradicts the threat model, which says {known}.")
    _checks.at_least(1, num_examples=count)
    return count


def _release(observation: Observation, count: int) -> UpdateRelease:
    """What the client computes, or a ValueError where the attacker does not know it."""
    threat = observation.threat_model
    if threat.protocol == "fedavg":
        if None in (threat.local_steps, threat.local_learning_rate):
            raise ValueError(
                "the posterior needs the update as a function of the images: local_steps and "
                "local_learning_rate of this FedAvg client are not known; attack by gradient "
                "matching with distance='cosine'."
            )
        if threat.num_clients > 1:
            raise ValueError(
                f"the update sums up {threat.num_clients} clients' local training, which cannot be "
                "replayed as one client's; this attack needs FedSGD there."
            )
        minibatches(count, threat)
    known = dataclasses.replace(
        threat, labels=None, num_examples=None, public_data="none", defense="none", noise_std=0.0
    )
    return UpdateRelease(victim=observation.victim, threat_model=known)


def _prior(
    prior: Prior | None,
    public: ArrayLike | None,
    options: GaussNewtonOptions,
    shape: tuple[int, int, int],
) -> Prior:
    size = math.prod(shape)
    if prior is None:
        if public is None:
            raise ValueError(
                "the attack needs public images (public=, --public) or a prior (prior=): what is "
                "probable among images it cannot know from the update."
            )
        images = np.asarray(public)
        if images.shape[1:] != shape:
            raise ValueError(
                f"public images must have shape (N, {', '.join(map(str, shape))}), got "
                f"{images.shape}; resize them, or give others."
            )
        prior = _from_public(images, options, size)
    if prior.num_inputs != size:
        raise ValueError(
            f"the prior must be of {size} pixel values, one image of shape {shape}; got "
            f"{prior.num_inputs}."
        )
    return prior


def _from_public(images: np.ndarray, options: GaussNewtonOptions, size: int) -> Prior:
    kind = options.image_prior
    if kind == "auto":
        kind = "gaussian" if size <= _LARGEST_GAUSSIAN else "low_rank"
    if kind == "gaussian":
        return Prior.from_data(images, shrinkage=options.image_prior_shrinkage)
    if kind == "isotropic":
        rows = images.reshape(len(images), -1).astype(np.float64)
        variance = float(rows.var(axis=0).mean())
        flat = Prior.isotropic(size, variance=variance)
        return dataclasses.replace(flat, mean=jnp.asarray(rows.mean(0), flat.mean.dtype))
    rank = min(options.image_prior_rank, min(len(images), size) - 1)
    return Prior.low_rank(images, rank=rank)


def _labels(
    key: Array, observation: Observation, count: int, public: ArrayLike | None
) -> tuple[np.ndarray, str]:
    given = observation.threat_model.labels
    if given is not None:
        if len(given) != count or max(given) >= observation.victim.num_classes:
            raise ValueError(
                f"the threat model must give {count} labels below "
                f"{observation.victim.num_classes}, got {given}."
            )
        return np.asarray(given), "given"
    pool = None if public is None or len(np.asarray(public)) < _LABELS_FROM else public
    found = infer_labels(key, observation, num_examples=count, public=pool)
    return found.labels, found.method


def _rounding(observation: Observation, update: Sequence[np.ndarray], dtype: Any) -> float:
    """Standard deviation of what rounding leaves on an entry of the update."""
    leaves = [*update]
    if observation.threat_model.protocol == "fedavg":  # a difference of parameters
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(observation.params)]
    square = sum(float(np.sum(leaf**2)) for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return max(_ROUNDING * float(jnp.finfo(dtype).eps) * math.sqrt(square), 1e-12)


def _starts(
    key: Array, prior: Prior, count: int, starts: int, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The mean and draws; draws alone for several images, which the mean would keep alike."""
    if count == 1 and starts == 1:
        return None
    draws = np.asarray(prior_draws(key, prior, starts * count)).reshape(starts, *shape)
    mean = np.asarray(prior.mean).reshape(shape[1:])
    draws = mean + (draws - mean) / 2
    if count == 1:
        draws[0] = mean
    return draws


def _reconstruction(
    observation: Observation,
    found: Estimate,
    labels: np.ndarray,
    labels_by: str,
    noise: float,
    options: GaussNewtonOptions,
    prior: Prior,
) -> Reconstruction:
    images = np.clip(found.images, 0, 1)
    if not (math.isfinite(found.objective) and np.isfinite(images).all()):
        return _nothing(observation, "the release or its derivatives left the finite numbers")
    status = Status.MATCHED if found.end == "converged" else Status.NOT_CONVERGED
    steps = np.arange(len(found.losses))
    return Reconstruction(
        images=images,
        scores=np.full(len(images), -found.objective),
        statuses=(status,) * len(images),
        selected_by=SELECTED_BY,
        labels=np.asarray(labels),
        candidates=tuple(
            {"status": str(status), "label": int(label), "objective": found.objective}
            for label in labels
        ),
        stats={
            "method": "gauss_newton",
            "options": dataclasses.asdict(options),
            "labels_by": labels_by,
            "noise_std": noise,
            "prior_pixel_std": math.sqrt(float(prior.variance)),
            "misfit": found.misfit,
            "end": found.end,
            "step_left": found.step_left if math.isfinite(found.step_left) else None,
            "steps": found.steps,
            "start": found.start,
            "start_objectives": [v if math.isfinite(v) else None for v in found.start_objectives],
            "curve_steps": steps.tolist(),
            "curve_losses": [float(v) for v in found.losses],
        },
        history=History(
            steps=steps,
            losses=found.losses,
            frame_steps=np.zeros(0, int),
            frames=np.zeros((0, *images.shape), images.dtype),
        ),
    )


def _nothing(observation: Observation, reason: str) -> Reconstruction:
    """No image, and why."""
    return Reconstruction(
        images=np.zeros((0, *observation.victim.input_shape), np.float32),
        scores=np.zeros(0),
        statuses=(),
        selected_by=SELECTED_BY,
        candidates=({"status": str(Status.NONFINITE), "reason": reason},),
        stats={"method": "gauss_newton", "reason": reason},
    )
