"""GIAS: search a generator's latent codes, then its weights. A baseline on the same prior."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd import drive, stages
from jgia.attacks.gifd.drive import Group
from jgia.attacks.gifd.prepare import TrainedGenerator, prepare
from jgia.attacks.gifd.result import reconstruction
from jgia.attacks.gifd.run import Progress, StageResult
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gifd.stages import Anchor, Stage, State, Weights, make_stage
from jgia.config.gifd_baselines import GiasOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import GeneratorState, Side, StagedGenerator
from jgia.observation import Observation, Reconstruction

PyTree = Any

_DROPS = (3 / 8, 5 / 8, 7 / 8)  # parts of a phase after which the learning rate is a tenth
_STRETCH, _STRETCH_TIMED = 100, 5  # steps between looks at the clock
_NO_BALLS = (math.inf, math.inf, math.inf)


def attack_gias(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    *,
    options: GiasOptions | None = None,
    performance: PerformanceFlags | None = None,
    num_examples: int | None = None,
    generator_labels: ArrayLike | None = None,
    start_side: Side | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    r"""Search latent codes ``z``, then the generator's weights ``w``, for the images.

    ``min_z L(G_w(z))``, then ``min_w L(G_w(z))`` from the ``z`` found and the ``w`` that were
    trained, with ``L(x) = D(T'(update(x)), g*) + tv TV(x)``. Both by Adam, whose learning rate
    falls to a tenth three times. Of all restarts, after either phase, the images with the smallest
    distance of updates are returned.

    Args:
      key: PRNG key. The same key starts from the same latent codes and noise maps as
        :func:`jgia.attacks.gifd.attack`.
      observation: update, parameters that were sent, model, threat model.
      prior: a generator, and its parameters, which stay as they are: copies are searched.
      options: see :class:`~jgia.config.gifd_baselines.GiasOptions`.
      performance: searches at once (``microbatch``; one on CPU, where copies of weights gain
        nothing from company, and all elsewhere when left out), driver.
      num_examples: how many images to search for where the threat model does not tell.
      generator_labels: (B,) classes that a conditional generator is given.
      start_side: side inputs to start from, every leaf (restarts, B, ...).
      progress: called with (steps done, steps in all, smallest loss so far).

    Returns:
      As :func:`jgia.attacks.gifd.attack`, with the two phases as stages: all images of the
      winning restart with status ``matched``, or none with ``nonfinite``.

    Raises:
      ValueError: as :func:`jgia.attacks.gifd.attack`; before any step.

    Guarantees:
      The same key gives the same bits on the same device (without a budget of seconds). A step from
      or to numbers that are not finite is not taken, nor any after it in that phase.

    Edge cases:
      Memory: weights, two moments and the start for every copy. One copy per restart serves all
      images of an update, since the loss is joint; ``gias_copies="image"`` has the original's,
      one per image, which has more freedom when there are several. Weights that the images do not
      depend on, such as a mapping network's, stay where they are.

    References:
      Jeon, Kim, Lee, Oh, Ok, "Gradient Inversion with Generative Image Prior" (NeurIPS 2021, arXiv
      2110.14962), section 3; rates and weights as in GIFD's comparison with it.

    Departures: the better of the two phases is returned, not always the second.
    """
    options = options or GiasOptions()
    performance = performance or PerformanceFlags()
    chosen = _settings(options)
    client = prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
    alone = 1 if jax.default_backend() == "cpu" else chosen.restarts
    size = performance.microbatch or alone
    generator, factor = (
        prior.generator,
        prior.generator.resolution // observation.victim.input_shape[0],
    )
    steps = options.gias_latent_steps, options.gias_weight_steps
    search = _Search(
        weights=Weights(options.gias_tv, 0.0),
        driver=drive.resolve_driver(performance.driver),
        total=sum(steps),
        budget=options.gias_budget_seconds,
        progress=progress,
    )

    def stage(generator: StagedGenerator, side: Side, chosen: Settings) -> Stage:
        one = jax.tree.map(lambda leaf: leaf[0], side)
        return make_stage(generator, 0, one, chosen, factor)

    groups = [
        Group(
            client.matching, jax.tree.map(lambda leaf, i=i: leaf[i : i + size], client.side), None
        )
        for i in range(0, chosen.restarts, size)
    ]
    first = stage(generator, groups[0].side, chosen)
    latent, sides = search(first, prior.params, groups, steps[0], options.gias_latent_rate)
    copies = 1 if options.gias_copies == "restart" else len(client.matching.labels)
    groups = [
        Group(client.matching, _with_weights(prior.params, side, copies), None) for side in sides
    ]
    second = stage(Reweighted(generator), groups[0].side, dataclasses.replace(chosen, search="all"))
    weights, _ = search(second, (), groups, steps[1], options.gias_weight_rate)
    results = [latent, _WeightResult(**vars(weights))]
    found = reconstruction(client, results, range(chosen.restarts), chosen, prior.name)
    stopped = any(r.losses.shape[1] < n for r, n in zip(results, steps, strict=True))
    stats = {"settings": dataclasses.asdict(options), "stopped_early": stopped}
    return dataclasses.replace(found, stats={**found.stats, **stats})


def _settings(options: GiasOptions) -> Settings:
    """What the parts that GIAS shares with GIFD have to know."""
    return Settings(
        last_stage=0,
        num_steps=options.gias_latent_steps,
        restarts=options.gias_restarts,
        learning_rate=options.gias_latent_rate,
        search="all" if options.gias_noise else "features_styles",
        radius_mode="none",
        distance=options.gias_distance,
        total_variation=options.gias_tv,
        image_l2=0.0,
        labels=options.gias_labels,
        replay=options.gias_replay,
    )


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """A generator of one block whose weights are side inputs, so that a stage can search them.

    Its side inputs are ``"weights"``, the parameters with a first axis of 1, for a copy that all
    images share, or of B, for one of each; and ``"latents"``, the generator's own.

    Attributes:
      generator: whose weights they are.
    """

    generator: StagedGenerator
    num_blocks: int = 1

    @property
    def resolution(self) -> int:
        """As the generator's."""
        return self.generator.resolution

    @property
    def channels(self) -> int:
        """As the generator's."""
        return self.generator.channels

    @property
    def num_classes(self) -> int:
        """As the generator's."""
        return self.generator.num_classes

    def draw(
        self, params: PyTree, key: Array, num_images: int, labels: Array | None = None
    ) -> Side:
        """The parameters themselves, and random side inputs of the generator."""
        latents = self.generator.draw(params, key, num_images, labels)
        return {"weights": jax.tree.map(lambda leaf: leaf[None], params), "latents": latents}

    def run(
        self,
        params: PyTree,
        side: Side,
        state: GeneratorState | None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> GeneratorState:
        """All blocks of the generator; ``params`` are not looked at."""
        del params
        if state is not None or start or stop not in (None, 1):
            raise ValueError(f"there is one block, entered at 0; got start={start}, stop={stop}.")
        return _with_own(lambda w, s: self.generator.run(w, s, None), side, side["latents"])

    def image(self, params: PyTree, side: Side, state: GeneratorState) -> Array:
        """As the generator's, with the weights given."""
        del params
        inputs = side["latents"], state
        return _with_own(lambda w, pair: self.generator.image(w, *pair), side, inputs)

    def free(self, side: Side, stage: int) -> Side:
        """The weights."""
        del stage
        return {
            "weights": jax.tree.map(lambda _: True, side["weights"]),
            "latents": jax.tree.map(lambda _: False, side["latents"]),
        }


def _with_own(function: Callable[[PyTree, PyTree], PyTree], side: Side, inputs: PyTree) -> PyTree:
    """``function(weights, inputs)``, image by image where each has weights of its own."""
    weights = side["weights"]
    if jax.tree.leaves(weights)[0].shape[0] == 1:
        return function(jax.tree.map(lambda leaf: leaf[0], weights), inputs)

    def one(weights: PyTree, inputs: PyTree) -> PyTree:
        batch = function(weights, jax.tree.map(lambda leaf: leaf[None], inputs))
        return jax.tree.map(lambda leaf: leaf[0], batch)

    return jax.vmap(one)(weights, inputs)


def _with_weights(params: PyTree, side: Side, copies: int) -> Side:
    """Side inputs of a group of the second phase."""
    searches = jax.tree.leaves(side)[0].shape[0]
    weights = jax.tree.map(
        lambda leaf: jnp.broadcast_to(
            jnp.asarray(leaf)[None, None], (searches, copies, *jnp.shape(leaf))
        ),
        params,
    )
    return {"weights": weights, "latents": side}


class _WeightResult(StageResult):
    """The second phase's."""

    def name(self) -> str:
        """What was searched."""
        return "generator weights"


class _Search:
    """Runs the phases, one call for each, against one clock."""

    def __init__(
        self,
        *,
        weights: Weights,
        driver: Literal["python", "scan"],
        total: int,
        budget: float | None,
        progress: Progress | None,
    ) -> None:
        self.weights, self.total = weights, total
        self.driver: Literal["python", "scan"] = driver
        self.budget, self.progress = budget, progress
        self.seconds, self.done, self.least = 0.0, 0, math.inf

    def __call__(
        self, stage: Stage, params: PyTree, groups: list[Group], steps: int, rate: float
    ) -> tuple[StageResult, list[Side]]:
        """A phase: its result, and the groups' side inputs at its end."""
        share = math.inf
        if self.budget is not None:
            share = max(self.budget - self.seconds, 0.0) * steps / (self.total - self.done)
        begun = [drive.begin(stage, group.side, group.state, _NO_BALLS) for group in groups]
        searches = [_Begun(group, *pair) for group, pair in zip(groups, begun, strict=True)]
        losses = np.zeros((sum(len(s.state.alive) for s in searches), 0), np.float32)
        spent = pace = 0.0
        stretch = _STRETCH if self.budget is None else _STRETCH_TIMED
        while (done := losses.shape[1]) < steps and not (done and spent >= share):
            count = min(stretch, steps - done)
            ahead = np.arange(count)
            parts = np.maximum((done + ahead) / steps, (spent + ahead * pace) / max(share, 1e-9))
            rates = step_rates(parts, rate)
            began = time.monotonic()
            columns = []
            for i, (group, anchor, state) in enumerate(searches):
                state, values = drive.advance(
                    stage,
                    self.weights,
                    params,
                    group.matching,
                    anchor,
                    state,
                    rates,
                    driver=self.driver,
                )
                searches[i] = _Begun(group, anchor, state)
                columns.append(values)
            took = time.monotonic() - began
            pace = took / count if done else 0.0  # the first steps compile
            spent += took
            losses = np.concatenate([losses, np.concatenate(columns)], axis=1)
            self._tell(self.done + losses.shape[1], losses)
        self.done, self.seconds = self.done + steps, self.seconds + spent
        return self._result(stage, params, searches, losses, spent)

    def _result(
        self,
        stage: Stage,
        params: PyTree,
        searches: list[_Begun],
        losses: np.ndarray,
        seconds: float,
    ) -> tuple[StageResult, list[Side]]:
        images = [drive.images(stage, params, s.anchor, s.state.point) for s in searches]
        fits = [
            drive.distances(self.weights, s.group.matching, pixels)
            for s, pixels in zip(searches, images, strict=True)
        ]
        sides = [stages.inputs_of(stage, s.anchor, s.state.point)[0] for s in searches]
        result = StageResult(
            distances=np.concatenate(jax.device_get(fits)),
            images=np.concatenate(jax.device_get(images)).astype(np.float32),
            losses=losses,
            alive=np.concatenate([np.asarray(s.state.alive) for s in searches]),
            shape=(),
            seconds=seconds,
        )
        return result, sides

    def _tell(self, now: int, losses: np.ndarray) -> None:
        finite = losses[np.isfinite(losses)]
        self.least = min(self.least, float(finite.min())) if finite.size else self.least
        if self.progress is not None:
            self.progress(now, self.total, self.least)


class _Begun(NamedTuple):
    """A group on its way."""

    group: Group
    anchor: Anchor
    state: State


def step_rates(progress: np.ndarray, learning_rate: float) -> np.ndarray:
    """Learning rates at parts of a phase: a tenth after 3/8, 5/8 and 7/8 of it.

    Args:
      progress: parts done, in [0, 1].
      learning_rate: the first.

    >>> step_rates(np.array([0.0, 0.375, 1.0]), 1.0).round(6).tolist()
    [1.0, 0.1, 0.001]
    """
    drops = np.sum(progress[:, None] >= np.asarray(_DROPS)[None], axis=1)
    return learning_rate * 10.0**-drops
