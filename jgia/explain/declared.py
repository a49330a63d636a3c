"""What each defense declares of one release: which rows are left, and the noise's covariance."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from jgia.config import DefenseConfig
from jgia.config.defense import ADAPTIVE, ON_SHARED
from jgia.config.explain import CoordinateOptions, Explained, SoteriaOptions
from jgia.defenses import (
    Defense,
    coordinate_noise,
    declared_noise_std,
    soteria,
    soteria_scores,
)
from jgia.defenses._adaptive_gradient import input_noise_std, shaped_covariance_of
from jgia.explain.sent import IN_GRADIENT, Sent, flat, gradient_under
from jgia.models import Victim
from jgia.risk import Release, UpdateRelease

PyTree = Any


class Declared(NamedTuple):
    """One defended release, and what the client declares of it.

    Attributes:
      shared: (p,) what the defense made, flat, without the noise that is there in any case.
      kept: (p,) entries that were not deleted.
      variance: (p,) of the defense's independent noise on every entry.
      least_variance: (p,) one over the Fisher information of that noise about a shift: the same
        for Gaussian noise, half of it for Laplace noise.
      input_factor: (d, m) F of noise ``J F z``, correlated by the Jacobian, or ``None``.
      input_std: () standard deviation of noise on every pixel before the release.
    """

    shared: Float[Array, " outputs"]
    kept: Bool[Array, " outputs"]
    variance: Float[Array, " outputs"]
    least_variance: Float[Array, " outputs"]
    input_factor: Float[Array, "inputs parts"] | None = None
    input_std: float | Float[Array, ""] = 0.0


@functools.partial(jax.jit, static_argnums=(1, 2))
def declare(
    key: PRNGKeyArray,
    defense: Explained | None,
    release: Release,
    params: PyTree,
    image: Array,
    labels: Array,
) -> Declared:
    """Let the library's own defense act on one release.

    Args:
      key: random key of the defense; :class:`Sent` under the same key has the same draws.
      defense: what the client does; ``None`` for nothing. Hashable, as is the next: static.
      release: what it shares otherwise.
      params: the parameters.
      image: the input.
      labels: its labels.
    """
    arguments = (params, image, labels)
    if defense is None:
        return _plain(flat(release(*arguments)))
    if isinstance(defense, SoteriaOptions):
        return _soteria(defense, release, *arguments)
    if isinstance(defense, CoordinateOptions):
        return _coordinate(key, defense, release, *arguments)
    (name,) = defense.defense
    if name in ON_SHARED:
        return _on_shared(key, name, defense, release(*arguments))
    shared, stats = gradient_under(defense, release, *arguments, key)
    plain = _plain(flat(shared))
    if name == "input_noise":
        return plain._replace(input_std=input_noise_std(defense))
    if name == "shaped":
        factor, floor = _shaped(Sent(release=release), defense, *arguments, key)
        return _noisy(plain, floor**2)._replace(input_factor=factor)
    if name in ("adaptive_scale", "dp_sgd"):
        return _noisy(plain, jnp.asarray(stats.noise_std, plain.shared.dtype) ** 2)
    return plain


def check_explained(defense: Explained | None, release: Release) -> None:
    """Raise ``ValueError`` where a defense does not act on such a release; nothing is computed."""
    if defense is None:
        return
    if isinstance(release, UpdateRelease) and release.threat_model.visible_layers is not None:
        raise ValueError(
            "a defense acts on the update of all layers; leave --visible-layers out (an "
            "explanation shows every layer on its own)."
        )
    if isinstance(defense, SoteriaOptions):
        name = "soteria"
    elif isinstance(defense, CoordinateOptions):
        return
    else:
        if len(defense.defense) != 1:
            raise ValueError(
                "explain one defense at a time, got "
                f"{' '.join(defense.defense) or 'none'}; pass a DefenseConfig with one name."
            )
        (name,) = defense.defense
        if name in ON_SHARED:
            return
    if not isinstance(release, UpdateRelease):
        raise ValueError(
            f"{name} acts inside a gradient, and the release is not an update; explain "
            f"{', '.join(ON_SHARED)} or coordinate for it, or leave --embedding out."
        )
    if release.threat_model.protocol != "fedsgd" or release.clip_norm is not None:
        raise ValueError(
            f"{name} acts inside the one gradient of FedSGD, before anything else is done to it; "
            "leave --protocol fedavg and --clip-norm out, or explain what acts on the shared "
            f"update: {', '.join(ON_SHARED)}."
        )
    if name in (*ADAPTIVE, *IN_GRADIENT):
        return
    assert isinstance(defense, SoteriaOptions)
    shapes = release.victim.param_shapes()
    if not _is_dense(shapes.get(defense.layer, {})):
        dense = [n for n, part in shapes.items() if _is_dense(part)]
        raise ValueError(
            f"soteria prunes a fully connected layer; the model has {', '.join(dense) or 'none'}, "
            f"got {defense.layer!r}: give --soteria-layer."
        )


def _is_dense(layer: Any) -> bool:
    return len(getattr(layer.get("kernel"), "shape", ())) == 2


def _plain(shared: Array) -> Declared:
    zero = jnp.zeros_like(shared)
    return Declared(shared, jnp.ones(shared.shape, bool), zero, zero)


def _noisy(plain: Declared, variance: Array, fisher_gain: float = 1.0) -> Declared:
    spread = jnp.broadcast_to(variance, plain.shared.shape)
    return plain._replace(variance=spread, least_variance=spread / fisher_gain)


def _on_shared(key: PRNGKeyArray, name: str, config: DefenseConfig, update: PyTree) -> Declared:
    chain = Defense(config=config).transformation(key)
    found: Any = chain.update(update, chain.init(update))
    shared, state = found
    plain = _plain(flat(shared))
    if name == "top_k":
        return plain._replace(kept=plain.shared != 0)
    if name in ("gaussian", "laplace"):
        std = declared_noise_std(state, jnp.zeros((), plain.shared.dtype))
        # Laplace noise of scale b has variance 2 b^2 and Fisher information 1 / b^2.
        return _noisy(plain, std**2, fisher_gain=2.0 if name == "laplace" else 1.0)
    if name in ("quantize", "quantize_stochastic"):
        # Uniform rounding errors; the mean of f (1 - f) over a uniform f is 1 / 6.
        divisor = 12 if name == "quantize" else 6
        steps = jax.tree.map(
            lambda leaf, step: jnp.full(leaf.shape, step.astype(plain.shared.dtype)),
            update,
            state[0].step,
        )
        return _noisy(plain, flat(steps) ** 2 / divisor)
    return plain


def _shaped(
    sent: Sent,
    config: DefenseConfig,
    params: PyTree,
    image: Array,
    labels: Array,
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    def fn(x: Array) -> PyTree:
        return sent(params, x, labels, key)

    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(fn, image)))
    return shaped_covariance_of(config, fn, image, size)


def _coordinate(
    key: PRNGKeyArray,
    options: CoordinateOptions,
    release: Release,
    params: PyTree,
    image: Array,
    labels: Array,
) -> Declared:
    update = release(params, image, labels)
    size = sum(leaf.size for leaf in jax.tree.leaves(update))
    made = coordinate_noise(
        key,
        lambda x: release(params, x, labels),
        image,
        energy=size * options.noise_std**2,
    )
    plain = _plain(flat(jax.tree.map(jnp.add, update, made.noise)))
    return _noisy(plain, flat(made.std) ** 2)


def _soteria(
    options: SoteriaOptions, release: Release, params: PyTree, image: Array, labels: Array
) -> Declared:
    assert isinstance(release, UpdateRelease)  # checked before
    victim, layer = release.victim, options.layer
    batch = image[None] if image.ndim == 3 else image
    scores = soteria_scores(lambda x: _inputs_of(victim, params, layer, x), batch)
    update = release(params, image, labels)
    shared, kept = soteria(update, scores, layer=layer, keep_fraction=options.keep_fraction)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), update)
    kernel = masks[layer]["kernel"]
    masks[layer]["kernel"] = jnp.broadcast_to(kept[:, None], kernel.shape)
    return _plain(flat(shared))._replace(kept=flat(masks))


def _inputs_of(victim: Victim, params: PyTree, layer: str, images: Array) -> Array:
    """What enters a fully connected layer, a row for each image."""
    found: list[Array] = []

    def interceptor(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__" and "/".join(context.module.path) == layer:
            found.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        victim.apply(params, victim.normalization.normalize(images))
    return found[0]
