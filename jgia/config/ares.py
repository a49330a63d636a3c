"""Options of the ARES attack."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jgia import _checks
from jgia.config.client import ClientConfig

FrontEnd = Literal["random", "signed", "direct", "principal"]
FirstLayer = Literal["joint", "ratio", "ignore"]
SparseBasis = Literal["block_dct", "block_dct_gray", "global_dct", "haar", "db4", "pixel"]
Inversion = Literal["masked_onesided", "masked_eq", "klasso_mu", "pinv", "activation_matching"]


_SMALL_LEARNING_RATE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class AresOptions:
    """What changes the answer of the ARES attack."""

    front_end: FrontEnd = "random"
    """First layer: `random` unit-norm Gaussian filters or rows (the paper), `signed` +/- identity
    pairs (an upper bound on what leaks), `direct` plain identity (what earlier attacks did;
    fails on normalized inputs), `principal` +/- pairs of the strongest public block-DCT
    coefficients (multilayer perceptrons only)."""

    inversion: Inversion = "masked_onesided"
    """How activations become images: `masked_onesided` (equalities where a neuron was on, upper
    bounds where it was off), `masked_eq` (equalities only, as in the released code), `klasso_mu`
    (the paper's eq. 7: the rectifier as a factor and noise), `pinv` (pseudoinverse) and
    `activation_matching` (gradient descent), the last two as baselines."""

    basis: SparseBasis = "block_dct"
    """Where images are sparse: `block_dct` (color rotation and 8 x 8 cosines), the same without
    the rotation (`block_dct_gray`), `global_dct`, wavelets `haar` and `db4` (with the rotation),
    or `pixel` (images that are mostly zero)."""

    first_layer: FirstLayer = "joint"
    """How the gradient of a multilayer perceptron's own first layer is read: `joint` solves for
    all examples whose on/off pattern the imprint gave away, `ratio` takes the rows that isolated
    one example (the paper), `ignore` leaves everything to sparse recovery."""

    paired: bool = True
    """Measure a multilayer perceptron's inputs by rows in +/- pairs, two of which no single
    example turns on. Without pairs, the number of rows that are on has to tell mixtures."""

    isolating_fraction: float = 0.5
    """Part of a multilayer perceptron's first layer that tries to isolate single examples; the
    rest measures all of them."""

    front_end_trials: int = 32
    """Random draws of the filters; the one that determines the public calibration images best
    is kept. 1 is the paper's single draw."""

    head_gain: float | None = None
    """Scale of the head's weights: larger gradients survive absolute noise, smaller ones leave
    the other layers as they are during local training. Chosen for the client when left out: 1
    for one gradient, 3e-4 for several local steps, 1e-7 for Adam (at 1024 bins), whose division
    by the root of the second moment then vanishes beside its epsilon."""

    front_scale: float | None = None
    """Scale of the first layer. 1 when left out, 0.03 for several local steps."""

    imprint_scale: float | None = None
    """Scale of the imprint layer: small outputs train the head slowly. 1 when left out, 0.003 for
    several local steps."""

    spread_widening: float = 1.15
    """Factor on the fitted standard deviation of the query feature, since private data may
    spread wider than the public calibration data."""

    mixture_residual: float = 1e-3
    """A candidate whose relative least-squares residual exceeds this (or its own read-out
    noise, if larger) is a mixture of several samples."""

    lam_ratio: float = 1e-5
    """Last l1 weight of the sparse recovery, relative to the weight at which the solution is
    zero."""

    def __post_init__(self) -> None:
        _checks.one_of(get_args(FrontEnd), front_end=self.front_end)
        _checks.one_of(get_args(SparseBasis), basis=self.basis)
        _checks.one_of(get_args(FirstLayer), first_layer=self.first_layer)
        _checks.one_of(get_args(Inversion), inversion=self.inversion)
        if not 0 <= self.isolating_fraction <= 1:
            raise ValueError(
                f"isolating_fraction must lie in [0, 1], got {self.isolating_fraction!r}."
            )
        _checks.at_least(1, front_end_trials=self.front_end_trials)
        _checks.positive(
            spread_widening=self.spread_widening,
            mixture_residual=self.mixture_residual,
        )
        _checks.fraction(lam_ratio=self.lam_ratio)
        for name in ("head_gain", "front_scale", "imprint_scale"):
            if (value := getattr(self, name)) is not None:
                _checks.positive(**{name: value})

    def scales(
        self, client: ClientConfig, *, num_examples: int, num_bins: int
    ) -> tuple[float, float, float]:
        """(head_gain, front_scale, imprint_scale) for what the client is told to do.

        Measured on CIFAR-10 (benchmarks/configs/federated.toml): the second set holds for learning
        rates up to about 0.05 (of momentum, with what it adds up), the third trades precision
        for larger ones. They fix the weight of one neuron, so the gain grows with the number of
        bins; Adam's also with the batch.

        >>> AresOptions(head_gain=2.0).scales(ClientConfig(), num_examples=32, num_bins=1024)
        (2.0, 1.0, 1.0)
        """
        wider = num_bins / 1024
        if client.optimizer == "adam" and client.protocol == "fedavg":
            defaults = (1e-7 * wider * num_examples / 32, 1.0, 1.0)
        elif client.protocol == "fedsgd" or client.num_steps(num_examples) == 1:
            defaults = (1.0, 1.0, 1.0)
        elif _effective_rate(client, num_examples) <= _SMALL_LEARNING_RATE:
            defaults = (3e-4 * wider, 0.03, 0.003)
        else:
            defaults = (1.9e-4 * wider, 0.01, 0.036)
        chosen = (self.head_gain, self.front_scale, self.imprint_scale)
        head, front, imprint = (
            d if c is None else c for c, d in zip(chosen, defaults, strict=True)
        )
        return head, front, imprint


def _effective_rate(client: ClientConfig, num_examples: int) -> float:
    """The most that one gradient moves parameters, with what momentum adds up over the steps."""
    if client.optimizer != "momentum":
        return client.learning_rate
    return client.learning_rate * min(client.num_steps(num_examples), 1 / (1 - client.momentum))
