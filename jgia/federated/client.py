"""The honest client: local training on private examples, and what it shares afterwards."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jgia import _checks
from jgia.config import ClientConfig
from jgia.config.defense import ADAPTIVE
from jgia.defenses import AdaptiveStats, Defense, DpSgdStats
from jgia.defenses._adaptive_gradient import check_adaptive
from jgia.models import Victim, flatten_params
from jgia.observation import Observation, ThreatModel, check_params

PyTree = Any

# Folded into the client's key for its defense; epochs, which fold in their number, stay below.
_DEFENSE_STREAM = 2**32 - 1


class ClientError(ValueError):
    """Local training left the finite numbers: there is nothing honest to share."""


def client_update(
    key: PRNGKeyArray,
    victim: Victim,
    params: PyTree,
    images: ArrayLike,
    labels: ArrayLike,
    config: ClientConfig = ClientConfig(),
    defense: Defense | None = None,
) -> Observation:
    r"""What an honest client shares after one round, as the attacker will see it.

    With the mean cross-entropy ``L(theta; x, y)`` of the victim, FedSGD shares
    ``grad L(theta; x, y)`` over all examples. FedAvg runs ``theta_{t+1} = theta_t +
    optimizer(grad L(theta_t; x_b, y_b))`` over ``local_epochs`` passes of minibatches ``b`` and
    shares ``theta_T - theta_0``, rounded as a client would round it.

    A defense acts in two places. Augmentation, dropout and DP-SGD replace **every local
    gradient** (the only one of FedSGD, that of each step of FedAvg). Clipping, additive noise,
    quantization and sparsification change **what is shared**, once, at the end.

    With ``config.share_batch_statistics`` the means and biased variances of what entered the batch
    normalizations travel along (:meth:`~jgia.models.Victim.batch_statistics`): at the parameters
    that were sent, on the client's batch (FedSGD) or on that of the first local step (FedAvg), and
    on the augmented images where a defense augments. No noise is added to them.

    Args:
      key: random key; decides the order of the examples and the defense's draws, from separate
        streams, and nothing else. Without a defense it is unused when no order matters (FedSGD,
        ``shuffle=False``, or one minibatch that holds everything).
      victim: the model that client and server train.
      params: what the server sent; floating point of one dtype. The computation runs in it.
      images: (B, H, W, C) floating-point pixels in [0, 1], (H, W, C) as ``victim.input_shape``.
      labels: (B,) integers in [0, num_classes).
      config: protocol and local optimizer.
      defense: from :func:`jgia.defenses.make_defense`; ``None`` for a client without one.

    Returns:
      The observation of a malicious server that knows the protocol, the number of steps and of
      examples, the defense, (FedAvg) the learning rate, and the declared noise unless the
      defense's ``noise_known`` is off. Narrow what the attacker knows with
      ``dataclasses.replace``.

    Raises:
      ValueError: images, labels or parameters do not fit the model, or the defense does not, or
        batch statistics are to be shared that the model does not have or that dropout, DP-SGD and
        adaptive noise leave undefined, or adaptive noise is to go with FedAvg or with a batch of
        too many pixels; nothing was computed.
      ClientError: the gradient or the trained parameters have NaN or infinite entries, before or
        after the defense; with DP-SGD, the gradient of any single example.

    Guarantees:
      The same key gives the same bits on the same device. A second call with the same shapes
      traces nothing again. ``params`` are neither changed nor copied; FedSGD holds the
      parameters and one gradient, FedAvg one more set of parameters besides the optimizer's
      state; a defense holds one more update, DP-SGD a microbatch of gradients. A defense does not
      change the order of the examples, and ``defense=None`` computes what it always did.

    Edge cases:
      The order cannot matter when one minibatch holds every example, so it is left as given: one
      local step of SGD is exactly ``-learning_rate`` times the FedSGD gradient up to the rounding
      of ``theta_1 - theta_0``. A short last minibatch has its own shape and compiles once more.
      Local steps are driven from Python: XLA runs convolutions inside ``scan`` slowly on CPU.
      DP-SGD's declared noise on a FedAvg update is known in closed form for plain SGD,
      ``learning_rate sqrt(sum_t std_t^2)``: what each step's noise adds directly, without its
      effect on later gradients. For the other optimizers ``noise_std`` is 0: not declared.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(2, 2, 1), num_classes=2, widths=(3,))
    >>> pixels, label = np.full((1, 2, 2, 1), 0.5, "float32"), np.array([1])
    >>> seen = client_update(
    ...     jax.random.key(0), victim, victim.init(jax.random.key(1)), pixels, label
    ... )
    >>> seen.update["fc1"]["kernel"].shape, seen.threat_model.num_examples
    ((4, 3), 1)

    References:
      McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
      (AISTATS 2017, arXiv 1602.05629), algorithm 1.
    """
    pixels = _check_images(images, victim)
    classes = _check_labels(labels, pixels.shape[0], victim)
    params, dtype = _check_params(params, victim)
    pixels = pixels.astype(dtype, copy=False)
    check_adaptive(() if defense is None else defense.config.defense, config.protocol, pixels.size)
    statistics = None
    if config.share_batch_statistics:
        _check_statistics(victim, defense)
        first = pixels[next(_minibatches(key, len(classes), config))]
        statistics = _batch_statistics(victim, params, client_images(key, first, defense))
    gradient_fn = _Gradients(key, victim, config, defense)
    if config.protocol == "fedsgd":
        update = gradient_fn(params, pixels, classes)
    else:
        update = _local_training(key, gradient_fn, params, pixels, classes, config)
    _require_finite(update, config)
    noise_std = 0.0
    if defense is not None:
        update, noise_std = gradient_fn.shared(update, defense)
        _require_finite(update, config, defended=True)
    return Observation(
        update=update,
        params=params,
        victim=victim,
        threat_model=ThreatModel(
            protocol=config.protocol,
            local_steps=1 if config.protocol == "fedsgd" else config.num_steps(len(classes)),
            local_learning_rate=None if config.protocol == "fedsgd" else config.learning_rate,
            local_epochs=config.local_epochs,
            local_batch_size=config.local_batch_size,
            local_optimizer=config.optimizer if config.protocol == "fedavg" else "sgd",
            local_momentum=config.momentum,
            num_examples=len(classes),
            defense="none" if defense is None else defense.words,
            noise_std=noise_std,
        ),
        batch_statistics=statistics,
    )


def local_order(
    key: PRNGKeyArray, num_examples: int, config: ClientConfig = ClientConfig()
) -> tuple[tuple[int, ...], ...]:
    """The rows of the client's examples that each local step uses, in the order of the steps.

    Args:
      key: the key of :func:`client_update`, which takes the same rows.
      num_examples: how many examples the client holds.
      config: as given to :func:`client_update`.

    Returns:
      One tuple of rows for each local step; one of all rows for FedSGD. Every epoch uses every row
      once.

    Raises:
      ValueError: no example.

    >>> config = ClientConfig(protocol="fedavg", local_batch_size=2, shuffle=False)
    >>> local_order(jax.random.key(0), 3, config)
    ((0, 1), (2,))
    """
    _checks.at_least(1, num_examples=num_examples)
    return tuple(tuple(map(int, rows)) for rows in _minibatches(key, num_examples, config))


def client_images(key: PRNGKeyArray, images: ArrayLike, defense: Defense | None) -> Array:
    """The images behind a FedSGD update: what augmentation makes of the client's, for scoring.

    An attack recovers these, not the originals, so a score against the originals alone takes a
    shifted copy for a failure.

    Args:
      key: the key of :func:`client_update`.
      images: (B, H, W, C) pixels in [0, 1], floating point; their dtype is what the parameters
        had.
      defense: as given to :func:`client_update`.

    Returns:
      (B, H, W, C) pixels in [0, 1]; ``images`` where the defense does not augment.
    """
    pixels = jnp.asarray(images)
    if defense is None:
        return pixels
    return defense.augment(_step_key(jax.random.fold_in(key, _DEFENSE_STREAM), 1), pixels)


def _step_key(key: PRNGKeyArray, step: int) -> PRNGKeyArray:
    """The key of a defense in local step ``step`` >= 1; 0 is what is shared."""
    return jax.random.fold_in(key, step)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(victim: Victim, params: PyTree, images: Array, labels: Array) -> PyTree:
    return jax.grad(victim.loss)(params, images, labels)


@functools.partial(jax.jit, static_argnums=0)
def _batch_statistics(victim: Victim, params: PyTree, images: Array) -> PyTree:
    return victim.batch_statistics(params, victim.normalization.normalize(images))


class _Gradients:
    """The gradients of one round, under its defense: numbers the steps and sums up their noise.

    Step t draws from stream t of the defense's key, what is shared from stream 0.
    """

    def __init__(
        self, key: PRNGKeyArray, victim: Victim, config: ClientConfig, defense: Defense | None
    ) -> None:
        self._victim, self._config, self._defense = victim, config, defense
        self._key = key if defense is None else jax.random.fold_in(key, _DEFENSE_STREAM)
        self._variances: list[float] = []

    def __call__(self, params: PyTree, images: np.ndarray, labels: np.ndarray) -> PyTree:
        chosen = jnp.asarray(images), jnp.asarray(labels)
        if self._defense is None or not self._defense.changes_gradient:
            return _gradient(self._victim, params, *chosen)
        key = _step_key(self._key, len(self._variances) + 1)
        gradient, stats = self._defense.gradient(key, self._victim, params, *chosen)
        _require_finite_examples(stats, self._config)
        self._variances.append(0.0 if stats is None else float(stats.noise_std) ** 2)
        return gradient

    def shared(self, update: PyTree, defense: Defense) -> tuple[PyTree, float]:
        """What leaves the client, and the noise on it that the attacker is told."""
        before = math.sqrt(sum(self._variances))
        if self._config.protocol == "fedavg":
            before *= self._config.learning_rate if self._config.optimizer == "sgd" else 0.0
        key = _step_key(self._key, 0)
        update, noise_std = defense.share(key, update, noise_std=before)
        return update, float(noise_std) if defense.config.noise_known else 0.0


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _apply(
    config: ClientConfig, gradient: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    # The new parameters take the gradient's memory. ``params`` is never given up: in the first
    # step it is what the server sent.
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer step count
        change, state = _optimizer(config).update(gradient, state, params)
    return optax.apply_updates(params, change), state


@functools.partial(jax.jit, donate_argnums=0)
def _difference(after: PyTree, sent: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, after, sent)


@jax.jit
def _finite_leaves(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def _optimizer(config: ClientConfig) -> optax.GradientTransformation:
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    momentum = config.momentum if config.optimizer == "momentum" else None
    return optax.sgd(config.learning_rate, momentum)


def _local_training(
    key: PRNGKeyArray,
    gradient_fn: _Gradients,
    sent: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    config: ClientConfig,
) -> PyTree:
    params, state = sent, _optimizer(config).init(sent)
    for batch in _minibatches(key, len(labels), config):
        gradient = gradient_fn(params, images[batch], labels[batch])
        params, state = _apply(config, gradient, state, params)
    return _difference(params, sent)


def _minibatches(key: PRNGKeyArray, num_examples: int, config: ClientConfig) -> Iterator[Any]:
    size = num_examples if config.local_batch_size is None else config.local_batch_size
    for epoch in range(config.local_epochs):
        order = np.arange(num_examples)
        if config.shuffle and size < num_examples:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), num_examples))
        for start in range(0, num_examples, size):
            yield order[start : start + size]


def _require_finite_examples(
    stats: DpSgdStats | AdaptiveStats | None, config: ClientConfig
) -> None:
    count = int(stats.num_nonfinite) if isinstance(stats, DpSgdStats) else 0
    if count:
        raise ClientError(
            f"the gradients of {count} examples have NaN or infinite entries. {_cause(config)}."
        )


def _cause(config: ClientConfig) -> str:
    if config.protocol == "fedsgd":
        return "Check the parameters that were sent: their gradient overflows"
    return f"Local training diverged: lower learning_rate={config.learning_rate}"


def _require_finite(update: PyTree, config: ClientConfig, *, defended: bool = False) -> None:
    flags = flatten_params(jax.device_get(_finite_leaves(update)))
    bad = sorted(name for name, finite in flags.items() if not finite)
    if bad:
        cause = f"{_cause(config)}, or the parameters are too large for their dtype"
        if defended:
            cause = "Its noise or rounding overflows the dtype: choose a weaker one"
        subject = "the defended update" if defended else "the update"
        raise ClientError(f"{subject} of {', '.join(bad)} has NaN or infinite entries. {cause}.")


def _check_statistics(victim: Victim, defense: Defense | None) -> None:
    inputs = jax.ShapeDtypeStruct((1, *victim.input_shape), "float32")
    if not jax.eval_shape(victim.batch_statistics, victim.param_shapes(), inputs):
        raise ValueError(
            f"share_batch_statistics needs batch normalization, which the model {victim.name!r} "
            "does not have; choose --model resnet, resnet18 or vgg11 with --norm batch."
        )
    undefined = {"dropout", "dp_sgd", *ADAPTIVE}
    without = sorted(undefined & set(defense.config.defense if defense else ()))
    if without:
        raise ValueError(
            f"share_batch_statistics cannot go with the defense {without[0]!r}, whose gradient is "
            "not that of one pass of the batch; leave one of them out."
        )


def _check_images(images: Any, victim: Victim) -> np.ndarray:
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1:] != victim.input_shape:
        expected = ", ".join(map(str, victim.input_shape))
        raise ValueError(
            f"images must have shape (B, {expected}), got {array.shape}; the axes are batch, "
            "height, width, channels."
        )
    if array.shape[0] == 0:
        raise ValueError("images must hold at least one example, got batch 0.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point in [0, 1], got {array.dtype}; divide bytes by 255."
        )
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images must be finite, got NaN or infinite pixels.")
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"images must be pixels in [0, 1], got [{low:.6g}, {high:.6g}]; pass them before "
            "normalization (the victim normalizes) and clip or rescale them."
        )
    return array


def _check_labels(labels: Any, num_examples: int, victim: Victim) -> np.ndarray:
    array = np.asarray(labels)
    if array.shape != (num_examples,):
        raise ValueError(
            f"labels must have shape ({num_examples},), one per image, got {array.shape}."
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be integers (class indices), got {array.dtype}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= victim.num_classes:
        raise ValueError(
            f"labels must lie in [0, {victim.num_classes}), got values from {low} to {high}."
        )
    return array.astype(np.int32, copy=False)


def _check_params(params: PyTree, victim: Victim) -> tuple[PyTree, np.dtype]:
    check_params(params, victim)
    params = jax.tree.map(jnp.asarray, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        raise ValueError(
            "the parameters must share one floating-point dtype, got "
            f"{', '.join(sorted(map(str, dtypes)))}."
        )
    return params, next(iter(dtypes))
