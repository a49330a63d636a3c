"""InvRE: what a release tells about every single image, in one call."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jgia import _checks
from jgia.risk.estimate import RiskEstimate, RiskSettings, estimate
from jgia.risk.jacobian import Sizes, layer_names, sizes
from jgia.risk.krylov import spectral_norm
from jgia.risk.prior import Prior
from jgia.risk.release import Release, UpdateRelease
from jgia.risk.spectrum import Choice, choose_route
from jgia.risk.structured import structured_outputs

PyTree = Any


class RiskError(ValueError):
    """The release or its derivatives left the finite numbers: there is no estimate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskReport:
    """The estimates of many inputs, with what they rest on.

    Attributes:
      estimates: fields of :class:`RiskEstimate` as NumPy arrays with a leading axis of inputs.
      layers: names along ``estimates.layer_risk``.
      choice: the route, why, and about how much memory it took.
      energy: E0: the error of who only knows the prior, summed over pixels.
      noise_std: tau.
      num_inputs: d.
      num_outputs: p.
    """

    estimates: RiskEstimate
    layers: tuple[str, ...]
    choice: Choice
    energy: float
    noise_std: float
    num_inputs: int
    num_outputs: int

    def aggregate(self, labels: ArrayLike | None = None) -> dict[str, Any]:
        """Mean, median, 95th percentile and worst of the risk, of all inputs and per class."""
        risk = np.asarray(self.estimates.risk)
        whole = _quantiles(risk)
        if labels is not None:
            classes = np.asarray(labels)
            whole["per_class"] = {
                int(c): _quantiles(risk[classes == c]) for c in np.unique(classes)
            }
        return whole


def _quantiles(risk: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(risk),
        "mean": float(risk.mean()),
        "median": float(np.median(risk)),
        "p95": float(np.quantile(risk, 0.95)),
        "worst": float(risk.max()),
    }


def invre(
    key: PRNGKeyArray,
    release: Release,
    params: PyTree,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    prior: Prior,
    noise_std: float,
    settings: RiskSettings | None = None,
    microbatch: int | None = None,
) -> RiskReport:
    r"""Estimate, without attacking, how well any attack can reconstruct each image.

    For every image x with label y the release ``G`` is linearized, ``o = G(x) + J (x' - x) + n``
    with ``n ~ N(0, tau^2 I)``, and the attacker's uncertainty is the Gaussian posterior of that
    channel under the prior: its trace is InvLoss, and ``1 - InvLoss / E0`` the risk.

    Args:
      key: random key of Monte Carlo parts (success curve, diagnostics).
      release: :class:`UpdateRelease`, :class:`EmbeddingRelease`, or a function of (params, image,
        label) to any pytree.
      params: the parameters; float32 or float64, as the images.
      images: (N, H, W, C) in [0, 1]: N inputs of one image each; or (N, B, H, W, C): N clients
        that share one update of B images.
      labels: (N,) or (N, B).
      prior: of one image's pixels (repeated for B of them).
      noise_std: tau: standard deviation of the noise on every shared entry, in absolute terms.
        Without a defense it is what rounding and mismatch leave; it must be positive.
      settings: what to compute, and how.
      microbatch: inputs of one call of the device; from ``settings.memory_bytes`` if left out. On
        CPU they are computed one after the other, whatever it is.

    Returns:
      A :class:`RiskReport`.

    Raises:
      ValueError: noise not positive, shapes that do not fit each other or the prior, half
        precision, a route that does not fit (says which, and how much memory it needs).
      RiskError: the release or an estimate is NaN or infinite; names the inputs.

    Guarantees:
      Nothing here sees an attack. The risk does not decrease when layers are added or noise is
      taken away. Several devices share the inputs.

    Edge cases:
      The number depends on the prior and on the noise: report both with it. It is local: other
      images with the same update, permutations within a batch and strong generative priors are
      outside the model. Risk under a malicious server is that at the parameters it sends.

    References:
      Xu et al. (USENIX Security 2025, arXiv 2512.15460), which names InvRE; docs/risk.md derives
      what is computed here.
    """
    settings = settings or RiskSettings()
    _checks.positive(noise_std=noise_std)
    pixels, classes = jnp.asarray(images), jnp.asarray(labels)
    _check_inputs(pixels, classes, prior)
    size = pixels[0].size
    whole = prior if size == prior.num_inputs else prior.repeat(size // prior.num_inputs)
    whole = whole.astype(pixels.dtype.name)
    shape = sizes(lambda x: release(params, x, classes[0]), pixels[0])
    tau = jnp.asarray(noise_std, pixels.dtype)
    key_inputs, key_route = jax.random.split(key)
    choice = _choose(key_route, release, params, pixels, classes, whole, noise_std, shape, settings)
    settings = dataclasses.replace(settings, route=choice.route)
    together = microbatch or _microbatch(len(pixels), choice, settings)
    parts: list[RiskEstimate] = []
    keys = jax.random.split(key_inputs, len(pixels))
    for start in range(0, len(pixels), together):
        rows = slice(start, start + together)
        shared = _shared((keys[rows], pixels[rows], classes[rows]))
        found = _estimates(release, settings, params, *shared, whole, tau)
        parts.append(jax.tree.map(np.asarray, found))
    estimates = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    if not estimates.finite.all():
        bad = np.flatnonzero(~estimates.finite).tolist()
        raise RiskError(
            f"the estimates of inputs {bad[:8]} are not finite (route {choice.route!r}): the "
            "release or its derivatives are not finite there, or float32 lost too much; check the "
            "images and parameters, use route='qr', or float64."
        )
    layers = tuple(sorted(layer_names(shape.names))) if settings.per_layer else ()
    return RiskReport(
        estimates=estimates,
        layers=layers,
        choice=choice,
        energy=float(whole.energy),
        noise_std=noise_std,
        num_inputs=shape.num_inputs,
        num_outputs=shape.num_outputs,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _estimates(
    release: Release,
    settings: RiskSettings,
    params: PyTree,
    keys: Array,
    images: Array,
    labels: Array,
    prior: Prior,
    noise_std: Array,
) -> RiskEstimate:
    def one(key: Array, image: Array, label: Array) -> RiskEstimate:
        return estimate(key, release, params, image, label, prior, noise_std, settings)

    if jax.default_backend() == "cpu":
        # Batched LAPACK calls that run beside each other were seen to wait for each other's threads
        # forever on XLA:CPU; a batch axis of one also costs them their threads.
        return lax.map(lambda inputs: one(*inputs), (keys, images, labels))
    return jax.vmap(one)(keys, images, labels)


def _microbatch(count: int, choice: Choice, settings: RiskSettings) -> int:
    """Inputs at a time: as memory allows; on CPU one, which keeps every core busy."""
    if jax.default_backend() == "cpu":
        return 1
    return max(1, min(count, 64, settings.memory_bytes // max(1, choice.peak_bytes)))


def _shared(arrays: Any) -> Any:
    """Spread inputs over devices where there are several and their number divides."""
    devices = jax.devices()
    count = len(arrays[1])
    if len(devices) == 1 or count % len(devices):
        return arrays
    sharding = NamedSharding(Mesh(np.asarray(devices), ("inputs",)), PartitionSpec("inputs"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), arrays)


def _check_inputs(images: Array, labels: Array, prior: Prior) -> None:
    if images.ndim < 2 or labels.shape[:1] != images.shape[:1] or len(images) == 0:
        raise ValueError(
            f"images (N, ...) and labels (N, ...) must agree in N >= 1, got shapes {images.shape} "
            f"and {labels.shape}."
        )
    size = images[0].size
    if size % prior.num_inputs:
        raise ValueError(
            f"the prior describes {prior.num_inputs} pixels, an input has {size}; make the prior "
            "from images of the same shape."
        )
    if not bool(jnp.isfinite(images).all()):
        raise ValueError("images must be finite.")


def _choose(
    key: Array,
    release: Release,
    params: PyTree,
    images: Array,
    labels: Array,
    prior: Prior,
    noise_std: float,
    shape: Sizes,
    settings: RiskSettings,
) -> Choice:
    """Check the route that was asked for, or choose one."""
    structured = isinstance(release, UpdateRelease)
    if settings.route == "structured" and (not structured or not settings.labels_known):
        raise ValueError(
            "route='structured' needs an UpdateRelease and known labels; use another route."
        )
    if not settings.labels_known and not hasattr(release, "victim"):
        raise ValueError(
            "labels_known=False needs a release with a victim, whose labels may be probabilities."
        )
    options: dict[str, Any] = {
        "rank": prior.rank,
        "dtype": images.dtype,
        "memory_bytes": settings.memory_bytes,
        "chunk_size": settings.chunk_size,
    }
    if isinstance(release, UpdateRelease) and settings.labels_known:
        together = images.shape[1] if images.ndim == 5 else 1
        options["structured_outputs"] = structured_outputs(release, params, together)
    if settings.route != "auto":
        chosen = choose_route(shape, **options | {"memory_bytes": 2**62})
        return Choice(settings.route, "asked for", chosen.peak_bytes)
    noise = None
    if images.dtype == jnp.float32:
        signal = float(_signal(release, key, params, images[0], labels[0], prior))
        noise = noise_std / max(signal, 1e-30)
    return choose_route(shape, relative_noise=noise, **options)


@functools.partial(jax.jit, static_argnums=0)
def _signal(
    release: Release, key: Array, params: PyTree, image: Array, label: Array, prior: Prior
) -> Array:
    """The largest singular value in the prior's coordinates."""
    rows = jnp.sqrt(prior.variance) if prior.factor is None else prior.factor

    def fn(z: Array) -> PyTree:
        moved = rows * z if rows.ndim == 0 else z @ rows
        return release(params, image + moved.reshape(image.shape), label)

    return spectral_norm(key, fn, jnp.zeros(prior.rank, image.dtype))
