"""GIAS: search a generator's latent codes, then its weights. A baseline on the same prior."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd import drive, stages
from jgia.attacks.gifd.drive import Group
from jgia.attacks.gifd.prepare import TrainedGenerator, prepare
from jgia.attacks.gifd.result import reconstruction
from jgia.attacks.gifd.run import Progress, Run, StageResult
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gifd.stages import Anchor, Point, Stage, Weights, make_stage
from jgia.attacks.gradient_matching.checkpoint import digest
from jgia.config.gifd_baselines import GiasOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import GeneratorState, Side, StagedGenerator
from jgia.observation import Observation, Reconstruction

PyTree = Any

_DROPS = (3 / 8, 5 / 8, 7 / 8)  # parts of a phase after which the learning rate is a tenth


def attack_gias(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    *,
    options: GiasOptions | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
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
      run_options: as for :func:`jgia.attacks.gifd.attack`. A checkpoint in the second phase holds
        three times the weights of every copy.
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
      The same key gives the same bits on the same device, whether the run was interrupted and
      resumed from its checkpoint or not (without a budget of seconds). A step from or to numbers
      that are not finite is not taken, nor any after it in that phase.

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
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    chosen = _settings(options)
    client = prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
    alone = 1 if jax.default_backend() == "cpu" else chosen.restarts
    size = performance.microbatch or alone
    groups = [
        Group(
            client.matching, jax.tree.map(lambda leaf, i=i: leaf[i : i + size], client.side), None
        )
        for i in range(0, chosen.restarts, size)
    ]
    plan = _Plan(
        prior=prior,
        options=options,
        settings=chosen,
        factor=prior.generator.resolution // observation.victim.input_shape[0],
        copies=1 if options.gias_copies == "restart" else len(client.matching.labels),
    )
    mark = ""
    if run_options.checkpoint is not None:
        statics = prior.generator, options, observation.victim, observation.threat_model
        mark = digest(statics, (prior.params, groups), key)
    run = Run(
        plan=plan,
        driver=drive.resolve_driver(performance.driver),
        options=run_options,
        mark=mark,
        progress=progress,
    )
    latent, weights = run(groups)
    results = [latent, _WeightResult(**vars(weights))]
    found = reconstruction(client, results, range(chosen.restarts), chosen, prior.name)
    stopped = any(r.losses.shape[1] < n for r, n in zip(results, plan.steps, strict=True))
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """Latent codes, then weights; satisfies :class:`~jgia.attacks.gifd.plan.Plan`."""

    prior: TrainedGenerator
    options: GiasOptions
    settings: Settings
    factor: int
    copies: int

    @property
    def steps(self) -> tuple[int, ...]:
        return self.options.gias_latent_steps, self.options.gias_weight_steps

    @property
    def weights(self) -> Weights:
        return Weights(self.options.gias_tv, 0.0)

    @property
    def budget_seconds(self) -> float | None:
        return self.options.gias_budget_seconds

    def stage(self, index: int, side: Side) -> Stage:
        # Both are stage 0 of a generator: no features enter.
        if not index:
            return make_stage(self.prior.generator, 0, side, self.settings, self.factor)
        every = dataclasses.replace(self.settings, search="all")
        return make_stage(Reweighted(self.prior.generator), 0, side, every, self.factor)

    def params(self, index: int) -> PyTree:
        return () if index else self.prior.params

    def inputs(self, index: int, side: Side) -> Side:
        return _with_weights(self.prior.params, side, self.copies) if index else side

    def radii(self, index: int) -> tuple[float, float, float]:
        del index
        return math.inf, math.inf, math.inf

    def rates(self, index: int, parts: np.ndarray) -> np.ndarray:
        options = self.options
        return step_rates(parts, options.gias_weight_rate if index else options.gias_latent_rate)

    def leave(self, stage: Stage, anchor: Anchor, point: Point) -> tuple[Side, None]:
        return stages.inputs_of(stage, anchor, point)[0], None


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
