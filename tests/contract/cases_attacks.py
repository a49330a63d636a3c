"""Every attack of ``jgia.attacks``, with what the contract test needs to know about it.

A package in ``jgia/attacks`` without a case here fails the contract test.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgia.attacks import analytic, ares, gauss_newton, gifd, gradient_matching, imprint
from jgia.config import (
    AresOptions,
    GaussNewtonOptions,
    GglOptions,
    GiasOptions,
    GifdOptions,
    MatchingOptions,
    PerformanceFlags,
)
from jgia.data import load_dataset
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.observation import Observation, Reconstruction
from jgia.risk import Prior


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackCase:
    """One attack.

    Attributes:
      package: its package in ``jgia.attacks``.
      attack: from a key and an observation to a reconstruction.
      observe: an observation on which it recovers at least one image, made once.
      needs_malicious_server: whether it must refuse an honest-but-curious one.
      variant: its name where a package holds several attacks.
    """

    package: str
    attack: Callable[[Any, Observation], Reconstruction]
    observe: Callable[[], Observation]
    needs_malicious_server: bool
    variant: str = ""

    @property
    def name(self) -> str:
        """Package and variant."""
        return f"{self.package}.{self.variant}" if self.variant else self.package


@functools.cache
def _observe_ares() -> Observation:
    dataset = load_dataset("sample")
    images, labels = dataset.take(np.arange(40))
    images = images[:, 8:24, 8:24]
    victim = make_victim(
        "cnn", input_shape=(16, 16, 3), num_classes=dataset.num_classes, fc_width=64
    )
    options = AresOptions(front_end="signed")
    params, _ = ares.craft(jax.random.key(0), victim, images[4:], options=options)
    return client_update(jax.random.key(1), victim, params, images[:4], labels[:4])


@functools.cache
def _observe_imprint(method: str, model: str) -> Observation:
    dataset = load_dataset("sample")
    images, labels = dataset.take(np.arange(36))
    images = images[:, 8:16, 8:16]
    victim = make_victim(
        model,  # pyright: ignore[reportArgumentType]
        input_shape=(8, 8, 3),
        num_classes=dataset.num_classes,
        fc_width=32,
        widths=(64,),
    )
    craft = getattr(imprint, method).craft
    params, _ = craft(jax.random.key(0), victim, images[4:], num_examples=4)
    return client_update(jax.random.key(1), victim, params, images[:4], labels[:4])


def _imprint_case(method: str, model: str) -> AttackCase:
    return AttackCase(
        package="imprint",
        variant=method,
        attack=getattr(imprint, method).attack,
        observe=functools.partial(_observe_imprint, method, model),
        needs_malicious_server=True,
    )


@functools.cache
def _observe_honest(side: int = 6) -> Observation:
    images = np.random.default_rng(0).uniform(size=(1, side, side, 1)).astype(np.float32)
    victim = make_victim("mlp", input_shape=(side, side, 1), num_classes=3, widths=(8,))
    params = victim.init(jax.random.key(0))
    observation = client_update(jax.random.key(1), victim, params, images, np.array([1]))
    threat = dataclasses.replace(observation.threat_model, server="honest_but_curious")
    return dataclasses.replace(observation, threat_model=threat)


def _matching_case(method: str) -> AttackCase:
    return AttackCase(
        package="gradient_matching",
        variant=method,
        attack=functools.partial(
            gradient_matching.attack,
            method=method,  # pyright: ignore[reportArgumentType]
            options=MatchingOptions(num_steps=3),
            num_examples=1,
        ),
        observe=_observe_honest,
        needs_malicious_server=False,
    )


def _gauss_newton(key: Any, observation: Observation) -> Reconstruction:
    return gauss_newton.attack(
        key,
        observation,
        prior=Prior.isotropic(36, variance=0.1),
        options=GaussNewtonOptions(newton_steps=3),
        num_examples=1,
    )


@functools.cache
def _tiny_prior() -> Any:
    """A generator of 8 x 8 gray images."""
    path = Path(__file__).resolve().parents[1] / "attacks" / "tiny_generator.py"
    spec = importlib.util.spec_from_file_location("contract_tiny_generator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.make_prior(channels=1)


def _gifd(key: Any, observation: Observation) -> Reconstruction:
    options = GifdOptions(gifd_steps=2, gifd_restarts=2, last_stage=1)
    return gifd.attack(key, observation, _tiny_prior(), options=options, num_examples=1)


def _gias(key: Any, observation: Observation) -> Reconstruction:
    options = GiasOptions(gias_latent_steps=2, gias_weight_steps=2, gias_restarts=1)
    return gifd.attack_gias(key, observation, _tiny_prior(), options=options, num_examples=1)


def _ggl(key: Any, observation: Observation) -> Reconstruction:
    options = GglOptions(ggl_population=4, ggl_rounds=2)
    return gifd.attack_ggl(key, observation, _tiny_prior(), options=options, num_examples=1)


def _prior_case(attack: Callable[[Any, Observation], Reconstruction], variant: str) -> AttackCase:
    return AttackCase(
        package="gifd",
        variant=variant,
        attack=attack,
        observe=functools.partial(_observe_honest, 8),
        needs_malicious_server=False,
    )


NOT_ATTACKS = frozenset({"coarseness", "labels"})
"""Modules of ``jgia.attacks`` that return no images: they have tests of their own."""

CASES = (
    AttackCase(
        package="ares",
        attack=functools.partial(ares.attack, performance=PerformanceFlags(microbatch=4)),
        observe=_observe_ares,
        needs_malicious_server=True,
    ),
    _imprint_case("rtf", "imprint_mlp"),
    _imprint_case("trap_weights", "mlp"),
    _imprint_case("qbi", "mlp"),
    _imprint_case("loki", "cnn"),
    _matching_case("dlg"),
    _matching_case("idlg"),
    _matching_case("inverting_gradients"),
    _matching_case("see_through"),
    AttackCase(
        package="gauss_newton",
        attack=_gauss_newton,
        observe=_observe_honest,
        needs_malicious_server=False,
    ),
    _prior_case(_gifd, ""),
    _prior_case(_gias, "gias"),
    *([_prior_case(_ggl, "ggl")] if importlib.util.find_spec("cmaes") else []),
    AttackCase(
        package="analytic",
        attack=functools.partial(analytic.attack, num_examples=1),
        observe=_observe_honest,
        needs_malicious_server=False,
    ),
)
