"""GGL: search a generator's latent codes without derivatives. A baseline on the same prior."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia.attacks.gifd.ggl_search import Search
from jgia.attacks.gifd.ggl_space import evaluate, make_basis, make_space
from jgia.attacks.gifd.matching import Matching, matching_distance
from jgia.attacks.gifd.prepare import TrainedGenerator, prepare
from jgia.attacks.gifd.result import reconstruction
from jgia.attacks.gifd.run import Progress, check_folders, draw_images
from jgia.attacks.gifd.settings import Settings
from jgia.attacks.gifd.stages import make_stage
from jgia.attacks.gradient_matching.checkpoint import digest
from jgia.attacks.gradient_matching.distances import square
from jgia.config.gifd_baselines import GglOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.generators.protocol import Side
from jgia.observation import Observation, Reconstruction

_MOST_ON_CPU = 10  # candidates evaluated at once: each takes a gradient's memory


def attack_ggl(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    *,
    options: GglOptions | None = None,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
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
      run_options: as for :func:`jgia.attacks.gifd.attack`; a round counts as a step. A checkpoint
        holds the losses so far, from which CMA-ES is taken through its rounds again.
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
      The same key gives the same images on the same device, whether the run was interrupted and
      resumed from its checkpoint or not (without a budget of seconds). The candidate returned was
      evaluated: its images' distance is the one reported, clipping included.

    References:
      Li, Zhang, Liu, Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient
      Leakage" (CVPR 2022, arXiv 2203.15696), section 4; Hansen, "The CMA Evolution Strategy: A
      Tutorial" (2016, arXiv 1604.00772).

    Departures: the start is the prior's center, not a uniform one; a clip bound is replayed if
    asked for (``ggl_replay="all"``) only, because a client's not clipping cannot be seen.
    """
    cma = require_cmaes()
    options = options or GglOptions()
    performance, run_options = performance or PerformanceFlags(), run_options or RunOptions()
    chosen = _settings(options)
    check_folders(run_options)
    seeds = _seeds(key, 2 * options.ggl_restarts)
    client = prepare(key, observation, prior, chosen, num_examples, generator_labels, start_side)
    factor = prior.generator.resolution // observation.victim.input_shape[0]
    one = jax.tree.map(lambda leaf: leaf[0], client.side)
    space = make_space(options, make_stage(prior.generator, 0, one, chosen, factor), client)
    alone = _MOST_ON_CPU if jax.default_backend() == "cpu" else options.ggl_population
    size = min(performance.microbatch or alone, options.ggl_population)
    mark = ""
    if run_options.checkpoint is not None:
        versions = getattr(cma, "__version__", ""), np.__version__
        statics = prior.generator, options, versions, observation.victim, observation.threat_model
        mark = digest(statics, (prior.params, client.matching, client.side), key)
    search = Search(cma, options, size, run_options, mark, progress)
    for r in range(options.ggl_restarts):
        side = jax.tree.map(lambda leaf, r=r: leaf[r], client.side)
        basis = make_basis(space, prior.params, side, client, seeds[2 * r])
        values = functools.partial(evaluate, space, prior.params, client.matching, basis)
        search.restart(values, space.size, seeds[2 * r + 1])
    result = search.result()
    if run_options.dump is not None:
        draw_images(run_options.dump / "stage-0.png", result.images)
    found = reconstruction(client, [result], range(chosen.restarts), chosen, prior.name)
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
