"""Closed forms: one number per class out of the head's gradient, then counts by a rule.

Every function returns ``(counts, scores)``: (K,) whole numbers with sum B, and the (K,) evidence
that they were decided on, larger for more examples.
"""

from __future__ import annotations

import numpy as np

from jgia.attacks.labels.calibration import Calibration
from jgia.attacks.labels.counts import count_bounds, round_counts
from jgia.attacks.labels.head import HeadGradient

Counts = tuple[np.ndarray, np.ndarray]

_RIDGE = 1e-3


def unit_gradient(head: HeadGradient, calibration: Calibration | None) -> np.ndarray:
    """(K,) ``mean_i (p_i - y_i)``: the bias gradient, or the kernel's along ``f . u = 1``.

    Without a bias, u is the ridge solution of ``F u = 1`` over the calibration features: the
    direction in which features vary least from example to example.
    """
    if head.bias is not None:
        return head.bias
    assert calibration is not None  # infer_labels makes one for a head without bias
    return head.kernel.T @ constant_direction(calibration.features)


def constant_direction(features: np.ndarray) -> np.ndarray:
    """(d,) u with ``f . u`` close to 1 for all rows f, by ridge regression in its dual form."""
    gram = features @ features.T
    ridge = _RIDGE * np.trace(gram) / len(gram)
    scale = ridge if ridge > 0 else 1.0
    return features.T @ np.linalg.solve(gram + scale * np.eye(len(gram)), np.ones(len(gram)))


def idlg(head: HeadGradient, num_examples: int, calibration: Calibration | None) -> Counts:
    """The classes with a negative bias gradient, each once; the rest by taking turns.

    Exact for one example: ``p_k - y_k`` is negative for its class alone. For more, a class whose
    predicted probabilities add up to more than its examples is missed. Classes are taken in the
    order of the evidence, most negative first; where there are fewer than B, the list starts again
    from its beginning (the padding rule).

    References:
      Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients" (2020, arXiv 2001.02610),
      eq. 4-5. Departures: the bias gradient where there is one, which needs no sign of the
      features; batches at all.
    """
    gradient = unit_gradient(head, calibration)
    return _in_turn(gradient, gradient < 0, num_examples), -gradient


def yin(head: HeadGradient, num_examples: int, calibration: Calibration | None) -> Counts:
    """The B classes with the smallest entry of their column of the kernel gradient.

    ``p_k f >= 0`` for non-negative features, so that only examples of class k make an entry of
    its column negative. Labels are assumed distinct: with more than B negative columns the most
    negative are taken; with fewer, the list of negative ones starts again.

    References:
      Yin et al., "See through Gradients" (CVPR 2021, arXiv 2104.07586), eq. 4. Departures: the
      unit gradient (:func:`unit_gradient`) replaces the smallest entry where features can be
      negative; repeated labels by taking turns.
    """
    smallest = head.kernel.min(axis=0) if head.nonnegative else unit_gradient(head, calibration)
    return _in_turn(smallest, smallest < 0, num_examples), -smallest


def wainakh(head: HeadGradient, num_examples: int, calibration: Calibration | None) -> Counts:
    """LLG: an example of class i changes that class's gradient by the impact m.

    With ``g_i`` the sum of column i of the kernel gradient and ``g_i = m n_i + s_i``:
    (1) every class with ``g_i < 0`` gets an example and ``g_i -= m``; (2) ``g_i -= s_i``; then,
    until there are B, the class with the smallest ``g_i`` gets an example and **its** ``g_i -= m``.

    With a calibration, impact and offset come from batches of one class each (LLG*):
    ``m = (1 + 1/K) / B mean_c mean_x (p_c - 1) sum(f)`` and ``s_i = mean_x p_i sum(f)``. Without
    (or where the gradient's length is not known), from the gradient itself (LLG):
    ``m = (1 + 1/K) / B sum_{g_i < 0} g_i`` and ``s = 0``.

    References:
      Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning" (PoPETs 2022,
      arXiv 2105.09369), algorithm 1. Departures: the expectation over the batches of one class is
      taken in closed form; where features can be negative, the unit gradient replaces their sum.
    """
    classes = head.num_classes
    gradient = head.kernel.sum(axis=0) if head.nonnegative else unit_gradient(head, calibration)
    gradient = gradient.copy()
    negative = gradient < 0
    if calibration is not None and head.scaled:
        total = np.ones(len(calibration.features))
        if head.nonnegative:
            total = calibration.features.sum(axis=1)
        offset = calibration.probabilities.T @ total / len(total)
        impact = (offset - total.mean()).mean() * (1 + 1 / classes) / num_examples
    else:
        offset = np.zeros(classes)
        impact = gradient[negative].sum() * (1 + 1 / classes) / num_examples
    if not impact < 0:  # no negative entry (rounding), or features that are zero
        return _in_turn(gradient, negative, num_examples), -gradient
    scores = (gradient - offset) / impact
    counts = np.zeros(classes, np.int64)
    first = np.argsort(gradient, kind="stable")[: min(int(negative.sum()), num_examples)]
    counts[first] += 1
    gradient[first] -= impact
    gradient -= offset
    for _ in range(num_examples - int(counts.sum())):
        chosen = int(np.argmin(gradient))
        counts[chosen] += 1
        gradient[chosen] -= impact
    return counts, scores


def analytic(head: HeadGradient, num_examples: int, calibration: Calibration) -> Counts:
    """``n_k = B (mean_x p_k - g_k)``, rounded to whole numbers within what is certain.

    The mean over the calibration images stands for that over the client's. Right where predictions
    hardly depend on the image, as before training.

    References:
      Geng et al., "Towards General Deep Leakage in Federated Learning" (2021, arXiv 2110.09074),
      section on label restoration. Departures: the bias gradient where there is one, instead of
      the kernel's over estimated features; certain bounds
      (:func:`~jgia.attacks.labels.counts.count_bounds`); the unknown length of
      :func:`multi_step`.
    """
    return _from_means(head, num_examples, calibration, calibration.probabilities.mean(axis=0))


def multi_step(
    head: HeadGradient, num_examples: int, calibration: Calibration, returned: Calibration
) -> Counts:
    """:func:`analytic` for several local steps: predictions are averaged on the way.

    The steps' gradients average ``p`` at parameters between those sent and those returned, both of
    which the server holds. ``mean_x p_k`` is taken at both ends and interpolated to where the steps
    were on average, ``(T - 1) / 2T``.

    Without the gradient's length, ``g = c d`` with unknown ``c > 0``: classes without examples have
    ``c d_k = mean_x p_k``, which gives c by least squares over the classes of which no example is
    certain. Where all have one, c is the largest value that leaves each at least one: exact if the
    rarest class has one example, and too large by a factor up to ``1 / (1 - n_min / (B p))``
    otherwise.

    References:
      Geng et al. (2021, arXiv 2110.09074), for differences of parameters; Chen and Vikalo,
      "Recovering Labels from Local Updates in Federated Learning" (2024, arXiv 2405.00955), for
      predictions that change on the way, which they simulate.
    """
    way = 2 * head.progress
    means = (1 - way / 2) * calibration.probabilities.mean(axis=0)
    means = means + way / 2 * returned.probabilities.mean(axis=0)
    return _from_means(head, num_examples, calibration, means)


def gradient_length(
    head: HeadGradient, gradient: np.ndarray, means: np.ndarray, num_examples: int
) -> float:
    """The length c of :func:`multi_step`; 1 where it is known."""
    if head.scaled:
        return 1.0
    low, _ = count_bounds(head, num_examples)
    rest = (low == 0) & (gradient > 0)
    if np.any(rest):
        return float(means[rest] @ gradient[rest] / (gradient[rest] @ gradient[rest]))
    positive = gradient > 0
    if not np.any(positive):
        return 1.0
    room = np.maximum(means - 1 / num_examples, 0.1 * means)[positive] / gradient[positive]
    return float(room.min())


def _from_means(
    head: HeadGradient, num_examples: int, calibration: Calibration, means: np.ndarray
) -> Counts:
    gradient = unit_gradient(head, calibration)
    length = gradient_length(head, gradient, means, num_examples)
    estimate = num_examples * (means - length * gradient)
    return round_counts(estimate, num_examples, count_bounds(head, num_examples)), estimate


def _in_turn(values: np.ndarray, chosen: np.ndarray, num_examples: int) -> np.ndarray:
    """Counts of the classes that were chosen, by turns, smallest value first; all if none was."""
    order = np.argsort(values, kind="stable")
    order = order[: max(1, int(chosen.sum()))]
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, order[np.arange(num_examples) % len(order)], 1)
    return counts
