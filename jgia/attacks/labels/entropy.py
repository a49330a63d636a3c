"""The most likely batch: calibration examples reweighted until they give the client's gradient."""

from __future__ import annotations

import jax
import numpy as np
from jax import Array
from scipy.optimize import minimize

from jgia.attacks.labels.calibration import Calibration, generator, softmax
from jgia.attacks.labels.counts import count_bounds, present_classes, round_counts
from jgia.attacks.labels.direct import (
    Counts,
    constant_direction,
    gradient_length,
    unit_gradient,
)
from jgia.attacks.labels.head import HeadGradient

_RIDGE = 0.03  # over B: squared distance from an example to the nearest atom, when white
_SCALES = (1.0, 1.7)
_JITTER = 0.7
_IMPOSSIBLE = -60.0
_RANK_TOLERANCE = 1e-6
_TRIALS = 16
_RELIABLE = 0.98
_ITERATIONS = 100


def llg(
    head: HeadGradient,
    num_examples: int,
    calibration: Calibration,
    *,
    key: Array,
) -> Counts:
    r"""Counts of the most likely batch, given everything that the head's gradient says.

    An atom is a calibration example s with a label k. It adds ``(p_s - e_k) (1, x_s)^T`` to the
    gradient, ``x_s`` its coordinates in the space that decides the predictions. Among all weights w
    over atoms the ones are taken that fit the observed means and are nearest to the prior
    ``w0_sk ~ p_sk`` (labels as the model predicts them, as for a calibrated model):

    ``min_w KL(w || w0)  s.t.  sum_sk w_sk (p_s - e_k) (1, x_s)^T = (g, G^T x)``

    By Sanov's theorem this is the limit of the distribution of a batch drawn from the prior, given
    its gradient. The solution is ``w ~ w0 exp(<L, (p_s - e_k) (1, x_s)^T>)`` with multipliers L
    from a smooth convex problem in ``K (q + 1)`` unknowns. Then
    ``n = B (sum_sk w_sk p_s - g)``, rounded within what is certain.

    Coordinates are the logits; for ``B < K``, where the kernel gradient has rank B, those in its
    column space, in which all features of the batch then lie. Calibration examples are copied with
    noise and with larger spread, so that the client's lie among them.

    Classes without a negative entry (:func:`~jgia.attacks.labels.counts.present_classes`) get no
    atom where random batches of the calibration examples show that examples hardly ever hide.

    Args:
      head: the gradient.
      num_examples: B.
      calibration: at the parameters where the gradients were taken.
      key: PRNG key of the noise and of the random batches.

    References:
      Wainakh et al. (PoPETs 2022, arXiv 2105.09369), whose LLG* simulates with the model, too; Ma
      et al., "Instance-wise Batch Label Restoration via Gradients in Federated Learning" (ICLR
      2023), who solve ``(P^T - I) n = B g`` with probabilities of one estimated feature per class.
      Here whole distributions are estimated instead of one feature per class, by maximum entropy:
      Csiszár, "Sanov property, generalized I-projection and a conditional limit theorem" (Annals of
      Probability 12, 1984).
    """
    key_noise, key_trials = jax.random.split(key)
    absent = None
    if head.undefended and head.noise == 0.0 and head.nonnegative:
        found = present_classes(head)
        if _reliable(key_trials, calibration, num_examples):
            absent = ~found
    means = calibration.probabilities.mean(axis=0)
    gradient = unit_gradient(head, calibration)
    length = gradient_length(head, gradient, means, num_examples)
    bounds = count_bounds(head, num_examples, absent=absent)
    if bounds[0].sum() == num_examples:
        return bounds[0], bounds[0].astype(np.float64)
    atoms = _atoms(key_noise, head, num_examples, calibration)
    constant, coordinates, probabilities, directions, center = atoms
    x = np.concatenate([constant[:, None], coordinates], axis=1)
    kernel = length * head.kernel.T @ directions
    target = np.concatenate([length * gradient[:, None], kernel], axis=1)
    target[:, 1:] -= target[:, :1] * center
    prior = np.log(np.maximum(probabilities, np.exp(_IMPOSSIBLE)))
    prior = np.where(bounds[1] == 0, _IMPOSSIBLE, prior)
    squares = np.concatenate([[1.0], (directions**2).sum(axis=0)])
    ridge = _RIDGE / num_examples + num_examples * (length * head.noise) ** 2 * squares
    weights = reweight(prior, probabilities, x, target, ridge)
    if head.bias is not None and head.noise == 0.0:
        estimate = num_examples * (weights.sum(axis=1) @ probabilities - length * gradient)
    else:
        estimate = num_examples * weights.sum(axis=0)
    return round_counts(estimate, num_examples, bounds), estimate


def reweight(
    prior: np.ndarray,
    probabilities: np.ndarray,
    x: np.ndarray,
    target: np.ndarray,
    ridge: np.ndarray,
) -> np.ndarray:
    """Weights nearest to a prior under which atoms have given means.

    Minimizes ``log sum_sk exp(log w0_sk + <L, v_sk>) - <L, t> + sum_q r_q |L_q|^2 / 2`` with
    ``v_sk = (p_s - e_k) x_s^T``, the dual of the problem of :func:`llg` with a squared error
    ``|residual_q|^2 / 2 r_q`` instead of equality.

    Args:
      prior: (N, K) log w0, up to a constant.
      probabilities: (N, K) p.
      x: (N, q).
      target: (K, q) t.
      ridge: (q,) r, positive.

    Returns:
      (N, K) weights with sum 1.
    """
    shape = target.shape
    prior = prior - prior.max()

    def weights_at(multipliers: np.ndarray) -> tuple[float, np.ndarray]:
        exponents = prior + products(multipliers)
        largest = float(exponents.max())
        weights = np.exp(exponents - largest)
        total = float(weights.sum())
        return largest + np.log(total), weights / total

    def products(multipliers: np.ndarray) -> np.ndarray:  # <L, v_sk> for all atoms
        u = x @ multipliers.T
        return (probabilities * u).sum(axis=1, keepdims=True) - u

    def means(weights: np.ndarray) -> np.ndarray:  # sum_sk w_sk v_sk
        return (probabilities * weights.sum(axis=1, keepdims=True) - weights).T @ x

    def dual(flat: np.ndarray) -> tuple[float, np.ndarray]:
        multipliers = flat.reshape(shape)
        value, weights = weights_at(multipliers)
        value += float((ridge * multipliers**2 / 2 - multipliers * target).sum())
        return value, (means(weights) - target + ridge * multipliers).ravel()

    def curvature(flat: np.ndarray, direction: np.ndarray) -> np.ndarray:
        _, weights = weights_at(flat.reshape(shape))
        along = products(direction.reshape(shape))
        covariance = means(weights * (along - (weights * along).sum()))
        return (covariance + ridge * direction.reshape(shape)).ravel()

    solution = minimize(
        dual,
        np.zeros(target.size),
        jac=True,
        hessp=curvature,
        method="Newton-CG",
        options={"maxiter": _ITERATIONS},
    )
    return weights_at(solution.x.reshape(shape))[1]


def _atoms(
    key: Array, head: HeadGradient, num_examples: int, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N,) constant, (N, q) coordinates, (N, K) probabilities; (d, q) directions, (q,) center.

    ``coordinates = features @ directions - constant * center``, white over the calibration.
    """
    features, logits = calibration.features, calibration.logits
    span = _column_space(head, num_examples)
    raw = head.weights - head.weights.mean(axis=1, keepdims=True) if span is None else span
    if head.bias is None:
        raw = np.concatenate([raw, constant_direction(features)[:, None]], axis=1)
    values = features @ raw
    mean = values.mean(axis=0)
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(values.T, bias=True)))
    kept = variances > 1e-8 * max(float(variances.max()), 1e-300)
    spread = np.sqrt(variances[kept])
    white = (values - mean) @ axes[:, kept] / spread
    noise = generator(key).standard_normal((len(_SCALES), *white.shape))
    white = np.concatenate(
        [scale * white + _JITTER * z for scale, z in zip(_SCALES, noise, strict=True)]
    )
    values = mean + (white * spread) @ axes[:, kept].T
    if span is not None:
        logits = values[:, : span.shape[1]] @ (span.T @ head.weights) + head.offsets
    else:
        logits = values[:, : head.num_classes] + head.offsets
    constant = np.ones(len(values))
    if head.bias is None:
        constant, values, raw, mean = values[:, -1], values[:, :-1], raw[:, :-1], mean[:-1]
        variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(values.T, bias=True)))
        kept = variances > 1e-8 * max(float(variances.max()), 1e-300)
        spread = np.sqrt(variances[kept])
    whitening = axes[:, kept] / spread
    coordinates = (values - constant[:, None] * mean) @ whitening
    return constant, coordinates, softmax(logits), raw @ whitening, mean @ whitening


def _column_space(head: HeadGradient, num_examples: int) -> np.ndarray | None:
    """(d, B) orthonormal basis of the batch's features, where the gradient gives it away."""
    exact = head.single_step and head.undefended and head.noise == 0.0 and head.bias is not None
    if not exact or num_examples >= head.num_classes or num_examples >= len(head.kernel):
        return None
    left, values, _ = np.linalg.svd(head.kernel, full_matrices=False)
    if values[num_examples - 1] <= _RANK_TOLERANCE * values[0]:
        return None
    return left[:, :num_examples]


def _reliable(key: Array, calibration: Calibration, num_examples: int) -> bool:
    """Whether present classes nearly always show a negative entry, in random batches."""
    features, probabilities = calibration.features, calibration.probabilities
    num, classes = probabilities.shape
    rng, shape = generator(key), (_TRIALS, num_examples)
    rows, labels = rng.integers(0, num, shape), rng.integers(0, classes, shape)
    shown = present = 0
    for chosen, y in zip(rows, labels, strict=True):
        residuals = probabilities[chosen]
        residuals[np.arange(num_examples), y] -= 1
        there = np.bincount(y, minlength=classes) > 0
        shown += int(((features[chosen].T @ residuals).min(axis=0) < 0)[there].sum())
        present += int(there.sum())
    return shown >= _RELIABLE * present
