"""The attack as one call: which of its ways an observation allows, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from jgia.attacks.analytic.arrays import (
    LayerArrays,
    noise,
    perturbed,
    precision,
    read_layer,
)
from jgia.attacks.analytic.chain import NAME, Stage, head_name, stages
from jgia.attacks.analytic.recursion import Recovered, ratio, recover
from jgia.attacks.analytic.rows import attack_batch
from jgia.attacks.analytic.simulate import Match, match
from jgia.models import Conv, Dense, flatten_params
from jgia.observation import Observation, Reconstruction, Status, ThreatModel

SELECTED_BY = "digits to which the image's own gradient repeats the update"

_EXPLAINED = 8  # times the expected size of rounding or noise: still explained by it
_SOLVED = 1e-11  # residual that chains of float64 solves reach
_EXACT_ERROR = 0.01  # root mean square in pixels, 40 dB


def attack(
    key: Array, observation: Observation, *, num_examples: int | None = None
) -> Reconstruction:
    """Compute the client's image from its update, without a search where equations suffice.

    One example: the update of a first layer that is fully connected is the image times a known
    vector; through a chain of convolutions and fully connected layers the input of each layer
    solves linear equations, from the head on (:func:`~jgia.attacks.analytic.recursion.recover`).
    Several examples behind a first layer that is fully connected with ReLU: all of them, or what
    its neurons have for themselves (:func:`~jgia.attacks.analytic.rows.attack_batch`).

    Args:
      key: PRNG key: random vectors that test what is determined and how far noise carries, and
        starts where layers must be solved together.
      observation: update, parameters that were sent, model, threat model. The server may be honest
        but curious.
      num_examples: how many examples the update covers where the threat model does not tell. If
        neither does, one is assumed as far as the update allows it.

    Returns:
      For one example, one image with one of these statuses:

      * ``exact``: its own gradient repeats the update to rounding, every pixel is determined, and
        noise of that size changes the image by less than 1 % (root mean square);
      * ``noisy``: every pixel is determined, but there is more noise, or it carries further;
      * ``rank_deficient``: pixels are left that the equations do not determine;
      * ``not_converged``: an iteration ended too early, or in a local minimum.

      Or none, ``mixture`` if the update is not that of one example (or not of the label that the
      threat model gives), ``nonfinite`` if it is zero. The score is the number of digits to which
      the update is repeated. ``candidates`` has ``expected_psnr``: the attack's own estimate in
      dB, from solving once more with noise of the size of what is left over. ``stats["layers"]``
      counts equations and unknowns. For several examples see
      :func:`~jgia.attacks.analytic.rows.attack_batch`.

    Raises:
      ValueError: the model cannot be attacked (:func:`~jgia.attacks.analytic.chain.check`), a layer
        is not visible, or the update is of several examples or steps where one is needed.

    Guarantees:
      The same key gives the same bits on the same device. No image of the client's and no metric
      is used.
    """
    victim, threat = observation.victim, observation.threat_model
    chain = stages(victim)
    _require_one_step(threat)
    count = _num_examples(threat, num_examples)
    first = chain[0].layer
    rectified = isinstance(first, Dense) and first.activation == "relu"
    if count not in (None, 1) and not rectified:
        raise ValueError(_one_example_needed(chain[0], count))
    arrays = [read_layer(observation, stage) for stage in chain]
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))
    if not all(each.finite for each in arrays):
        return _nothing(observation, Status.NONFINITE, "the update has NaN or infinite entries")
    reason = _not_one(observation, chain[-1], arrays[-1]) if count is None else None
    if (count or 1) > 1 or (reason is not None and rectified):
        return attack_batch(observation, chain[0], rng)
    if reason is not None:
        return _nothing(observation, Status.MIXTURE, f"it is not of one example: {reason}")
    return _one(rng, observation, chain, arrays, certain=count == 1)


def _require_one_step(threat: ThreatModel) -> None:
    if threat.protocol == "fedsgd":
        return
    if threat.local_steps != 1:
        steps = "an unknown number of" if threat.local_steps is None else threat.local_steps
        raise ValueError(
            f"the update sums up {steps} local steps, whose gradients belong to different "
            "parameters: the analytic attack needs local_steps=1, or protocol='fedsgd'; attack by "
            "gradient matching."
        )
    if threat.local_optimizer == "adam":
        raise ValueError(
            "the first step of Adam divides every entry of the gradient by its own size: only "
            "signs are left, which no equation can use; the analytic attack needs SGD."
        )


def _num_examples(threat: ThreatModel, given: int | None) -> int | None:
    known = threat.num_examples
    if given is None:
        return known
    if given < 1:
        raise ValueError(f"num_examples must be at least 1, got {given}.")
    if known is not None and given != known:
        raise ValueError(f"num_examples={given} contradicts the threat model, which says {known}.")
    return given


def _one_example_needed(first: Stage, count: int | None) -> str:
    layer = first.layer
    what = (
        f"every entry of the update of the convolution {layer.name}"
        if isinstance(layer, Conv)
        else f"every neuron of the layer {layer.name}, whose activation is {layer.activation!r},"
    )
    return (
        f"{what} mixes all {count} examples: the analytic attack needs num_examples=1 here, or a "
        "first layer that is fully connected with ReLU (--model mlp); attack by gradient matching."
    )


def _not_one(observation: Observation, stage: Stage, arrays: LayerArrays) -> str | None:
    """Why the update of a fully connected layer is not that of one example, if it is not."""
    if arrays.bias_update is None or not np.any(arrays.bias_update):
        return None
    left = ratio(arrays.kernel_update, arrays.bias_update)[1]
    update = arrays.kernel_update
    std = noise(observation)[f"{stage.layer.name}/kernel"]
    limit = _EXPLAINED * std * math.sqrt(update.size) / max(float(np.linalg.norm(update)), 1e-300)
    if left <= limit:
        return None
    return (
        f"that of layer {stage.layer.name} has rank one up to {left:.1e} only, rounding and "
        f"declared noise explain {limit:.1e} (num_examples=1 overrules this)"
    )


def _one(
    rng: np.random.Generator,
    observation: Observation,
    chain: Sequence[Stage],
    arrays: Sequence[LayerArrays],
    *,
    certain: bool,
) -> Reconstruction:
    """The example behind the update of one, or of what may be one if that is not ``certain``."""
    eps = precision(observation)
    found = recover(chain, arrays, precision=eps, rng=rng)
    if not np.isfinite(found.inputs).all():
        reason = "the update of a fully connected layer is zero: there is nothing to divide by"
        return _nothing(observation, Status.NONFINITE, reason)
    label, labels_by, contradiction = _label(observation)
    if contradiction:
        return _nothing(observation, Status.MIXTURE, contradiction)
    inputs = found.inputs.reshape(observation.victim.input_shape)
    matched = match(observation, inputs, label)
    full = bool(found.determined.all())
    explained = matched.residual <= max(_EXPLAINED * matched.told, _SOLVED)
    if full and found.converged and found.searched_from is None and not (certain or explained):
        reason = (
            f"the gradient of its image leaves {matched.residual:.1e} of the update, rounding "
            f"and declared noise explain {_EXPLAINED * matched.told:.1e} (num_examples=1 overrules "
            "this)"
        )
        return _nothing(observation, Status.MIXTURE, f"it is not of one example: {reason}")
    error = math.inf
    if full:
        error = _carried_noise(observation, chain, arrays, found, matched, eps, rng)
    status = _status(found, matched, error, explained=explained)
    pixels = np.clip(_pixels(observation, inputs), 0, 1)
    score = -math.log10(max(matched.residual, 1e-16))
    candidate = {
        "status": str(status),
        "label": matched.label,
        "residual": matched.residual,
        "determined": float(np.mean(found.determined)),
        "expected_psnr": -20 * math.log10(max(error, 1e-15)) if full else None,
    }
    return Reconstruction(
        images=pixels[None].astype(np.float32 if eps > 1e-8 else np.float64),
        scores=np.array([score]),
        statuses=(status,),
        selected_by=SELECTED_BY,
        labels=np.array([matched.label], np.int64),
        candidates=(candidate,),
        stats={
            "method": NAME,
            "num_candidates": 1,
            "labels_by": labels_by,
            "scale": matched.scale,
            "rounding_residual": matched.rounding,
            "told_residual": matched.told,
            "layers": list(found.layers),
        },
    )


def _label(observation: Observation) -> tuple[int | None, str, str | None]:
    """The label, how it was found, and what contradicts it.

    The bias gradient of the head is ``softmax(z) - onehot(y)``: negative for y alone.
    """
    given = observation.threat_model.labels
    if given is not None and (len(given) != 1 or given[0] >= observation.victim.num_classes):
        raise ValueError(
            f"the threat model must give one label below {observation.victim.num_classes}, got "
            f"{given}."
        )
    head = head_name(observation.victim)
    update = flatten_params(observation.update).get(f"{head}/bias")
    if update is None:
        return (None, "residual", None) if given is None else (given[0], "given", None)
    sign = 1.0 if observation.threat_model.protocol == "fedsgd" else -1.0
    signed = sign * np.asarray(update, np.float64)
    if given is None:
        return int(np.argmin(signed)), "head", None
    limit = _EXPLAINED * noise(observation)[f"{head}/bias"]
    if signed[given[0]] > limit:
        return (
            given[0],
            "given",
            f"the head's bias update is not that of the given label {given[0]}",
        )
    return given[0], "given", None


def _carried_noise(
    observation: Observation,
    chain: Sequence[Stage],
    arrays: Sequence[LayerArrays],
    found: Recovered,
    matched: Match,
    eps: float,
    rng: np.random.Generator,
) -> float:
    """Root mean square change of the pixels if the update gets its noise once more."""

    def std(name: str, update: np.ndarray | None) -> float:
        if update is None:
            return 0.0
        size = float(np.sqrt(np.mean(update**2)))
        return max(matched.leaves[name], observation.threat_model.noise_std, eps / 4 * size)

    noisy = [
        perturbed(
            each,
            std(f"{stage.layer.name}/kernel", each.kernel_update),
            std(f"{stage.layer.name}/bias", each.bias_update),
            rng,
        )
        for stage, each in zip(chain, arrays, strict=True)
    ]
    again = recover(chain, noisy, precision=eps, rng=rng, again=found)
    shape = observation.victim.input_shape
    one, other = (
        np.clip(_pixels(observation, each.inputs.reshape(shape)), 0, 1) for each in (found, again)
    )
    return float(np.sqrt(np.mean((one - other) ** 2)))


def _status(found: Recovered, matched: Match, error: float, *, explained: bool) -> Status:
    """From rank, convergence, residual and carried noise, never from the truth."""
    if not found.determined.all():
        return Status.RANK_DEFICIENT
    if not found.converged:
        return Status.NOT_CONVERGED
    if matched.residual <= max(_EXPLAINED * matched.rounding, _SOLVED) and error <= _EXACT_ERROR:
        return Status.EXACT
    if found.searched_from is not None and not explained:
        return Status.NOT_CONVERGED
    return Status.NOISY


def _pixels(observation: Observation, inputs: np.ndarray) -> np.ndarray:
    normalization = observation.victim.normalization
    return inputs * np.asarray(normalization.std) + np.asarray(normalization.mean)


def _nothing(observation: Observation, status: Status, reason: str) -> Reconstruction:
    """No image, and why."""
    return Reconstruction(
        images=np.zeros((0, *observation.victim.input_shape), np.float32),
        scores=np.zeros(0),
        statuses=(),
        selected_by=SELECTED_BY,
        candidates=({"status": str(status), "reason": reason},),
        stats={"method": NAME, "num_candidates": 1, "reason": reason},
    )
