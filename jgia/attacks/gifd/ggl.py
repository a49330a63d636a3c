"""GGL: search a generator's latent codes without derivatives. A baseline on the same prior."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.ggl_space import evaluate, make_basis, make_space
from jgia.attacks.gifd.matching import Matching, matching_distance
from jgia.attacks.gifd.prepare import TrainedGenerator, prepare
from jgia.attacks.gifd.result import reconstruction
from jgia.attacks.gifd.run import Progress, StageResult
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gifd.stages import make_stage
from jgia.attacks.gradient_matching.distances import square
from jgia.config.gifd_baselines import GglOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import Side
from jgia.observation import History, Observation, Reconstruction

_MOST_ON_CPU = 10  # candidates evaluated at once: each takes a gradient's memory
_WORST = 1e30  # instead of a loss that is not finite
_FRAMES = 8


def attack_ggl(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    *,
    options: GglOptions | None = None,
    performance: PerformanceFlags | None = None,
    num_examples: int | None = None,
    generator_labels: ArrayLike | None = None,
    start_side: Side | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    r"""Search a latent vector by CMA-ES: candidates are drawn and compared, nothing is derived.

    ``min_u D(T'(update(G(tanh u))), g*) + kld K(tanh u)``, where ``G`` takes normal vectors. What
    they are depends on the generator:

    - ``latent``: the vector ``z`` before a mapping network; all layers get the style it maps to.
    - ``side``: what stage 0 of GIFD searches, but no noise maps: a BigGAN's ``z``, or styles. The
      values are ``mean + deviation * tanh u``, with mean and deviation of each entry over 256
      random draws, so that any generator's are searched in a unit of their own.

    The search starts at ``u = 0`` with standard deviation ``ggl_sigma``. Noise maps and classes are
    those of GIFD's restart with the same key. Several images of one update are one vector.

    Args:
      key: PRNG key. CMA-ES draws from NumPy generators seeded with it; no global state is used.
      observation: update, parameters that were sent, model, threat model.
      prior: a generator, and its parameters.
      options: see :class:`~jgia.config.gifd_baselines.GglOptions`.
      performance: candidates evaluated at once (``microbatch``; ten on CPU and a whole population
        elsewhere when left out).
      num_examples: how many images to search for where the threat model does not tell.
      generator_labels: (B,) classes that a conditional generator is given.
      start_side: side inputs whose noise and classes are used, every leaf (restarts, B, ...).
      progress: called with (rounds done, rounds in all, smallest loss so far).

    Returns:
      As :func:`jgia.attacks.gifd.attack`, with one stage. ``stats`` also holds the number of
      ``evaluations``; how often CMA-ES had converged and was started anew, after which the best
      candidate stays (``begun_anew``); and the ``cosine_distance`` of the images returned, which
      compares with other attacks' where another distance was searched.

    Raises:
      ImportError: the ``ggl`` extra is not installed.
      ValueError: as :func:`jgia.attacks.gifd.attack`, or the generator has no normal vector and
        ``ggl_space="latent"``; before any step.

    Guarantees:
      The same key gives the same images on the same device (without a budget of seconds). The
      candidate returned was evaluated: its images' distance is the one reported, clipping
      included.

    References:
      Li, Zhang, Liu, Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient
      Leakage" (CVPR 2022, arXiv 2203.15696), section 4; Hansen, "The CMA Evolution Strategy: A
      Tutorial" (2016, arXiv 1604.00772).

    Departures: the start is the prior's center, not a uniform one; a clip bound is replayed if
    asked for (``ggl_replay="all"``) only, because a client's not clipping cannot be seen.
    """
    cma = require_cmaes()
    options = options or GglOptions()
    performance = performance or PerformanceFlags()
    chosen = _settings(options)
    seeds = _seeds(key, 2 * options.ggl_restarts)
    client = prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
    factor = prior.generator.resolution // observation.victim.input_shape[0]
    one = jax.tree.map(lambda leaf: leaf[0], client.side)
    space = make_space(options, make_stage(prior.generator, 0, one, chosen, factor), client)
    alone = _MOST_ON_CPU if jax.default_backend() == "cpu" else options.ggl_population
    size = min(performance.microbatch or alone, options.ggl_population)
    search = _Search(cma, options, size, progress)
    for r in range(options.ggl_restarts):
        side = jax.tree.map(lambda leaf, r=r: leaf[r], client.side)
        basis = make_basis(space, prior.params, side, client, seeds[2 * r])
        values = functools.partial(evaluate, space, prior.params, client.matching, basis)
        search.restart(values, space.size, seeds[2 * r + 1])
    found = reconstruction(client, [search.result()], range(chosen.restarts), chosen, prior.name)
    stats = {
        "settings": dataclasses.asdict(options),
        "space": "latent" if space.mapped else "side",
        "evaluations": search.evaluations,
        "begun_anew": search.begun_anew,
        "stopped_early": search.rounds < options.ggl_restarts * options.ggl_rounds,
        "cosine_distance": _cosine(client.matching, found.images),
    }
    history = search.histories[found.stats["restart"]]
    return dataclasses.replace(found, stats={**found.stats, **stats}, history=history)


def require_cmaes() -> Any:
    """The optional package that GGL's search comes from.

    Raises:
      ImportError: the ``ggl`` extra is not installed.
    """
    try:
        return importlib.import_module("cmaes")
    except ImportError as error:
        raise ImportError(
            'ggl needs an optional package; install it with: pip install "jgia[ggl]"'
        ) from error


def _settings(options: GglOptions) -> Settings:
    """What the parts that GGL shares with GIFD have to know."""
    return Settings(
        last_stage=0,
        num_steps=options.ggl_rounds,
        restarts=options.ggl_restarts,
        search="features_styles",
        radius_mode="none",
        distance=options.ggl_distance,
        total_variation=0.0,
        image_l2=0.0,
        labels=options.ggl_labels,
        replay=options.ggl_replay,
    )


def _seeds(key: Array, count: int) -> list[int]:
    data = key if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.key_data(key)
    words = np.asarray(data, np.uint32).ravel().tolist()
    return np.random.SeedSequence(words).generate_state(count).tolist()


def _cosine(matching: Matching, images: np.ndarray) -> float | None:
    if not len(images):
        return None
    length = square(matching.update)
    matching = dataclasses.replace(matching, distance="cosine", target_square=length)
    pixels = jnp.asarray(images, length.dtype)
    return float(_distance(matching, matching.victim.normalization.normalize(pixels)))


_distance = jax.jit(matching_distance)


class _Result(StageResult):
    """One stage, whose steps are rounds."""

    def name(self) -> str:
        """What was searched."""
        return "latent codes, by CMA-ES"


class _Search:
    """Runs the restarts one after the other, and keeps the best candidate of each."""

    def __init__(self, cma: Any, options: GglOptions, size: int, progress: Progress | None) -> None:
        self.cma, self.options, self.size, self.progress = cma, options, size, progress
        self.evaluations = self.begun_anew = self.rounds = 0
        self.seconds, self.least = 0.0, math.inf
        self.histories: list[History] = []
        self._bests: list[_Best] = []

    def restart(self, evaluate: Callable[..., Any], length: int, seed: int) -> None:
        """One search of vectors of so many entries."""
        options, best = self.options, _Best()
        share = math.inf
        if options.ggl_budget_seconds is not None:
            left = max(options.ggl_budget_seconds - self.seconds, 0.0)
            share = left / (options.ggl_restarts - len(self._bests))
        seeds = np.random.SeedSequence(seed)
        strategy = self._strategy(length, seeds)
        shown = np.linspace(1, options.ggl_rounds, min(_FRAMES, options.ggl_rounds)).round()
        began, curve = time.monotonic(), []
        frames: dict[int, np.ndarray] = {}
        for done in range(1, options.ggl_rounds + 1):
            if done > 1 and time.monotonic() - began >= share:
                break
            vectors = np.stack([strategy.ask() for _ in range(options.ggl_population)])
            losses = self._values(evaluate, vectors, best)
            finite = np.isfinite(losses)
            strategy.tell(
                list(zip(vectors, np.where(finite, losses, _WORST).tolist(), strict=True))
            )
            curve.append(losses[finite].min() if finite.any() else math.nan)
            if strategy.should_stop():
                strategy = self._strategy(length, seeds)
                self.begun_anew += 1
            if done in shown:
                frames[done] = best.images
            self._tell(best.loss)
        frames[len(curve)] = best.images
        self.seconds += time.monotonic() - began
        self._bests.append(best)
        self.histories.append(
            History(
                steps=np.arange(1, len(curve) + 1),
                losses=np.asarray(curve, np.float32),
                frame_steps=np.asarray(list(frames)),
                frames=np.stack(list(frames.values())),
            )
        )

    def result(self) -> StageResult:
        """All restarts as one stage; curves of those that time cut short end in NaN."""
        longest = max(len(history.losses) for history in self.histories)
        curves = [
            np.pad(history.losses, (0, longest - len(history.losses)), constant_values=np.nan)
            for history in self.histories
        ]
        return _Result(
            distances=np.asarray([best.fit for best in self._bests]),
            images=np.stack([best.images for best in self._bests]),
            losses=np.stack(curves),
            alive=np.asarray([math.isfinite(best.fit) for best in self._bests]),
            shape=(),
            seconds=self.seconds,
        )

    def _strategy(self, length: int, seeds: np.random.SeedSequence) -> Any:
        (own,) = seeds.spawn(1)
        return self.cma.CMA(
            mean=np.zeros(length),
            sigma=self.options.ggl_sigma,
            population_size=self.options.ggl_population,
            seed=int(own.generate_state(1)[0]),
        )

    def _values(self, evaluate: Callable[..., Any], vectors: np.ndarray, best: _Best) -> np.ndarray:
        """(P,) losses; the best candidate is kept."""
        collected = []
        for start in range(0, len(vectors), self.size):
            rows = vectors[start : start + self.size]
            short = self.size - len(rows)  # filled up, so that nothing compiles twice
            rows = np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)])
            losses, fits, pixels = evaluate(jnp.asarray(rows, "float32"))
            losses = np.asarray(losses, np.float64)[: self.size - short]
            best.update(losses, fits, pixels)
            collected.append(losses)
        self.evaluations += len(vectors)
        return np.concatenate(collected)

    def _tell(self, loss: float) -> None:
        self.rounds += 1
        self.least = min(self.least, loss)
        if self.progress is not None:
            total = self.options.ggl_restarts * self.options.ggl_rounds
            self.progress(self.rounds, total, self.least)


class _Best:
    """The best candidate so far."""

    def __init__(self) -> None:
        self.loss, self.fit = math.inf, math.nan
        self.images = np.zeros(())

    def update(self, losses: np.ndarray, fits: Array, pixels: Array) -> None:
        """Look at some candidates."""
        if not self.images.ndim:
            self.images = np.zeros(pixels.shape[1:], np.float32)
        least = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
        if losses[least] < self.loss:
            self.loss, self.fit = float(losses[least]), float(fits[least])
            self.images = np.asarray(pixels[least], np.float32)
