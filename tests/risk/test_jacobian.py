"""Derivatives of a release: every way to the Gram matrix is the Jacobian's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.observation import ThreatModel
from jgia.risk import (
    UpdateRelease,
    function_of_image,
    gram,
    jacobian,
    push,
    sizes,
    structured_gram,
    structured_grams,
    triangular,
)
from jgia.risk.jacobian import blocks

NETS = ("mlp", "lenet")


def oracle(fn, x):
    """The Jacobian by reverse mode: another path through JAX than ours."""

    def flat(z):
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(fn(z))])

    return np.asarray(jax.jit(jax.jacrev(flat))(x)).reshape(-1, x.size)


@pytest.fixture(params=NETS, scope="module")
def net(request, case):
    release, params, images, labels = case(request.param, 1)
    fn = function_of_image(release, params, jnp.asarray(labels[0]))
    x = jnp.asarray(images[0])
    return fn, x, oracle(fn, x)


@pytest.mark.slow
def test_jacobian_is_the_reverse_mode_one(net):
    fn, x, expected = net
    scale = np.abs(expected).max()
    np.testing.assert_allclose(jacobian(fn, x, chunk_size=5), expected, atol=1e-12 * scale)


@pytest.mark.slow
def test_gram_is_that_of_the_jacobian(net):
    fn, x, expected = net
    product = expected.T @ expected
    found = gram(fn, x, chunk_size=7)
    np.testing.assert_allclose(found, product, atol=1e-12 * np.abs(product).max())
    wrong = product + 1e-9 * np.abs(product).max()
    assert np.abs(np.asarray(found) - wrong).max() > 1e-10 * np.abs(product).max()


@pytest.mark.slow
def test_triangular_factor_has_the_jacobians_gram(net):
    fn, x, expected = net
    product = expected.T @ expected
    whole = expected.shape[0]
    for parts in (1, 3):
        r = triangular(fn, x, max_entries=x.size * -(-whole // parts))
        assert r.shape == (x.size, x.size)
        np.testing.assert_allclose(r.T @ r, product, atol=1e-12 * np.abs(product).max())
        np.testing.assert_allclose(r, np.triu(r))


@pytest.mark.slow
def test_directions_are_rows(net):
    fn, x, expected = net
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(3, x.size)))
    moved = expected @ rows.T
    pushed = jnp.concatenate(
        [leaf.reshape(3, -1) for leaf in jax.tree.leaves(push(fn, x, rows, chunk_size=2))], axis=1
    )
    np.testing.assert_allclose(pushed.T, moved, atol=1e-12 * np.abs(moved).max())
    np.testing.assert_allclose(
        gram(fn, x, rows), moved.T @ moved, atol=1e-11 * np.abs(moved).max() ** 2
    )


@pytest.mark.slow
def test_residual_nets_pass(case):
    release, params, images, labels = case("resnet", 1)
    fn = function_of_image(release, params, jnp.asarray(labels[0]))
    x = jnp.asarray(images[0])
    product = oracle(fn, x).T @ oracle(fn, x)
    np.testing.assert_allclose(gram(fn, x), product, atol=1e-12 * np.abs(product).max())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("mlp", None), ("mlp", 2), ("lenet", 2)])
def test_structured_is_the_jacobians(case, name, batch):
    release, params, images, labels = case(name, 2)
    x, y = jnp.asarray(images), jnp.asarray(labels)
    if batch is None:
        x, y = x[0], y[0]
    product = gram(function_of_image(release, params, y), x)
    rows = jnp.eye(x.size)
    found = structured_gram(release, params, x, y, rows)
    np.testing.assert_allclose(found, product, atol=1e-12 * np.abs(product).max())
    layers = structured_grams(release, params, x, y, rows)
    assert set(layers) >= {"head"}


def test_structured_of_visible_layers(case):
    release, params, images, labels = case(
        "mlp", 1, threat_model=ThreatModel(server="honest_but_curious", visible_layers=("fc2",))
    )
    x, y = jnp.asarray(images[0]), jnp.asarray(labels[0])
    product = gram(function_of_image(release, params, y), x)
    found = structured_grams(release, params, x, y, jnp.eye(x.size))
    assert list(found) == ["fc2"]
    np.testing.assert_allclose(found["fc2"], product, atol=1e-12 * np.abs(product).max())


def test_structured_refuses_what_it_does_not_know(case):
    release, params, images, labels = case("mlp", 1, clip_norm=1.0)
    with pytest.raises(ValueError, match="unclipped"):
        structured_gram(
            release, params, jnp.asarray(images[0]), jnp.asarray(labels[0]), jnp.eye(16)
        )


@pytest.mark.slow
def test_float32_agrees(case):
    release, params, images, labels = case("lenet", 1)
    fn = function_of_image(release, params, jnp.asarray(labels[0]))
    expected = gram(fn, jnp.asarray(images[0]))
    narrow = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    fn32 = function_of_image(release, narrow, jnp.asarray(labels[0]))
    found = gram(fn32, jnp.asarray(images[0], "float32"))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_blocks_cover_every_entry_once():
    for leaves in ((3, 2, 4), (1,), (10, 1, 10), (5, 5)):
        for largest in (1, 2, 3, 5, 100):
            parts = blocks(leaves, largest)
            seen = [
                (leaf, i)
                for part in parts
                for leaf, start, stop in part
                for i in range(start, stop)
            ]
            assert sorted(seen) == [(leaf, i) for leaf, n in enumerate(leaves) for i in range(n)]
            assert len(seen) == len(set(seen))
            assert all(sum(stop - start for _, start, stop in part) <= largest for part in parts)


def test_half_precision_and_integers_are_refused():
    for dtype in ("float16", "bfloat16", "int32"):
        with pytest.raises(ValueError, match="float32 or float64"):
            sizes(lambda x: x, jnp.zeros(3, dtype))
    with pytest.raises(ValueError, match="output 'a'"):
        sizes(lambda x: {"a": (x > 0).astype("int32")}, jnp.zeros(3))
    with pytest.raises(ValueError, match="returns nothing"):
        sizes(lambda x: (), jnp.zeros(3))


@pytest.mark.slow
def test_jit_and_vmap_pass(case):
    release, params, images, labels = case("mlp", 3)

    def one(image, label):
        return gram(lambda x: release(params, x, label), image)

    together = jax.jit(jax.vmap(one))(jnp.asarray(images), jnp.asarray(labels))
    for image, label, found in zip(images, labels, together, strict=True):
        apart = one(jnp.asarray(image), jnp.asarray(label))
        np.testing.assert_allclose(found, apart, rtol=1e-10, atol=1e-14)


def test_release_refuses_unknown_local_training(build):
    victim, _ = build("mlp")
    threat = ThreatModel(protocol="fedavg", local_steps=None)
    with pytest.raises(ValueError, match="local_steps and local_learning_rate"):
        UpdateRelease(victim=victim, threat_model=threat)
