"""All that one client does against leakage, as one object."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from jgia.config import DefenseConfig
from jgia.config.defense import ADAPTIVE, ON_SHARED
from jgia.defenses._adaptive_gradient import AdaptiveStats, adaptive_gradient, check_adaptive
from jgia.defenses._noise import NoiseState
from jgia.defenses._tree import wide_dtype
from jgia.defenses.augmentation import augment
from jgia.defenses.clipping import ClipState, clip_update
from jgia.defenses.dp_sgd import DpSgdStats, dp_sgd_gradient
from jgia.defenses.dropout import DropoutLoss
from jgia.defenses.gaussian import gaussian_noise
from jgia.defenses.laplace import laplace_noise
from jgia.defenses.quantization import quantize_nearest, quantize_stochastic
from jgia.defenses.shaped import ShapedNoiseState
from jgia.defenses.sparsification import keep_top_k
from jgia.models import Victim

PyTree = Any
Transform = Callable[[PRNGKeyArray], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defense:
    """What a client does before it shares: in every local gradient, and once to the result.

    A frozen description without arrays or keys, so that it can be a static argument of compiled
    functions; two defenses of equal options are equal.

    Attributes:
      config: names and knobs.
      transforms: further transformations of what is shared, applied after those of ``config``;
        each makes an optax transformation from a key. Named functions compile once.

    >>> defense = Defense(config=DefenseConfig(defense=("top_k",), keep_fraction=0.5))
    >>> update = {"w": jnp.array([1.0, -3.0])}
    >>> defense.share(jax.random.key(0), update)[0]["w"].tolist()
    [0.0, -3.0]
    """

    config: DefenseConfig = dataclasses.field(default_factory=DefenseConfig)
    transforms: tuple[Transform, ...] = ()

    @property
    def words(self) -> str:
        """Names and knobs in one line; ``"none"`` where nothing is done."""
        custom = [f"custom({getattr(f, '__name__', type(f).__name__)})" for f in self.transforms]
        named = [self.config.words()] if self.config.defense else []
        return ", ".join([*named, *custom]) or "none"

    @property
    def changes_gradient(self) -> bool:
        """Whether local gradients differ from the plain ones (otherwise only the result does)."""
        return any(name not in ON_SHARED for name in self.config.defense)

    def augment(
        self, key: PRNGKeyArray, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The images that :meth:`gradient` sees under the same key."""
        if "augment" not in self.config.defense:
            return images
        return _augment(self.config, jax.random.split(jax.random.clone(key), 3)[0], images)

    def gradient(
        self,
        key: PRNGKeyArray,
        victim: Victim,
        params: PyTree,
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> tuple[PyTree, DpSgdStats | AdaptiveStats | None]:
        """One local gradient: augmented images, dropout, per-example clipping, adapted noise.

        Args:
          key: random key of this step.
          victim: the model.
          params: its parameters.
          images: pixels in [0, 1].
          labels: integer labels.

        Returns:
          The gradient of the mean loss, and the statistics of DP-SGD or of the adaptive noise, or
          ``None`` without either.

        Raises:
          ValueError: the augmentation or the dropout layer does not fit the model, or the batch
            has too many pixels for an adaptive defense.
        """
        key_images, key_dropout, key_noise = jax.random.split(key, 3)
        if "augment" in self.config.defense:
            images = _augment(self.config, key_images, images)
        loss: Any = _VictimLoss(victim)
        if "dropout" in self.config.defense:
            loss = DropoutLoss(
                victim=victim, rate=self.config.dropout_rate, layer=self.config.dropout_layer
            )
        for name in ADAPTIVE:
            if name in self.config.defense:
                check_adaptive((name,), "fedsgd", images.size)
                return adaptive_gradient(
                    name, self.config, loss, key_noise, params, images, labels, key_dropout
                )
        if "dp_sgd" not in self.config.defense:
            return _gradient(loss, params, images, labels, key_dropout), None
        return dp_sgd_gradient(
            key_noise,
            _OneExample(loss),
            params,
            (images, labels, jax.random.split(key_dropout, images.shape[0])),
            clip_norm=self.config.clip_norm,
            noise_multiplier=self.config.noise_multiplier,
        )

    def transformation(self, key: PRNGKeyArray) -> optax.GradientTransformation:
        """The chain that :meth:`share` applies, for use in a training loop of one's own."""
        named = (
            functools.partial(_MAKERS[name], self.config)
            for name in self.config.defense
            if name in ON_SHARED
        )
        makers: tuple[Transform, ...] = (*named, *self.transforms)
        if not makers:
            return optax.identity()
        keys = jax.random.split(key, len(makers))
        return optax.chain(*(make(k) for make, k in zip(makers, keys, strict=True)))

    def share(
        self, key: PRNGKeyArray, update: PyTree, *, noise_std: float = 0.0
    ) -> tuple[PyTree, Float[Array, ""]]:
        """What is shared in place of ``update``, and the noise it carries.

        Args:
          key: random key of this release.
          update: a gradient (FedSGD) or a parameter difference (FedAvg).
          noise_std: standard deviation of noise that ``update`` already carries.

        Returns:
          The update to share and the declared standard deviation of additive noise per entry
          (:func:`declared_noise_std`).
        """
        return _share(self, key, update, noise_std)


def make_defense(config: DefenseConfig) -> Defense | None:
    """The defense that a configuration names, or ``None`` if it names none.

    >>> make_defense(DefenseConfig()) is None
    True
    >>> make_defense(DefenseConfig(defense=("gaussian",), noise_std=0.01)).words
    'gaussian(noise_std=0.01)'
    """
    return Defense(config=config) if config.defense else None


def declared_noise_std(state: PyTree, noise_std: Float[Array, ""]) -> Float[Array, ""]:
    """Standard deviation of additive noise on every entry after the last update.

    Follows noise through a chain: independent noises add in quadrature, and clipping scales what
    came before it. Quantization and sparsification are not counted: their error is in their own
    states, and entries that ``top_k`` drops carry no noise at all.

    Args:
      state: of a transformation from this package, or of an ``optax.chain`` of them.
      noise_std: noise that the update carried before.

    >>> chain = optax.chain(gaussian_noise(jax.random.key(0), noise_std=3.0),
    ...                     gaussian_noise(jax.random.key(1), noise_std=4.0))
    >>> _, state = chain.update({"w": jnp.zeros(2)}, chain.init({"w": jnp.zeros(2)}))
    >>> float(declared_noise_std(state, jnp.zeros(())))
    5.0
    """
    if isinstance(state, NoiseState | ShapedNoiseState):
        return jnp.hypot(noise_std, state.noise_std.astype(noise_std.dtype))
    if isinstance(state, ClipState):
        return noise_std * state.scale.astype(noise_std.dtype)
    if isinstance(state, tuple):
        for part in state:
            noise_std = declared_noise_std(part, noise_std)
    return noise_std


_MAKERS: dict[str, Callable[[DefenseConfig, PRNGKeyArray], optax.GradientTransformation]] = {
    "clip": lambda c, key: clip_update(clip_norm=c.clip_norm),
    "gaussian": lambda c, key: gaussian_noise(
        key, noise_std=c.noise_std, relative=c.noise_relative
    ),
    "laplace": lambda c, key: laplace_noise(key, noise_std=c.noise_std, relative=c.noise_relative),
    "quantize": lambda c, key: quantize_nearest(num_bits=c.num_bits),
    "quantize_stochastic": lambda c, key: quantize_stochastic(key, num_bits=c.num_bits),
    "top_k": lambda c, key: keep_top_k(keep_fraction=c.keep_fraction, scope=c.sparsity_scope),
}


@dataclasses.dataclass(frozen=True)
class _VictimLoss:
    victim: Victim

    def __call__(self, params: PyTree, images: Array, labels: Array, key: PRNGKeyArray) -> Array:
        del key
        return self.victim.loss(params, images, labels)


@dataclasses.dataclass(frozen=True)
class _OneExample:
    """A loss that takes a batch of one and that one's key, with its leading axis."""

    loss: Any

    def __call__(self, params: PyTree, images: Array, labels: Array, keys: Array) -> Array:
        return self.loss(params, images, labels, keys[0])


@functools.partial(jax.jit, static_argnums=0)
def _augment(config: DefenseConfig, key: PRNGKeyArray, images: Array) -> Array:
    return augment(
        key,
        images,
        policy=config.augmentations,
        crop_padding=config.crop_padding,
        jitter=config.jitter,
    )


@functools.partial(jax.jit, static_argnums=0)
def _gradient(loss: Any, params: PyTree, images: Array, labels: Array, key: PRNGKeyArray) -> PyTree:
    return jax.grad(loss)(params, images, labels, key)


@functools.partial(jax.jit, static_argnums=0)
def _share(
    defense: Defense, key: PRNGKeyArray, update: PyTree, noise_std: Array
) -> tuple[PyTree, Array]:
    before = noise_std.astype(wide_dtype(update))
    with jax.numpy_dtype_promotion("standard"):  # transformations of others count in integers
        chain = defense.transformation(key)
        shared, state = chain.update(update, chain.init(update))
    return shared, declared_noise_std(state, before)
