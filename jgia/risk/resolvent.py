"""InvLoss inside a loss: finite derivatives of every order, with little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.sparse.linalg import cg
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.risk.jacobian import CHUNK, gram, push

PyTree = Any
_TOLERANCE = 1e-4


def invloss_of_gram(
    gram: Float[Array, "inputs inputs"],
    *,
    noise_std: float | Float[Array, ""],
    prior_variance: float | Float[Array, ""],
) -> Float[Array, ""]:
    r"""The mmse form ``s^2 tr (I + s^2 K / tau^2)^-1`` by a Cholesky factor.

    The same number as :func:`jgia.risk.invloss` of the singular values, but with finite first and
    second derivatives where they repeat or vanish: those of ``eigh`` and ``svd`` divide by their
    differences.

    Args:
      gram: K = J' J.
      noise_std: tau > 0.
      prior_variance: s^2 > 0.

    Edge cases:
      In float32 the factor needs ``s^2 lambda_max / tau^2`` below about 1e7; beyond it the value is
      NaN: use :func:`invloss_of_jacobian`.

    >>> round(float(invloss_of_gram(jnp.eye(2), noise_std=1.0, prior_variance=1.0)), 6)
    1.0
    """
    s2 = jnp.asarray(prior_variance, gram.dtype)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    precision = eye + s2 / jnp.asarray(noise_std, gram.dtype) ** 2 * gram
    inverse = solve_triangular(jnp.linalg.cholesky(precision), eye, lower=True)
    return s2 * jnp.sum(inverse**2)


def invloss_of_jacobian(
    jacobian: Float[Array, "outputs inputs"],
    *,
    noise_std: float | Float[Array, ""],
    prior_variance: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The same from the Jacobian, by the factor of ``[s J / tau; I]``: nothing is squared."""
    s2 = jnp.asarray(prior_variance, jacobian.dtype)
    eye = jnp.eye(jacobian.shape[1], dtype=jacobian.dtype)
    scaled = jnp.sqrt(s2) / jnp.asarray(noise_std, jacobian.dtype) * jacobian
    upper = jnp.linalg.qr(jnp.concatenate([scaled, eye]), mode="r")
    return s2 * jnp.sum(solve_triangular(upper, eye) ** 2)


def differentiable_invloss(
    fn: Callable[[PyTree, Array], PyTree],
    params: PyTree,
    x: Float[Array, "*shape"],
    *,
    noise_std: float | Float[Array, ""],
    prior_variance: float | Float[Array, ""],
    key: PRNGKeyArray | None = None,
    num_probes: int | None = None,
    chunk_size: int = CHUNK,
    num_iterations: int = 100,
    method: Literal["surrogate", "iterative", "autodiff"] = "surrogate",
) -> Float[Array, ""]:
    r"""InvLoss of ``fn(params, .)`` at x, for training: more InvLoss is less leakage.

    With ``A = I + s^2 K / tau^2`` the derivative in K is ``-(s^4 / tau^2) A^-2 = -L L'`` with
    ``L = s^2 A^-1 / tau``, and that in the parameters is the gradient of
    ``-sum_k ||J(params) l_k||^2`` with L held fixed: one forward pass for each column, or for each
    of a few random combinations of them. Reverse mode then passes through these alone, not through
    the Gram matrix.

    Args:
      fn: the release as a function of what is trained and the input.
      params: any pytree.
      x: the input.
      noise_std: tau > 0.
      prior_variance: s^2 > 0.
      key: random key of the probes.
      num_probes: random combinations; ``None`` for all columns, which is exact.
      chunk_size: directions at a time.
      num_iterations: of ``"iterative"``; it needs about ``s sigma_max / tau`` of them.
      method: ``"surrogate"``; ``"iterative"``, which forms no Gram matrix but finds ``A^-1 z`` for
        every probe by conjugate gradients: for images of many pixels; or ``"autodiff"`` through the
        Gram matrix: for second derivatives, and as a check.

    Returns:
      The value: exact, but for ``"iterative"``: that is Hutchinson's estimate of the trace, from
      below where it stops early (as a Gauss quadrature does), that is with too much risk. With
      probes the gradient in ``params`` is an unbiased estimate where the iterations suffice. Only
      ``"autodiff"`` has derivatives in ``x``, ``noise_std`` and ``prior_variance``.

    Raises:
      ValueError: probes without a key, or ``"iterative"`` without probes.
    """
    _checks.one_of(("surrogate", "iterative", "autodiff"), method=method)
    _checks.at_least(1, num_iterations=num_iterations)
    if method == "iterative" and num_probes is None:
        raise ValueError("the iterative method works on probes; give num_probes and a key.")
    if method == "autodiff":
        k = gram(lambda z: fn(params, z), x, chunk_size=chunk_size)
        return invloss_of_gram(k, noise_std=noise_std, prior_variance=prior_variance)
    if num_probes is not None and key is None:
        raise ValueError("num_probes draws random combinations; give a key.")
    held = lax.stop_gradient(params)
    x = lax.stop_gradient(x)
    s2, tau = jnp.asarray(prior_variance, x.dtype), jnp.asarray(noise_std, x.dtype)
    signs = None
    if num_probes is not None:
        assert key is not None  # checked above
        signs = jax.random.rademacher(key, (num_probes, x.size), x.dtype)
    if method == "iterative":
        assert signs is not None  # checked above
        solved = _solve(lambda z: fn(held, z), x, signs, s2 / tau**2, num_iterations)
        value = s2 * jnp.mean(jnp.sum(signs * solved, axis=1))
    else:
        k = gram(lambda z: fn(held, z), x, chunk_size=chunk_size)
        eye = jnp.eye(x.size, dtype=x.dtype)
        inverse = cho_solve((jnp.linalg.cholesky(eye + s2 / tau**2 * k), True), eye)
        solved = inverse if signs is None else signs @ inverse
        value = s2 * jnp.trace(inverse)
    scale = s2 / tau / jnp.sqrt(jnp.asarray(num_probes or 1, x.dtype))
    directions = lax.stop_gradient(scale * solved)
    moved = push(lambda z: fn(params, z), x, directions, chunk_size=chunk_size)
    proxy = -sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(moved))
    return proxy + lax.stop_gradient(value - proxy)


def _solve(
    fn: Callable[[Array], PyTree], x: Array, sides: Array, snr: Array, num_iterations: int
) -> Array:
    """``(I + snr J' J)^-1`` of every row of ``sides``, matrix-free."""
    outputs, forward = jax.linearize(fn, x)
    backward = jax.linear_transpose(forward, x)
    del outputs

    def operator(v: Array) -> Array:
        (back,) = backward(forward(v.reshape(x.shape)))
        return v + snr * back.reshape(-1)

    def solve(side: Array) -> Array:
        return cg(operator, side, tol=_TOLERANCE, maxiter=num_iterations)[0]

    return jax.vmap(solve)(sides)
