"""Train a victim on labeled images: a Python loop over one compiled step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from jgia.config.training import TrainOptions
from jgia.data import Dataset
from jgia.models import Victim, with_batch_norm, with_buffers
from jgia.training import checkpoint as checkpoints
from jgia.training.augment import augmented
from jgia.training.leakage import LeakageTerm, leakage_term
from jgia.training.measure import Metrics, evaluate, folded, in_unit_range

PyTree = Any
Progress = Callable[[str, int, int], None]
"""Called with (stage in words, steps done, steps in all)."""

MOMENTUM = 0.9
STATISTICS_DECAY = 0.9


class TrainingError(ValueError):
    """Training left the finite numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch left behind.

    Attributes:
      epoch: its number, from 1.
      train: means over the images as they came by: augmented, and under parameters that were
        still changing.
      test: on the test images after the epoch; ``None`` without any.
      risk: estimated fraction of an image that its gradient gives away, in [0, 1], the mean over
        the steps that computed it; ``None`` where training has no such term.
    """

    epoch: int
    train: Metrics
    test: Metrics | None
    risk: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedVictim:
    """A model as a server would send it after training.

    Attributes:
      victim: the model, with running statistics as buffers if it has batch normalizations.
      params: its parameters: a pytree of NumPy arrays.
      history: one record per epoch.
      train: on all training images as they are, with the final parameters.
      test: the same on the test images; ``None`` without any.
    """

    victim: Victim
    params: PyTree
    history: tuple[Epoch, ...]
    train: Metrics
    test: Metrics | None


class _State(NamedTuple):
    params: PyTree
    optimizer: PyTree
    statistics: PyTree
    step: Array


def train_victim(
    key: PRNGKeyArray,
    victim: Victim,
    dataset: Dataset,
    options: TrainOptions | None = None,
    *,
    test: Dataset | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TrainedVictim:
    """Minimize the victim's loss over a data set, from random parameters.

    Batch normalizations train with the statistics of the batch, whatever the victim's mode, while
    running ones are kept: ``r <- 0.9 r + 0.1 s`` with the biased variances of the batch (PyTorch's
    running ones are ``n / (n - 1)`` times as large), from the first batch's own, so that no
    initial value is left in them. They become the victim's buffers.

    Args:
      key: decides the first parameters, the order of the images and their augmentation.
      victim: the model; its normalization and classes must fit the images.
      dataset: the training images, all of which are used.
      options: see :class:`~jgia.config.training.TrainOptions`, whose defaults hold when left
        out; of a :class:`~jgia.config.training.TrainConfig` only what is declared there.
      test: images to measure on after every epoch.
      checkpoint: a file that keeps the state after every epoch. If it is there, the run goes on
        from it. It is left in place at the end.
      progress: called before every step, and once at the end of an epoch.

    Returns:
      The trained victim, in the batch-normalization mode that ``victim`` has.

    Raises:
      ValueError: the images do not fit the victim, or there is nothing to learn; before any
        compute.
      CheckpointError: a :class:`ValueError`; the checkpoint is damaged or of another run.
      TrainingError: a :class:`ValueError`; the loss or the parameters are not finite.

    Guarantees:
      The same arguments give the same bits on the same device, also if the run was interrupted at
      any point and continued from its checkpoint. One step is compiled, whatever the number of
      epochs.

    Edge cases:
      A data set smaller than a batch is one batch per epoch.
    """
    options = options or TrainOptions()
    fields = (field.name for field in dataclasses.fields(TrainOptions))
    options = TrainOptions(**{name: getattr(options, name) for name in fields})
    _check(victim, dataset, "training")
    if test is not None:
        _check(victim, test, "test")
    if len(np.unique(dataset.labels)) < 2:
        raise ValueError(
            f"all images of {dataset.name!r} have one class: there is nothing to learn; use data "
            "with labels."
        )
    run = _Run(key, victim, dataset, options, test)
    mark = checkpoints.fingerprint(key, victim, options, (dataset, test))
    state, history = run.start(), []
    if checkpoint is not None and (found := checkpoints.load(checkpoint, state, mark=mark)):
        state, history = found[0], [_epoch(record) for record in found[1]]
    for epoch in range(len(history), options.epochs):
        state, record = run.epoch(state, epoch, history, progress or _silent)
        history.append(record)
        if checkpoint is not None:
            records = [dataclasses.asdict(record) for record in history]
            checkpoints.save(checkpoint, state, records, mark=mark)
    return run.finish(state, tuple(history))


class _Run:
    """What stays the same from the first step to the last."""

    def __init__(
        self,
        key: PRNGKeyArray,
        victim: Victim,
        dataset: Dataset,
        options: TrainOptions,
        test: Dataset | None,
    ) -> None:
        self._key_init, self._key_epochs = jax.random.split(key)
        self._key_probes = jax.random.fold_in(self._key_epochs, options.epochs)  # of no epoch
        self._term = leakage_term(options, victim, dataset)
        self._victim, self._dataset, self._options, self._test = victim, dataset, options, test
        self._training = self._plain = victim
        inputs = jax.ShapeDtypeStruct((1, *victim.input_shape), "float32")
        self._statistics = jax.eval_shape(victim.batch_statistics, victim.param_shapes(), inputs)
        if self._statistics:
            self._training = with_batch_norm(with_buffers(victim, {}), "train")
            self._plain = with_batch_norm(self._training, "eval")
        self._batch = min(options.batch_size, len(dataset))
        self._per_epoch = len(dataset) // self._batch
        self._num_steps = self._per_epoch * options.epochs

    def start(self) -> _State:
        params = jax.jit(self._victim.init)(self._key_init)
        return _State(
            params=params,
            optimizer=_optimizer(self._options, self._num_steps).init(params),
            statistics=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._statistics),
            step=jnp.zeros((), jnp.int32),
        )

    def epoch(
        self, state: _State, epoch: int, history: list[Epoch], progress: Progress
    ) -> tuple[_State, Epoch]:
        options, dataset = self._options, self._dataset
        # The host's generator restarts in every epoch: a continued run draws what it would have.
        words = jax.random.key_data(jax.random.fold_in(self._key_epochs, epoch))
        rng = np.random.default_rng(np.asarray(words).tolist())
        order = rng.permutation(len(dataset))[: self._per_epoch * self._batch]
        stage = f"epoch {epoch + 1} of {options.epochs}{_so_far(history)}"
        results = []
        for i, rows in enumerate(order.reshape(self._per_epoch, self._batch)):
            progress(stage, i, self._per_epoch)
            images = augmented(rng, dataset.images[rows], flip=options.flip, crop=options.crop)
            batch = jnp.asarray(images), jnp.asarray(dataset.labels[rows])
            due = (epoch * self._per_epoch + i) % options.risk_every == 0
            statics = self._training, options, self._num_steps, self._term if due else None
            state, result = _step(*statics, state, *batch, self._key_probes)
            results.append(result)
        table = np.asarray(jax.device_get(results), np.float64)
        loss, accuracy, _ = table.mean(axis=0).tolist()
        train = Metrics(loss=loss, accuracy=accuracy)
        risks = table[np.isfinite(table[:, 2]), 2]
        progress(stage, self._per_epoch, self._per_epoch)
        test = None if self._test is None else self._evaluate(state, self._test)
        for metrics in (train, test):
            if metrics is not None and not math.isfinite(metrics.loss):
                raise TrainingError(
                    f"the loss is {metrics.loss} in epoch {epoch + 1}; lower learning_rate="
                    f"{options.initial_learning_rate:g}."
                )
        risk = float(risks.mean()) if len(risks) else None
        return state, Epoch(epoch=epoch + 1, train=train, test=test, risk=risk)

    def finish(self, state: _State, history: tuple[Epoch, ...]) -> TrainedVictim:
        victim, params = self._victim, jax.device_get(state.params)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise TrainingError(
                "the parameters are not finite after the last step; lower "
                f"learning_rate={self._options.initial_learning_rate:g}."
            )
        if state.statistics:
            victim = with_buffers(victim, jax.device_get(state.statistics))
        return TrainedVictim(
            victim=victim,
            params=params,
            history=history,
            train=self._evaluate(state, self._dataset),
            test=history[-1].test,
        )

    def _evaluate(self, state: _State, dataset: Dataset) -> Metrics:
        return evaluate(self._plain, folded(state.params, state.statistics), dataset)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _step(
    victim: Victim,
    options: TrainOptions,
    num_steps: int,
    term: LeakageTerm | None,
    state: _State,
    images: Array,
    labels: Array,
    key_probes: Array,
) -> tuple[_State, tuple[Array, Array, Array]]:
    """One step; with its cross-entropy, accuracy and leakage (NaN without a term)."""
    dtype = next(iter(jax.tree.leaves(state.params))).dtype
    pixels = in_unit_range(images, dtype)
    inputs = victim.normalization.normalize(pixels)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, Array, Array, PyTree]]:
        logits, statistics = victim.apply_with_statistics(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = logits.argmax(axis=1).astype(labels.dtype) == labels
        loss = total = losses.mean()
        risk = jnp.full((), jnp.nan, dtype)
        if term is not None:
            key = jax.random.fold_in(key_probes, state.step)
            risk = term.fraction(key, victim, params, pixels, labels)
            total = loss + term.weight * risk
        return total, (loss, correct.astype(dtype).mean(), risk, statistics)

    gradient, (loss, accuracy, risk, found) = jax.grad(loss_fn, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer step count
        change, optimizer = _optimizer(options, num_steps).update(
            gradient, state.optimizer, state.params
        )
    decay = jnp.where(state.step == 0, 0.0, STATISTICS_DECAY).astype(dtype)
    return _State(
        params=optax.apply_updates(state.params, change),
        optimizer=optimizer,
        statistics=jax.tree.map(lambda r, s: decay * r + (1 - decay) * s, state.statistics, found),
        step=state.step + 1,
    ), (loss, accuracy, risk)


def _optimizer(options: TrainOptions, num_steps: int) -> optax.GradientTransformation:
    rate: Any = options.initial_learning_rate
    if options.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, num_steps)
    if options.optimizer == "adam":
        return optax.adamw(rate, weight_decay=options.weight_decay, mask=_kernels)
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=_kernels),
        optax.sgd(rate, MOMENTUM),
    )


def _kernels(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _check(victim: Victim, dataset: Dataset, part: str) -> None:
    if dataset.image_shape != victim.input_shape:
        raise ValueError(
            f"the {part} images have shape {dataset.image_shape}, the model takes "
            f"{victim.input_shape}; give --image-size, or other data."
        )
    if dataset.num_classes > victim.num_classes:
        raise ValueError(
            f"the {part} images have {dataset.num_classes} classes, the model {victim.num_classes}."
        )


def _so_far(history: list[Epoch]) -> str:
    if not history:
        return ""
    last = history[-1]
    part, metrics = ("test", last.test) if last.test else ("training", last.train)
    return f", {part} accuracy {metrics.accuracy:.1%} before"


def _epoch(record: dict[str, Any]) -> Epoch:
    test = None if record["test"] is None else Metrics(**record["test"])
    train = Metrics(**record["train"])
    return Epoch(epoch=record["epoch"], train=train, test=test, risk=record["risk"])


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total
