"""StyleGAN2's generator, which can be entered at any block.

Written from the papers: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN"
(CVPR 2020, arXiv 1912.04958), and "Training Generative Adversarial Networks with Limited Data"
(NeurIPS 2020, arXiv 2006.06676).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jgia import _checks
from jgia.generators.layers import (
    Dense,
    StyledConv,
    ToImage,
    activate,
    normalize_second_moment,
    upsample,
)
from jgia.generators.protocol import GeneratorState, Side, checked_stop

PyTree = Any
StyleStart = Literal["mapped", "gaussian"]

FIRST_RESOLUTION = 4
STYLES_PER_BLOCK = 3
"""Of the two convolutions and of the output of a block; the first block has one convolution and
does not use its first style."""
_MAPPING_RATE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleGAN2:
    """A StyleGAN2 generator: what its parameters are for. Satisfies ``StagedGenerator``.

    Block b works at ``4 * 2**b`` pixels and has ``min(base / resolution, max_features)`` features.
    Block 0 is a learned constant and a convolution; every other block doubles the resolution and
    has two. Every block adds an image to the upsampled one of the block below.

    Attributes:
      resolution: side in pixels: 8, 16, 32, 64, ...
      channels: of an image.
      base: features times resolution.
      max_features: most features of a block.
      latent_dim: of the normal vector ``z``.
      style_dim: of the style vector ``w``.
      mapping_layers: from ``z`` to ``w``.
      num_classes: classes that it is conditioned on; 0 for none.
      dtype: of features; ``"bfloat16"`` keeps parameters, styles and images in float32.

    Its side inputs are ``"styles"``, (B, num_blocks, 3, style_dim), and ``"noise"``, a mapping of
    names such as ``"8a"`` to (B, 8, 8, 1).
    """

    resolution: int = 32
    channels: int = 3
    base: int = 1024
    max_features: int = 64
    latent_dim: int = 64
    style_dim: int = 64
    mapping_layers: int = 2
    num_classes: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        size = self.resolution
        if size < 2 * FIRST_RESOLUTION or size & (size - 1):
            raise ValueError(
                f"resolution must be a power of two of at least {2 * FIRST_RESOLUTION}, got {size}."
            )
        _checks.at_least(
            1,
            channels=self.channels,
            max_features=self.max_features,
            latent_dim=self.latent_dim,
            style_dim=self.style_dim,
            mapping_layers=self.mapping_layers,
        )
        _checks.at_least(size, base=self.base)
        _checks.at_least(0, num_classes=self.num_classes)
        _checks.one_of(("float32", "bfloat16"), dtype=self.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks, from 4 pixels to the resolution."""
        return (self.resolution // FIRST_RESOLUTION).bit_length()

    def features(self, block: int) -> int:
        """Features that leave a block.

        >>> [StyleGAN2().features(b) for b in range(4)]
        [64, 64, 64, 32]
        """
        return min(self.base // (FIRST_RESOLUTION << block), self.max_features)

    def init(self, key: Array) -> PyTree:
        """Random parameters, ``{"mapping": ..., "synthesis": ..., "styles": ...}``.

        ``styles`` holds statistics that training keeps: see :func:`style_statistics`.
        """
        key_mapping, key_synthesis = jax.random.split(key)
        latent = jnp.zeros((1, self.latent_dim))
        labels = jnp.zeros(1, jnp.int32) if self.num_classes else None
        styles = jnp.zeros((1, self.num_blocks, STYLES_PER_BLOCK, self.style_dim))
        noise = self.draw_noise(jax.random.key(0), 1)
        zeros = jnp.zeros(self.style_dim)
        return {
            "mapping": self._mapping.init(key_mapping, latent, labels)["params"],
            "synthesis": self._synthesis.init(key_synthesis, styles, noise, None)["params"],
            "styles": {"mean": zeros, "flat_mean": zeros, "flat_std": jnp.ones(self.style_dim)},
        }

    def map(self, params: PyTree, latents: Array, labels: Array | None = None) -> Array:
        """(B, latent_dim) normal vectors, and (B,) classes if it has any, to (B, style_dim)."""
        return self._mapping.apply({"params": params["mapping"]}, latents, labels)  # pyright: ignore[reportReturnType]

    def broadcast(self, style: Array) -> Array:
        """(B, D) to (B, num_blocks, 3, D): the same style everywhere."""
        shape = (len(style), self.num_blocks, STYLES_PER_BLOCK, self.style_dim)
        return jnp.broadcast_to(style[:, None, None, :], shape)

    def draw_noise(self, key: Array, num_images: int) -> dict[str, Array]:
        """Normal noise maps of every convolution, ``{"4b": (B, 4, 4, 1), "8a": ..., ...}``."""
        names = [
            f"{FIRST_RESOLUTION << b}{which}"
            for b in range(self.num_blocks)
            for which in ("ab" if b else "b")
        ]
        keys = jax.random.split(key, len(names))
        return {
            name: jax.random.normal(k, (num_images, int(name[:-1]), int(name[:-1]), 1), "float32")
            for name, k in zip(names, keys, strict=True)
        }

    def draw(
        self,
        params: PyTree,
        key: Array,
        num_images: int,
        labels: Array | None = None,
        *,
        start: StyleStart = "mapped",
        truncation: float = 1.0,
    ) -> Side:
        """Random styles and noise.

        Args:
          params: the parameters.
          key: PRNG key.
          num_images: B.
          labels: (B,) classes of a conditional generator.
          start: ``"mapped"`` maps a normal vector, the same style in all layers; ``"gaussian"``
            draws each layer's on its own from a Gaussian that was fitted to mapped styles before
            their last rectifier (as GIFD's code does, after PULSE).
          truncation: factor on the distance of mapped styles from their mean.

        Raises:
          ValueError: labels for an unconditional generator, or none for a conditional one.
        """
        _check_labels(self.num_classes, labels)
        key_style, key_noise = jax.random.split(key)
        known = params["styles"]
        dtype = known["mean"].dtype
        if start == "gaussian":
            shape = (num_images, self.num_blocks, STYLES_PER_BLOCK, self.style_dim)
            normal = jax.random.normal(key_style, shape, dtype)
            flat = (
                known["flat_mean"][None, None, None] + known["flat_std"][None, None, None] * normal
            )
            styles = activate(flat)
        else:
            latents = jax.random.normal(key_style, (num_images, self.latent_dim), dtype)
            style = self.map(params, latents, labels)
            mean = known["mean"][None]
            styles = self.broadcast(mean + truncation * (style - mean))
        return {"styles": styles, "noise": self.draw_noise(key_noise, num_images)}

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
        return self._synthesis.apply(  # pyright: ignore[reportReturnType]
            {"params": params["synthesis"]}, side["styles"], side["noise"], state, start, stop
        )

    def image(self, params: PyTree, side: Side, state: GeneratorState) -> Array:
        """The images summed up by the blocks."""
        del params, side
        assert state.image is not None
        return state.image

    def free(self, side: Side, stage: int) -> Side:
        """All styles; noise maps up to ``16 * 2**stage`` pixels, as in GIFD's code."""
        largest = 4 * FIRST_RESOLUTION << stage
        noise: Mapping[str, Array] = side["noise"]
        return {"styles": True, "noise": {name: int(name[:-1]) <= largest for name in noise}}

    def generate(self, params: PyTree, key: Array, num_images: int, **options: Any) -> Array:
        """(B, resolution, resolution, channels) random images, about [-1, 1]; see :meth:`draw`."""
        side = self.draw(params, key, num_images, **options)
        return self.image(params, side, self.run(params, side, None))

    @property
    def _mapping(self) -> MappingNetwork:
        return MappingNetwork(self.style_dim, self.mapping_layers, self.num_classes)

    @property
    def _synthesis(self) -> Synthesis:
        features = tuple(self.features(b) for b in range(self.num_blocks))
        return Synthesis(features, self.channels, self.dtype)


class MappingNetwork(nn.Module):
    """Normal vectors to styles: a normalized vector, beside that of its class, through layers."""

    features: int
    num_layers: int
    num_classes: int

    @nn.compact
    def __call__(self, latents: Array, labels: Array | None = None) -> Array:
        """(B, Z) and (B,) to (B, features)."""
        x = normalize_second_moment(latents)
        if self.num_classes:
            assert labels is not None
            hot = jax.nn.one_hot(labels, self.num_classes, dtype=x.dtype)
            # One-hot rows have one entry: undo the 1 / sqrt(fan in) that all would need.
            embedded = Dense(self.features, name="embed")(hot * math.sqrt(self.num_classes))
            x = jnp.concatenate([x, normalize_second_moment(embedded)], axis=-1)
        for i in range(self.num_layers):
            x = activate(Dense(self.features, rate=_MAPPING_RATE, name=f"dense{i}")(x))
        return x


class Synthesis(nn.Module):
    """Blocks of styled convolutions, each of which adds to the image."""

    features: tuple[int, ...]
    channels: int
    dtype: str

    @nn.compact
    def __call__(
        self,
        styles: Array,
        noise: Mapping[str, Array],
        state: GeneratorState | None,
        start: int = 0,
        stop: int | None = None,
    ) -> GeneratorState:
        """(B, blocks, 3, D) styles, noise maps and what enters block ``start``: what leaves."""
        x, image = (None, None) if state is None else state
        for b in range(start, len(self.features) if stop is None else stop):
            size, width = FIRST_RESOLUTION << b, self.features[b]
            if b == 0:
                shape = (size, size, width)
                constant = self.param("constant", nn.initializers.normal(1.0), shape)
                x = jnp.broadcast_to(constant[None], (len(styles), *shape))
                x = jnp.asarray(x, self.dtype)
            else:
                assert x is not None
                x = jnp.asarray(x, self.dtype)
                conv = StyledConv(width, up=True, name=f"block{b}_conv_a")
                x = conv(x, styles[:, b, 0], noise[f"{size}a"])
            x = StyledConv(width, name=f"block{b}_conv_b")(x, styles[:, b, 1], noise[f"{size}b"])
            own = ToImage(self.channels, name=f"block{b}_image")(x, styles[:, b, 2])
            own = jnp.asarray(own, styles.dtype)
            image = own if image is None else upsample(image) + own
        assert x is not None
        return GeneratorState(x, image)


def style_statistics(
    generator: StyleGAN2, params: PyTree, key: Array, num_samples: int = 10_000
) -> PyTree:
    """Mean style, and mean and deviation of styles before the last rectifier, over random ones.

    Returns:
      ``{"mean": (D,), "flat_mean": (D,), "flat_std": (D,)}``, for ``params["styles"]``.
    """
    key_latents, key_labels = jax.random.split(key)
    latents = jax.random.normal(key_latents, (num_samples, generator.latent_dim))
    labels = None
    if generator.num_classes:
        labels = jax.random.randint(key_labels, (num_samples,), 0, generator.num_classes)
    styles = generator.map(params, latents, labels)
    gain = activate(jnp.ones(()))
    flat = jnp.where(styles >= 0, styles / gain, styles / -activate(-jnp.ones(())))
    return {
        "mean": styles.mean(axis=0),
        "flat_mean": flat.mean(axis=0),
        "flat_std": flat.std(axis=0),
    }


def _check_labels(num_classes: int, labels: Array | None) -> None:
    if labels is None and num_classes:
        raise ValueError(f"the generator is conditioned on {num_classes} classes; give labels.")
    if labels is not None and not num_classes:
        raise ValueError("the generator is unconditional; leave labels out.")


PRESETS: dict[str, functools.partial[StyleGAN2]] = {
    "tiny32": functools.partial(StyleGAN2, resolution=32),
    "small32": functools.partial(
        StyleGAN2, resolution=32, base=2048, max_features=128, latent_dim=128, style_dim=128
    ),
    "mid32": functools.partial(
        StyleGAN2, resolution=32, base=4096, max_features=256, latent_dim=256, style_dim=256
    ),
    "small64": functools.partial(
        StyleGAN2, resolution=64, base=4096, max_features=128, latent_dim=128, style_dim=128
    ),
    "mid64": functools.partial(
        StyleGAN2, resolution=64, base=8192, max_features=256, latent_dim=256, style_dim=256
    ),
}
"""Sizes by name: a resolution, and how many features there are."""
