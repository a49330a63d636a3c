"""Every attack of ``jgia.attacks``, with what the contract test needs to know about it.

A package in ``jgia/attacks`` without a case here fails the contract test.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jgia.attacks import analytic, ares, gauss_newton, gradient_matching, imprint
from jgia.config import AresOptions, GaussNewtonOptions, MatchingOptions, PerformanceFlags
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
def _observe_honest() -> Observation:
    images = np.random.default_rng(0).uniform(size=(1, 6, 6, 1)).astype(np.float32)
    victim = make_victim("mlp", input_shape=(6, 6, 1), num_classes=3, widths=(8,))
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
    AttackCase(
        package="analytic",
        attack=functools.partial(analytic.attack, num_examples=1),
        observe=_observe_honest,
        needs_malicious_server=False,
    ),
)
