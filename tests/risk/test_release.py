"""What leaves a client, and structural facts about its Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config import ClientConfig
from jgia.federated import client_update
from jgia.observation import ThreatModel
from jgia.risk import EmbeddingRelease, UpdateRelease, function_of_image, gram, jacobian


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [ClientConfig(), ClientConfig(protocol="fedavg", local_epochs=3, learning_rate=0.1)],
    ids=["fedsgd", "fedavg"],
)
def test_release_is_what_the_client_shares(case, config):
    _, params, images, labels = case("lenet", 2)
    release, *_ = case("lenet", 2)
    seen = client_update(jax.random.key(0), release.victim, params, images, labels, config)
    release = UpdateRelease(victim=release.victim, threat_model=seen.threat_model)
    found = jax.jit(release)(params, jnp.asarray(images), jnp.asarray(labels))
    difference = jax.tree.map(jnp.subtract, found, seen.update)
    assert norm(difference) < 1e-12 * norm(seen.update)


@pytest.mark.slow
def test_clipped_release_has_the_projected_jacobian(case):
    """J_clip = (c / ||g||) (I - g g' / ||g||^2) J, and J where nothing is clipped."""
    release, params, images, labels = case("mlp", 1)
    x, y = jnp.asarray(images[0]), jnp.asarray(labels[0])
    plain = function_of_image(release, params, y)
    j = np.asarray(jacobian(plain, x))
    g = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(jax.jit(plain)(x))])
    size = np.linalg.norm(g)
    for clip in (size / 3, 2 * size):
        clipped = UpdateRelease(victim=release.victim, clip_norm=float(clip))
        found = jacobian(function_of_image(clipped, params, y), x)
        expected = j
        if clip < size:
            expected = clip / size * (j - np.outer(g, g @ j) / size**2)
        np.testing.assert_allclose(found, expected, atol=1e-13 * np.abs(j).max())


@pytest.mark.slow
def test_first_dense_layer_bounds_the_smallest_singular_value(case):
    """sigma_min(J) >= ||delta_1|| / sqrt(1 + ||a||^2): a bias and an error leak all of it."""
    release, params, images, labels = case("wide", 3)
    identity = release.victim.normalization
    for image, label in zip(images, labels, strict=True):
        x, y = jnp.asarray(image), jnp.asarray(label)
        fn = function_of_image(release, params, y)
        delta = np.linalg.norm(jax.jit(fn)(x)["fc1"]["bias"])
        a = np.asarray(identity.normalize(x)).reshape(-1)
        smallest = np.linalg.svd(np.asarray(jacobian(fn, x)), compute_uv=False)[-1]
        per_pixel = 1 / 0.3  # the normalization's scale: J is with respect to pixels
        assert smallest >= per_pixel * delta / np.sqrt(1 + a @ a) * (1 - 1e-10)
        assert delta > 0


@pytest.mark.slow
def test_batch_gram_holds_the_blocks_of_its_examples(case):
    """The Jacobian of a mean gradient is the examples' side by side, over B."""
    release, params, images, labels = case("mlp", 3)
    x, y = jnp.asarray(images), jnp.asarray(labels)
    whole = gram(function_of_image(release, params, y), x)
    trace = 0.0
    for i in range(3):
        alone = gram(function_of_image(release, params, y[i]), x[i])
        block = whole[16 * i : 16 * (i + 1), 16 * i : 16 * (i + 1)]
        np.testing.assert_allclose(block, alone / 9, atol=1e-14)
        trace += float(jnp.trace(alone)) / 9
    np.testing.assert_allclose(jnp.trace(whole), trace, rtol=1e-12)


@pytest.mark.slow
def test_more_local_steps_tell_more(case):
    release, params, images, labels = case("mlp", 1)
    tops = []
    for steps in (1, 5, 20):
        threat = ThreatModel(
            server="honest_but_curious",
            protocol="fedavg",
            local_steps=steps,
            local_epochs=steps,
            local_learning_rate=0.01,
        )
        fn = function_of_image(
            UpdateRelease(victim=release.victim, threat_model=threat),
            params,
            jnp.asarray(labels[0]),
        )
        tops.append(float(np.linalg.norm(np.asarray(jacobian(fn, jnp.asarray(images[0]))), 2)))
    assert tops == sorted(tops)


@pytest.mark.slow
def test_embedding_is_the_layers_output(build):
    victim, params = build("mlp")
    x = jnp.asarray(np.random.default_rng(0).uniform(size=victim.input_shape))
    release = EmbeddingRelease(victim=victim, layer="fc1")
    flat = victim.normalization.normalize(x).reshape(-1)
    expected = flat @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    np.testing.assert_allclose(release(params, x), expected, rtol=1e-12)
    assert release(params, x[None]).shape == (1, 7)
    j = jacobian(function_of_image(release, params, jnp.zeros((), int)), x)
    np.testing.assert_allclose(j, np.asarray(params["fc1"]["kernel"]).T / 0.3, rtol=1e-12)
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        EmbeddingRelease(victim=victim, layer="conv9")(params, x)


def test_bad_clip_norm_is_refused(build):
    with pytest.raises(ValueError, match="clip_norm"):
        UpdateRelease(victim=build("mlp")[0], clip_norm=0.0)
