"""Choose parameters that make a shared gradient readable, architecture untouched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgia.attacks.ares.calibrate import check_calibration, fit_thresholds, smoothed_bin_masses
from jgia.attacks.ares.filters import convolution_filters
from jgia.attacks.ares.front import Front
from jgia.attacks.ares.measurement import Measurement
from jgia.attacks.ares.passing import pass_through_params
from jgia.attacks.ares.plan import Plan, attackable_layers, measured_by
from jgia.attacks.ares.rows import measurement_rows
from jgia.config import AresOptions, ClientConfig
from jgia.models import Dense, Victim
from jgia.sparse import to_planes

PyTree = Any


def craft(
    key: Array,
    victim: Victim,
    calibration: np.ndarray,
    *,
    options: AresOptions | None = None,
    num_examples: int = 32,
    client: ClientConfig | None = None,
) -> tuple[PyTree, Plan]:
    """Build malicious parameters for a CNN or an MLP and the plan to read their gradient.

    First layer: what is measured. In a CNN (ARES type I) a bank of filters; in a multilayer
    perceptron (type II) rows that isolate single examples and pairs of rows that measure all of
    them. Later layers in front of the last hidden one: direct pass, harmless because their
    inputs are non-negative. Last hidden layer, the imprint: identical columns ``query``, biases
    ``-t_j`` with thresholds at the quantiles ``(j + 1/2) / K`` of a distribution fitted to the
    query feature of public images. Head: ``gain * 1 u^T / K`` with ``u`` not constant, so that
    the back-propagated signal of an example is the same for all neurons **and not zero** (with
    constant ``u`` softmax cross-entropy sends exactly nothing back).

    Args:
      key: PRNG key; decides filters or rows, query and head.
      victim: the model; its architecture is checked, never changed.
      calibration: (N, H, W, C) public images in [0, 1], N >= 16, disjoint from the client's.
      options: see :class:`AresOptions`.
      num_examples: batch size that the server expects; isolating rows are tuned to it.
      client: what the server tells the client to do; one gradient when left out. For several
        local steps all layers are scaled down, so that training moves thresholds and head little
        against the bins' widths (:meth:`AresOptions.scales`).

    Returns:
      ``(params, plan)``.

    Raises:
      ValueError: the architecture cannot carry the attack or the calibration images do not fit.

    References:
      ARES (IEEE S&P 2026, arXiv 2603.17623), section 3 and figure 2; imprint of Fowl et al.
      (ICLR 2022, arXiv 2110.13057).

    Departures: thresholds are calibrated and sorted; the head condition above holds; of
      ``front_end_trials`` random filter banks the best-conditioned on public images is kept.
    """
    options = options or AresOptions()
    attackable = attackable_layers(victim)
    front, fc, head = attackable
    public = check_calibration(calibration, victim)
    head_gain, front_scale, imprint_scale = options.scales(
        client or ClientConfig(), num_examples=num_examples, num_bins=fc.features
    )
    key_filters, key_query, key_head = jax.random.split(key, 3)

    inputs = to_planes(victim.normalization.normalize(jnp.asarray(public, jnp.float32)))
    if isinstance(front, Front):
        kernel, bias = convolution_filters(key_filters, options, front, inputs)
        kernel, bias = (front_scale * np.asarray(a, np.float32) for a in (kernel, bias))
        params = pass_through_params(victim, front, kernel, bias)
    else:
        number = min(layer.features for layer in front)
        kernel, bias = measurement_rows(
            key_filters, options, number, inputs, num_examples=num_examples
        )
        kernel, bias = front_scale * kernel, front_scale * bias
        params = {
            layer.name: _dense_params(victim, layer, layer is front[0], kernel, bias)
            for layer in front
        }
    measured = measured_by(victim, kernel, bias)
    exact = np.moveaxis(measured.exact, 0, -1)
    uniform = jax.random.uniform(key_query, exact.shape, minval=0.5, maxval=1.5)
    uniform = jnp.where(exact, uniform, 0)
    query = np.asarray(imprint_scale * uniform / uniform.sum(), np.float32)
    features = query_features(measured, query, inputs)
    thresholds = fit_thresholds(features, fc.features, widening=options.spread_widening)
    thresholds = np.sort(thresholds.astype(np.float32)).astype(np.float64)

    params[fc.name] = {
        "kernel": _identical_columns(query, attackable.num_inputs, fc.features),
        "bias": jnp.asarray(-thresholds, jnp.float32),
    }
    u = _head_directions(key_head, victim.num_classes)
    params[head.name] = {
        "kernel": jnp.asarray(
            np.tile(u * (head_gain / fc.features), (fc.features, 1)), jnp.float32
        ),
        "bias": jnp.zeros(victim.num_classes, jnp.float32),
    }
    seen = bool(np.any(features > thresholds[0]))
    plan = Plan(
        front_end=options.front_end,
        kernel=kernel,
        bias=bias,
        channels=measured.feature,
        query=query,
        thresholds=thresholds,
        order=np.arange(fc.features),
        fc_name=fc.name,
        first_name=attackable.first.name,
        bin_masses=smoothed_bin_masses(features, thresholds) if seen else None,
    )
    return params, plan


def query_features(measured: Measurement, query: np.ndarray, inputs: Array) -> np.ndarray:
    """Query feature ``<query, ReLU(M x + b)>`` of normalized planes (C, H, W, N): (N,)."""
    outputs = measured.operator.apply(inputs) + jnp.asarray(measured.bias)[..., None]
    weights = jnp.asarray(query.transpose(2, 0, 1))
    return np.asarray(jnp.einsum("fhw,fhwn->n", weights, jax.nn.relu(outputs)), np.float64)


def _dense_params(
    victim: Victim, layer: Dense, first: bool, kernel: np.ndarray, bias: np.ndarray
) -> dict[str, Array]:
    """The measurement in the first hidden layer, the identity in those between."""
    shape = victim.param_shapes()[layer.name]["kernel"].shape
    num_passed = kernel.shape[-1]
    full, full_bias = np.zeros(shape, np.float32), np.zeros(layer.features, np.float32)
    if first:
        full[:, :num_passed] = kernel
        full_bias[:num_passed] = bias
    else:
        full[range(num_passed), range(num_passed)] = 1
    return {"kernel": jnp.asarray(full), "bias": jnp.asarray(full_bias)}


def _identical_columns(query: np.ndarray, num_features: int, num_neurons: int) -> Array:
    """The fully connected kernel (H * W * num_features, K): every column is the query."""
    column = np.zeros((*query.shape[:2], num_features), np.float32)
    column[..., : query.shape[2]] = query
    return jnp.asarray(np.broadcast_to(column.reshape(-1, 1), (column.size, num_neurons)))


def _head_directions(key: Array, num_classes: int) -> np.ndarray:
    """U with entries +-1, as balanced as can be, in random order: never constant.

    The signal of an example is ``E_p[u] - u_label``, at least ``1 - 1/C`` in size for uniform
    predictions, whatever its label.
    """
    signs = np.where(np.arange(num_classes) % 2 == 0, 1.0, -1.0)
    return signs[np.asarray(jax.random.permutation(key, num_classes))]
