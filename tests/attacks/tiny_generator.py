"""An 8 px generator of three blocks with a skip image: what an attack needs, and no more."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jgia.generators.protocol import GeneratorState

WIDTH = 6
LATENT = 5


@dataclasses.dataclass(frozen=True)
class TinyGenerator:
    """Dense to 4 px, up to 8 px, then one more convolution; an image is added up on the way."""

    channels: int = 3
    num_classes: int = 0
    resolution: int = 8
    num_blocks: int = 3

    def init(self, key) -> Any:
        keys = iter(jax.random.split(key, 8))

        def normal(*shape):
            return jax.random.normal(next(keys), shape, "float32") / math.sqrt(
                math.prod(shape[:-1])
            )

        return {
            "dense": 2 * normal(LATENT, 16 * WIDTH),
            "mod": [normal(LATENT, WIDTH) for _ in range(3)],
            "conv": [2 * normal(3, 3, WIDTH, WIDTH) for _ in range(2)],
            "rgb": normal(WIDTH, self.channels),
            "embed": normal(max(self.num_classes, 1), LATENT),
        }

    def draw(self, params, key, num_images, labels=None):
        first, *others = jax.random.split(key, 3)
        side: dict[str, Any] = {
            "styles": jax.random.normal(first, (num_images, 3, LATENT), "float32"),
            "noise": {
                name: jax.random.normal(k, (num_images, 8, 8, 1), "float32")
                for name, k in zip(("b1", "b2"), others, strict=True)
            },
        }
        if labels is not None:
            side["class"] = params["embed"][labels]
        return side

    def run(self, params, side, state, *, start=0, stop=None):
        stop = self.num_blocks if stop is None else stop
        features, image = (None, None) if state is None else state
        for block in range(start, stop):
            style = side["styles"][:, block]
            if "class" in side:
                style = style + side["class"]
            if block == 0:
                h = (style @ params["dense"]).reshape(-1, 4, 4, WIDTH)
            else:
                assert features is not None
                h = features if block == 2 else _up(features)
                kernel = params["conv"][block - 1]
                dims = ("NHWC", "HWIO", "NHWC")
                h = lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=dims)
                h = h + 0.1 * side["noise"][f"b{block}"]
            h = jax.nn.leaky_relu(h * (1 + (style @ params["mod"][block])[:, None, None]), 0.2)
            rgb = h @ params["rgb"]
            if image is not None:
                rgb = rgb + (image if block == 2 else _up(image))
            features, image = h, rgb
        assert features is not None
        return GeneratorState(features, image)

    def image(self, params, side, state):
        del params, side
        return jnp.tanh(state.image)

    def free(self, side, stage):
        free = jax.tree.map(lambda _: True, side)
        if "class" in side:
            free["class"] = False
        if stage == 0:
            free["noise"]["b2"] = False
        return free


def _up(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


@dataclasses.dataclass(frozen=True, eq=False)
class TinyPrior:
    generator: TinyGenerator
    params: Any
    name: str = "tiny"


def make_prior(seed=0, **fields) -> TinyPrior:
    generator = TinyGenerator(**fields)
    return TinyPrior(generator, generator.init(jax.random.key(seed)))
