"""Label mapping: which of a conditional prior's classes a client's image looks like.

The classes that the clients are taught (of the federated model) and those that a prior was trained
on differ. A first, coarse search shows about what an image is; a classifier of the prior's classes
names it; a second search starts from the same latent codes, with that class.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia import _checks
from jgia.attacks.gifd.attack import attack
from jgia.attacks.gifd.prepare import TrainedGenerator
from jgia.attacks.gifd.run import Progress
from jgia.attacks.gifd.settings import Settings, settings
from jgia.attacks.labels.known import example_count, given_or_inferred
from jgia.config.gifd import GifdOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction, check_params

PyTree = Any


def attack_with_label_mapping(
    key: Array,
    observation: Observation,
    prior: TrainedGenerator,
    classifier: Victim,
    classifier_params: PyTree,
    *,
    options: GifdOptions | Settings | None = None,
    coarse_steps: int = 100,
    candidates: int = 1,
    performance: PerformanceFlags | None = None,
    run_options: RunOptions | None = None,
    num_examples: int | None = None,
    coarse_labels: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """GIFD twice: coarsely with any class, then with the classes that the coarse images look like.

    The prior's classes steer the generator alone. Updates are matched with the victim's labels,
    given or inferred, in every pass.

    Args:
      key: PRNG key. All passes use it: they start from the same latent codes.
      observation: update, parameters that were sent, model, threat model.
      prior: a conditional generator, and its parameters.
      classifier: of the prior's classes, for images of the victim's shape; see
        :func:`jgia.training.load_victim`.
      classifier_params: its parameters.
      options: of the second pass; as for :func:`jgia.attacks.gifd.attack`. ``budget_steps`` and
        ``budget_seconds`` are for all passes together, in proportion to their steps.
      coarse_steps: of every stage in the first pass.
      candidates: how many classes to try, each in a pass of its own: pass j gives every image its
        j-th most likely class. The pass with the smallest gradient distance wins.
      performance: as for :func:`jgia.attacks.gifd.attack`.
      run_options: likewise; each pass has a checkpoint (``name-coarse``, ``name-fine-1``, ...) and
        a folder of pictures (``coarse``, ``fine-1``, ...) of its own.
      num_examples: how many images to search for where the threat model does not tell.
      coarse_labels: (B,) classes for the first pass; the victim's labels modulo the number of the
        prior's classes when left out. They need not mean anything.
      progress: called with (steps done, steps in all, smallest loss so far).

    Returns:
      The winning pass's reconstruction. ``stats["label_mapping"]`` holds what each pass was given
      and found: ``coarse_labels``, ``coarse_distance``, ``classes`` (candidates, B) with their
      ``probabilities``, ``distances`` of the fine passes, ``chosen`` (row of ``classes``), and
      ``steps`` of all passes.

    Raises:
      ValueError: the prior is not conditional, the classifier is not for its classes or not for
        images of this shape, there are fewer classes than candidates, or as
        :func:`jgia.attacks.gifd.attack`; before any step.

    Edge cases:
      A coarse pass that left the finite numbers has no image to classify; it is what is returned.

    References:
      Fang et al., "Enhancing Gradient Inversion Attacks in Federated Learning via Hierarchical
      Feature Optimization" (2026, arXiv 2604.00955), label mapping.

    Departures: the released code matches the update with the mapped class, too, which is of
    another set of classes; here the two labels are kept apart. It tries one class.
    """
    _checks.at_least(1, coarse_steps=coarse_steps, candidates=candidates)
    generator, shape = prior.generator, observation.victim.input_shape
    _check_classifier(classifier, classifier_params, generator.num_classes, shape, candidates)
    if not isinstance(options, Settings):
        options = settings(options, generator=generator)
    coarse, fine = _shared_out(options, coarse_steps, candidates)
    if coarse_labels is None:
        # The same key as in the attack, so the same labels: ties are broken alike.
        count = example_count(observation, num_examples)
        own, _ = given_or_inferred(
            jax.random.split(jax.random.clone(key))[0], observation, options.labels, count
        )
        coarse_labels = np.asarray(own) % generator.num_classes
    lengths = [sum(s.steps_of(k) for k in range(s.last_stage + 1)) for s in (coarse, fine)]
    told = _Told(progress, lengths[0] + candidates * lengths[1])

    def search(name: str, chosen: Settings, classes: ArrayLike) -> Reconstruction:
        found = attack(
            jax.random.clone(key),  # meant: the same start in every pass
            observation,
            prior,
            options=chosen,
            performance=performance,
            run_options=_own(run_options or RunOptions(), name),
            num_examples=num_examples,
            generator_labels=classes,
            progress=told,
        )
        told.next_pass(lengths[0] if name == "coarse" else lengths[1])
        return found

    first = search("coarse", coarse, coarse_labels)
    record: dict[str, Any] = {
        "coarse_labels": np.asarray(coarse_labels).tolist(),
        "coarse_distance": _distance(first),
        "classes": [],
        "probabilities": [],
        "distances": [],
        "chosen": None,
        "steps": sum(first.stats["stage_steps"]),
    }
    if not len(first.images):
        return dataclasses.replace(first, stats={**first.stats, "label_mapping": record})
    classes, probabilities = map_labels(classifier, classifier_params, first.images, candidates)
    passes = [search(f"fine-{j}", fine, row) for j, row in enumerate(classes, start=1)]
    distances = [_distance(found) for found in passes]
    best = int(np.argmin([np.inf if d is None else d for d in distances]))
    record |= {
        "classes": classes.tolist(),
        "probabilities": probabilities.tolist(),
        "distances": distances,
        "chosen": best,
        "steps": record["steps"] + sum(sum(found.stats["stage_steps"]) for found in passes),
    }
    stats = {**passes[best].stats, "label_mapping": record}
    return dataclasses.replace(passes[best], stats=stats)


def map_labels(
    classifier: Victim, params: PyTree, images: ArrayLike, candidates: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that images look like.

    Args:
      classifier: a model of the classes, which normalizes pixels as it was trained to.
      params: its parameters.
      images: (B, H, W, C) pixels in [0, 1].
      candidates: how many classes of each.

    Returns:
      (classes, probabilities), each (candidates, B), most likely first.
    """
    logits = _logits(classifier, params, jnp.asarray(images))
    probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), candidates)
    return np.asarray(classes).T, np.asarray(probabilities).T


@functools.partial(jax.jit, static_argnums=0)
def _logits(classifier: Victim, params: PyTree, images: Array) -> Array:
    return classifier.apply(params, classifier.normalization.normalize(images))


def _check_classifier(
    classifier: Victim, params: PyTree, classes: int, shape: tuple[int, ...], candidates: int
) -> None:
    if not classes:
        raise ValueError(
            "label mapping needs a conditional prior, and this one has no classes; attack without "
            "it, or take a conditional prior."
        )
    if classifier.num_classes != classes:
        raise ValueError(
            f"the classifier must tell the prior's {classes} classes apart, and has "
            f"{classifier.num_classes}; train one on the images that the prior was trained on."
        )
    if classifier.input_shape != shape:
        raise ValueError(
            f"the classifier must take images of the victim's shape {shape}, and takes "
            f"{classifier.input_shape}; train one at that size."
        )
    if candidates > classes:
        raise ValueError(
            f"candidates={candidates} are more than the prior's {classes} classes; give at most "
            f"{classes}."
        )
    check_params(params, classifier)


def _shared_out(chosen: Settings, coarse_steps: int, candidates: int) -> tuple[Settings, Settings]:
    """Settings of the first and of the other passes, with the budgets divided."""
    stages = chosen.last_stage + 1
    coarse = dataclasses.replace(chosen, num_steps=coarse_steps, budget_steps=None)
    fine = chosen
    if chosen.budget_steps is not None:
        each = (chosen.budget_steps - coarse_steps * stages) // candidates
        if each < stages:
            raise ValueError(
                f"budget_steps={chosen.budget_steps} do not suffice for {stages} stages of "
                f"{coarse_steps} coarse steps and {candidates} fine passes of at least {stages} "
                "steps; give more, or fewer coarse steps."
            )
        fine = dataclasses.replace(chosen, budget_steps=each)
    if chosen.budget_seconds is not None:
        fine_steps = sum(fine.steps_of(k) for k in range(stages))
        part = chosen.budget_seconds / (coarse_steps * stages + candidates * fine_steps)
        coarse = dataclasses.replace(coarse, budget_seconds=part * coarse_steps * stages)
        fine = dataclasses.replace(fine, budget_seconds=part * fine_steps)
    return coarse, fine


def _own(options: RunOptions, name: str) -> RunOptions:
    """A pass's files, apart from those of the others."""
    path, folder = options.checkpoint, options.dump
    return dataclasses.replace(
        options,
        checkpoint=None if path is None else path.with_name(f"{path.stem}-{name}{path.suffix}"),
        dump=None if folder is None else folder / name,
    )


def _distance(found: Reconstruction) -> float | None:
    return -float(found.scores[0]) if len(found.images) else None


class _Told:
    """Progress of one pass as that of all."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.before = progress, total, 0

    def __call__(self, done: int, total: int, least: float) -> None:
        del total
        if self.progress is not None:
            self.progress(self.before + done, self.total, least)

    def next_pass(self, length: int) -> None:
        self.before += length
