"""From real evidence to whole numbers of examples per class, within what is certain."""

from __future__ import annotations

import numpy as np

from jgia.attacks.labels.head import HeadGradient

_SLACK = 1e-3  # of one example: rounding of a sum that is compared with whole numbers


def present_classes(head: HeadGradient) -> np.ndarray:
    """(K,) bool: classes of which there certainly is an example.

    A class without examples has ``sum_i p_ik`` as its bias gradient and ``sum_i p_ik f_i`` as its
    kernel gradient, of which no entry is negative where no feature is. So one negative entry proves
    an example. This holds for every local step, and so for their sum, whatever the length.
    """
    found = np.zeros(head.num_classes, bool)
    if head.bias is not None:
        found |= head.bias < -head.tolerance
    if head.nonnegative:
        found |= head.kernel.min(axis=0) < -head.tolerance
    return found


def count_bounds(
    head: HeadGradient, num_examples: int, *, absent: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers between which every class's count certainly lies.

    With ``n_k = sum_i p_ik - B g_k`` and ``0 < p_ik < 1``: ``-B g_k < n_k < B - B g_k``. Only a
    single step, in which every example counts once, has these; others keep "at least one".

    Args:
      head: the gradient.
      num_examples: B.
      absent: (K,) bool, classes to which no example is given unless one is certain.

    Returns:
      (K,) lower and (K,) upper bounds with ``sum(lower) <= B <= sum(upper)``. Zeros and B where the
      gradient contradicts itself, as one with undeclared noise does.
    """
    classes, total = head.num_classes, num_examples
    low = np.zeros(classes, np.int64)
    high = np.full(classes, total, np.int64)
    if not head.undefended:
        return low, high
    low = np.maximum(low, present_classes(head))
    if head.bias is not None and head.single_step and head.noise == 0.0:
        least = -total * head.bias
        low = np.maximum(low, np.floor(least - _SLACK).astype(np.int64) + 1)
        high = np.minimum(high, np.ceil(least + total + _SLACK).astype(np.int64) - 1)
    if absent is not None:
        high = np.where(absent & (low == 0), 0, high)
    if np.any(low > high) or low.sum() > total or high.sum() < total:
        return np.zeros(classes, np.int64), np.full(classes, total, np.int64)
    return low, high


def round_counts(
    estimate: np.ndarray, num_examples: int, bounds: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """The whole numbers with the right sum that are nearest to an estimate.

    Minimizes ``sum_k (n_k - x_k)^2`` over whole ``l_k <= n_k <= u_k`` with ``sum_k n_k = B``. The
    sum is separable and convex, so giving out one example after another, each to the class that
    lowers it most, is exact. Ties go to the smaller class.

    Args:
      estimate: (K,) finite real numbers x.
      num_examples: B.
      bounds: (K,) l and (K,) u with ``sum(l) <= B <= sum(u)``; 0 and B when left out.

    >>> round_counts(np.array([1.4, 0.9, -3.0]), 3)
    array([2, 1, 0])
    """
    classes = len(estimate)
    if bounds is None:
        bounds = np.zeros(classes, np.int64), np.full(classes, num_examples, np.int64)
    counts, high = bounds[0].astype(np.int64), bounds[1]
    for _ in range(num_examples - int(counts.sum())):
        gain = np.where(counts < high, estimate - counts, -np.inf)
        counts[int(np.argmax(gain))] += 1
    return counts


def as_labels(counts: np.ndarray) -> np.ndarray:
    """(B,) sorted labels of (K,) counts."""
    return np.repeat(np.arange(len(counts)), counts)
