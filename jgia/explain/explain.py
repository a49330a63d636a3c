"""A defense as a transformation of (J, C): what that predicts, and what an attack comes to."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jgia import _checks
from jgia.config import DefenseConfig
from jgia.config.explain import Explained
from jgia.explain.attack import DeclaredChannel, MostProbable, most_probable
from jgia.explain.declared import Declared, check_explained, declare
from jgia.explain.sent import SMOOTH, Sent, linearization_ratio, linearized, value_of
from jgia.explain.words import EFFECTS, Effect, name_of, options_of
from jgia.risk import Channel, Posterior, Prior, Release, channel_posterior, error_at, keep_rows
from jgia.risk.jacobian import CHUNK, Sizes, layer_names, sizes, slices_of

PyTree = Any

LARGEST_INPUTS = 1024
"""Pixels of an input up to which its Jacobian and their covariance are held as matrices."""


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
      converged: (draws,) whether it did.
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
    case = _case(
        defense, release, params, image, labels, prior, noise_std, chunk_size, memory_bytes
    )
    key_draws, key_ratio = jax.random.split(key)
    draws = _draws(key_draws, num_draws)
    prediction = _predicted(case, [jax.random.clone(one) for one, _ in draws], key_ratio)
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

    Args:
      key: as there; the same key predicts the same.
      defense: as there.
      release: as there.
      params: as there.
      image: as there.
      labels: as there.
      prior: as there.
      noise_std: as there.
      num_draws: over which dropout and augmentation are averaged.
      chunk_size: as there.
      memory_bytes: as there.

    Raises:
      ValueError: as there.
    """
    _checks.at_least(1, num_draws=num_draws)
    case = _case(
        defense, release, params, image, labels, prior, noise_std, chunk_size, memory_bytes
    )
    key_draws, key_ratio = jax.random.split(key)
    keys = [one for one, _ in _draws(key_draws, num_draws)]
    prediction = _predicted(case, keys, key_ratio)
    return Explanation(*prediction.public, errors=np.zeros(0), converged=np.zeros(0, bool))


def dense_bytes(num_outputs: int, num_inputs: int) -> int:
    """About what an explanation holds: the Jacobian in both precisions, factored, and covariances.

    >>> dense_bytes(10_000, 192) // 2**20
    113
    """
    return 56 * num_outputs * num_inputs + 64 * num_inputs**2


def check_dense(num_outputs: int, num_inputs: int, *, memory_bytes: int) -> None:
    """Raise ``ValueError`` where the matrices of an explanation are too large."""
    needed = dense_bytes(num_outputs, num_inputs)
    if num_inputs > LARGEST_INPUTS or needed > memory_bytes:
        raise ValueError(
            f"an explanation holds the Jacobian of {num_outputs:,} shared numbers by "
            f"{num_inputs:,} pixels, about {needed / 2**30:.2f} GiB; it takes at most "
            f"{LARGEST_INPUTS:,} pixels and {memory_bytes / 2**30:.2f} GiB: lower the image size, "
            "or the width of the model."
        )


class _Case(NamedTuple):
    """One defense on one input, checked."""

    name: str
    defense: Explained | None
    sent: Sent
    params: PyTree
    image: Array
    labels: Array
    prior: Prior
    noise_std: float
    chunk_size: int
    shape: Sizes

    def declared(self, key: PRNGKeyArray) -> Declared:
        inputs = (self.params, self.image, self.labels)
        made = declare(jax.random.clone(key), self.defense, self.sent.release, *inputs)
        return made._replace(input_std=float(made.input_std))

    def linear(self, image: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        rest = (self.params, image, self.labels, jax.random.clone(key))
        return linearized(self.sent, self.chunk_size, *rest)


def _case(
    defense: Explained | None,
    release: Release,
    params: PyTree,
    image: ArrayLike,
    labels: ArrayLike,
    prior: Prior,
    noise_std: float,
    chunk_size: int,
    memory_bytes: int,
) -> _Case:
    _checks.positive(noise_std=noise_std)
    pixels, classes = jnp.asarray(image), jnp.asarray(labels)
    check_explained(defense, release)
    shape = sizes(lambda x: release(params, x, classes), pixels)
    whole = _whole_prior(prior, pixels)
    check_dense(shape.num_outputs, shape.num_inputs, memory_bytes=memory_bytes)
    name = name_of(defense)
    config = defense if isinstance(defense, DefenseConfig) and name in SMOOTH else DefenseConfig()
    sent = Sent(release=release, config=config)
    return _Case(name, defense, sent, params, pixels, classes, whole, noise_std, chunk_size, shape)


def _draws(key: PRNGKeyArray, count: int) -> list[tuple[PRNGKeyArray, PRNGKeyArray]]:
    """For each draw the keys of the defense and of the noise that is there in any case."""
    pairs = [jax.random.split(draw) for draw in jax.random.split(key, count)]
    return [(pair[0], pair[1]) for pair in pairs]


class _Predicted(NamedTuple):
    public: tuple[Any, ...]
    factor: Array | None


def _predicted(case: _Case, keys: list[PRNGKeyArray], key_ratio: PRNGKeyArray) -> _Predicted:
    """The figures of one input; means over the draws where these change the Jacobian."""
    changing = case.name in ("augment", "dropout")
    made = [case.declared(key) for key in (keys if changing else keys[:1])]
    parts = [
        _predict(case, case.linear(case.image, key)[1], one)
        for key, one in zip(keys, made, strict=False)
    ]
    ratio = linearization_ratio(
        case.sent,
        key_ratio,
        case.params,
        case.image,
        case.labels,
        jax.random.clone(keys[0]),
        parts[0].posterior,
    )

    def mean(name: str) -> float:
        return float(np.mean([getattr(part, name) for part in parts]))

    layers = {
        layer: float(np.mean([part.layer_risk[layer] for part in parts]))
        for layer in parts[0].layer_risk
    }
    figures = (mean("invloss"), mean("invloss_least"), mean("expected"), float(ratio), layers)
    kept = float(np.mean([np.asarray(one.kept) for one in made]))
    named = (case.name, options_of(case.defense), EFFECTS[case.name], float(case.prior.energy))
    return _Predicted((*named, *figures, kept, mean("noise_std")), parts[0].factor)


class _Prediction(NamedTuple):
    invloss: float
    invloss_least: float
    expected: float
    layer_risk: dict[str, float]
    noise_std: float
    posterior: Posterior
    factor: Array | None


def _predict(case: _Case, jacobian: Array, made: Declared) -> _Prediction:
    prior, x = case.prior, case.image.reshape(-1)
    factor = None
    if made.input_factor is not None:
        factor = jacobian @ made.input_factor.astype(jacobian.dtype)
    elif made.input_std:
        factor = made.input_std * jacobian
    tau2 = case.noise_std**2
    channel = keep_rows(Channel(jacobian, tau2 + made.variance, factor), made.kept)
    least = channel._replace(variance=tau2 + made.least_variance)
    invloss, posterior, expected = _errors(channel, prior, x)
    same = bool((made.least_variance == made.variance).all())
    energy = float(prior.energy)
    variance = channel.variance
    if channel.factor is not None:
        variance = variance + jnp.sum(channel.factor**2, axis=1)
    if made.input_std:  # a nonlinear release is evaluated at all the images that the noise makes
        spread = made.input_std * jnp.eye(x.size, dtype=jacobian.dtype)
        posterior = posterior._replace(root=jnp.concatenate([posterior.root, spread]))
    return _Prediction(
        invloss=float(invloss),
        invloss_least=float(invloss if same else _errors(least, prior, x)[0]),
        expected=float(expected),
        layer_risk={
            layer: max(0.0, 1 - float(_layer_error(channel, rows, prior)) / energy)
            for layer, rows in _layer_rows(case.shape).items()
        },
        noise_std=float(jnp.sqrt(jnp.mean(variance))),
        posterior=posterior,
        factor=channel.factor,
    )


@jax.jit
def _errors(channel: Channel, prior: Prior, x: Array) -> tuple[Array, Posterior, Array]:
    posterior = channel_posterior(channel, prior)
    return posterior.error, posterior, error_at(channel, prior, x)


@functools.partial(jax.jit, static_argnums=1)
def _layer_error(channel: Channel, rows: tuple[tuple[int, int], ...], prior: Prior) -> Array:
    parts = [slice(start, stop) for start, stop in rows]

    def of(array: Array) -> Array:
        return jnp.concatenate([array[part] for part in parts])

    factor = None if channel.factor is None else of(channel.factor)
    return channel_posterior(
        Channel(of(channel.jacobian), of(channel.variance), factor), prior
    ).error


def _layer_rows(shape: Sizes) -> dict[str, tuple[tuple[int, int], ...]]:
    parts = slices_of(shape.leaves)
    return {
        layer: tuple((parts[index].start, parts[index].stop) for index in leaves)
        for layer, leaves in layer_names(shape.names).items()
    }


def _attack(
    case: _Case,
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


def _told(case: _Case, key: PRNGKeyArray, made: Declared, factor: Array | None) -> DeclaredChannel:
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


def _whole_prior(prior: Prior, pixels: Array) -> Prior:
    if pixels.size % prior.num_inputs:
        raise ValueError(
            f"the prior describes {prior.num_inputs} pixels, the input has {pixels.size}; make the "
            "prior from images of the same shape."
        )
    if prior.rank < prior.num_inputs:
        raise ValueError(
            f"an explanation needs a prior of full rank, got {prior.rank} of {prior.num_inputs}: "
            "the rest of the image would act as noise that no channel declares; use --prior "
            "gaussian or isotropic, with a smaller image."
        )
    whole = (
        prior if pixels.size == prior.num_inputs else prior.repeat(pixels.size // prior.num_inputs)
    )
    return whole.astype(pixels.dtype.name)


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array, "float64")
