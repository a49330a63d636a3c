"""Look at parameters before training on them: are they crafted to be read back?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from scipy import stats

from jgia.models import Victim, flatten_params

PyTree = Any

THRESHOLDS: Mapping[str, float] = {
    "parallel_neurons": 0.6,
    "parallel_readout": 0.6,
    "duplicate_neurons": 0.25,
    "monotone_bias": 0.9,
    "large_bias": 0.5,
    "delta_kernels": 0.8,
    "equal_norm_filters": 0.5,
    "mirrored_weights": 0.5,
    "constant_loss": 0.5,
}
"""The score at which each check flags; docs/detector.md measures them."""

_WORDS: Mapping[str, str] = {
    "parallel_neurons": "the neurons share one direction, as if to measure one feature",
    "parallel_readout": "the next layer treats all neurons alike",
    "duplicate_neurons": "neurons or filters repeat, up to sign",
    "monotone_bias": "the biases are sorted",
    "large_bias": "the biases are large against the weights",
    "delta_kernels": "the kernels pass single values on",
    "equal_norm_filters": "the filters have equal norms and no bias",
    "mirrored_weights": "the positive weights are a scaled copy of the negative ones",
    "constant_loss": "every example has the loss ln(classes)",
}

_CHUNK = 1 << 22  # entries that are converted to float64 at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """What the checks say about a set of parameters.

    Attributes:
      scores: check to its largest score over the layers, in [0, 1]; 1 is as crafted as can be.
        Checks that no layer admits are left out.
      layers: check to the layer with that score.
      thresholds: check to the score at which it flags.
      flagged: whether any check reaches its threshold.
      reasons: one sentence per check that does, worst first.
    """

    scores: Mapping[str, float]
    layers: Mapping[str, str]
    thresholds: Mapping[str, float]
    flagged: bool
    reasons: tuple[str, ...]

    @property
    def suspicion(self) -> float:
        """One number in [0, 1]: the worst check, on a scale where its threshold is 1/2."""
        return max(
            (_rescaled(score, self.thresholds[name]) for name, score in self.scores.items()),
            default=0.0,
        )


def detect_crafted(
    params: PyTree,
    victim: Victim | None = None,
    *,
    batch: tuple[Any, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> DetectionReport:
    r"""Check parameters that a server sent for the marks of known gradient-leakage attacks.

    Every check maps a layer to a score in [0, 1]; benign layers score low whatever their scale:

    ``parallel_neurons``: ``||mean_k w_k / ||w_k|| ||``, the mean resultant length of a fully
    connected layer's neurons. An imprint layer must measure one feature with all of them, so it
    is 1 there; about ``1 / sqrt(K)`` for independent neurons. ``parallel_readout``: the same of
    the rows of a fully connected layer that follows another: the signal sent back must be equal
    for all neurons. ``duplicate_neurons``: share of neurons (and filters) within a relative 1e-3
    of another one, or of its negative. ``monotone_bias``: absolute rank correlation of biases
    and indices. ``large_bias``: ``r / (1 + r)`` with r the median of ``|b_k| / ||w_k||``: bins
    and rarely active (trap) neurons need biases of the size of the features. ``delta_kernels``:
    median over filters of the largest share that one tap has in the energy.
    ``equal_norm_filters``: 1 where filter norms agree far better than those of random filters
    and all biases are zero. ``mirrored_weights``: 1 where a neuron's positive weights are its
    negative ones times a constant. ``constant_loss`` (with a batch): 1 where the loss of
    every example is ``ln C``.

    Args:
      params: a pytree of ``{layer: {"kernel": ..., "bias": ...}}``: kernels (in, out) or
        (h, w, in, out).
      victim: the model; with it, names and shapes are checked. Needed for ``batch``.
      batch: ``(images, labels)`` of the client itself, for ``constant_loss``.
      thresholds: overrides of :data:`THRESHOLDS`, by check.

    Returns:
      A :class:`DetectionReport`.

    Raises:
      ValueError: a parameter is not finite, parameters that are not the model's, a batch without
        a victim, or an unknown check.

    Guarantees:
      Looks at parameters only (and the loss), costs one pass over them, is deterministic, and
      does not depend on the order of neurons except for ``monotone_bias``.

    Edge cases:
      Layers too small to tell (fewer than 8 neurons or inputs) are left out. A clean report is no
      proof: the checks know the attacks of this package and their kin, and a server can trade
      some of its attack for stealth. Networks that are initialized orthogonally or as the
      identity can be flagged.

    >>> from jgia.models import make_victim
    >>> victim = make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(16,))
    >>> params = victim.init(jax.random.key(0))
    >>> detect_crafted(params, victim).flagged
    False
    >>> import jax.numpy as jnp
    >>> params["fc1"]["kernel"] = jnp.ones((16, 16))
    >>> report = detect_crafted(params, victim)
    >>> report.flagged, report.layers["parallel_neurons"]
    (True, 'fc1')
    """
    limits = _thresholds(thresholds)
    flat = _checked(params, victim)
    found: dict[str, tuple[float, str]] = {}

    def note(check: str, layer: str, score: float | None) -> None:
        if score is not None and (check not in found or score > found[check][0]):
            found[check] = (float(min(1.0, max(0.0, score))), layer)

    for layer, kernel, bias in _layers(flat):
        neurons = kernel.reshape(-1, kernel.shape[-1])  # (inputs, neurons)
        norms = _norms(neurons)
        note("duplicate_neurons", layer, _duplicates(neurons, norms))
        note("monotone_bias", layer, _monotone(bias))
        note("large_bias", layer, _large_bias(bias, norms))
        if kernel.ndim == 4:
            note("delta_kernels", layer, _delta(neurons, norms))
            note("equal_norm_filters", layer, _equal_norms(neurons, norms, bias))
        else:
            note("parallel_neurons", layer, _parallel(neurons, norms))
            note("mirrored_weights", layer, _mirrored(neurons))
            if _follows_dense(layer, kernel, flat):
                note("parallel_readout", layer, _parallel(neurons.T, _norms(neurons.T), 2))
    if batch is not None:
        if victim is None:
            raise ValueError("batch needs victim=: the loss is the model's.")
        note("constant_loss", "loss", _constant_loss(params, victim, *batch))

    scores = {name: found[name][0] for name in limits if name in found}
    over = [name for name, score in scores.items() if score >= limits[name]]
    over.sort(key=lambda name: -_rescaled(scores[name], limits[name]))
    return DetectionReport(
        scores=scores,
        layers={name: found[name][1] for name in scores},
        thresholds=limits,
        flagged=bool(over),
        reasons=tuple(
            f"{found[name][1]}: {_WORDS[name]} ({name} {scores[name]:.3f}, flagged from "
            f"{limits[name]:g})."
            for name in over
        ),
    )


def _rescaled(score: float, threshold: float) -> float:
    if score < threshold:
        return 0.5 * score / threshold
    return 1.0 if threshold >= 1 else 0.5 + 0.5 * (score - threshold) / (1 - threshold)


def _thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    given = given or {}
    if unknown := sorted(set(given) - set(THRESHOLDS)):
        raise ValueError(
            f"thresholds are for the checks {', '.join(THRESHOLDS)}; got {', '.join(unknown)}."
        )
    for name, value in given.items():
        if not 0 < value <= 1:
            raise ValueError(f"the threshold of {name} must lie in (0, 1], got {value!r}.")
    return {**THRESHOLDS, **given}


def _checked(params: PyTree, victim: Victim | None) -> dict[str, np.ndarray]:
    flat = {name: np.asarray(leaf) for name, leaf in flatten_params(params).items()}
    if victim is not None:
        expected = {n: tuple(x.shape) for n, x in flatten_params(victim.param_shapes()).items()}
        got = {name: array.shape for name, array in flat.items()}
        if got != expected:
            wrong = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
            raise ValueError(
                f"the parameters do not fit the model {victim.name!r}: {', '.join(wrong[:5])} "
                "differ in name or shape."
            )
    for name, array in flat.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name} has NaN or infinite entries; refuse these parameters.")
    return flat


def _layers(
    flat: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    for name, kernel in flat.items():
        if name.rpartition("/")[2] == "kernel" and kernel.ndim in (2, 4):
            layer = name.rpartition("/")[0]
            bias = flat.get(f"{layer}/bias")
            yield layer, kernel, None if bias is None else bias.astype(np.float64)


def _follows_dense(layer: str, kernel: np.ndarray, flat: Mapping[str, np.ndarray]) -> bool:
    """Whether some other fully connected layer has as many outputs as this one has inputs."""
    return any(
        other != layer and found.ndim == 2 and found.shape[1] == kernel.shape[0]
        for other, found, _ in _layers(flat)
    )


def _chunks(neurons: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns in float64, as many at once as memory allows."""
    step = max(1, _CHUNK // max(1, neurons.shape[0]))
    for start in range(0, neurons.shape[1], step):
        part = slice(start, start + step)
        yield part, neurons[:, part].astype(np.float64)


def _norms(neurons: np.ndarray) -> np.ndarray:
    norms = np.empty(neurons.shape[1])
    for part, values in _chunks(neurons):
        largest = np.abs(values).max(axis=0, initial=0.0)
        scaled = values / np.where(largest > 0, largest, 1.0)  # squares cannot overflow
        norms[part] = largest * np.sqrt((scaled**2).sum(axis=0))
    return norms


def _unit(values: np.ndarray, norms: np.ndarray) -> np.ndarray:
    return values / np.where(norms > 0, norms, 1.0)


def _parallel(neurons: np.ndarray, norms: np.ndarray, fewest_inputs: int = 8) -> float | None:
    inputs, count = neurons.shape
    alive = np.count_nonzero(norms)
    if inputs < fewest_inputs or count < 8 or alive == 0:
        return None
    total = np.zeros(inputs)
    for part, values in _chunks(neurons):
        total += _unit(values, norms[part]).sum(axis=1)
    return float(np.linalg.norm(total)) / alive


def _duplicates(neurons: np.ndarray, norms: np.ndarray) -> float | None:
    """Neurons are sorted by one fixed projection, so that equal ones become neighbors."""
    inputs, count = neurons.shape
    alive = np.flatnonzero(norms)
    if inputs < 4 or count < 4 or len(alive) < 2:
        return None
    direction = np.random.default_rng(0).normal(size=inputs)
    projected = np.empty(count)
    for part, values in _chunks(neurons):
        projected[part] = direction @ _unit(values, norms[part])
    order = alive[np.argsort(np.abs(projected[alive]), kind="stable")]
    signs = np.where(projected[order] < 0, -1.0, 1.0)
    near = np.zeros(len(order), bool)
    step = max(1, _CHUNK // inputs)
    for start in range(0, len(order) - 1, step):
        part = order[start : start + step + 1]
        rows = _unit(neurons[:, part].astype(np.float64), norms[part])
        rows *= signs[start : start + step + 1]
        close = np.linalg.norm(np.diff(rows, axis=1), axis=0) <= 1e-3
        near[start : start + len(close)] |= close
        near[start + 1 : start + 1 + len(close)] |= close
    return float(near.mean())


def _monotone(bias: np.ndarray | None) -> float | None:
    if bias is None or len(bias) < 16:
        return None
    if len(np.unique(bias)) < len(bias) / 2:  # zeros of a fresh layer are in no order
        return 0.0
    ranks = stats.rankdata(bias)
    return abs(float(np.corrcoef(ranks, np.arange(len(bias)))[0, 1]))


def _large_bias(bias: np.ndarray | None, norms: np.ndarray) -> float | None:
    alive = norms > 0
    if bias is None or not alive.any():
        return None
    ratio = float(np.median(np.abs(bias[alive]) / norms[alive]))
    return ratio / (1 + ratio) if math.isfinite(ratio) else 1.0


def _delta(neurons: np.ndarray, norms: np.ndarray) -> float | None:
    alive = norms > 0
    if neurons.shape[0] < 9 or not alive.any():
        return None
    largest = np.abs(neurons[:, alive]).max(axis=0).astype(np.float64)
    return float(np.median((largest / norms[alive]) ** 2))


def _equal_norms(neurons: np.ndarray, norms: np.ndarray, bias: np.ndarray | None) -> float | None:
    alive = norms[norms > 0]
    if neurons.shape[0] < 9 or len(alive) < 6:
        return None
    if bias is not None and np.any(bias):
        return 0.0
    # Norms of Gaussian filters of n taps vary by 1 / sqrt(2 n): 1 in these units.
    spread = float(alive.std() / alive.mean()) * math.sqrt(2 * neurons.shape[0])
    return 1 / (1 + (spread / 0.1) ** 2)


def _mirrored(neurons: np.ndarray) -> float | None:
    """Median over neurons of how well sorted positive weights match scaled negative ones."""
    inputs, count = neurons.shape
    if inputs < 16 or count < 4:
        return None
    deviations = []
    for index in np.unique(np.linspace(0, count - 1, min(count, 32)).astype(int)):
        values = neurons[:, index].astype(np.float64)
        positive, negative = np.sort(values[values > 0]), np.sort(-values[values < 0])
        if len(positive) != len(negative) or len(positive) < 8:
            deviations.append(1.0)
            continue
        scaled = negative * (positive.sum() / negative.sum())
        deviations.append(float(np.median(np.abs(positive - scaled) / positive)))
    return 1 / (1 + (float(np.median(deviations)) / 1e-4) ** 2)


def _constant_loss(params: PyTree, victim: Victim, images: Any, labels: Any) -> float:
    pixels, classes = np.asarray(images), np.asarray(labels)
    if pixels.ndim != 4 or pixels.shape[1:] != victim.input_shape or not len(pixels):
        raise ValueError(
            f"batch must hold images of shape (B, {', '.join(map(str, victim.input_shape))}) and "
            f"their labels, got {pixels.shape}."
        )
    dtype = jax.tree.leaves(params)[0].dtype
    one: Callable[..., Any] = jax.vmap(
        lambda x, y: victim.loss(params, x[None], y[None]), in_axes=(0, 0)
    )
    losses = np.asarray(one(pixels.astype(dtype), classes.astype(np.int32)), np.float64)
    if not np.all(np.isfinite(losses)):
        raise ValueError("the loss is NaN or infinite on the batch; refuse these parameters.")
    furthest = float(np.abs(losses - math.log(victim.num_classes)).max())
    return 1 / (1 + furthest / 1e-3)
