"""A defense as a transformation of (J, C): what that predicts, and what an attack comes to."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jgia import _checks
from jgia.config.explain import Explained
from jgia.explain.attack import DeclaredChannel, MostProbable, most_probable
from jgia.explain.declared import Declared
from jgia.explain.predict import Case, make_case, predicted
from jgia.explain.sent import value_of
from jgia.explain.words import Effect
from jgia.risk import Prior, Release
from jgia.risk.jacobian import CHUNK

PyTree = Any


class Explanation(NamedTuple):
    """One defense on one input. Errors are squared, summed over pixels.

    Attributes:
      name: of the defense.
      options: name and knobs in one line.
      effect: what it does to J and C, in words.
      energy: E0, the error of who only knows the prior.
      invloss: predicted from the transformed J and C: InvLoss for Gaussian noise, and for other
        noise of that covariance the error of the best linear attack; an average over the prior.
      invloss_least: the same with the Fisher information of the noise in place of its variance:
        below it comes no attack on the linear release. Differs for Laplace noise.
      expected: predicted for the attack at this image, averaged over noise alone.
      linearization_ratio: of what is sent, over what an attacker cannot tell apart.
      layer_risk: the risk of every layer alone.
      kept_share: share of the entries that are shared at all.
      noise_std: root mean square over the entries of the noise's standard deviation, with the
        noise that is there in any case.
      errors: (draws,) of the attack (:func:`jgia.explain.most_probable`) on what the defense
        really made.
      converged: (draws,) whether it found an image that the noise explains.
    """

    name: str
    options: str
    effect: Effect
    energy: float
    invloss: float
    invloss_least: float
    expected: float
    linearization_ratio: float
    layer_risk: dict[str, float]
    kept_share: float
    noise_std: float
    errors: np.ndarray
    converged: np.ndarray

    @property
    def risk(self) -> float:
        """``1 - invloss / energy``, in [0, 1]."""
        return min(1.0, max(0.0, 1 - self.invloss / self.energy))

    @property
    def realized(self) -> float:
        """Mean error of the attack."""
        return float(self.errors.mean())

    @property
    def standard_error(self) -> float:
        """Of :attr:`realized`, over the draws of this input."""
        return float(self.errors.std(ddof=1) / math.sqrt(len(self.errors)))


def explain_defense(
    key: PRNGKeyArray,
    defense: Explained | None,
    release: Release,
    params: PyTree,
    image: ArrayLike,
    labels: ArrayLike,
    *,
    prior: Prior,
    noise_std: float,
    num_draws: int = 4,
    num_steps: int = 60,
    chunk_size: int = CHUNK,
    memory_bytes: int = 2**31,
) -> Explanation:
    r"""What a defense does to the Jacobian and the noise of a release, predicted and realized.

    The release ``o = G(x) + n`` with ``n ~ N(0, tau^2 I)`` becomes another pair ``(J, C)``. The
    prediction is ``tr (Sigma^-1 + J' C^-1 J)^-1`` of that pair. Beside it stands the error of an
    attack that knows the pair: damped Gauss-Newton on the log posterior from the prior's mean, on
    updates that the library's own defense has made.

    Args:
      key: random key of the defense's draws, the noise and the diagnostics.
      defense: a :class:`jgia.config.DefenseConfig` with one name, ``SoteriaOptions``,
        ``CoordinateOptions``, or ``None`` for the release as it is.
      release: :class:`jgia.risk.UpdateRelease` (defenses inside the gradient need FedSGD, without
        clipping), :class:`jgia.risk.EmbeddingRelease` or any release (those on what is shared).
      params: the parameters; float32 or float64, as the image.
      image: (H, W, C) in [0, 1], or (B, H, W, C) behind one update.
      labels: () or (B,) integers.
      prior: of one image, of full rank.
      noise_std: tau > 0, on every shared entry, on top of the defense's.
      num_draws: attacked releases, at least 2.
      num_steps: of the attack, at most.
      chunk_size: directions at a time.
      memory_bytes: that the dense matrices may take.

    Returns:
      An :class:`Explanation`.

    Raises:
      ValueError: the defense does not fit the release, the prior is of low rank, or the matrices
        do not fit (says how much they need); before anything expensive runs.

    Guarantees:
      The attack sees what was shared, the declared J and C and the prior. The image enters its
      score only, and, where a covariance is declared that depends on it, that covariance.

    Edge cases:
      ``expected`` is right for a linear release; realized errors above it come from curvature or
      from a search that ended elsewhere (``converged``), those below it from noise that is not
      Gaussian. One starting point: more might find more.

    References:
      Derived here (docs/risk.md). Clipping: the derivative of Abadi et al. (2016), algorithm 1.
    """
    _checks.at_least(2, num_draws=num_draws)
    case = make_case(
        defense, release, params, image, labels, prior, noise_std, chunk_size, memory_bytes
    )
    key_draws, key_ratio = jax.random.split(key)
    draws = _draws(key_draws, num_draws)
    prediction = predicted(case, [jax.random.clone(one) for one, _ in draws], key_ratio)
    guesses = [_attack(case, *draw, prediction.factor, num_steps) for draw in draws]
    truth = _wide(case.image).reshape(-1)
    return Explanation(
        *prediction.public,
        errors=np.array([np.sum((guess.image - truth) ** 2) for guess in guesses]),
        converged=np.array([guess.converged for guess in guesses]),
    )


def predict_defense(
    key: PRNGKeyArray,
    defense: Explained | None,
    release: Release,
    params: PyTree,
    image: ArrayLike,
    labels: ArrayLike,
    *,
    prior: Prior,
    noise_std: float,
    num_draws: int = 4,
    chunk_size: int = CHUNK,
    memory_bytes: int = 2**31,
) -> Explanation:
    """:func:`explain_defense` without the attack: the same figures, ``errors`` empty.

    Takes the same arguments; ``num_draws`` are those over which dropout and augmentation are
    averaged. The same key predicts the same.

    Raises:
      ValueError: as there.
    """
    _checks.at_least(1, num_draws=num_draws)
    case = make_case(
        defense, release, params, image, labels, prior, noise_std, chunk_size, memory_bytes
    )
    key_draws, key_ratio = jax.random.split(key)
    keys = [one for one, _ in _draws(key_draws, num_draws)]
    prediction = predicted(case, keys, key_ratio)
    return Explanation(*prediction.public, errors=np.zeros(0), converged=np.zeros(0, bool))


def _draws(key: PRNGKeyArray, count: int) -> list[tuple[PRNGKeyArray, PRNGKeyArray]]:
    """For each draw the keys of the defense and of the noise that is there in any case."""
    pairs = [jax.random.split(draw) for draw in jax.random.split(key, count)]
    return [(pair[0], pair[1]) for pair in pairs]


def _attack(
    case: Case,
    key: PRNGKeyArray,
    key_noise: PRNGKeyArray,
    factor: Array | None,
    num_steps: int,
) -> MostProbable:
    """The most probable image; under noise on the input, by way of the most probable noisy one."""
    made = case.declared(key)
    shared = made.shared
    noise = case.noise_std * jax.random.normal(key_noise, shared.shape, shared.dtype)
    seen = _wide(shared + noise)
    told = _told(case, key, made, factor)
    mean, rows = _wide(case.prior.mean), _wide(case.prior.rows())
    if not made.input_std:
        return most_probable(told, seen, mean, rows, num_steps=num_steps)
    covariance = rows.T @ rows
    noisy = covariance + made.input_std**2 * np.eye(len(mean))
    guess = most_probable(told, seen, mean, np.linalg.cholesky(noisy).T, num_steps=num_steps)
    image = mean + covariance @ np.linalg.solve(noisy, guess.image - mean)
    return guess._replace(image=image)


def _told(case: Case, key: PRNGKeyArray, made: Declared, factor: Array | None) -> DeclaredChannel:
    """What the attacker is told; of the image's array only shape and dtype are used."""
    shape, dtype = case.image.shape, case.image.dtype

    def linear(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, jacobian = case.linear(jnp.asarray(x.reshape(shape), dtype), key)
        return _wide(value), _wide(jacobian)

    def value(x: np.ndarray) -> np.ndarray:
        image = jnp.asarray(x.reshape(shape), dtype)
        rest = (case.params, image, case.labels, jax.random.clone(key))
        return _wide(value_of(case.sent, *rest))

    return DeclaredChannel(
        value=value,
        linear=linear,
        kept=np.asarray(made.kept),
        variance=_wide(made.variance) + case.noise_std**2,
        factor=None if made.input_factor is None else _wide(factor),
    )


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array, "float64")
