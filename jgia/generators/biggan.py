"""BigGAN-deep's class-conditional generator, which can be entered at any block.

Written from the paper: Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity
Natural Image Synthesis" (ICLR 2019, arXiv 1809.11096), appendix B.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgia import _checks
from jgia.generators.biggan_layers import FIRST_RESOLUTION, Blocks, Head, Layer
from jgia.generators.protocol import GeneratorState, Side, checked_stop

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigGAN:
    """A BigGAN-deep generator: what its parameters are for. Satisfies ``StagedGenerator``.

    At every resolution but the last there is a residual block that keeps it and one that doubles
    it; block 0 begins with a linear layer from ``[z; embedding]`` to 4 x 4 features. Every
    normalization takes its gains and offsets linearly from that same vector. One self-attention
    block stands before the other blocks of its resolution.

    Attributes:
      multipliers: features at 4, 8, 16, ... pixels, as multiples of ``base``; none grows.
      base: ``ch`` of the paper.
      attention: side in pixels of the features that attend to themselves; ``None`` for none.
      latent_dim: of the normal vector ``z``.
      embedding_dim: of a class's vector, shared by all blocks.
      num_classes: that it is conditioned on.
      channels: of an image.

    Its side inputs are ``{"z": (B, latent_dim), "condition": (B, embedding_dim)}``, the latter the
    vector of the class. Features have no image beside them: ``GeneratorState.image`` is ``None``.

    Normalizations divide by statistics that are stored with the parameters, as batch normalization
    does outside training: what comes out for one image does not depend on the others, and an
    attack may differentiate through it. :func:`standing_statistics` measures them.
    """

    multipliers: tuple[int, ...] = (4, 4, 2, 1)
    base: int = 16
    attention: int | None = 16
    latent_dim: int = 32
    embedding_dim: int = 32
    num_classes: int = 10
    channels: int = 3

    def __post_init__(self) -> None:
        _checks.at_least(
            1,
            base=self.base,
            latent_dim=self.latent_dim,
            embedding_dim=self.embedding_dim,
            num_classes=self.num_classes,
            channels=self.channels,
        )
        wide = self.multipliers
        falling = all(a >= b for a, b in itertools.pairwise(wide))
        if len(wide) < 2 or wide[-1] < 1 or not falling:
            raise ValueError(
                "multipliers must be two or more positive integers that do not grow (a shortcut "
                f"drops features, it adds none), got {wide}."
            )
        sides = [FIRST_RESOLUTION << i for i in range(1, len(wide) - 1)]
        if self.attention is not None and self.attention not in sides:
            raise ValueError(
                f"attention must be one of {sides or 'no resolutions'}, between the first and the "
                f"last, or None; got {self.attention}."
            )

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return FIRST_RESOLUTION << len(self.multipliers) - 1

    @property
    def num_blocks(self) -> int:
        """Residual blocks, and the one of self-attention."""
        return len(self.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The blocks in order.

        >>> [layer.after for layer in BigGAN().layers]
        [64, 64, 64, 32, 32, 32, 16]
        """
        widths = [self.base * multiplier for multiplier in self.multipliers]
        layers = []
        for i, (width, following) in enumerate(itertools.pairwise(widths)):
            if self.attention == FIRST_RESOLUTION << i:
                layers.append(Layer(width, width, attends=True))
            layers += [Layer(width, width), Layer(width, following, up=True)]
        return tuple(layers)

    def init(self, key: Array) -> PyTree:
        """Random parameters, ``{"embedding", "blocks", "head", "statistics"}``.

        Weights are orthogonal, vectors of classes normal, statistics those of normalized features
        (mean 0, variance 1).
        """
        key_embedding, key_blocks, key_head = jax.random.split(key, 3)
        z = jnp.zeros((1, self.latent_dim), "float32")
        condition = jnp.zeros((1, self.embedding_dim), "float32")
        features = jnp.zeros((1, 1, 1, self.layers[-1].after), "float32")
        blocks = self._blocks().init(key_blocks, z, condition, None)
        head = self._head().init(key_head, features)
        shape = (self.num_classes, self.embedding_dim)
        return {
            "embedding": jax.random.normal(key_embedding, shape, "float32"),
            "blocks": blocks["params"],
            "head": head["params"],
            "statistics": {"blocks": blocks["statistics"], "head": head["statistics"]},
        }

    def draw(
        self,
        params: PyTree,
        key: Array,
        num_images: int,
        labels: Array | None = None,
        *,
        truncation: float | None = None,
    ) -> Side:
        """Random latent codes, and the vectors of the classes.

        Args:
          params: the parameters.
          key: PRNG key.
          num_images: B.
          labels: (B,) classes, below ``num_classes``.
          truncation: largest magnitude of a latent coordinate; a normal one that is larger is
            drawn anew (the truncation trick, section 3.1). ``None`` for no limit.

        Raises:
          ValueError: no labels, or not one for each image; a truncation that is not positive.
        """
        if labels is None:
            raise ValueError(
                f"the generator is conditioned on {self.num_classes} classes; give labels."
            )
        if labels.shape != (num_images,):
            raise ValueError(
                f"labels must have shape ({num_images},), one class per image, got {labels.shape}."
            )
        shape = (num_images, self.latent_dim)
        if truncation is None:
            z = jax.random.normal(key, shape, "float32")
        else:
            _checks.positive(truncation=truncation)
            z = jax.random.truncated_normal(key, -truncation, truncation, shape, "float32")
        return {"z": z, "condition": params["embedding"][labels]}

    def run(
        self,
        params: PyTree,
        side: Side,
        state: GeneratorState | None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> GeneratorState:
        """Blocks ``start`` to ``stop - 1``; see :class:`StagedGenerator`."""
        stop = checked_stop(self.num_blocks, state, start, stop)
        if start == stop and state is not None:
            return state
        variables = {"params": params["blocks"], "statistics": params["statistics"]["blocks"]}
        features = None if state is None else state.features
        features = self._blocks().apply(
            variables, side["z"], side["condition"], features, start, stop
        )
        return GeneratorState(features, None)  # pyright: ignore[reportArgumentType]

    def image(self, params: PyTree, side: Side, state: GeneratorState) -> Array:
        """(B, resolution, resolution, channels) in [-1, 1]: normalized, rectified, 3x3, tanh."""
        del side
        variables = {"params": params["head"], "statistics": params["statistics"]["head"]}
        return self._head().apply(variables, state.features)  # pyright: ignore[reportReturnType]

    def free(self, side: Side, stage: int) -> Side:
        """The latent code in stage 0; nothing later, as in GIFD's code. Never the class."""
        del side
        return {"z": stage == 0, "condition": False}

    def generate(
        self, params: PyTree, key: Array, num_images: int, labels: Array, **options: Any
    ) -> Array:
        """(B, resolution, resolution, channels) random images of classes; see :meth:`draw`."""
        side = self.draw(params, key, num_images, labels, **options)
        return self.image(params, side, self.run(params, side, None))

    def _blocks(self, *, measure: bool = False) -> Blocks:
        return Blocks(self.layers, measure)

    def _head(self, *, measure: bool = False) -> Head:
        return Head(self.channels, measure)


def standing_statistics(
    generator: BigGAN, params: PyTree, key: Array, num_samples: int = 256
) -> PyTree:
    """The parameters with statistics that random images of random classes have.

    Every normalization is measured on features that the ones before it normalized with the same
    images (the paper's standing statistics, of one large batch).

    Args:
      generator: whose parameters.
      params: the statistics in it are not read.
      key: PRNG key.
      num_samples: images, all at once.

    Returns:
      ``params`` with another ``"statistics"``.
    """
    _checks.at_least(2, num_samples=num_samples)
    key_labels, key_latents = jax.random.split(key)
    labels = jax.random.randint(key_labels, (num_samples,), 0, generator.num_classes)
    side = generator.draw(params, key_latents, num_samples, labels)
    old = params["statistics"]
    features, blocks = generator._blocks(measure=True).apply(
        {"params": params["blocks"], "statistics": old["blocks"]},
        side["z"],
        side["condition"],
        None,
        mutable=["statistics"],
    )
    _, head = generator._head(measure=True).apply(
        {"params": params["head"], "statistics": old["head"]}, features, mutable=["statistics"]
    )
    measured = {"blocks": blocks["statistics"], "head": head["statistics"]}
    return {**params, "statistics": measured}


PRESETS: dict[str, functools.partial[BigGAN]] = {
    "tiny32": functools.partial(BigGAN),
    "deep128": functools.partial(
        BigGAN,
        multipliers=(16, 16, 8, 4, 2, 1),
        base=128,
        attention=64,
        latent_dim=128,
        embedding_dim=128,
        num_classes=1000,
    ),
    "deep256": functools.partial(
        BigGAN,
        multipliers=(16, 16, 8, 8, 4, 2, 1),
        base=128,
        attention=64,
        latent_dim=128,
        embedding_dim=128,
        num_classes=1000,
    ),
}
"""Sizes by name; the last two are the paper's, tables 7 and 8."""
