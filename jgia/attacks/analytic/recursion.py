"""From the head back to the image, one linear system per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jgia.attacks.analytic.arrays import LayerArrays
from jgia.attacks.analytic.chain import Stage
from jgia.attacks.analytic.convolution import conv_system, windows_of
from jgia.attacks.analytic.joint import Front, search_image
from jgia.attacks.analytic.linear import determined, least_squares
from jgia.models import Conv


class Recovered(NamedTuple):
    """The input of the first layer.

    Attributes:
      inputs: of the first stage's ``input_shape``; normalized pixels. NaN if the update is zero.
      determined: of the same shape: entries that the equations of every layer determine.
      converged: whether every linear solver reached its tolerance.
      layers: numbers of each layer, from the last to the first, JSON-ready.
      searched_from: index of the stage from which on the layers were solved together, if any.
    """

    inputs: np.ndarray
    determined: np.ndarray
    converged: bool
    layers: tuple[dict[str, Any], ...]
    searched_from: int | None = None


class _Step(NamedTuple):
    """One layer's input, what is known of it, and the derivatives of the loss by it."""

    inputs: np.ndarray
    determined: np.ndarray
    deltas: np.ndarray
    converged: bool
    report: dict[str, Any]


def recover(
    stages: Sequence[Stage],
    arrays: Sequence[LayerArrays],
    *,
    precision: float,
    rng: np.random.Generator,
    again: Recovered | None = None,
) -> Recovered:
    """Invert a plain chain of layers, given the update of one example.

    The head's bias update is the derivative ``delta`` of the loss by its outputs, ``dW = u
    delta^T`` gives its input u, and ``W delta`` the derivative by it. A layer below knows its
    output ``a = u`` and ``delta = act'(z) W delta`` alike, which makes its own equations linear in
    its input: ``W u = act^-1(a) - b`` wherever a determines z, and those of its update. The scale
    of the update cancels, so no learning rate is needed.

    Args:
      stages: from :func:`~jgia.attacks.analytic.chain.stages`.
      arrays: one per stage; the last one has a bias.
      precision: unit roundoff of the update.
      rng: of the vectors that test what is determined, and of the starts of searches.
      again: an earlier answer for arrays that differ little: it starts the searches, and what is
        determined is not tested again.

    References:
      Zhu & Blaschko, "R-GAP: Recursive Gradient Attack on Privacy" (ICLR 2021, arXiv 2010.07733),
      algorithm 1.

    Departures:
      The paper's networks have no biases, and it solves for the scale of the last layer's gradient;
      here the head's bias gives it. Systems are solved without forming their matrices, equations of
      outputs weighted by the activation's slope. Where the output of a ReLU layer leaves its input
      undetermined the paper stops; here it and the layers below are solved together
      (:func:`~jgia.attacks.analytic.joint.search_image`).
    """
    deltas = arrays[-1].bias_update
    if deltas is None:
        raise ValueError(f"layer {stages[-1].layer.name!r} needs a bias.")
    outputs, sure = np.zeros(0), np.ones(0, bool)
    converged, reports = True, []
    for i in reversed(range(len(stages))):
        stage = stages[i]
        if i < len(stages) - 1:
            outputs, sure, deltas = (v.reshape(stage.output_shape) for v in (outputs, sure, deltas))
            deltas = deltas * stage.activation.derivative(outputs)
        if isinstance(stage.layer, Conv):
            front = _front(stages[: i + 1], arrays[: i + 1], outputs, sure, deltas)
            found = _conv(front, precision=precision, rng=rng, index=i, again=again)
            if isinstance(found, Recovered):
                layers = (*reports, *found.layers)
                return found._replace(converged=converged & found.converged, layers=layers)
            step = found
        else:
            step = _dense(stage, arrays[i], deltas)
        converged &= step.converged
        reports.append(step.report)
        if not np.isfinite(step.inputs).all():
            nothing = np.full(stages[0].input_shape, np.nan)
            return Recovered(nothing, np.zeros(nothing.shape, bool), False, tuple(reports))
        outputs, sure, deltas = step.inputs, step.determined, step.deltas
        if i > 0:
            outputs = stages[i - 1].activation.clean(outputs, precision)
    return Recovered(outputs, sure, converged, tuple(reports))


def ratio(kernel_update: np.ndarray, deltas: np.ndarray) -> tuple[np.ndarray, float]:
    """``u = sum_j delta_j dW_j / sum_j delta_j^2``, and the share of dW that it leaves over.

    Least squares for ``dW = u delta^T`` over all rows: exact for one example whatever its loss,
    its label and the learning rate, which appear in dW and delta alike.

    Args:
      kernel_update: (n, F).
      deltas: (F,) the bias update.

    Returns:
      (n,) NaN if the deltas are zero, and ``|dW - u delta^T| / |dW|``.

    References:
      Geiping et al. (2020, arXiv 2003.14053), proposition 3.1: the ratio of a single row.
    """
    square = float(deltas @ deltas)
    if not square > 0:
        return np.full(len(kernel_update), np.nan), math.nan
    inputs = kernel_update @ deltas / square
    size = float(np.linalg.norm(kernel_update))
    left = float(np.linalg.norm(kernel_update - inputs[:, None] * deltas[None, :]))
    return inputs, left / size if size > 0 else 0.0


def _dense(stage: Stage, arrays: LayerArrays, deltas: np.ndarray) -> _Step:
    signals = deltas if arrays.bias_update is None else arrays.bias_update
    inputs, residual = ratio(arrays.kernel_update, signals)
    finite = np.isfinite(inputs)
    report = {
        "layer": stage.layer.name,
        "equations": int(np.count_nonzero(signals)) * inputs.size,
        "unknowns": inputs.size,
        "undetermined": int(np.count_nonzero(~finite)),
        "residual": residual if math.isfinite(residual) else None,
        "iterations": 0,
    }
    return _Step(inputs, finite, arrays.kernel @ signals, True, report)


def _front(
    stages: Sequence[Stage],
    arrays: Sequence[LayerArrays],
    outputs: np.ndarray,
    sure: np.ndarray,
    deltas: np.ndarray,
) -> Front:
    """The equations of the last of some convolutions."""
    stage = stages[-1]
    before, known = stage.activation.invert(outputs)
    slopes = stage.activation.derivative(outputs)
    system = conv_system(stage, arrays[-1], deltas, slopes, known & sure)
    y = system.right_hand_side(
        (before - arrays[-1].bias[None, None, :]).reshape(system.weights.shape),
        arrays[-1].kernel_update,
    )
    off = (~known & sure).reshape(system.weights.shape) * system.weights.max()
    return Front(stages, arrays, system, y, off)


def _conv(
    front: Front,
    *,
    precision: float,
    rng: np.random.Generator,
    index: int,
    again: Recovered | None,
) -> _Step | Recovered:
    """The input of one convolution, or the image if only that is determined."""
    num_equations, unknowns = front.system.num_equations, front.system.shape[1]
    searched = again is not None and again.searched_from == index
    step = None
    if num_equations >= unknowns and not searched:
        step = _linear(front, precision, rng, test_rank=again is None)
    if index > 0 and (step is None or not step.determined.all()):
        found = search_image(
            front,
            precision=precision,
            rng=rng,
            start=None if again is None else again.inputs,
            test_rank=again is None,
        )
        if found is not None:
            alone = {
                "layer": front.stages[-1].layer.name,
                "equations": num_equations,
                "unknowns": unknowns,
                "undetermined": max(0, unknowns - num_equations),
                "residual": None,
                "iterations": 0,
            }
            reports = (alone if step is None else step.report, found.report)
            return Recovered(found.inputs, found.determined, True, reports, index)
    return step or _linear(front, precision, rng, test_rank=again is None)


def _linear(front: Front, precision: float, rng: np.random.Generator, *, test_rank: bool) -> _Step:
    system, stage = front.system, front.stages[-1]
    solution = least_squares(system, front.y, tolerance=max(1e-2 * precision, 1e-14))
    sure = determined(system, rng) if test_rank else np.ones(len(solution.x), bool)
    report = {
        "layer": stage.layer.name,
        "equations": system.num_equations,
        "unknowns": sure.size,
        "undetermined": int(np.count_nonzero(~sure)),
        "residual": solution.residual,
        "iterations": solution.iterations,
    }
    return _Step(
        solution.x.reshape(stage.input_shape),
        sure.reshape(stage.input_shape),
        windows_of(stage).add_patches(system.deltas @ system.kernel.T),
        solution.converged,
        report,
    )
