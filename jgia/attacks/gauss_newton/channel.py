"""What was observed as a function of whitened coordinates: misfit, derivatives, Gram matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgia.attacks.gauss_newton.coordinates import Coordinates

PyTree = Any
Whiten = Callable[[PyTree], PyTree]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Channel:
    """``o = G(x) + n``, with everything that a compiled step needs.

    Attributes:
      fn: ``(x, *args)`` to a pytree; ``(x, width, *args)`` where a width is given.
      args: what ``fn`` takes beside the images, such as parameters and labels.
      observed: o, whitened.
      noise_std: () standard deviation after whitening.
      coordinates: of x.
      whiten: linear, from a pytree like o to one whose noise is white; ``None`` where it is.
      width: () of smoothed kinks, or ``None`` for a release that has no smoothed form.
    """

    fn: Callable[..., PyTree] = dataclasses.field(metadata={"static": True})
    args: tuple[Any, ...]
    observed: PyTree
    noise_std: Array
    coordinates: Coordinates
    whiten: Whiten | None = dataclasses.field(default=None, metadata={"static": True})
    width: Array | None = None

    def smoothed(self, width: float) -> Channel:
        """With kinks of another width."""
        if self.width is None:
            return self
        return dataclasses.replace(self, width=jnp.asarray(width, self.noise_std.dtype))

    def predicted(self, z: Array) -> PyTree:
        """``G(x(z))`` over the noise's standard deviation."""
        images = self.coordinates.images(z)
        kinks = () if self.width is None else (self.width,)
        value = self.fn(images, *kinks, *self.args)
        value = value if self.whiten is None else self.whiten(value)
        return jax.tree.map(lambda leaf: leaf / self.noise_std, value)

    def residual(self, z: Array) -> PyTree:
        """What the image leaves of the observation, over the noise's standard deviation."""
        return jax.tree.map(
            lambda o, leaf: o / self.noise_std - leaf, self.observed, self.predicted(z)
        )


def _square(tree: PyTree) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)]))


@jax.jit
def misfit(channel: Channel, z: Array) -> Array:
    """Squared length of the residual."""
    return _square(channel.residual(z))


@jax.jit
def gradient(channel: Channel, z: Array) -> tuple[Array, Array]:
    """The misfit, and ``J' r``: half of its derivative, with the sign turned."""
    residual, pull = jax.vjp(channel.residual, z)
    return _square(residual), -pull(residual)[0]


@jax.jit
def product(channel: Channel, z: Array, v: Array) -> Array:
    """``J' J v``."""
    _, moved = jax.jvp(channel.predicted, (z,), (v,))
    return jax.vjp(channel.predicted, z)[1](moved)[0]


def gram(channel: Channel, z: Array, *, chunk_size: int, max_entries: int) -> Array:
    """``J' J``, from the Jacobian's rows where they fit in memory, else forward over reverse."""
    outputs = sum(leaf.size for leaf in jax.tree.leaves(channel.observed))
    return _gram(channel, z, min(chunk_size, z.size), outputs * z.size <= max_entries)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gram(channel: Channel, z: Array, chunk_size: int, hold: bool) -> Array:
    _, derivative = jax.linearize(channel.predicted, z)
    basis = jnp.eye(z.size, dtype=z.dtype)
    if hold:
        pushed = lax.map(derivative, basis, batch_size=chunk_size)
        leaves = [leaf.reshape(z.size, -1) for leaf in jax.tree.leaves(pushed)]
        rows = jnp.concatenate(leaves, axis=1)
        return rows @ rows.T
    adjoint = jax.linear_transpose(derivative, z)
    pulled = lax.map(lambda row: adjoint(derivative(row))[0], basis, batch_size=chunk_size)
    return (pulled + pulled.T) / 2
