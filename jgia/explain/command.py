"""Explanations for ``jgia risk``: checks before anything runs, then one defense after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jgia.config.risk import RiskConfig
from jgia.explain.declared import check_explained
from jgia.explain.explain import explain_defense
from jgia.explain.predict import LARGEST_INPUTS, check_dense, dense_bytes
from jgia.explain.records import explanation_rows
from jgia.models import Victim, make_victim
from jgia.risk import Prior, Release

PyTree = Any
Progress = Callable[[str, int, int], None]


def check_explanations(config: RiskConfig, victim: Victim, release: Release) -> None:
    """Raise ``ValueError`` where a defense does not fit the release, or the matrices are too large.

    The message names an image size that fits, if there is one.
    """
    for name in config.explain.explain:
        check_explained(config.explain.options(name), release)
    memory = int(config.memory_gib * 2**30)
    try:
        check_dense(*_sizes(config, victim, release), memory_bytes=memory)
    except ValueError as error:
        fitting = None if config.trained else _fitting(config, victim, release, memory)
        advice = "no --image-size fits." if fitting is None else f"--image-size {fitting} fits."
        raise ValueError(f"{error} {advice}") from None


def _sizes(config: RiskConfig, victim: Victim, release: Any) -> tuple[int, int]:
    """Shared numbers and pixels; nothing is computed."""
    batch = () if config.together == 1 else (config.together,)
    image = jax.ShapeDtypeStruct((*batch, *victim.input_shape), jnp.float32)
    label = jax.ShapeDtypeStruct(batch, jnp.int32)
    shared = jax.eval_shape(release, victim.param_shapes(), image, label)
    return sum(leaf.size for leaf in jax.tree.leaves(shared)), image.size


def _fitting(config: RiskConfig, victim: Victim, release: Any, memory: int) -> int | None:
    """The largest multiple of 4 below the image's side at which an explanation fits."""
    height, _, channels = victim.input_shape
    for side in range((height - 1) // 4 * 4, 3, -4):
        if config.together * side * side * channels > LARGEST_INPUTS:
            continue
        try:
            smaller = make_victim(
                config.model.model,
                input_shape=(side, side, channels),
                num_classes=victim.num_classes,
                normalization=victim.normalization,
                **config.model.architecture(),
            )
            moved = dataclasses.replace(release, victim=smaller)
            outputs, inputs = _sizes(config, smaller, moved)
        except ValueError:
            continue  # the model does not take images of this size
        if dense_bytes(outputs, inputs) <= memory:
            return side
    return None


def explain_inputs(
    key: PRNGKeyArray,
    config: RiskConfig,
    release: Release,
    params: PyTree,
    inputs: np.ndarray,
    labels: np.ndarray,
    prior: Prior,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The section ``explanations`` of ``risk.json``: a row without a defense, and one for each.

    Every input has the same keys under every defense, so that differences are those of defenses.
    """
    options = config.explain
    defenses = [None, *(options.options(name) for name in options.explain)]
    keys = [jax.random.fold_in(key, index) for index in range(len(inputs))]
    found = []
    for done, defense in enumerate(defenses):
        progress("explaining defenses", done, len(defenses))
        found.append(
            [
                explain_defense(
                    jax.random.clone(one),
                    defense,
                    release,
                    params,
                    image,
                    label,
                    prior=prior,
                    noise_std=config.noise_std,
                    num_draws=options.explain_draws,
                    chunk_size=config.chunk_size,
                    memory_bytes=int(config.memory_gib * 2**30),
                )
                for one, image, label in zip(keys, inputs, labels, strict=True)
            ]
        )
    return explanation_rows(found)
