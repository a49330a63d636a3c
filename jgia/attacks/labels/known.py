"""What a search has to know before it starts: how many images, and their labels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jgia.attacks.labels.infer import LabelInference, infer_labels
from jgia.observation import Observation


def example_count(observation: Observation, given: int | None) -> int:
    """How many images to search for.

    Args:
      observation: its threat model may tell.
      given: by the caller, where the threat model does not.

    Raises:
      ValueError: neither tells, they differ, or it is less than 1.
    """
    known = observation.threat_model.num_examples
    count = known if given is None else given
    if count is None:
        raise ValueError(
            "gradient matching searches for a fixed number of images, and the threat model does "
            "not tell how many; give num_examples=."
        )
    if known is not None and count != known:
        raise ValueError(f"num_examples={count} contradicts the threat model, which says {known}.")
    if count < 1:
        raise ValueError(f"num_examples must be at least 1, got {count}.")
    return count


def given_or_inferred(
    key: Array, observation: Observation, method: LabelInference, count: int
) -> tuple[Array, str]:
    """(B,) labels, and how they were found: ``"given"``, or the method's name.

    Args:
      key: PRNG key of the inference.
      observation: its threat model may give labels.
      method: see :func:`~jgia.attacks.labels.infer_labels`.
      count: B.

    Raises:
      ValueError: labels that are given do not fit, or cannot be inferred.
    """
    given = observation.threat_model.labels
    if given is not None:
        if len(given) != count or max(given) >= observation.victim.num_classes:
            raise ValueError(
                f"the threat model must give {count} labels below "
                f"{observation.victim.num_classes}, got {given}."
            )
        return jnp.asarray(given, jnp.int32), "given"
    found = infer_labels(key, observation, method=method, num_examples=count)
    return jnp.asarray(found.labels, jnp.int32), found.method
