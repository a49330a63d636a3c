"""What a defense's pair (J, C) predicts for one input."""

from __future__ import annotations

import functools
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
from jgia.explain.declared import Declared, check_explained, declare
from jgia.explain.sent import SMOOTH, Sent, linearization_ratio, linearized
from jgia.explain.words import EFFECTS, name_of, options_of
from jgia.risk import Channel, Posterior, Prior, Release, channel_posterior, error_at, keep_rows
from jgia.risk.jacobian import Sizes, layer_names, sizes, slices_of

PyTree = Any

LARGEST_INPUTS = 1024
"""Pixels of an input up to which its Jacobian and their covariance are held as matrices."""


def dense_bytes(num_outputs: int, num_inputs: int) -> int:
    """About what an explanation holds: the Jacobian in both precisions, factored, and covariances.

    >>> dense_bytes(10_000, 192) // 2**20
    104
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


class Case(NamedTuple):
    """One defense on one input, checked by :func:`make_case`."""

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
        """What the defense makes and declares under a key."""
        inputs = (self.params, self.image, self.labels)
        made = declare(jax.random.clone(key), self.defense, self.sent.release, *inputs)
        return made._replace(input_std=float(made.input_std))

    def linear(self, image: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        """What is sent of an image without noise, and its Jacobian."""
        rest = (self.params, image, self.labels, jax.random.clone(key))
        return linearized(self.sent, self.chunk_size, *rest)


def make_case(
    defense: Explained | None,
    release: Release,
    params: PyTree,
    image: ArrayLike,
    labels: ArrayLike,
    prior: Prior,
    noise_std: float,
    chunk_size: int,
    memory_bytes: int,
) -> Case:
    """Refuse what does not fit, before anything is computed."""
    _checks.positive(noise_std=noise_std)
    pixels, classes = jnp.asarray(image), jnp.asarray(labels)
    check_explained(defense, release)
    shape = sizes(lambda x: release(params, x, classes), pixels)
    whole = _whole_prior(prior, pixels)
    check_dense(shape.num_outputs, shape.num_inputs, memory_bytes=memory_bytes)
    name = name_of(defense)
    config = defense if isinstance(defense, DefenseConfig) and name in SMOOTH else DefenseConfig()
    sent = Sent(release=release, config=config)
    return Case(name, defense, sent, params, pixels, classes, whole, noise_std, chunk_size, shape)


class Predicted(NamedTuple):
    """The figures of an :class:`jgia.explain.Explanation` in their order, and the noise's factor.

    Attributes:
      public: the fields before ``errors``.
      factor: (p, m) of correlated noise in the release, or ``None``.
    """

    public: tuple[Any, ...]
    factor: Array | None


def predicted(case: Case, keys: list[PRNGKeyArray], key_ratio: PRNGKeyArray) -> Predicted:
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
    return Predicted((*named, *figures, kept, mean("noise_std")), parts[0].factor)


class _Prediction(NamedTuple):
    invloss: float
    invloss_least: float
    expected: float
    layer_risk: dict[str, float]
    noise_std: float
    posterior: Posterior
    factor: Array | None


def _predict(case: Case, jacobian: Array, made: Declared) -> _Prediction:
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
