"""Train a generative prior: a Python loop over one compiled step, with a memory on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from jgia.config.prior import PriorOptions
from jgia.data import Dataset
from jgia.generators.steps import GanInfo, GanState, Networks, make_networks, train_step
from jgia.generators.stylegan2 import StyleGAN2, style_statistics
from jgia.training import checkpoint as checkpoints

PyTree = Any

_LOG_EVERY = 100  # steps


class PriorTrainingError(ValueError):
    """Training left the finite numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Where a training run stands.

    Attributes:
      step: steps done.
      kimg: thousands of real images shown.
      seconds: of training, over all runs that were continued.
      images_per_second: in this run.
      generator_loss: mean since the last report.
      discriminator_loss: mean since the last report.
      r1: mean squared gradient of the logits of real images, where it was computed.
      sign: mean sign of the logits of real images; near 1 where the discriminator overfits.
      probability: of augmentation.
      kid: see :func:`jgia.generators.quality.kernel_distance`; ``None`` where not computed.
    """

    step: int
    kimg: float
    seconds: float
    images_per_second: float
    generator_loss: float
    discriminator_loss: float
    r1: float
    sign: float
    probability: float
    kid: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedGenerator:
    """What training ends with.

    Attributes:
      generator: the network.
      params: the moving average of its parameters, with the statistics of its styles.
      history: one report for each look at the run.
      finished: whether all images were shown; not so where ``minutes`` ran out.
    """

    generator: StyleGAN2
    params: PyTree
    history: tuple[Report, ...]
    finished: bool


Look = Callable[[StyleGAN2, PyTree, Report], Report]
"""Called at every checkpoint with the generator, its averaged parameters and a report, which it may
complete."""


def train_generator(
    key: PRNGKeyArray,
    dataset: Dataset,
    options: PriorOptions | None = None,
    *,
    minutes: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 5.0,
    look: Look | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainedGenerator:
    """Train a StyleGAN2 on the images of a data set, from random parameters.

    Args:
      key: decides the first parameters, batches, latents and augmentation.
      dataset: images of the generator's resolution, all of which are used.
      options: see :class:`~jgia.config.prior.PriorOptions`.
      minutes: stop after so long.
      checkpoint: a file that keeps the state. If it is there, the run goes on from it. It is left
        in place at the end.
      checkpoint_minutes: time between checkpoints, and between looks.
      look: see :data:`Look`.
      progress: called with (stage in words, steps done, steps in all).

    Returns:
      The generator with the averaged parameters.

    Raises:
      ValueError: images do not fit the generator, or classes are missing; before any compute.
      CheckpointError: a :class:`ValueError`; the checkpoint is damaged or of another run.
      PriorTrainingError: a :class:`ValueError`; a loss is not finite.

    Guarantees:
      The same arguments give the same bits on the same device, also if the run was interrupted and
      went on from its checkpoint. With several devices the batch is divided among them.
    """
    options = options or PriorOptions()
    networks = make_networks(
        options,
        channels=dataset.image_shape[2],
        num_classes=dataset.num_classes,
        accelerated=jax.default_backend() != "cpu",
    )
    _check(networks, dataset)
    total = math.ceil(1000 * options.kimg / options.prior_batch)
    run = _Run(key, networks, dataset, total, progress or (lambda stage, done, total: None))
    state, history = run.start(checkpoint)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    while run.done(state) < run.total and time.monotonic() < deadline:
        until = min(deadline, time.monotonic() + 60 * checkpoint_minutes)
        before = history[-1].seconds if history else 0.0
        state, report = run.advance(state, until, before)
        if look is not None:
            report = look(networks.generator, run.averaged(state), report)
        history.append(report)
        if checkpoint is not None:
            records = [dataclasses.asdict(each) for each in history]
            checkpoints.save(checkpoint, jax.device_get(state), records, mark=run.mark)
    return TrainedGenerator(
        generator=networks.generator,
        params=jax.device_get(run.averaged(state)),
        history=tuple(history),
        finished=run.done(state) >= run.total,
    )


def _check(networks: Networks, dataset: Dataset) -> None:
    generator, options = networks.generator, networks.options
    expected = (generator.resolution, generator.resolution)
    if dataset.image_shape[:2] != expected:
        raise ValueError(
            f"the prior makes images of {expected[0]} x {expected[1]} pixels, the data have "
            f"{dataset.image_shape[0]} x {dataset.image_shape[1]}; give --image-size "
            f"{expected[0]}, or another --size."
        )
    if options.conditional and dataset.num_classes < 2:
        raise ValueError(
            f"a conditional prior needs images of several classes, {dataset.name!r} has "
            f"{dataset.num_classes}; leave out --conditional."
        )
    devices = jax.local_device_count()
    if options.prior_batch % devices:
        raise ValueError(
            f"prior_batch={options.prior_batch} cannot be divided among {devices} devices."
        )


class _Run:
    """What stays the same from the first step to the last."""

    def __init__(
        self,
        key: PRNGKeyArray,
        networks: Networks,
        dataset: Dataset,
        total: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._key_init, self._key_steps, self._key_styles = jax.random.split(key, 3)
        self._networks, self._progress, self.total = networks, progress, total
        images = np.asarray(dataset.images)
        if images.dtype != np.uint8:
            images = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
        labels = np.asarray(dataset.labels, np.int32)
        self.mark = _fingerprint(key, networks, images, labels)
        self._mesh = _mesh()
        self._images, self._labels = self._everywhere((jnp.asarray(images), jnp.asarray(labels)))

    def start(self, checkpoint: Path | None) -> tuple[GanState, list[Report]]:
        state, history = jax.jit(self._networks.init)(self._key_init), []
        if checkpoint is not None and (
            found := checkpoints.load(checkpoint, state, mark=self.mark)
        ):
            state, history = found[0], [Report(**record) for record in found[1]]
        return self._everywhere(state), history

    def done(self, state: GanState) -> int:
        return int(state.step)

    def averaged(self, state: GanState) -> PyTree:
        """The averaged parameters, with statistics of their styles."""
        key = jax.random.clone(self._key_styles)  # the same latent codes each time
        styles = style_statistics(self._networks.generator, state.average, key)
        return {**state.average, "styles": styles}

    def advance(self, state: GanState, until: float, seconds: float) -> tuple[GanState, Report]:
        """Steps until a time, or the last one."""
        options, began = self._networks.options, time.monotonic()
        infos: list[GanInfo] = []
        first = step = self.done(state)
        while step < self.total and (time.monotonic() < until or step == first):
            state, info = train_step(
                self._networks,
                state,
                self._images,
                self._labels,
                self._key_steps,
                mesh=self._mesh,
                r1=bool(options.r1_gamma) and step % options.r1_every == 0,
                path_length=bool(options.path_length_weight)
                and step % options.path_length_every == 0,
            )
            infos.append(info)
            step += 1
            if step % _LOG_EVERY == 0:
                self._tell(info, step)
        table = np.asarray(jax.device_get(infos), np.float64)
        passed = time.monotonic() - began
        self._tell(infos[-1], step)
        r1 = table[np.isfinite(table[:, 2]), 2]
        return state, Report(
            step=step,
            kimg=step * options.prior_batch / 1000,
            seconds=seconds + passed,
            images_per_second=(step - first) * options.prior_batch / passed,
            generator_loss=float(table[:, 0].mean()),
            discriminator_loss=float(table[:, 1].mean()),
            r1=float(r1.mean()) if len(r1) else 0.0,
            sign=float(table[:, 4].mean()),
            probability=float(state.probability),
        )

    def _tell(self, info: GanInfo, step: int) -> None:
        losses = float(info.generator_loss), float(info.discriminator_loss)
        if not all(map(math.isfinite, losses)):
            raise PriorTrainingError(
                f"a loss is not finite after {step} steps; lower learning_rate="
                f"{self._networks.options.learning_rate:g} or raise r1_gamma."
            )
        words = f"training, losses {losses[0]:.2f} and {losses[1]:.2f}"
        self._progress(words, step, self.total)

    def _everywhere(self, tree: PyTree) -> PyTree:
        """On all devices of the mesh, if there is one."""
        if self._mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))


def _mesh() -> Mesh | None:
    if jax.local_device_count() == 1:
        return None
    return jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))


def _fingerprint(key: Array, networks: Networks, images: np.ndarray, labels: np.ndarray) -> str:
    # The length of a run decides nothing but where it stops: it may be extended.
    options = dataclasses.replace(networks.options, kimg=1.0)
    digest = hashlib.sha256()
    digest.update(repr((networks.generator, options, jax.__version__)).encode())
    digest.update(np.asarray(jax.random.key_data(key)).tobytes())
    digest.update(images.tobytes() + labels.tobytes())
    return digest.hexdigest()
