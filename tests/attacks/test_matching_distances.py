"""Distances between updates and image priors, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.test_util import check_grads

from jgia.attacks.gradient_matching import distance, layer_weights, priors
from jgia.attacks.gradient_matching.distances import square

NAMES = ("l2", "l2_norm", "cosine", "layer_cosine", "max_layer")


def _update(seed):
    rng = np.random.default_rng(seed)
    return {
        "conv1": {"kernel": rng.normal(size=(3, 3, 1, 2)), "bias": rng.normal(size=2)},
        "block1": {"conv1": {"kernel": rng.normal(size=(2, 2))}},
    }


def _layers(update):
    flat = [update["conv1"]["kernel"].ravel(), update["conv1"]["bias"]]
    return [np.concatenate(flat), update["block1"]["conv1"]["kernel"].ravel()]


def _cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def _expected(name, weights):
    pairs = list(zip(_layers(_update(0)), _layers(_update(1)), weights, strict=True))
    if name == "l2":
        return sum(w * np.sum((a - b) ** 2) for a, b, w in pairs)
    if name == "l2_norm":
        return sum(w * np.linalg.norm(a - b) for a, b, w in pairs)
    if name == "cosine":
        roots = [np.sqrt(w) for *_, w in pairs]
        a, b = (
            np.concatenate([r * p[i] for r, p in zip(roots, pairs, strict=True)]) for i in (0, 1)
        )
        return 1 - _cos(a, b)
    each = [w * (1 - _cos(a, b)) for a, b, w in pairs]
    return sum(each) / sum(weights) if name == "layer_cosine" else max(each)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [None, (1.5, 0.5)])
def test_distances_equal_numpy(name, weights):
    given = None if weights is None else {"conv1": weights[0], "block1/conv1": weights[1]}
    found = distance(name, _update(0), _update(1), given)
    assert float(found) == pytest.approx(_expected(name, weights or (1, 1)), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_distances_have_derivatives(name):
    target = jax.tree.map(jnp.asarray, _update(1))
    update = jax.tree.map(jnp.asarray, _update(0))
    check_grads(lambda u: distance(name, u, target), (update,), order=2)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_at_the_target_and_at_zero_are_finite(name):
    target = jax.tree.map(jnp.asarray, _update(1))
    for point in (target, jax.tree.map(jnp.zeros_like, target)):
        gradient = jax.grad(lambda u: distance(name, u, target))(point)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["cosine", "layer_cosine", "max_layer"])
def test_directions_ignore_scale_and_tell_opposites(name):
    target = jax.tree.map(jnp.asarray, _update(1))
    longer = jax.tree.map(lambda leaf: 3 * leaf, target)
    opposite = jax.tree.map(lambda leaf: -leaf, target)
    assert float(distance(name, longer, target)) == pytest.approx(0, abs=1e-12)
    assert float(distance(name, opposite, target)) == pytest.approx(2)
    assert float(distance("l2", longer, target)) > 1


def test_a_layer_without_a_target_says_nothing_about_directions():
    target = jax.tree.map(jnp.asarray, _update(1))
    target["conv1"] = jax.tree.map(jnp.zeros_like, target["conv1"])
    update = jax.tree.map(jnp.asarray, _update(0))
    only = {"block1": update["block1"]}
    alone = distance("max_layer", only, {"block1": target["block1"]})
    assert float(distance("max_layer", update, target)) == float(alone)
    assert float(distance("layer_cosine", update, target)) == pytest.approx(float(alone) / 2)


def test_updates_of_other_models_are_refused():
    with pytest.raises(ValueError, match="the same parameters"):
        distance("l2", _update(0), {"conv1": _update(1)["conv1"]})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("equal", [1, 1, 1]), ("linear", [1.5, 1, 0.5]), ("exponential", [12 / 7, 6 / 7, 3 / 7])],
)
def test_layer_weights_fall_from_first_to_last(kind, expected):
    found = layer_weights(["a", "b", "c"], kind)
    assert list(found.values()) == pytest.approx(expected)


IMAGES = np.random.default_rng(3).normal(size=(2, 5, 4, 3))


def test_total_variation_equals_numpy():
    down, right = np.diff(IMAGES, axis=1), np.diff(IMAGES, axis=2)
    expected = np.abs(down).mean() + np.abs(right).mean()
    assert float(priors.total_variation(jnp.asarray(IMAGES))) == pytest.approx(expected)
    length = np.sqrt(down[:, :, :-1] ** 2 + right[:, :-1] ** 2).mean()
    assert float(priors.total_variation(jnp.asarray(IMAGES), "l2")) == pytest.approx(length)


def test_zero_padded_total_variation_is_a_padded_convolution():
    kernel = np.zeros((1, 3, 1, 1))
    kernel[0, 1:, 0, 0] = -1, 1
    parts = [
        np.abs(scipy.ndimage.correlate(IMAGES, k, mode="constant"))
        for k in (kernel, kernel.transpose(0, 2, 1, 3))
    ]
    found = priors.total_variation(jnp.asarray(IMAGES), "zero_padded")
    assert float(found) == pytest.approx((parts[0] + parts[1]).mean())


@pytest.mark.parametrize("form", ["l1", "l2", "zero_padded"])
def test_flat_images_have_no_derivatives(form):
    flat = jnp.zeros((1, 4, 4, 1))
    gradient = jax.grad(lambda x: priors.total_variation(x, form))(flat)
    assert not np.any(gradient)
    assert float(priors.total_variation(flat, form)) == 0
    assert np.isfinite(jax.grad(priors.image_l2)(flat)).all()


def test_an_image_of_one_pixel_has_no_variation():
    assert float(priors.total_variation(jnp.ones((1, 1, 1, 3)))) == 0


def test_image_length_and_group_distance():
    images = jnp.asarray(IMAGES)
    assert float(priors.image_l2(images)) == pytest.approx(np.linalg.norm(IMAGES) / 20)
    assert float(priors.group_distance(images, images + 2)) == pytest.approx(4)


def test_batch_norm_distance_is_a_sum_of_lengths():
    found = {"norm1": (jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0]))}
    wanted = {"norm1": (np.array([0.0, 4.0]), np.array([1.0, 1.0])), "other": (0, 0)}
    assert float(priors.batch_norm_distance(found, wanted)) == pytest.approx(5)
    gradient = jax.grad(lambda m: priors.batch_norm_distance({"norm1": (m, m)}, {"norm1": (m, m)}))
    assert np.isfinite(gradient(jnp.ones(2))).all()


def test_a_targets_square_may_be_known():
    rng = np.random.default_rng(5)
    update, target = (
        {"fc": {"kernel": jnp.asarray(rng.normal(size=(3, 2))), "bias": jnp.ones(2)}}
        for _ in range(2)
    )
    known = square(target)
    np.testing.assert_allclose(known, sum(np.sum(x**2) for x in jax.tree.leaves(target)))
    plain = distance("cosine", update, target)
    np.testing.assert_allclose(distance("cosine", update, target, target_square=known), plain)
    wrong = distance("cosine", update, target, target_square=2 * known)
    assert abs(float(wrong - plain)) > 1e-3
    weights = {"fc": 0.5}
    np.testing.assert_allclose(
        distance("cosine", update, target, weights, target_square=2 * known),
        distance("cosine", update, target, weights),
    )
