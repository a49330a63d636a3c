"""Observation in, reconstruction out: leak, then invert."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from jgia.attacks.ares.invert import invert
from jgia.attacks.ares.leak import leak
from jgia.attacks.ares.plan import Plan, read_plan
from jgia.config import AresOptions, PerformanceFlags
from jgia.observation import Observation, Reconstruction


def attack(
    key: Array,
    observation: Observation,
    *,
    plan: Plan | None = None,
    options: AresOptions | None = None,
    performance: PerformanceFlags | None = None,
    noise_std: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Rebuild the images behind one update that was computed on crafted parameters.

    Args:
      key: PRNG key.
      observation: update, parameters that were sent, model, threat model.
      plan: from :func:`craft`; read off the parameters when left out.
      options: see :class:`AresOptions`.
      performance: see :class:`PerformanceFlags`.
      noise_std: noise that a defense is known to add to every entry; what the threat model
        declares when left out.
      progress: called with the number of candidates finished.

    Returns:
      A :class:`Reconstruction`; empty if nothing in the update is one example.

    Raises:
      ValueError: the architecture cannot carry the attack, the update does not fit, or the
        threat model does not allow a malicious server.
    """
    if observation.threat_model.server != "malicious":
        raise ValueError(
            "ARES needs a server that chooses the parameters it sends "
            "(ThreatModel(server='malicious')); the observation is of an honest-but-curious one."
        )
    if plan is None:
        plan = read_plan(observation.victim, observation.params)
    options = options or AresOptions()
    if noise_std is None:
        noise_std = observation.threat_model.noise_std
    candidates = leak(observation, plan, noise_std=noise_std, first_layer=options.first_layer)
    return invert(
        key,
        candidates,
        plan,
        observation.victim,
        options=options,
        performance=performance,
        progress=progress,
    )
