"""A release's Jacobian in the prior's coordinates and over the noise, as a square matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import block_diag, solve_triangular

from jgia.risk.jacobian import (
    gram,
    gram_of_rows,
    layer_names,
    push,
    rows_of,
    sizes,
    slices_of,
    triangular,
)
from jgia.risk.posterior import (
    Posterior,
    posterior_from_gram,
    posterior_from_triangular,
    without_nuisance,
    without_nuisance_triangular,
)
from jgia.risk.prior import Prior
from jgia.risk.release import Release, UpdateRelease
from jgia.risk.spectrum import spectrum_of_gram
from jgia.risk.structured import structured_grams

PyTree = Any


class Whitened(NamedTuple):
    """``K = L J' J L' / tau^2`` with the prior's rows L.

    Attributes:
      gram: K, or ``None`` where it was not squared.
      triangular: R with ``R' R = K`` then.
      layers: the same for every layer alone, or nothing.
    """

    gram: Array | None
    triangular: Array | None
    layers: tuple[Whitened, ...] = ()

    @property
    def matrix(self) -> Array:
        """The one of the two that is there."""
        found = self.gram if self.gram is not None else self.triangular
        assert found is not None
        return found

    def posterior(self, rows: Array) -> Posterior:
        """The posterior under a prior with these rows."""
        if self.gram is not None:
            return posterior_from_gram(self.gram, rows)
        assert self.triangular is not None  # one of the two is there
        return posterior_from_triangular(self.triangular, rows)

    def singular_values(self) -> Array:
        """All k, largest first."""
        if self.gram is not None:
            return spectrum_of_gram(self.gram)[0]
        assert self.triangular is not None
        values = jnp.linalg.svd(self.triangular, compute_uv=False)
        return jnp.pad(values, (0, self.triangular.shape[1] - values.shape[0]))

    def times(self, v: Array) -> Array:
        """``K v``."""
        if self.gram is not None:
            return self.gram @ v
        assert self.triangular is not None
        return self.triangular.T @ (self.triangular @ v)

    def without_nuisance(self, count: int) -> Whitened:
        """With the first coordinates unknown and of no interest."""
        parts = tuple(part.without_nuisance(count) for part in self.layers)
        if self.gram is not None:
            return Whitened(without_nuisance(self.gram, count), None, parts)
        assert self.triangular is not None
        return Whitened(None, without_nuisance_triangular(self.triangular, count), parts)

    def unwhitened(self, rows: Array) -> Whitened:
        """In pixels again; for a prior of full rank whose rows are triangular."""
        if self.gram is not None:
            half = solve_triangular(rows, self.gram)
            return Whitened(solve_triangular(rows, half.T), None)
        assert self.triangular is not None
        return Whitened(None, solve_triangular(rows, self.triangular.T).T)

    def scaled(self, factor: Array) -> Whitened:
        """K times a factor."""
        if self.gram is not None:
            return Whitened(factor * self.gram, None)
        return Whitened(None, jnp.sqrt(factor) * self.matrix)

    def trace(self) -> Array:
        """``tr K``."""
        return jnp.trace(self.gram) if self.gram is not None else jnp.sum(self.matrix**2)

    def largest(self, num_steps: int = 50) -> Array:
        """``sqrt(lambda_max(K))`` by power iteration, from below."""
        count = self.matrix.shape[1]
        start = jax.random.normal(jax.random.key(0), (count,), self.matrix.dtype)

        def step(_: Any, v: Array) -> Array:
            there = self.times(v)
            norm = jnp.linalg.norm(there)
            return there / jnp.where(norm == 0, 1, norm)

        return jnp.sqrt(jnp.linalg.norm(self.times(lax.fori_loop(0, num_steps, step, start))))


def whitened(
    release: Release,
    params: PyTree,
    images: Array,
    labels: Array,
    prior: Prior,
    noise_std: Array,
    *,
    route: str,
    labels_known: bool,
    per_layer: bool,
    chunk_size: int,
) -> Whitened:
    """Differentiate a release along the prior's rows.

    Args:
      release: what is shared.
      params: the parameters.
      images: the input.
      labels: its labels.
      prior: of the flattened input.
      noise_std: () tau.
      route: see :func:`jgia.risk.choose_route`.
      labels_known: otherwise probabilities of the classes are coordinates too, ahead of the
        image's, and are taken out of the posterior again.
      per_layer: also every layer alone.
      chunk_size: directions at a time.
    """
    rows = prior.rows() / noise_std
    if route == "structured":
        assert isinstance(release, UpdateRelease)  # checked before
        grams = structured_grams(release, params, images, labels, rows, chunk_size=chunk_size)
        parts = tuple(Whitened(grams[name], None) for name in sorted(grams))
        total = sum(grams.values(), jnp.zeros((), rows.dtype))
        return Whitened(total, None, parts if per_layer else ())

    def fn(x: Array) -> PyTree:
        return release(params, x, labels)

    if labels_known:
        return _derivatives(fn, images, rows, route, per_layer, chunk_size)
    victim: Any = release.victim  # pyright: ignore[reportFunctionMemberAccess]
    count = victim.num_classes * labels.size
    classes = jax.nn.one_hot(labels, count // labels.size, dtype=images.dtype)

    def joint(z: Array) -> PyTree:
        return release(params, z[count:].reshape(images.shape), z[:count].reshape(classes.shape))

    at = jnp.concatenate([classes.reshape(-1), images.reshape(-1)])
    unknown = label_rows(count // labels.size, rows.dtype) / noise_std
    unknown = jnp.kron(jnp.eye(labels.size, dtype=rows.dtype), unknown)
    found = _derivatives(joint, at, block_diag(unknown, rows), route, per_layer, chunk_size)
    return found.without_nuisance(unknown.shape[0])


def label_rows(num_classes: int, dtype: Any) -> Array:
    """A root of the covariance of a label drawn evenly: ``(I - 1 1' / C) / sqrt(C)``."""
    count = jnp.asarray(num_classes, dtype)
    eye = jnp.eye(num_classes, dtype=dtype)
    return (eye - 1 / count) / jnp.sqrt(count)


def _derivatives(
    fn: Callable[[Array], PyTree],
    x: Array,
    rows: Array,
    route: str,
    per_layer: bool,
    chunk_size: int,
) -> Whitened:
    shape = sizes(fn, x)
    layers = layer_names(shape.names) if per_layer else {}
    if route in ("svd", "rows"):
        moved = rows_of(push(fn, x, rows, chunk_size=chunk_size))
        places = slices_of(shape.leaves)
        parts = [
            jnp.concatenate([moved[:, places[leaf]] for leaf in layers[name]], axis=1)
            for name in sorted(layers)
        ]
        if route == "rows":
            return Whitened(
                gram_of_rows(moved),
                None,
                tuple(Whitened(gram_of_rows(part), None) for part in parts),
            )
        return Whitened(
            None, _short(moved.T), tuple(Whitened(None, _short(part.T)) for part in parts)
        )

    def only(leaves: tuple[int, ...]) -> Callable[[Array], list[Array]]:
        return lambda z: [jax.tree.leaves(fn(z))[leaf] for leaf in leaves]

    if route == "gram":
        if not layers:
            return Whitened(gram(fn, x, rows, chunk_size=chunk_size), None)
        grams = [
            gram(only(layers[name]), x, rows, chunk_size=chunk_size) for name in sorted(layers)
        ]
        total = sum(grams, jnp.zeros((), rows.dtype))
        return Whitened(total, None, tuple(Whitened(part, None) for part in grams))
    if not layers:
        return Whitened(None, triangular(fn, x, rows, chunk_size=chunk_size))
    factors = [
        triangular(only(layers[name]), x, rows, chunk_size=chunk_size) for name in sorted(layers)
    ]
    whole = jnp.linalg.qr(jnp.concatenate(factors), mode="r")
    return Whitened(None, whole, tuple(Whitened(None, factor) for factor in factors))


def _short(matrix: Array) -> Array:
    """The matrix itself if it is wide, otherwise its triangular factor."""
    tall = matrix.shape[0] > matrix.shape[1]
    return jnp.linalg.qr(matrix, mode="r") if tall else matrix
