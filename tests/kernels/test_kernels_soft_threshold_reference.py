"""Tier 1: the XLA reference against a float64 oracle and the definition of the proximal map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from jgia_kernels.soft_threshold import soft_threshold
from jgia_kernels.soft_threshold.reference import shrink
from jgia_kernels.soft_threshold.rules import differentiable
from jgia_kernels.soft_threshold.specs import TEST_SPECS

_KINDS = ("scalar", "ragged_vector", "lam_per_image", "lam_per_coefficient")
_SPECS = [spec for spec in TEST_SPECS if spec.name in _KINDS]
_EXAMPLES = settings(derandomize=True, database=None, deadline=None, max_examples=60)
_SHAPE = (4, 5)  # one shape for all examples: one compilation


def _floats(low: float, high: float):
    return st.floats(low, high, width=32, allow_subnormal=False)


_OPERANDS = hnp.arrays(np.float32, _SHAPE, elements=_floats(-1e6, 1e6))
_THRESHOLDS = hnp.arrays(np.float32, (_SHAPE[0], 1), elements=_floats(0, 1e6))


def _oracle(x, lam) -> np.ndarray:
    x, lam = np.asarray(x, np.float64), np.asarray(lam, np.float64)
    return np.sign(x) * np.maximum(np.abs(x) - lam, 0.0)


def _rounds_to(actual, expected: np.ndarray) -> bool:
    """Whether ``actual`` is ``expected``, in float64, after one rounding to ``actual``'s dtype."""
    finfo = jnp.finfo(actual.dtype)
    bound = 0.5 * float(finfo.eps) * np.abs(expected) + float(finfo.tiny)
    return bool(np.all(np.abs(np.asarray(actual, np.float64) - expected) <= bound))


def _solves_prox(x, y, lam) -> bool:
    """Optimality: ``x - y`` is ``lam sign(y)`` where ``y != 0``, within ``[-lam, lam]`` else."""
    x, y, lam = (np.asarray(a, np.float64) for a in (x, y, lam))
    slack = np.finfo(np.float32).eps * (np.abs(x) + lam) + np.finfo(np.float32).tiny
    gap = np.where(y != 0, np.abs(x - y - lam * np.sign(y)), np.abs(x) - lam)
    return bool(np.all(gap <= slack))


def _is_nonexpansive(fn, a, b, lam) -> bool:
    change = np.abs(np.asarray(fn(a, lam), np.float64) - np.asarray(fn(b, lam), np.float64))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    slack = np.finfo(np.float32).eps * (np.abs(a) + np.abs(b)) + np.finfo(np.float32).tiny
    return bool(np.all(change <= np.abs(a - b) + slack))


def _hard_threshold(x, lam):
    return jnp.where(jnp.abs(x) > lam, x, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("spec", _SPECS, ids=_KINDS)
def test_value_is_the_formula_with_one_rounding(spec, dtype):
    key_x, key_lam = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, spec.x, dtype)
    lam = jnp.abs(jax.random.normal(key_lam, spec.lam, dtype))
    y = soft_threshold(x, lam)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert _rounds_to(y, _oracle(x, lam))
    if x.ndim:  # the comparison sees a threshold that is wrong by one part in a hundred
        assert not _rounds_to(y, _oracle(x, np.asarray(lam, np.float64) * 1.01))


@_EXAMPLES
@given(x=_OPERANDS, lam=_THRESHOLDS)
def test_value_solves_the_proximal_problem(x, lam):
    x, lam = jnp.asarray(x), jnp.asarray(lam)
    assert _solves_prox(x, soft_threshold(x, lam), lam)


@_EXAMPLES
@given(a=_OPERANDS, b=_OPERANDS, lam=_THRESHOLDS)
def test_map_is_nonexpansive(a, b, lam):
    assert _is_nonexpansive(soft_threshold, jnp.asarray(a), jnp.asarray(b), jnp.asarray(lam))


def test_properties_reject_wrong_answers():
    x, lam = jnp.array([3.0, -3.0, 0.4], jnp.float32), jnp.float32(1.0)
    y = soft_threshold(x, lam)
    assert _solves_prox(x, y, lam)
    assert not _solves_prox(x, _hard_threshold(x, lam), lam)
    assert not _solves_prox(x, soft_threshold(x, 0.5), lam)
    assert not _solves_prox(x, jnp.zeros_like(x), lam)
    near, far = jnp.array([0.99], jnp.float32), jnp.array([1.01], jnp.float32)
    assert _is_nonexpansive(soft_threshold, near, far, lam)
    assert not _is_nonexpansive(_hard_threshold, near, far, lam)


def test_moreau_decomposition(key):
    # x = prox of lam ||.||_1 + projection on the ball of radius lam of the dual norm.
    x = 3 * jax.random.normal(key, (50,), jnp.float64)
    np.testing.assert_allclose(x - soft_threshold(x, 0.7), np.clip(x, -0.7, 0.7), rtol=1e-15)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_special_values(implementation):
    nan, inf = np.nan, np.inf
    x = jnp.array([nan, inf, -inf, 1.0, -0.0, 2.0, 2.0, nan], jnp.float32)
    lam = jnp.array([1.0, 1.0, 1.0, inf, 0.0, nan, -1.0, inf], jnp.float32)
    y = soft_threshold(x, lam, implementation=implementation)
    np.testing.assert_array_equal(y, np.array([nan, inf, -inf, 0, 0, nan, nan, nan], np.float32))
    dx, dlam = jax.grad(
        lambda x, lam: soft_threshold(x, lam, implementation=implementation).sum(), (0, 1)
    )(x, lam)
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(y))
    np.testing.assert_array_equal(np.isnan(dlam), np.isnan(y))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 4, 1)])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_no_entries(implementation, shape):
    y = soft_threshold(jnp.zeros(shape, jnp.float32), 0.1, implementation=implementation)
    assert (y.shape, y.dtype) == (shape, jnp.float32)


def _away_from_the_kink(key, shape) -> jax.Array:
    """Magnitudes in [0.1, 0.4] or [0.6, 0.9], for thresholds near 0.5."""
    key_size, key_half, key_sign = jax.random.split(key, 3)
    small = jax.random.uniform(key_size, shape, jnp.float64, 0.1, 0.4)
    half = jax.random.bernoulli(key_half, 0.5, shape)
    return jnp.where(half, small, small + 0.5) * jax.random.rademacher(key_sign, shape, jnp.float64)


@pytest.mark.parametrize("lam_shape", [(), (3, 1), (1, 4)])
def test_derivatives_in_closed_form(lam_shape):
    x, lam = _away_from_the_kink(jax.random.key(0), (3, 4)), jnp.full(lam_shape, 0.5)
    live = np.abs(x) > 0.5
    dx, dlam = jax.jit(jax.jacfwd(soft_threshold, (0, 1)))(x, lam)
    np.testing.assert_array_equal(dx.reshape(12, 12), np.diag(live.ravel().astype(float)))
    basis = np.eye(lam.size).reshape(lam.size, *(lam_shape or (1, 1)))
    expected = np.stack([-np.sign(x) * live * row for row in basis], axis=-1)
    np.testing.assert_array_equal(dlam.reshape(3, 4, lam.size), expected)


def test_derivatives_of_first_and_second_order_against_differences():
    x, lam = _away_from_the_kink(jax.random.key(1), (3, 4)), jnp.full((3, 1), 0.5)
    check_grads(jax.jit(soft_threshold), (x, lam), order=2, modes=("fwd", "rev"), eps=1e-3)
    hessian = jax.hessian(lambda x, lam: soft_threshold(x, lam).sum(), (0, 1))
    jax.tree.map(
        lambda block: np.testing.assert_array_equal(block, np.zeros_like(block)),
        jax.jit(hessian)(x, lam),
    )


def test_check_of_derivatives_rejects_a_wrong_rule():
    @jax.custom_jvp
    def wrong(x, lam):
        return shrink(x, lam)

    @wrong.defjvp
    def _jvp(primals, tangents):
        y = wrong(*primals)
        return y, jnp.where(y == 0, 0, tangents[0] + jnp.sign(y) * tangents[1])

    operands = _away_from_the_kink(jax.random.key(0), (3, 4)), jnp.float64(0.5)
    check_grads(jax.jit(differentiable(shrink)), operands, order=1, modes=("fwd",), eps=1e-3)
    with pytest.raises(AssertionError):
        check_grads(jax.jit(wrong), operands, order=1, modes=("fwd",), eps=1e-3)


def test_derivative_at_the_kink_is_zero():
    x = jnp.array([1.0, -1.0, 0.0])
    dx, dlam = jax.grad(lambda x, lam: soft_threshold(x, lam).sum(), (0, 1))(x, jnp.float64(1))
    np.testing.assert_array_equal(dx, np.zeros(3))
    assert dlam == 0


def test_infinite_cotangent_outside_the_support_is_masked():
    _, pullback = jax.vjp(functools.partial(soft_threshold, lam=1.0), jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(pullback(jnp.array([jnp.inf, 3.0]))[0], [0.0, 3.0])


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
def test_default_types_of_a_user_without_x64(implementation):
    with jax.enable_x64(False):
        x = jnp.array([[-2.0, 0.1], [0.5, 4.0]])
        run = jax.jit(functools.partial(soft_threshold, implementation=implementation))
        for lam in (1, 1.0, np.float64(1.0), jnp.array([[1.0], [1.0]])):
            y = soft_threshold(x, lam, implementation=implementation)
            assert y.dtype == jnp.float32
            np.testing.assert_array_equal(y, [[-1.0, 0.0], [0.0, 3.0]])
            np.testing.assert_array_equal(run(x, 1.0), y)


def test_python_threshold_through_jit_takes_the_dtype_of_x():
    x = jnp.array([2.0, -0.5], jnp.float32)
    y = jax.jit(soft_threshold)(x, 0.5)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, [1.5, 0.0])


@pytest.mark.parametrize(
    ("x", "lam", "options", "message"),
    [
        (np.zeros(3, np.float16), 0.1, {}, "x must have dtype"),
        (np.zeros(3, np.float32), -0.1, {}, "lam must be zero or more"),
        (np.zeros(3, np.float32), float("nan"), {}, "lam must be zero or more"),
        (np.zeros(3, np.float32), np.ones(1), {}, "x's dtype float32, got float64"),
        (np.zeros((2, 3), np.float32), np.ones(3, np.float32), {}, r"rank.*\(2, 3\), lam \(3,\)"),
        (np.zeros((2, 3), np.float32), np.ones((3, 1), np.float32), {}, r"lam \(3, 1\)"),
        (np.zeros((1, 3), np.float32), np.ones((2, 3), np.float32), {}, r"lam \(2, 3\)"),
        (np.zeros(3, np.float32), 0.1, {"implementation": "cuda"}, "one of 'auto', 'xla'"),
        (np.zeros(3), 0.1, {"implementation": "pallas"}, "for float32; got float64"),
    ],
)
def test_bad_arguments(x, lam, options, message):
    lam = jnp.asarray(lam) if isinstance(lam, np.ndarray) else lam
    with pytest.raises(ValueError, match=message):
        soft_threshold(jnp.asarray(x), lam, **options)
