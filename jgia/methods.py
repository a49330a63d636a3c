"""Every attack behind one interface: what the server sends, and what it reads out of the answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jgia._clock import StageClock
from jgia.attacks import analytic, ares, gauss_newton, gifd, gradient_matching, imprint
from jgia.config import AttackConfig, AttackName, AuditConfig, ClientConfig
from jgia.generators.prior import Prior, bundled_priors, load_prior
from jgia.models import Victim
from jgia.observation import Observation, Reconstruction
from jgia.training import load_victim

PyTree = Any

Progress = Callable[[str, int, int], None]
"""Called with (stage in words, steps done, steps in all)."""


Options = AuditConfig | AttackConfig
"""Commands that run an attack: both hold the options of every one."""


class Job(NamedTuple):
    """What an attack is given, and whom it tells how it goes.

    Attributes:
      observation: what the attacker holds.
      plan: what the server remembers of crafting; ``None`` where it did not.
      options: of the command.
      clock: counts the stages ``leak_s``, ``invert_s`` and ``search_s``.
      report: see :data:`Progress`.
      public: (N, H, W, C) public images in [0, 1], or ``None`` where the attacker has none.
      prior: the generator that the attack searches; ``None`` for attacks that search none.
    """

    observation: Observation
    plan: Any
    options: Options
    clock: StageClock
    report: Progress
    public: np.ndarray | None = None
    prior: Prior | None = None


class Method(NamedTuple):
    """One attack.

    Attributes:
      server: what it takes for granted of the server.
      check: refuses a victim that it cannot attack, before any compute.
      craft: ``(key, victim, calibration, options, client, num_examples) -> (params, plan)`` of a
        malicious server; ``None`` for attacks on what honest training sends.
      attack: from a key and a job to a reconstruction.
      fits: for attacks that search a generator: refuses one that does not suit the victim or the
        options, before any compute.
    """

    server: Literal["malicious", "honest_but_curious"]
    check: Callable[[Victim], object]
    craft: Callable[..., tuple[PyTree, Any]] | None
    attack: Callable[[jax.Array, Job], Reconstruction]
    fits: Callable[[Prior, Victim, Options], object] | None = None


def method(name: AttackName) -> Method:
    """The attack of a name."""
    return _METHODS[name]


def read_prior(name: AttackName, victim: Victim, options: Options) -> Prior | None:
    """The generator that an attack searches; ``None`` for attacks that search none.

    Raises:
      ValueError: one is missing, or given to an attack that searches none; it cannot be read, or
        does not fit the victim or the options.
      ImportError: an optional package is missing that the attack needs.
    """
    fits = method(name).fits
    if fits is None:
        if options.prior is not None:
            raise ValueError(f"the attack {name!r} searches no generator; leave out --prior.")
        return None
    if options.prior is None:
        bundled = ", ".join(bundled_priors()) or "none"
        raise ValueError(
            f"the attack {name!r} searches a generator of such images: give --prior, a folder "
            f"written by 'jgia train-prior' or the name of a bundled prior ({bundled})."
        )
    prior = load_prior(options.prior)
    fits(prior, victim, options)
    return prior


def prior_words(prior: Prior) -> str:
    """What an attacker with a prior knows beforehand, for the threat model.

    >>> from jgia.generators.prior import load_prior
    >>> prior_words(load_prior("faces32")).partition(",")[0]
    'generator faces32'
    """
    data = prior.record.get("data")
    source = data.get("provenance") if isinstance(data, Mapping) else None
    return f"generator {prior.name}, trained on: {source or 'not stated'}"


def ares_attack(key: jax.Array, job: Job) -> Reconstruction:
    """The attack's two halves, each timed as a stage, with progress per candidate."""
    observation, plan = job.observation, job.plan
    job.report("reading activations out of the update", 0, 1)
    with job.clock.stage("leak_s"):
        candidates = ares.leak(
            observation,
            plan,
            noise_std=observation.threat_model.noise_std,
            first_layer=job.options.ares.first_layer,
        )
    total = max(1, len(candidates))
    job.report("inverting activations", 0, total)
    with job.clock.stage("invert_s"):
        return ares.invert(
            key,
            candidates,
            plan,
            observation.victim,
            options=job.options.ares,
            performance=job.options.performance,
            progress=lambda done: job.report("inverting activations", done, total),
        )


def _craft_ares(
    key: jax.Array,
    victim: Victim,
    calibration: np.ndarray,
    options: Options,
    client: ClientConfig,
    num_examples: int,
) -> tuple[PyTree, Any]:
    return ares.craft(
        key, victim, calibration, options=options.ares, num_examples=num_examples, client=client
    )


def _craft_imprint(
    module: ModuleType,
    key: jax.Array,
    victim: Victim,
    calibration: np.ndarray,
    options: Options,
    client: ClientConfig,
    num_examples: int,
) -> tuple[PyTree, Any]:
    del client
    return module.craft(
        key, victim, calibration, options=options.imprint, num_examples=num_examples
    )


def _attack_imprint(module: ModuleType, key: jax.Array, job: Job) -> Reconstruction:
    job.report("reading images out of the update", 0, 1)
    with job.clock.stage("leak_s"):
        return module.attack(
            key,
            job.observation,
            plan=job.plan,
            options=job.options.imprint,
            noise_std=job.observation.threat_model.noise_std,
        )


def _attack_matching(name: Any, key: jax.Array, job: Job) -> Reconstruction:
    total = gradient_matching.settings(name, job.options.matching).num_steps
    job.report("searching", 0, total)
    with job.clock.stage("search_s"):
        return gradient_matching.attack(
            key,
            job.observation,
            method=name,
            options=job.options.matching,
            performance=job.options.performance,
            run_options=job.options.run,
            progress=lambda done, steps, loss: job.report(
                f"searching, loss {loss:.3g}", done, steps
            ),
        )


def _attack_analytic(key: jax.Array, job: Job) -> Reconstruction:
    job.report("solving layer by layer", 0, 1)
    with job.clock.stage("invert_s"):
        return analytic.attack(key, job.observation)


def _attack_gauss_newton(key: jax.Array, job: Job) -> Reconstruction:
    job.report("searching", 0, 1)
    with job.clock.stage("search_s"):
        return gauss_newton.attack(
            key,
            job.observation,
            public=job.public,
            options=job.options.gauss_newton,
            progress=lambda done, steps, loss: job.report(
                f"searching, loss {loss:.3g}", done, steps
            ),
        )


def _fits_gifd(prior: Prior, victim: Victim, options: Options) -> None:
    gifd.check_prior(prior.generator, victim)
    gifd.settings(options.gifd, generator=prior.generator)
    if (folder := options.mapping.mapping_classifier) is not None:
        if not prior.generator.num_classes:
            raise ValueError(
                "--mapping-classifier maps labels to classes of a conditional prior, and this one "
                "has none; leave it out."
            )
        load_victim(folder)


def _fits_baseline(name: str, prior: Prior, victim: Victim, options: Options) -> None:
    gifd.check_prior(prior.generator, victim)
    if options.mapping.mapping_classifier is not None:
        raise ValueError(f"{name} maps no labels; leave out --mapping-classifier.")
    if name == "ggl":
        gifd.require_cmaes()


def _attack_gifd(key: jax.Array, job: Job) -> Reconstruction:
    mapping = job.options.mapping
    attack: Callable[..., Reconstruction] = gifd.attack
    if mapping.mapping_classifier is not None:
        classifier, params = load_victim(mapping.mapping_classifier)
        attack = functools.partial(
            gifd.attack_with_label_mapping,
            classifier=classifier,
            classifier_params=params,
            coarse_steps=mapping.mapping_coarse_steps,
            candidates=mapping.mapping_candidates,
        )
    return _search_prior(attack, job.options.gifd, key, job)


def _search_prior(
    attack: Callable[..., Reconstruction], options: Any, key: jax.Array, job: Job
) -> Reconstruction:
    if job.prior is None:
        raise ValueError("this attack searches a generator, and the job brings none.")
    job.report("searching", 0, 1)
    with job.clock.stage("search_s"):
        return attack(
            key,
            job.observation,
            job.prior,
            options=options,
            performance=job.options.performance,
            run_options=job.options.run,
            progress=lambda done, steps, loss: job.report(
                f"searching, loss {loss:.3g}", done, steps
            ),
        )


def _imprint(module: ModuleType) -> Method:
    return Method(
        "malicious",
        module.check,
        functools.partial(_craft_imprint, module),
        functools.partial(_attack_imprint, module),
    )


def _matching(name: str) -> Method:
    return Method(
        "honest_but_curious",
        lambda victim: None,
        None,
        functools.partial(_attack_matching, name),
    )


_METHODS: dict[str, Method] = {
    "ares": Method("malicious", ares.attackable_layers, _craft_ares, ares_attack),
    "rtf": _imprint(imprint.rtf),
    "trap_weights": _imprint(imprint.trap_weights),
    "qbi": _imprint(imprint.qbi),
    "loki": _imprint(imprint.loki),
    "dlg": _matching("dlg"),
    "idlg": _matching("idlg"),
    "inverting_gradients": _matching("inverting_gradients"),
    "see_through": _matching("see_through"),
    "gauss_newton": Method("honest_but_curious", lambda victim: None, None, _attack_gauss_newton),
    "gifd": Method("honest_but_curious", lambda victim: None, None, _attack_gifd, fits=_fits_gifd),
    "gias": Method(
        "honest_but_curious",
        lambda victim: None,
        None,
        lambda key, job: _search_prior(gifd.attack_gias, job.options.gias, key, job),
        fits=functools.partial(_fits_baseline, "gias"),
    ),
    "ggl": Method(
        "honest_but_curious",
        lambda victim: None,
        None,
        lambda key, job: _search_prior(gifd.attack_ggl, job.options.ggl, key, job),
        fits=functools.partial(_fits_baseline, "ggl"),
    ),
    "analytic": Method("honest_but_curious", analytic.check, None, _attack_analytic),
}
