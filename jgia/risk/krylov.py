"""Matrix-free spectra: leading singular values, and brackets of traces by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.risk.jacobian import sizes

Fn = Callable[[Array], Any]


def _default() -> Any:
    """The dtype that matfree allocates in, whatever that of the release."""
    return jnp.result_type(float)


class TopSpectrum(NamedTuple):
    """Leading singular triplets without a Jacobian.

    Attributes:
      sigma: (k,) singular values, largest first; the last of them are not converged yet.
      right: (k, d) their right vectors.
      residual: () norm of what the next step would bring: 0 when nothing is left.
    """

    sigma: Float[Array, " values"]
    right: Float[Array, "values inputs"]
    residual: Float[Array, ""]


def top_spectrum(
    key: PRNGKeyArray, fn: Fn, x: Float[Array, "*shape"], *, num_steps: int = 30
) -> TopSpectrum:
    """Leading singular values of the Jacobian by Golub-Kahan bidiagonalization.

    One forward and one reverse pass each step, and ``num_steps (p + d)`` numbers in memory. Every
    value is at most the true one; a handful is right to five digits after about 30 steps where the
    spectrum decays.

    Args:
      key: random key of the starting vector.
      fn: the release.
      x: where.
      num_steps: at most ``min(p, d)``.

    Raises:
      ValueError: more steps than that.

    References:
      Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix" (1965),
      by matfree (Kraemer et al., arXiv 2405.17277).
    """
    from matfree import decomp

    shape = sizes(fn, x)
    _checks.at_least(1, num_steps=num_steps)
    if num_steps > min(shape.num_inputs, shape.num_outputs):
        raise ValueError(
            f"num_steps={num_steps} must be at most the smaller of {shape.num_inputs} inputs and "
            f"{shape.num_outputs} outputs."
        )
    _, derivative = jax.linearize(fn, x)

    def flat(v: Array) -> Array:
        pushed = jax.tree.leaves(derivative(v.reshape(x.shape).astype(x.dtype)))
        return jnp.concatenate([leaf.reshape(-1) for leaf in pushed]).astype(_default())

    start = jax.random.normal(key, (x.size,), _default())
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = decomp.bidiag(num_steps)(flat, start)
    small, (_, right) = found.J_small, found.Q_tall
    _, sigma, turn = jnp.linalg.svd(jnp.asarray(small, x.dtype), full_matrices=False)
    return TopSpectrum(
        sigma=sigma,
        right=turn @ right.astype(x.dtype),
        residual=jnp.linalg.norm(found.residual).astype(x.dtype),
    )


class TraceBracket(NamedTuple):
    """An estimate of InvLoss between two quadratures.

    Attributes:
      lower: () Gauss quadrature: below the truth for every probe.
      upper: () Gauss-Radau quadrature with a node at 0: above it for every probe.
      standard_error: () of the mean over probes.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    standard_error: Float[Array, ""]


def invloss_bracket_by_quadrature(
    key: PRNGKeyArray,
    matvec: Callable[[Float[Array, " rank"]], Float[Array, " rank"]],
    rows: Float[Array, "rank inputs"] | Float[Array, ""],
    num_inputs: int,
    *,
    num_steps: int = 30,
    num_probes: int = 16,
) -> TraceBracket:
    r"""``tr(L (I + K)^-1 L')`` from products with K alone, between two quadratures.

    For a random sign vector z and ``v = L z``, ``v' (I + K)^-1 v`` has the trace as its mean.
    ``f(t) = 1 / (1 + t)`` is completely monotone, so that Gauss quadrature from ``num_steps`` of
    Lanczos is a lower bound of every probe's value and Gauss-Radau with a node at 0, the left end
    of the spectrum, an upper one. The gap closes at about ``sqrt(1 + lambda_max)`` steps: with
    little noise an exact route costs less.

    Args:
      key: random key of the probes.
      matvec: a product with K, symmetric and positive semidefinite.
      rows: (k, d) of the prior, or () the standard deviation of an isotropic one.
      num_inputs: d.
      num_steps: of Lanczos, at most k - 1.
      num_probes: the standard error falls with its square root.

    References:
      Golub and Meurant, "Matrices, Moments and Quadrature" (Princeton 2010), sections 6.2 and 7.1.
      Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"
      (SIAM J. Matrix Anal. 38, 2017).
    """
    from matfree import decomp

    _checks.at_least(1, num_steps=num_steps, num_probes=num_probes)

    def probe(signs: Array) -> tuple[Array, Array]:
        start = rows * signs if rows.ndim == 0 else rows @ signs
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            found = decomp.tridiag_sym(num_steps, custom_vjp=False)(
                lambda v: matvec(v.astype(rows.dtype)).astype(_default()),
                start.astype(_default()),
            )
        tridiagonal = jnp.asarray(found.J_small, start.dtype)
        beta = jnp.linalg.norm(found.residual).astype(start.dtype)
        scale = jnp.vdot(start, start)
        return scale * _gauss(tridiagonal), scale * _radau(tridiagonal, beta)

    probes = jax.random.rademacher(key, (num_probes, num_inputs), rows.dtype)
    lower, upper = jax.lax.map(probe, probes)
    middle = (lower + upper) / 2
    spread = jnp.std(middle, ddof=min(1, num_probes - 1)) / jnp.sqrt(
        jnp.asarray(num_probes, middle.dtype)
    )
    return TraceBracket(jnp.mean(lower), jnp.mean(upper), spread)


def _gauss(tridiagonal: Array) -> Array:
    """``e1' (I + T)^-1 e1``."""
    count = tridiagonal.shape[0]
    first = jnp.eye(1, count, dtype=tridiagonal.dtype)[0]
    return jnp.linalg.solve(tridiagonal + jnp.eye(count, dtype=tridiagonal.dtype), first)[0]


def _radau(tridiagonal: Array, beta: Array) -> Array:
    """The same with a row added such that 0 is an eigenvalue (Golub and Meurant, section 6.2)."""
    count = tridiagonal.shape[0]
    eye = jnp.eye(count, dtype=tridiagonal.dtype)
    tiny = jnp.finfo(tridiagonal.dtype).eps * jnp.trace(tridiagonal)
    last = jnp.linalg.solve(tridiagonal + tiny * eye, beta**2 * eye[-1])[-1]
    bordered = jnp.pad(tridiagonal, ((0, 1), (0, 1)))
    bordered = bordered.at[-1, -1].set(last).at[-1, -2].set(beta).at[-2, -1].set(beta)
    return _gauss(bordered)


def whitened_matvec(
    fn: Fn, x: Float[Array, "*shape"], rows: Float[Array, "rank inputs"] | Float[Array, ""]
) -> Callable[[Float[Array, " rank"]], Float[Array, " rank"]]:
    """Products with ``L J' J L'``: one forward and one reverse pass each.

    Args:
      fn: the release, over the noise's standard deviation.
      x: where.
      rows: as for :func:`invloss_bracket_by_quadrature`.
    """
    _, derivative = jax.linearize(fn, x)
    adjoint = jax.linear_transpose(derivative, x)

    def product(v: Array) -> Array:
        direction = (rows * v if rows.ndim == 0 else v @ rows).astype(x.dtype)
        back = adjoint(derivative(direction.reshape(x.shape)))[0].reshape(-1)
        return rows * back if rows.ndim == 0 else rows @ back

    return product


def spectral_norm(
    key: PRNGKeyArray, fn: Fn, x: Float[Array, "*shape"], *, num_steps: int = 12
) -> Float[Array, ""]:
    """The largest singular value, from below; within a per cent after a dozen steps."""
    shape = sizes(fn, x)
    steps = min(num_steps, shape.num_inputs, shape.num_outputs)
    return top_spectrum(key, fn, x, num_steps=steps).sigma[0]
