"""Every defense of ``jgia.defenses``, with what the contract test needs to know about it.

A module in ``jgia/defenses`` or a name of ``DefenseName`` without a case here fails the test.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgia.defenses import (
    DropoutLoss,
    NoiseState,
    adaptive_scale_noise,
    augment,
    clip_update,
    dp_sgd_gradient,
    gaussian_noise,
    input_noise,
    keep_top_k,
    laplace_noise,
    quantize_nearest,
    quantize_stochastic,
    shaped_noise_transformation,
)
from jgia.models import make_victim

VICTIM = make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(8,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefenseCase:
    """One defense.

    Attributes:
      name: in ``DefenseName``.
      module: its file in ``jgia/defenses``.
      function: its public function or class in ``jgia.defenses``.
      apply: from key, a tree of arrays and knobs to a tree of arrays. The input is the update,
        or the images of a batch where the defense acts on those.
      knobs: a working point.
      weakest: knobs of zero strength, or ``None`` where there are none.
      tolerance: relative error allowed to the weakest setting.
      wrong: knobs that must be refused, each with a word of the message.
      random: whether it draws.
      deviation: ``(key, update, knobs) -> declared standard deviation`` of the additive noise,
        or ``None`` where it adds none.
      jitted: whether ``apply`` may be compiled as a whole; DP-SGD is driven from Python.
      act_on: what ``apply`` takes.
    """

    name: str
    module: str
    function: str
    apply: Callable[..., Any]
    knobs: dict[str, Any]
    weakest: dict[str, Any] | None
    tolerance: float = 0.0
    wrong: tuple[tuple[dict[str, Any], str], ...]
    random: bool
    deviation: Callable[..., float] | None = None
    jitted: bool = True
    act_on: str = "update"


def _transformed(make, key, update, **knobs):
    transformation = make(key, **knobs)
    return transformation.update(update, transformation.init(update))[0]


def _keyless(make):
    return lambda key, **knobs: make(**knobs)


def _state_deviation(make, key, update, **knobs):
    transformation = make(key, **knobs)
    _, state = transformation.update(update, transformation.init(update))
    assert isinstance(state, NoiseState)
    return float(state.noise_std)


def _linear(params, weights):
    """A loss whose gradient is the example itself."""
    products = jax.tree.map(lambda p, w: jnp.sum(p * w[0]), params, weights)
    return jax.tree.reduce(jnp.add, products)


def _dp_sgd(key, update, **knobs):
    """The private mean over a batch of one whose gradient is ``update``."""
    params = jax.tree.map(jnp.zeros_like, update)
    examples = (jax.tree.map(lambda leaf: leaf[None], update),)
    return dp_sgd_gradient(key, _linear, params, examples, **knobs)[0]


def _dp_sgd_deviation(key, update, **knobs):
    params = jax.tree.map(jnp.zeros_like, update)
    examples = (jax.tree.map(lambda leaf: leaf[None], update),)
    return dp_sgd_gradient(key, _linear, params, examples, **knobs)[1].noise_std


def _params(dtype):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), VICTIM.param_shapes()
    )


def plain_gradient(images):
    """The gradient of a batch's loss at fixed parameters."""
    return jax.grad(VICTIM.loss)(_params(images.dtype), images, jnp.zeros(len(images), "int32"))


def _dropout(key, images, **knobs):
    """The same under dropout."""
    loss = DropoutLoss(victim=VICTIM, **{"rate": 0.5, **knobs})
    labels = jnp.zeros(len(images), "int32")
    return jax.grad(loss)(_params(images.dtype), images, labels, key)


def _adaptive_scale(key, *, target):
    """One direction of three is unseen: a target of 1 or less needs no noise."""
    return adaptive_scale_noise(key, jnp.array([2.0, 1.0, 0.0]), prior_variance=1.0, target=target)


def _shaped(key, update, *, target, floor=0.1):
    """A release that is the update plus a fixed linear function of two of three numbers."""
    sizes = [leaf.size for leaf in jax.tree.leaves(update)]
    matrix = np.random.default_rng(2).normal(size=(sum(sizes), 3)) * [1.0, 0.5, 0.0]
    parts = np.split(matrix, np.cumsum(sizes)[:-1])
    structure = jax.tree.structure(update)

    def release(x):
        moved = [
            leaf + (jnp.asarray(part, x.dtype) @ x).reshape(leaf.shape).astype(leaf.dtype)
            for leaf, part in zip(jax.tree.leaves(update), parts, strict=True)
        ]
        return structure.unflatten(moved)

    transformation = shaped_noise_transformation(
        key,
        release,
        jnp.zeros(3),
        prior=1.0,
        target=target,
        gram=jnp.asarray(matrix.T @ matrix),
        floor=floor,
    )
    return transformation.update(update, transformation.init(update))[0]


def _input_noise(key, images, *, std):
    factor = std * jnp.eye(images.size, dtype=images.dtype)
    return input_noise(key, lambda x: x, images, factor)


_NOISE_KNOBS = (({"noise_std": -1.0}, "noise_std"), ({"noise_std": float("nan")}, "noise_std"))
_BITS = (({"num_bits": 1}, "num_bits"), ({"num_bits": 33}, "num_bits"))

CASES = (
    DefenseCase(
        name="gaussian",
        module="gaussian",
        function="gaussian_noise",
        apply=functools.partial(_transformed, gaussian_noise),
        knobs={"noise_std": 0.5},
        weakest={"noise_std": 0.0},
        wrong=_NOISE_KNOBS,
        random=True,
        deviation=functools.partial(_state_deviation, gaussian_noise),
    ),
    DefenseCase(
        name="laplace",
        module="laplace",
        function="laplace_noise",
        apply=functools.partial(_transformed, laplace_noise),
        knobs={"noise_std": 0.5},
        weakest={"noise_std": 0.0},
        wrong=_NOISE_KNOBS,
        random=True,
        deviation=functools.partial(_state_deviation, laplace_noise),
    ),
    DefenseCase(
        name="adaptive_scale",
        module="adaptive_scale",
        function="adaptive_scale_noise",
        apply=functools.partial(_transformed, _adaptive_scale),
        knobs={"target": 1.5},
        weakest={"target": 1.0},
        wrong=(({"target": 3.0}, "target"), ({"target": -1.0}, "target")),
        random=True,
        deviation=functools.partial(_state_deviation, _adaptive_scale),
    ),
    DefenseCase(
        name="shaped",
        module="shaped",
        function="shaped_noise_transformation",
        apply=_shaped,
        knobs={"target": 1.5},
        weakest={"target": 1.0},
        wrong=(({"target": 3.0}, "target"), ({"floor": -1.0}, "floor")),
        random=True,  # its covariance is measured in tests/defenses/test_defenses_adaptive.py
    ),
    DefenseCase(
        name="input_noise",
        module="shaped",
        function="input_noise",
        apply=_input_noise,
        knobs={"std": 0.5},
        weakest={"std": 0.0},
        wrong=(({"std": float("nan")}, "finite"),),
        random=True,
        act_on="images",
    ),
    DefenseCase(
        name="clip",
        module="clipping",
        function="clip_update",
        apply=functools.partial(_transformed, _keyless(clip_update)),
        knobs={"clip_norm": 0.5},
        weakest={"clip_norm": 1e6},
        wrong=(({"clip_norm": 0.0}, "clip_norm"),),
        random=False,
    ),
    DefenseCase(
        name="quantize",
        module="quantization",
        function="quantize_nearest",
        apply=functools.partial(_transformed, _keyless(quantize_nearest)),
        knobs={"num_bits": 4},
        weakest={"num_bits": 32},
        tolerance=2.0**-31,
        wrong=_BITS,
        random=False,
    ),
    DefenseCase(
        name="quantize_stochastic",
        module="quantization",
        function="quantize_stochastic",
        apply=functools.partial(_transformed, quantize_stochastic),
        knobs={"num_bits": 4},
        weakest={"num_bits": 32},
        tolerance=2.0**-30,
        wrong=_BITS,
        random=True,
    ),
    DefenseCase(
        name="top_k",
        module="sparsification",
        function="keep_top_k",
        apply=functools.partial(_transformed, _keyless(keep_top_k)),
        knobs={"keep_fraction": 0.3},
        weakest={"keep_fraction": 1.0},
        wrong=(({"keep_fraction": 0.0}, "keep_fraction"), ({"scope": "row"}, "scope")),
        random=False,
    ),
    DefenseCase(
        name="dp_sgd",
        module="dp_sgd",
        function="dp_sgd_gradient",
        apply=_dp_sgd,
        knobs={"clip_norm": 0.5, "noise_multiplier": 2.0},
        weakest={"clip_norm": 1e6, "noise_multiplier": 0.0},
        wrong=(({"clip_norm": -1.0}, "clip_norm"), ({"noise_multiplier": -1.0}, "noise_mult")),
        random=True,
        deviation=_dp_sgd_deviation,
        jitted=False,
    ),
    DefenseCase(
        name="dropout",
        module="dropout",
        function="DropoutLoss",
        apply=_dropout,
        knobs={"rate": 0.5},
        weakest={"rate": 0.0},
        wrong=(({"rate": 1.0}, "rate"), ({"layer": "conv"}, "fully connected")),
        random=True,
        act_on="gradient of images",
    ),
    DefenseCase(
        name="augment",
        module="augmentation",
        function="augment",
        apply=augment,
        knobs={"policy": ("crop", "flip", "rotate", "brightness")},
        weakest={"policy": ()},
        wrong=(({"policy": ("blur",)}, "policy"), ({"jitter": -1.0}, "jitter")),
        random=True,
        act_on="images",
    ),
)
