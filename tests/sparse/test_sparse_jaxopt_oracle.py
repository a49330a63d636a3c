"""The l1 solver against jaxopt's proximal gradient method on the same dense problem."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.sparse import BlockDCT, ConvOperator, LassoOptions, masked_lasso


@pytest.fixture
def relaxed():
    """jaxopt predates strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_objective_agrees_with_proximal_gradient(relaxed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # unmaintained, and says so once
        import jaxopt
    rng = np.random.default_rng(0)
    operator = ConvOperator(jnp.asarray(rng.standard_normal((3, 3, 1, 2))))
    basis = BlockDCT()
    shape, size = (1, 8, 8, 1), 64
    y = jnp.asarray(rng.standard_normal((2, 8, 8, 1)))
    mask = jnp.asarray(rng.random((2, 8, 8, 1)) < 0.7)

    def residual(c: jax.Array) -> jax.Array:
        return jnp.where(mask, operator.apply(basis.synthesize(c.reshape(shape))) - y, 0)

    ours = masked_lasso(
        operator,
        y,
        mask,
        options=LassoOptions(
            lam_ratio=0.05, num_stages=3, iterations_per_stage=400, one_sided=False
        ),
    )
    lam = ours.lam[0]
    solver = jaxopt.ProximalGradient(
        fun=lambda c: 0.5 * jnp.sum(residual(c) ** 2),
        prox=jaxopt.prox.prox_lasso,
        maxiter=4000,
        tol=1e-10,
    )
    c = solver.run(jnp.zeros(size), hyperparams_prox=lam).params
    theirs = 0.5 * jnp.sum(residual(c) ** 2) + lam * jnp.sum(jnp.abs(c))
    np.testing.assert_allclose(ours.objective[0], theirs, rtol=1e-8)
    np.testing.assert_allclose(
        basis.analyze(ours.x).ravel(), c, atol=1e-5 * float(jnp.abs(c).max())
    )
    # A point that is not the minimizer is told apart.
    off = c.at[0].add(1e-2)
    assert 0.5 * jnp.sum(residual(off) ** 2) + lam * jnp.sum(jnp.abs(off)) > theirs * (1 + 1e-6)
