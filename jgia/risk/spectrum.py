"""The singular spectrum of a release by the route that fits shapes, precision and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jgia import _checks
from jgia.risk.jacobian import CHUNK, Sizes, gram, gram_of_rows, push, rows_of, sizes, triangular

Fn = Callable[[Array], Any]
Route = Literal["svd", "qr", "rows", "gram", "structured", "krylov"]
"""How derivatives become a spectrum; see :func:`choose_route`."""

_SVD_ENTRIES = 2**24
_SVD_INPUTS = 1024
_LARGEST_EXACT = 8192
_SAVING = 4  # fewer outputs by this factor are worth the structured route
SAFE_NOISE = 1e-2
"""Noise over the largest signal from which squaring in float32 loses nothing that matters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of a release's Jacobian.

    Attributes:
      sigma: (m,) largest first, ``m = min(p, d)``; fewer where only the leading ones were asked.
      right: (m, d) right singular vectors, or ``None``.
      num_inputs: d.
      num_outputs: p.
      route: how they were computed.
    """

    sigma: Float[Array, " values"]
    right: Float[Array, "values inputs"] | None
    num_inputs: int = dataclasses.field(metadata={"static": True})
    num_outputs: int = dataclasses.field(metadata={"static": True})
    route: str = dataclasses.field(metadata={"static": True})

    @property
    def complete(self) -> bool:
        """Whether every singular value that can differ from zero is there."""
        return self.sigma.shape[-1] >= min(self.num_inputs, self.num_outputs)


class Choice(NamedTuple):
    """A route with its price.

    Attributes:
      route: the route.
      reason: why, in words.
      peak_bytes: about what it holds at once.
    """

    route: Route
    reason: str
    peak_bytes: int


def choose_route(
    shape: Sizes,
    *,
    rank: int | None = None,
    dtype: Any = "float32",
    memory_bytes: int = 2**31,
    relative_noise: float | None = None,
    chunk_size: int = CHUNK,
    structured_outputs: int | None = None,
) -> Choice:
    """Which route computes the spectrum of a Jacobian of this shape.

    ==========  ====================================================  =====================
    route       what it does                                          memory
    ==========  ====================================================  =====================
    svd         the Jacobian and its singular values                  3 p k
    qr          blocks of outputs, orthogonal steps only (TSQR)       block + 3 k^2
    rows        the Jacobian and its Gram matrix                      p k + 2 k^2
    gram        forward over reverse, the Jacobian is never held      chunk p + 3 k^2
    structured  dense layers from their factors: p does not matter    k sum(widths) + 2 k^2
    krylov      leading values, and brackets by quadrature            steps (p + d)
    ==========  ====================================================  =====================

    ``svd`` and ``qr`` keep every digit; the Gram routes lose singular values below ``sqrt(eps)`` of
    the largest, which does not matter where noise hides them: in float32 they are safe for
    ``tau / (s sigma_max) >= 1e-2``.

    Args:
      shape: of the release (:func:`jgia.risk.sizes`).
      rank: k directions; d when left out.
      dtype: of the computation.
      memory_bytes: what may be held at once.
      relative_noise: ``tau / (s sigma_max)`` if it is known.
      chunk_size: directions at a time.
      structured_outputs: what the structured route would hold in place of the p outputs
        (:func:`jgia.risk.structured_outputs`); ``None`` where it does not apply.

    Returns:
      The route, why, and its memory.

    Raises:
      ValueError: no exact route fits k; says how much memory one would need.

    >>> choose_route(Sizes(784, 10_000, (10_000,), ("w",)), memory_bytes=2**30).route
    'svd'
    """
    k, p = rank or shape.num_inputs, shape.num_outputs
    item = np.dtype(dtype).itemsize
    needs = {
        "svd": 3 * p * k * item,
        "rows": (p * k + 2 * k * k) * item,
        "gram": (2 * chunk_size * p + 3 * k * k) * item,
        "qr": (min(p, 2**28 // k) * k + 3 * k * k) * item,
    }
    if k > _LARGEST_EXACT:
        raise ValueError(
            f"an exact spectrum of {k} directions needs {needs['gram'] / 2**30:.1f} GiB at least "
            f"and about {2 * k**3 / 1e12:.1f} Tflop; use route='krylov', or a low-rank prior."
        )
    small = p * k <= _SVD_ENTRIES and k <= _SVD_INPUTS
    if small and needs["svd"] <= memory_bytes:
        return Choice("svd", "the Jacobian is small", needs["svd"])
    precise = item == 8 or (relative_noise is not None and relative_noise >= SAFE_NOISE)
    if structured_outputs is not None and precise:
        needed = (k * structured_outputs + 2 * k * k) * item
        if structured_outputs <= p / _SAVING and needed <= memory_bytes:
            return Choice("structured", "dense layers have most of the parameters", needed)
    if precise and needs["rows"] <= memory_bytes:
        return Choice("rows", "noise hides what squaring loses", needs["rows"])
    if precise and needs["gram"] <= memory_bytes:
        return Choice("gram", "the Jacobian does not fit in memory", needs["gram"])
    if needs["qr"] <= memory_bytes:
        return Choice("qr", "squaring would lose small singular values", needs["qr"])
    if needs["gram"] <= memory_bytes:
        return Choice("gram", "nothing else fits in memory", needs["gram"])
    cheapest = min(needs.values())
    raise ValueError(
        f"{k} directions of {p} outputs need {cheapest / 2**30:.2f} GiB, memory_bytes allows "
        f"{memory_bytes / 2**30:.2f}; raise it, lower chunk_size, or use route='krylov'."
    )


def spectrum(
    fn: Fn,
    x: Float[Array, "*shape"],
    *,
    route: Route | Literal["auto"] = "auto",
    vectors: bool = False,
    num_values: int = 30,
    key: Array | None = None,
    chunk_size: int = CHUNK,
    memory_bytes: int = 2**31,
) -> Spectrum:
    """Singular values of the Jacobian of ``fn`` at ``x``.

    Args:
      fn: a differentiable function of one array, to any pytree of float32 or float64 arrays.
      x: where; any shape.
      route: see :func:`choose_route`; ``"structured"`` is :func:`jgia.risk.structured_gram`.
      vectors: also the right singular vectors: images of what leaks most.
      num_values: of route ``"krylov"``: steps, and leading values returned.
      key: random key of route ``"krylov"``.
      chunk_size: directions at a time.
      memory_bytes: see :func:`choose_route`.

    Returns:
      A :class:`Spectrum`. NaN in the release gives NaN singular values, in any route.

    Raises:
      ValueError: half precision or integers, a route that does not fit, no key for ``"krylov"``.

    >>> spectrum(lambda x: jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]) @ x, jnp.zeros(2)).sigma
    Array([4., 3.], dtype=float32)
    """
    _checks.one_of(("auto", *get_args(Route)), route=route)
    shape = sizes(fn, x)
    if route == "auto":
        route = choose_route(
            shape, dtype=x.dtype, memory_bytes=memory_bytes, chunk_size=chunk_size
        ).route
    count = min(shape.num_inputs, shape.num_outputs)
    if route == "krylov":
        if key is None:
            raise ValueError("route='krylov' starts at random; give a key.")
        from jgia.risk.krylov import top_spectrum

        top = top_spectrum(key, fn, x, num_steps=min(num_values, count))
        return _spectrum(top.sigma, top.right if vectors else None, shape, route)
    if route in ("rows", "gram", "structured"):
        if route == "structured":
            raise ValueError("a structured spectrum needs the model: use structured_gram.")
        k = (
            gram(fn, x, chunk_size=chunk_size)
            if route == "gram"
            else gram_of_rows(rows_of(push(fn, x, chunk_size=chunk_size)))
        )
        sigma, right = spectrum_of_gram(k, vectors=vectors)
    else:
        matrix = (
            rows_of(push(fn, x, chunk_size=chunk_size)).T
            if route == "svd"
            else triangular(fn, x, chunk_size=chunk_size)
        )
        sigma, right = _svd(matrix, vectors=vectors)
    return _spectrum(sigma[:count], None if right is None else right[:count], shape, route)


def spectrum_of_gram(
    gram: Float[Array, "inputs inputs"], *, vectors: bool = False
) -> tuple[Float[Array, " inputs"], Float[Array, "inputs inputs"] | None]:
    """Singular values (largest first) and right vectors from a Gram matrix.

    Eigenvalues that rounding made negative count as zero.
    """
    if not vectors:
        values = jnp.linalg.eigvalsh(gram)
        return _root(values[::-1]), None
    values, basis = jnp.linalg.eigh(gram)
    return _root(values[::-1]), basis[:, ::-1].T


def _root(values: Array) -> Array:
    """The square root, 0 for what rounding made negative; NaN stays NaN."""
    return jnp.sqrt(jnp.where(values < 0, 0, values))


def _svd(matrix: Array, *, vectors: bool) -> tuple[Array, Array | None]:
    if not vectors:
        return jnp.linalg.svd(matrix, compute_uv=False), None
    _, sigma, right = jnp.linalg.svd(matrix, full_matrices=False)
    return sigma, right


def _spectrum(sigma: Array, right: Array | None, shape: Sizes, route: str) -> Spectrum:
    return Spectrum(
        sigma=sigma,
        right=right,
        num_inputs=shape.num_inputs,
        num_outputs=shape.num_outputs,
        route=route,
    )
