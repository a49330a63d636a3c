import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.data import sample
from jgia.sparse import Basis, ColorRotation, Identity, Wavelet, energy_support, to_planes
from jgia.sparse.wavelets import NAMES, scaling_filter

# Daubechies' tables (1988, table 1, with the sum normalized to sqrt(2)).
PUBLISHED = {
    "haar": [1 / np.sqrt(2)] * 2,
    "db2": [0.4829629131445341, 0.8365163037378079, 0.2241438680420134, -0.1294095225512604],
    "db4": [
        0.2303778133088964,
        0.7148465705529154,
        0.6308807679298587,
        -0.0279837694168599,
        -0.1870348117190931,
        0.0308413818355607,
        0.0328830116668852,
        -0.0105974017850690,
    ],
}


_support = jax.jit(energy_support, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=0)
def _analyze(basis, x):
    return basis.analyze(x)


def _dense(basis, shape, dtype=np.float64):
    """Columns: the analysis of every unit sample."""
    size = int(np.prod(shape))
    units = jnp.asarray(np.eye(size).reshape(*shape, size), dtype)
    return np.asarray(jax.jit(basis.analyze)(units)).reshape(size, size)


def _level(size, taps):
    """One level of one axis from the definition: rows of averages, the odd last, details."""
    pairs, length = size // 2, len(taps)
    high = [(-1) ** m * taps[length - 1 - m] for m in range(length)]
    matrix = np.zeros((size, size))
    for k in range(pairs):
        for m in range(length):
            column = (2 * k + m) % (2 * pairs)
            matrix[k, column] += taps[m]
            matrix[size - pairs + k, column] += high[m]
    if size % 2:
        matrix[pairs, size - 1] = 1
    return matrix


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_filters_are_the_published_ones(name):
    np.testing.assert_allclose(scaling_filter(name), PUBLISHED[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_filters_are_orthonormal_with_vanishing_moments(name):
    h = scaling_filter(name)
    moments = 1 if name == "haar" else int(name[2:])
    assert len(h) == 2 * moments
    for shift in range(moments):
        product = h[: len(h) - 2 * shift] @ h[2 * shift :]
        assert abs(product - (shift == 0)) < 1e-14
    g = h[::-1] * (-1.0) ** np.arange(len(h))
    scale = np.arange(len(h)) / len(h)
    for power in range(moments):
        assert abs(np.sum(g * scale**power)) < 1e-11
    assert abs(np.sum(g * scale**moments)) > 1e-7


@pytest.mark.parametrize(
    ("name", "size"),
    [("haar", 1), ("haar", 5), ("db2", 2), ("db2", 8), ("db4", 3), ("db4", 13)],
)
def test_one_level_is_the_definition(name, size):
    basis = Wavelet(name, levels=1)
    expected = _level(size, PUBLISHED[name])
    np.testing.assert_allclose(_dense(basis, (size,)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "shape", "levels"),
    [
        ("haar", (3, 7, 6), None),
        ("db2", (1, 5, 9), 2),
        ("db4", (2, 8, 11), None),
        ("db4", (1, 1, 37), 2),
        ("db8", (1, 4, 1), 1),
        ("db3", (10,), 5),
    ],
)
def test_every_size_is_orthonormal_and_synthesis_the_transpose(name, shape, levels):
    basis = Wavelet(name, levels)
    size = int(np.prod(shape))
    analysis = _dense(basis, shape)
    np.testing.assert_allclose(analysis @ analysis.T, np.eye(size), rtol=0, atol=1e-13)
    units = jnp.asarray(np.eye(size).reshape(*shape, size))
    synthesis = np.asarray(jax.jit(basis.synthesize)(units)).reshape(size, size)
    np.testing.assert_allclose(synthesis, analysis.T, rtol=0, atol=1e-14)


def test_levels_split_the_corner_of_averages_along_every_axis():
    taps = PUBLISHED["db2"]
    x = np.random.default_rng(0).standard_normal((1, 9, 6, 2))
    first = np.einsum("ai,bj,cijn->cabn", _level(9, taps), _level(6, taps), x)
    expected = first.copy()
    expected[:, :5, :3] = np.einsum(
        "ai,bj,cijn->cabn", _level(5, taps), _level(3, taps), first[:, :5, :3]
    )
    found = jax.jit(Wavelet("db2", levels=2).analyze)(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    # Splitting every row and column to the end, before the next axis, is another transform.
    rows = np.einsum("ai,cijn->cajn", _level(9, taps), x)
    rows[:, :5] = np.einsum("ai,cijn->cajn", _level(5, taps), rows[:, :5])
    assert np.abs(rows - np.asarray(found)).max() > 0.1


def test_the_number_of_levels_left_out_is_that_of_the_longest_side():
    # db4 has 8 taps: sides 32, 16 and 8 are split, 4 is not.
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 32, 6, 1)))
    left_out = _analyze(Wavelet("db4"), x)
    np.testing.assert_array_equal(left_out, _analyze(Wavelet("db4", levels=3), x))
    short = jnp.ones((1, 4, 6, 1))
    np.testing.assert_array_equal(_analyze(Wavelet("db4"), short), short)


def test_a_constant_is_one_coefficient_and_a_ramp_has_details_at_the_border_only():
    constant = jnp.full((1, 16, 16, 1), 0.5)
    assert int(_support(Wavelet("haar"), constant, 0.999)[0]) == 1
    ramp = jnp.arange(64.0)[:, None]
    details = np.asarray(_analyze(Wavelet("db2", levels=1), ramp))[32:, 0]
    # Two vanishing moments; the filter's wrap around the end sees the jump.
    assert np.count_nonzero(np.abs(details) > 1e-12) == 1


def test_color_is_rotated_first_or_not_at_all():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 4, 2)))
    plain = Wavelet("haar", color=False)
    expected = _analyze(plain, ColorRotation().analyze(x))
    np.testing.assert_allclose(_analyze(Wavelet("haar"), x), expected, rtol=0, atol=1e-14)
    alone = [_analyze(plain, x[c : c + 1]) for c in range(3)]
    np.testing.assert_allclose(_analyze(plain, x), jnp.concatenate(alone), rtol=0, atol=1e-14)


def test_natural_images_are_sparse():
    x = to_planes(jnp.asarray(sample.load().images[:32].astype(np.float32) / 255))
    pixels = np.asarray(_support(Identity(), x, 0.99))
    haar = np.asarray(_support(Wavelet("haar"), x, 0.99))
    assert np.median(haar) < 0.1 * np.median(pixels)


def test_jit_vmap_grad_and_dtype():
    dtype = np.float32
    basis = Wavelet("db2", levels=2)
    assert isinstance(basis, Basis)
    assert jax.tree.leaves(basis) == []
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 1, 9, 6, 3)), dtype)
    mapped = jax.jit(jax.vmap(basis.analyze))(x)
    assert mapped.dtype == dtype
    atol = 32 * float(np.finfo(dtype).eps)
    analyze = jax.jit(basis.analyze)
    np.testing.assert_allclose(mapped[1], analyze(x[1]), rtol=0, atol=atol)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(basis.analyze(x) ** 2) / 2))(x[0])
    np.testing.assert_allclose(gradient, x[0], rtol=0, atol=atol)  # an isometry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "db9"}, "name must be one of 'haar', 'db1'"),
        ({"name": "db4", "levels": 0}, "levels must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Wavelet(**options)
