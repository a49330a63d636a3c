"""Which labels a client's examples have, from the update alone."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jgia import _checks
from jgia.attacks.labels import direct, entropy
from jgia.attacks.labels.calibration import Calibration, calibrate, evaluate
from jgia.attacks.labels.counts import as_labels
from jgia.attacks.labels.head import HeadGradient, path_params, read_head
from jgia.observation import Observation

LabelInference = Literal["auto", "idlg", "yin", "wainakh", "analytic", "llg", "multi_step"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelEstimate:
    """The labels of a batch, in no order: the update has none.

    Attributes:
      labels: (B,) sorted class indices, each as often as counted.
      counts: (K,) examples of each class; they add up to B.
      method: what was used, ``"llg"`` for example, also where ``"auto"`` was asked for.
      scores: (K,) the method's own evidence, larger for more examples: negative gradients (idlg,
        yin), or counts before rounding (the others).
    """

    labels: np.ndarray
    counts: np.ndarray
    method: str
    scores: np.ndarray


def infer_labels(
    key: Array,
    observation: Observation,
    *,
    method: LabelInference = "auto",
    num_examples: int | None = None,
    public: ArrayLike | None = None,
    calibration: Calibration | None = None,
) -> LabelEstimate:
    """Infer how many of a client's examples have each class, from the head's part of its update.

    The gradient of the mean cross-entropy by the head's bias is ``g = mean_i (p_i - y_i)`` with
    predictions p and one-hot labels y; so ``n = B (mean_i p_i - g)``, and methods differ in what
    they take for the mean prediction and in what else they use.

    Args:
      key: PRNG key: images that are made up, and the random parts of ``llg``.
      observation: update, parameters that were sent, model, threat model. The server may be honest
        but curious.
      method: ``"idlg"``, ``"yin"``, ``"wainakh"``, ``"analytic"``
        (:mod:`~jgia.attacks.labels.direct`), ``"llg"`` (the most likely batch, the best here:
        :func:`~jgia.attacks.labels.entropy.llg`), ``"multi_step"`` (``analytic`` between the
        parameters that were sent and those returned). ``"auto"`` takes ``idlg`` for one example,
        where it is exact, and else ``llg``.
      num_examples: B, where the threat model does not tell.
      public: (N, H, W, C) pixels in [0, 1], N >= 16, that resemble the client's, without labels;
        images are made up when left out. ``idlg`` and ``yin`` use none if the head has a bias.
      calibration: of an earlier call with the same parameters, instead of ``public``.

    Returns:
      A :class:`LabelEstimate` with finite numbers.

    Raises:
      ValueError: the model has no head to read, it is not visible, its update is zero or not
        finite, the number of examples is not known, or the public images do not fit.

    Guarantees:
      Counts are whole, not negative, and add up to B. One example without a defense is exact with
      every method. What is certain stays certain: a class with a negative entry where only its own
      examples can make one is counted at least once (analytic, llg, multi_step).

    Edge cases:
      FedAvg with several steps averages gradients along the way; ``llg`` evaluates the model at its
      middle. Where the learning rate or the steps are not known only the direction is used
      (:func:`~jgia.attacks.labels.direct.gradient_length`). Under a defense nothing is certain, and
      declared noise widens what counts as zero.

    References:
      Named by each method.
    """
    _checks.one_of(get_args(LabelInference), method=method)
    total = _num_examples(observation, num_examples)
    head = read_head(observation)
    chosen = ("idlg" if total == 1 else "llg") if method == "auto" else method
    key_images, key_method = jax.random.split(key)
    if chosen in ("idlg", "yin") and head.bias is not None:
        counts, scores = getattr(direct, chosen)(head, total, None)
    else:
        if calibration is None:
            calibration = calibrate(
                key_images, observation.victim, observation.params, public=public
            )
        counts, scores = _calibrated(chosen, key_method, observation, head, total, calibration)
    return LabelEstimate(labels=as_labels(counts), counts=counts, method=chosen, scores=scores)


def _calibrated(
    method: str,
    key: Array,
    observation: Observation,
    head: HeadGradient,
    total: int,
    calibration: Calibration,
) -> direct.Counts:
    if method == "llg":
        there = _moved(observation, calibration, head.progress)
        return entropy.llg(head, total, there, key=key)
    if method == "multi_step":
        returned = _moved(observation, calibration, 1.0)
        return direct.multi_step(head, total, calibration, returned)
    return getattr(direct, method)(head, total, calibration)


def _moved(observation: Observation, calibration: Calibration, fraction: float) -> Calibration:
    """The same images at parameters a part of the way to those that the client returned."""
    if fraction == 0.0 or observation.threat_model.protocol == "fedsgd":
        return calibration
    return evaluate(observation.victim, path_params(observation, fraction), calibration.pixels)


def _num_examples(observation: Observation, given: int | None) -> int:
    known = observation.threat_model.num_examples
    count = known if given is None else given
    if count is None:
        raise ValueError(
            "labels are counted for a known number of examples, and the threat model does not "
            "tell it; give num_examples=."
        )
    if known is not None and count != known:
        raise ValueError(f"num_examples={count} contradicts the threat model, which says {known}.")
    _checks.at_least(1, num_examples=count)
    return count
