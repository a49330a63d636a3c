"""One step of adversarial training: losses, penalties, optimizers, the average that is kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgia.config.prior import PriorOptions
from jgia.generators.augmentation import augment
from jgia.generators.discriminator import Discriminator
from jgia.generators.stylegan2 import PRESETS, StyleGAN2

PyTree = Any

_BETA2 = 0.99
_PLAIN_GROUP, _RESIDUAL_GROUP = 32, 4
_ADAPTIVE_IMAGES = 500_000  # shown until the probability could have moved by one
_ADAPTIVE_MEMORY = 0.9
_PATH_MEMORY = 0.01
_PATH_SHRINK = 2  # path lengths are those of one image in so many
_RAMP = 0.05


class GanState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      generator: its parameters.
      discriminator: its parameters.
      average: moving average of the generator's parameters: what is kept.
      generator_optimizer: optax's state.
      discriminator_optimizer: optax's state.
      probability: of augmentation, where it adapts.
      sign: moving mean of the signs of real images' logits.
      path_length: moving mean of path lengths.
      step: steps done.
    """

    generator: PyTree
    discriminator: PyTree
    average: PyTree
    generator_optimizer: PyTree
    discriminator_optimizer: PyTree
    probability: Array
    sign: Array
    path_length: Array
    step: Array


class GanInfo(NamedTuple):
    """Diagnostics of one step; the penalties are NaN in steps without them."""

    generator_loss: Array
    discriminator_loss: Array
    r1: Array
    path_penalty: Array
    sign: Array


@dataclasses.dataclass(frozen=True)
class Networks:
    """Both networks and how they are trained: the static part of a step.

    Attributes:
      generator: what is trained.
      discriminator: what it is trained against.
      options: what a step does. ``kimg``, the length of training, is left at its default: runs of
        any length share one compiled step.
    """

    generator: StyleGAN2
    discriminator: Discriminator
    options: PriorOptions

    def generator_optimizer(self) -> optax.GradientTransformation:
        """Adam(0, 0.99), slowed down for the lazy penalty."""
        lazy = bool(self.options.path_length_weight)
        return _adam(self.options.learning_rate, self.options.path_length_every if lazy else None)

    def discriminator_optimizer(self) -> optax.GradientTransformation:
        """The same with the discriminator's penalty."""
        lazy = bool(self.options.r1_gamma)
        return _adam(self.options.learning_rate, self.options.r1_every if lazy else None)

    def init(self, key: Array) -> GanState:
        """Random parameters of both."""
        key_generator, key_discriminator = jax.random.split(key)
        generator = self.generator.init(key_generator)
        size, labels = self.generator.resolution, None
        if self.generator.num_classes:
            labels = jnp.zeros(1, jnp.int32)
        image = jnp.zeros((1, size, size, self.generator.channels), "float32")
        discriminator = self.discriminator.init(key_discriminator, image, labels)["params"]
        return GanState(
            generator=generator,
            discriminator=discriminator,
            average=jax.tree.map(jnp.copy, generator),
            generator_optimizer=self.generator_optimizer().init(generator),
            discriminator_optimizer=self.discriminator_optimizer().init(discriminator),
            probability=jnp.zeros((), "float32"),
            sign=jnp.zeros((), "float32"),
            path_length=jnp.zeros((), "float32"),
            step=jnp.zeros((), jnp.int32),
        )


def make_networks(
    options: PriorOptions, *, channels: int, num_classes: int, accelerated: bool
) -> Networks:
    """The networks that options describe.

    Args:
      options: see :class:`~jgia.config.prior.PriorOptions`; those of a whole run will do.
      channels: of an image.
      num_classes: of the images; used where the prior is conditional.
      accelerated: whether ``precision="auto"`` is bfloat16.

    Returns:
      The networks, equal for options that differ in the length of training alone.
    """
    kept: dict[str, Any] = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(PriorOptions)
    }
    kept["kimg"] = PriorOptions.kimg
    options = PriorOptions(**kept)
    names = ("resolution", "base", "max_features", "latent_dim", "style_dim", "mapping_layers")
    given = {name: getattr(options, name) for name in names}
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if accelerated else "float32"
    generator = PRESETS[options.size](
        **{name: value for name, value in given.items() if value is not None},
        channels=channels,
        num_classes=num_classes if options.conditional else 0,
        dtype=precision,
    )
    group = _PLAIN_GROUP if options.discriminator == "plain" else _RESIDUAL_GROUP
    return Networks(generator, Discriminator(generator, options.discriminator, group), options)


@functools.partial(
    jax.jit, static_argnames=("networks", "mesh", "r1", "path_length"), donate_argnums=1
)
def train_step(
    networks: Networks,
    state: GanState,
    images: Array,
    labels: Array,
    key: Array,
    *,
    mesh: Mesh | None,
    r1: bool,
    path_length: bool,
) -> tuple[GanState, GanInfo]:
    """One step of the discriminator, then one of the generator.

    Args:
      networks: static.
      state: given up.
      images: (N, H, W, C) bytes of the whole data set, from which the step draws its batch.
      labels: (N,) classes.
      key: of the run; the step's own is derived from it and the number of the step.
      mesh: devices with an axis ``data``, over which the batch is divided; ``None`` for one.
      r1: whether the step has the discriminator's penalty.
      path_length: whether it has the generator's.

    Returns:
      The new state, and diagnostics.

    References:
      Non-saturating loss: Goodfellow et al. 2014. R1: Mescheder et al. 2018 (arXiv 1801.04406),
      eq. 9. Lazy penalties and path lengths: Karras et al. 2020 (arXiv 1912.04958), sections 3.1
      and 3.2; as in their code, path lengths are those of half of the batch (at least one image).
      Adaptive probability: Karras et al. 2020 (arXiv 2006.06676), section 3.
    """
    options = networks.options
    keys = jax.random.split(jax.random.fold_in(key, state.step), 8)
    real, classes = _batch(keys[0], images, labels, options, mesh)
    conditional = bool(networks.generator.num_classes)
    given = classes if conditional else None

    fake = _fakes(networks, state.generator, keys[1], given)[0]
    (loss_d, (sign, penalty)), slope = jax.value_and_grad(
        lambda params: _discriminator_loss(
            networks, params, state, (real, fake), given, keys[2:4], r1=r1
        ),
        has_aux=True,
    )(state.discriminator)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
        change, optimizer_d = networks.discriminator_optimizer().update(
            slope, state.discriminator_optimizer
        )
    state = state._replace(
        discriminator=optax.apply_updates(state.discriminator, change),
        discriminator_optimizer=optimizer_d,
    )

    (loss_g, (length, path_penalty)), slope = jax.value_and_grad(
        lambda params: _generator_loss(
            networks, params, state, given, keys[4:8], path_length=path_length
        ),
        has_aux=True,
    )(state.generator)
    with jax.numpy_dtype_promotion("standard"):
        change, optimizer_g = networks.generator_optimizer().update(
            slope, state.generator_optimizer
        )
    generator = optax.apply_updates(state.generator, change)
    average = _averaged(options, state, generator)
    state = state._replace(
        generator=generator,
        average=average,
        generator_optimizer=optimizer_g,
        path_length=length,
        **_adapted(options, state, sign),
        step=state.step + 1,
    )
    return state, GanInfo(loss_g, loss_d, penalty, path_penalty, sign)


def _adam(rate: float, every: int | None) -> optax.GradientTransformation:
    share = 1.0 if every is None else every / (every + 1)
    return optax.adam(rate * share, b1=0.0, b2=_BETA2**share)


def _batch(
    key: Array, images: Array, labels: Array, options: PriorOptions, mesh: Mesh | None
) -> tuple[Array, Array]:
    """Random images in [-1, 1], some of them mirrored, with their classes."""
    key_rows, key_flip = jax.random.split(key)
    rows = jax.random.randint(key_rows, (options.prior_batch,), 0, len(images))
    real = jnp.asarray(images[rows], "float32") / 127.5 - 1
    if options.flip:
        mirrored = jax.random.bernoulli(key_flip, 0.5, (len(real), 1, 1, 1))
        real = jnp.where(mirrored, real[:, :, ::-1], real)
    classes = labels[rows]
    if mesh is not None:
        divided = NamedSharding(mesh, PartitionSpec("data"))
        real, classes = jax.lax.with_sharding_constraint((real, classes), divided)
    return real, classes


def _fakes(
    networks: Networks, params: PyTree, key: Array, labels: Array | None
) -> tuple[Array, Array]:
    """Random images, and the styles they are made from."""
    generator, batch = networks.generator, networks.options.prior_batch
    key_latent, key_noise = jax.random.split(key)
    latents = jax.random.normal(key_latent, (batch, generator.latent_dim), "float32")
    styles = generator.broadcast(generator.map(params, latents, labels))
    return _synthesized(networks, params, styles, key_noise), styles


def _synthesized(networks: Networks, params: PyTree, styles: Array, key: Array) -> Array:
    generator = networks.generator
    side = {"styles": styles, "noise": generator.draw_noise(key, len(styles))}
    return generator.image(params, side, generator.run(params, side, None))


def _judge(
    networks: Networks,
    params: PyTree,
    state: GanState,
    images: Array,
    labels: Array | None,
    key: Array,
) -> Array:
    kind = networks.options.augmentation
    if kind != "none":
        images = augment(key, images, 1.0 if kind == "diffaugment" else state.probability)
    return networks.discriminator.apply({"params": params}, images, labels)  # pyright: ignore[reportReturnType]


def _discriminator_loss(
    networks: Networks,
    params: PyTree,
    state: GanState,
    images: tuple[Array, Array],
    labels: Array | None,
    keys: Array,
    *,
    r1: bool,
) -> tuple[Array, tuple[Array, Array]]:
    options = networks.options
    real, fake = images

    def logits_of_real(x: Array) -> tuple[Array, Array]:
        logits = _judge(networks, params, state, x, labels, keys[0])
        return logits.sum(), logits

    penalty, weighted = jnp.full((), jnp.nan, "float32"), jnp.zeros((), "float32")
    if r1 and options.r1_gamma:
        slope, logits = jax.grad(logits_of_real, has_aux=True)(real)
        penalty = jnp.square(slope).sum(axis=(1, 2, 3)).mean()
        weighted = options.r1_gamma / 2 * options.r1_every * penalty
    else:
        _, logits = logits_of_real(real)
    logits_fake = _judge(networks, params, state, fake, labels, keys[1])
    loss = jax.nn.softplus(logits_fake).mean() + jax.nn.softplus(-logits).mean()
    return loss + weighted, (jnp.sign(logits).mean(), penalty)


def _generator_loss(
    networks: Networks,
    params: PyTree,
    state: GanState,
    labels: Array | None,
    keys: Array,
    *,
    path_length: bool,
) -> tuple[Array, tuple[Array, Array]]:
    options = networks.options
    fake, styles = _fakes(networks, params, keys[0], labels)
    logits = _judge(networks, state.discriminator, state, fake, labels, keys[1])
    loss = jax.nn.softplus(-logits).mean()
    if not (path_length and options.path_length_weight):
        return loss, (state.path_length, jnp.full((), jnp.nan, "float32"))
    some = max(1, len(fake) // _PATH_SHRINK)
    shape = (some, *fake.shape[1:])
    direction = jax.random.normal(keys[2], shape, "float32") / math.sqrt(fake[0, ..., 0].size)

    def along(styles: Array) -> Array:
        return jnp.vdot(direction, _synthesized(networks, params, styles, keys[3]))

    lengths = jnp.sqrt(jnp.square(jax.grad(along)(styles[:some])).sum(axis=-1).mean(axis=(1, 2)))
    mean = jax.lax.stop_gradient(
        state.path_length + _PATH_MEMORY * (lengths.mean() - state.path_length)
    )
    penalty = jnp.square(lengths - mean).mean()
    weight = options.path_length_weight * options.path_length_every
    return loss + weight * penalty, (mean, penalty)


def _averaged(options: PriorOptions, state: GanState, generator: PyTree) -> PyTree:
    seen = (jnp.asarray(state.step, "float32") + 1) * options.prior_batch
    half_life = jnp.minimum(options.ema_kimg * 1000, _RAMP * seen)
    kept = 0.5 ** (options.prior_batch / half_life)
    return jax.tree.map(
        lambda a, g: g + jnp.asarray(kept, g.dtype) * (a - g), state.average, generator
    )


def _adapted(options: PriorOptions, state: GanState, sign: Array) -> dict[str, Array]:
    mean = _ADAPTIVE_MEMORY * state.sign + (1 - _ADAPTIVE_MEMORY) * sign
    if options.augmentation != "adaptive":
        return {"sign": mean, "probability": state.probability}
    move = jnp.sign(mean - options.adaptive_target) * options.prior_batch / _ADAPTIVE_IMAGES
    return {"sign": mean, "probability": jnp.clip(state.probability + move, 0, 1)}
