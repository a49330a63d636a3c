"""Choose parameters that make a shared gradient readable, architecture untouched."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from jgia.attacks.ares.plan import (
    Plan,
    attackable_layers,
    direct_kernel,
    num_passed_channels,
    signed_kernel,
)
from jgia.config import AresOptions
from jgia.models import Conv, Victim
from jgia.sparse import ConvOperator, to_planes

PyTree = Any

_MIN_CALIBRATION = 16


def craft(
    key: Array,
    victim: Victim,
    calibration: np.ndarray,
    *,
    options: AresOptions | None = None,
) -> tuple[PyTree, Plan]:
    """Build malicious parameters for a CNN (ARES type I) and the plan to read their gradient.

    First convolution: the front end. Later convolutions: direct pass (center tap 1), harmless
    because their inputs are non-negative. Fully connected layer: identical columns ``query``,
    biases ``-t_j`` with thresholds at the quantiles ``(j + 1/2) / K`` of a distribution fitted
    to the query feature of public images. Head: ``gain * 1 u^T / K`` with ``u`` not constant, so
    that the back-propagated signal of an example is the same for all neurons **and not zero**
    (with constant ``u`` softmax cross-entropy sends exactly nothing back).

    Args:
      key: PRNG key; decides filters, query and head.
      victim: the model; its architecture is checked, never changed.
      calibration: (N, H, W, C) public images in [0, 1], N >= 16, disjoint from the client's.
      options: see :class:`AresOptions`.

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
    convs, fc, head = attackable_layers(victim)
    public = _check_calibration(calibration, victim)
    key_filters, key_query, key_head = jax.random.split(key, 3)

    inputs = to_planes(victim.normalization.normalize(jnp.asarray(public, jnp.float32)))
    num_passed = num_passed_channels(convs)
    kernel = _front_end(key_filters, options, convs[0], num_passed, inputs)

    height, width, _ = victim.input_shape
    uniform = jax.random.uniform(key_query, (height, width, num_passed), minval=0.5, maxval=1.5)
    query = np.asarray(uniform / uniform.sum(), np.float32)
    features = query_features(kernel, query, inputs)
    thresholds = fit_thresholds(features, fc.features, widening=options.spread_widening)
    thresholds = np.sort(thresholds.astype(np.float32)).astype(np.float64)

    params: dict[str, dict[str, Array]] = {}
    for conv in convs:
        params[conv.name] = _conv_params(victim, conv, conv is convs[0], kernel)
    params[fc.name] = {
        "kernel": _identical_columns(query, convs[-1].features, fc.features),
        "bias": jnp.asarray(-thresholds, jnp.float32),
    }
    u = _head_directions(key_head, victim.num_classes)
    params[head.name] = {
        "kernel": jnp.asarray(
            np.tile(u * (options.head_gain / fc.features), (fc.features, 1)), jnp.float32
        ),
        "bias": jnp.zeros(victim.num_classes, jnp.float32),
    }
    counts, _ = np.histogram(features, bins=np.append(thresholds, np.inf))
    plan = Plan(
        front_end=options.front_end,
        kernel=kernel,
        bias=np.zeros(num_passed, np.float32),
        query=query,
        thresholds=thresholds,
        order=np.arange(fc.features),
        fc_name=fc.name,
        bin_masses=smoothed_bin_masses(features, thresholds) if counts.sum() else None,
    )
    return params, plan


def fit_thresholds(features: np.ndarray, num_bins: int, *, widening: float = 1.15) -> np.ndarray:
    """Thresholds at the quantiles ``(j + 1/2) / K`` of a fitted distribution, increasing.

    A log-normal where all features are positive (rectified front ends), else a normal; the
    fitted standard deviation is multiplied by ``widening``. The first threshold is lowered to
    the smallest feature seen if that lies below it, so that calibration images are never lost.

    Args:
      features: (N,) query features of public images.
      num_bins: K >= 2.
      widening: factor on the standard deviation.

    Raises:
      ValueError: all features are equal, so that no threshold separates anything.

    >>> t = fit_thresholds(np.exp(np.random.default_rng(0).normal(size=200)), 8)
    >>> bool(np.all(np.diff(t) > 0))
    True
    """
    features = np.asarray(features, np.float64)
    logarithmic = bool(np.all(features > 0))
    values = np.log(features) if logarithmic else features
    spread = values.std()
    if not spread > 1e-9 * max(1.0, float(np.abs(values).max())):
        raise ValueError(
            "the public calibration images all give the same query feature, so no threshold can "
            "separate them; use varied images (one-colour or identical images do not calibrate)."
        )
    levels = (np.arange(num_bins) + 0.5) / num_bins
    thresholds = values.mean() + spread * widening * special.ndtri(levels)
    if logarithmic:
        thresholds = np.exp(thresholds)
    lowest = features.min()
    if lowest <= thresholds[0]:
        thresholds[0] = lowest - 1e-3 * abs(lowest) - 1e-9
    return thresholds


def smoothed_bin_masses(features: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Bin probabilities from a kernel density estimate of the calibration features.

    Raw counts of a few hundred features over a thousand bins would pretend that most bins are
    empty. Gaussian kernels with Silverman's bandwidth; mass below the first threshold is lost.
    """
    features = np.asarray(features, np.float64)
    logarithmic = bool(np.all(features > 0) and np.all(thresholds > 0))
    values = np.log(features) if logarithmic else features
    edges = np.log(thresholds) if logarithmic else thresholds
    quartiles = np.subtract(*np.percentile(values, [75, 25])) / 1.349
    scale = min(values.std(), quartiles) if quartiles > 0 else values.std()
    bandwidth = 0.9 * scale * len(values) ** -0.2  # Silverman 1986, eq. 3.31
    cdf = special.ndtr((edges[:, None] - values[None, :]) / bandwidth).mean(axis=1)
    return np.clip(np.diff(np.append(cdf, 1.0)), 0.0, 1.0)


def query_features(kernel: np.ndarray, query: np.ndarray, inputs: Array) -> np.ndarray:
    """Query feature ``<query, ReLU(M x)>`` of normalized planes (C, H, W, N): (N,)."""
    activation = jax.nn.relu(ConvOperator(jnp.asarray(kernel)).apply(inputs))
    weights = jnp.asarray(query.transpose(2, 0, 1))
    return np.asarray(jnp.einsum("fhw,fhwn->n", weights, activation), np.float64)


def _check_calibration(calibration: np.ndarray, victim: Victim) -> np.ndarray:
    images = np.asarray(calibration)
    if images.ndim != 4 or images.shape[1:] != victim.input_shape:
        raise ValueError(
            f"calibration images must have shape (N, {', '.join(map(str, victim.input_shape))}), "
            f"got {images.shape}."
        )
    if len(images) < _MIN_CALIBRATION:
        raise ValueError(
            f"thresholds need at least {_MIN_CALIBRATION} public calibration images, "
            f"got {len(images)}."
        )
    if not np.issubdtype(images.dtype, np.floating) or not np.all((images >= 0) & (images <= 1)):
        raise ValueError("calibration images must be finite floats in [0, 1].")
    return images


def _front_end(
    key: Array, options: AresOptions, conv: Conv, num_passed: int, inputs: Array
) -> np.ndarray:
    num_in = inputs.shape[0]
    needed = {"random": 1, "signed": 2 * num_in, "direct": num_in}[options.front_end]
    if num_passed < needed:
        raise ValueError(
            f"the {options.front_end!r} front end needs {needed} channels in every convolution, "
            f"the model passes {num_passed}; use front_end='random'."
        )
    if options.front_end == "signed":
        return signed_kernel(conv.kernel_size, num_in, num_passed)
    if options.front_end == "direct":
        return direct_kernel(conv.kernel_size, num_in, num_passed)
    draws = [
        _unit_norm_filters(k, (*conv.kernel_size, num_in, num_passed))
        for k in jax.random.split(key, options.front_end_trials)
    ]
    if len(draws) == 1:
        return np.asarray(draws[0])
    probes = _central_crop(inputs[..., :48], 64)
    quality = [float(_conditioning(kernel, probes)) for kernel in draws]
    return np.asarray(draws[int(np.argmax(quality))])


def _unit_norm_filters(key: Array, shape: tuple[int, ...]) -> Array:
    filters = jax.random.normal(key, shape, jnp.float32)
    return filters / jnp.sqrt(jnp.sum(filters**2, axis=(0, 1, 2), keepdims=True))


def _central_crop(planes: Array, side: int) -> Array:
    _, height, width, _ = planes.shape
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return planes[:, top : top + side, left : left + side]


@functools.partial(jax.jit)
def _conditioning(kernel: Array, inputs: Array) -> Array:
    """How well a filter bank determines images: a low quantile of local smallest eigenvalues.

    For every pixel of every public image, the smallest eigenvalue of the C x C diagonal block of
    ``M^T diag(active) M`` bounds the smallest eigenvalue of the whole operator from above. Its
    0.1 % quantile separates filter banks that leave dark or flat regions undetermined.
    """
    operator = ConvOperator(kernel)
    blocks = operator.pixel_blocks((operator.apply(inputs) > 0).astype(inputs.dtype))
    smallest = jnp.linalg.eigvalsh(jnp.moveaxis(blocks, (0, 1), (-2, -1)))[..., 0]
    return jnp.quantile(smallest, 1e-3)


def _conv_params(victim: Victim, conv: Conv, first: bool, kernel: np.ndarray) -> dict[str, Array]:
    num_passed = kernel.shape[-1]
    if first:
        full = np.zeros((*kernel.shape[:3], conv.features), np.float32)
        full[..., :num_passed] = kernel
    else:
        num_in = victim.param_shapes()[conv.name]["kernel"].shape[2]
        full = np.zeros((*conv.kernel_size, num_in, conv.features), np.float32)
        full[..., :num_passed, :num_passed] = direct_kernel(
            conv.kernel_size, num_passed, num_passed
        )
    return {"kernel": jnp.asarray(full), "bias": jnp.zeros(conv.features, jnp.float32)}


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
