"""What is predicted of every defense, against dense float64 linear algebra of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config.explain import ExplainConfig, ExplainName
from jgia.defenses import DropoutLoss, augment
from jgia.explain import EFFECTS, predict_defense
from jgia.models import make_victim
from jgia.risk import Prior, UpdateRelease

pytestmark = pytest.mark.slow

VICTIM = make_victim("mlp", input_shape=(3, 3, 1), num_classes=3, widths=(6,))
PARAMS = jax.tree.map(lambda leaf: leaf.astype("float64"), VICTIM.init(jax.random.key(3)))
RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.uniform(0.2, 0.8, (3, 3, 1)))
PAIR = jnp.asarray(RNG.uniform(0.2, 0.8, (2, 3, 3, 1)))
PRIOR = Prior.from_data(RNG.uniform(size=(40, 9)))
SIGMA = np.asarray(PRIOR.rows()).T @ np.asarray(PRIOR.rows())
TAU, S, D = 0.01, 0.05, 9
KEY = jax.random.key(7)
SHAPES = [leaf.shape for leaf in jax.tree.leaves(PARAMS)]


def flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def gradient(image, label=1):
    return flat(jax.grad(VICTIM.loss)(PARAMS, image[None], jnp.array([label])))


def jacobian(fn=gradient, x=IMAGE):
    return np.asarray(jax.jacfwd(fn)(x)).reshape(-1, x.size)


def dense(jac, noise, sigma=None):
    """``tr (Sigma^-1 + J' C^-1 J)^-1``."""
    sigma = SIGMA if sigma is None else sigma
    whole = np.diag(noise) if np.ndim(noise) == 1 else noise
    return np.trace(np.linalg.inv(np.linalg.inv(sigma) + jac.T @ np.linalg.solve(whole, jac)))


def white(extra=0.0, size=None):
    return np.full(size or len(gradient(IMAGE)), TAU**2) + extra


def explained(name: ExplainName, image=IMAGE, labels: Any = 1, draws=2, **knobs: Any):
    defense = ExplainConfig(explain=(name,), **knobs).options(name)
    return predict_defense(
        jax.random.clone(KEY),
        defense,
        UpdateRelease(victim=VICTIM),
        PARAMS,
        image,
        labels,
        prior=PRIOR,
        noise_std=TAU,
        num_draws=draws,
    )


def steps(bits):
    g = jax.grad(VICTIM.loss)(PARAMS, IMAGE[None], jnp.array([1]))
    levels = 2 ** (bits - 1) - 1
    return np.concatenate(
        [np.full(leaf.size, float(jnp.abs(leaf).max()) / levels) for leaf in jax.tree.leaves(g)]
    )


def clipped(bound):
    def fn(image, label=1):
        g = gradient(image, label)
        return g * jnp.minimum(1, bound / jnp.linalg.norm(g))

    return fn


def draw_keys(count):
    """Keys of dropout and augmentation, as documented: of the explanation, draw, gradient."""
    draws = jax.random.split(jax.random.split(jax.random.clone(KEY))[0], count)
    return [jax.random.split(jax.random.split(draw)[0], 3) for draw in draws]


def test_noise_adds_to_the_covariance():
    jac = jacobian()
    found = explained("gaussian", defense_noise_std=S)
    np.testing.assert_allclose(found.invloss, dense(jac, white(S**2)), rtol=1e-8)
    assert found.invloss_least == found.invloss
    assert not np.isclose(found.invloss, dense(jac, white(2 * S**2)), rtol=0.05)
    rms = float(jnp.sqrt(jnp.mean(gradient(IMAGE) ** 2)))
    relative = explained("gaussian", defense_noise_std=S, noise_relative=True)
    np.testing.assert_allclose(relative.invloss, dense(jac, white((S * rms) ** 2)), rtol=1e-8)


def test_laplace_noise_has_a_gaussians_covariance_and_at_most_twice_its_information():
    jac = jacobian()
    found = explained("laplace", defense_noise_std=S)
    scale = S / 2**0.5
    np.testing.assert_allclose(found.invloss, dense(jac, white(2 * scale**2)), rtol=1e-8)
    np.testing.assert_allclose(found.invloss_least, dense(jac, white(scale**2)), rtol=1e-8)
    sigma = SIGMA
    twice = 2 * jac.T @ np.linalg.solve(np.diag(white(S**2)), jac)
    never_less = np.trace(np.linalg.inv(np.linalg.inv(sigma) + twice))
    assert never_less <= found.invloss_least < found.invloss


@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_clipping_scales_and_removes_a_direction(bound):
    found = explained("clip", defense_clip_norm=bound)
    np.testing.assert_allclose(found.invloss, dense(jacobian(clipped(bound)), white()), rtol=1e-8)
    g, jac = np.asarray(gradient(IMAGE)), jacobian()
    norm = np.linalg.norm(g)
    if bound < norm:
        formula = bound / norm * (jac - np.outer(g, g @ jac) / norm**2)
        np.testing.assert_allclose(found.invloss, dense(formula, white()), rtol=1e-7)
        assert not np.isclose(found.invloss, dense(bound / norm * jac, white()), rtol=1e-6)


def test_dp_sgd_clips_every_example_and_adds_noise():
    bound, multiplier = 0.5, 0.2
    found = explained(
        "dp_sgd", PAIR, jnp.array([1, 2]), defense_clip_norm=bound, noise_multiplier=multiplier
    )

    def mean(images):
        fn = clipped(bound)
        return (fn(images[0], 1) + fn(images[1], 2)) / 2

    sigma = np.kron(np.eye(2), SIGMA)
    jac = jacobian(mean, PAIR)
    noise = white((multiplier * bound / 2) ** 2)
    np.testing.assert_allclose(found.invloss, dense(jac, noise, sigma), rtol=1e-8)
    wrong = white((multiplier * bound) ** 2)  # on the mean instead of on the sum
    assert not np.isclose(found.invloss, dense(jac, wrong, sigma), rtol=0.05)


def test_top_k_deletes_rows():
    found = explained("top_k", keep_fraction=0.15)
    g, jac = np.asarray(gradient(IMAGE)), jacobian()
    kept = np.zeros(len(g))
    kept[np.argsort(-np.abs(g))[: int(np.ceil(0.15 * len(g)))]] = 1
    np.testing.assert_allclose(found.invloss, dense(kept[:, None] * jac, white()), rtol=1e-8)
    assert found.invloss > dense(jac, white())
    np.testing.assert_allclose(found.kept_share, kept.mean(), atol=1e-9)


@pytest.mark.parametrize(("name", "divisor"), [("quantize", 12), ("quantize_stochastic", 6)])
def test_quantization_is_noise_of_its_steps(name, divisor):
    found = explained(name, num_bits=4)
    noise = white(steps(4) ** 2 / divisor)
    np.testing.assert_allclose(found.invloss, dense(jacobian(), noise), rtol=1e-7)
    other = white(steps(4) ** 2 / (18 - divisor))
    assert not np.isclose(found.invloss, dense(jacobian(), other), rtol=0.01)


def test_adaptive_scale_declares_the_noise_of_its_target():
    found = explained("adaptive_scale", target_error=0.4, prior_std=0.2, noise_rounds=3)
    jac = jacobian()
    sigma2 = np.linalg.svd(jac, compute_uv=False) ** 2
    low, high, tau = 1e-8, 1e4, 1.0
    for _ in range(200):
        tau = (low * high) ** 0.5
        error = np.sum(0.04 * tau**2 / (0.04 * sigma2 + tau**2))
        low, high = (tau, high) if error < 0.4 * 0.04 * D else (low, tau)
    np.testing.assert_allclose(found.invloss, dense(jac, white(3 * tau**2)), rtol=1e-6)


def test_shaped_and_input_noise_are_seen_through_the_jacobian():
    jac = jacobian()
    spread = 0.2**2 * 0.4 / 0.6  # s^2 t / (s^2 + t) = 0.4 s^2
    shape: dict[str, Any] = {"target_error": 0.4, "prior_std": 0.2}
    found = explained("input_noise", **shape)
    np.testing.assert_allclose(
        found.invloss, dense(jac, np.diag(white()) + spread * jac @ jac.T), rtol=1e-7
    )
    found = explained("shaped", noise_shape="uniform", noise_floor=0.3, **shape)
    floor = 0.3 * spread * np.sum(jac**2) / len(jac)
    noise = np.diag(white(floor)) + spread * jac @ jac.T
    np.testing.assert_allclose(found.invloss, dense(jac, noise), rtol=1e-5)
    without = np.diag(white()) + spread * jac @ jac.T
    assert not np.isclose(found.invloss, dense(jac, without), rtol=0.01)


def test_coordinate_noise_is_largest_where_rows_are_long_and_entries_small():
    found = explained("coordinate", defense_noise_std=S)
    g, jac = np.abs(np.asarray(gradient(IMAGE))), jacobian()
    shares = np.linalg.norm(jac, axis=1) / np.maximum(g, 1e-6 * g.max())
    noise = white(len(g) * S**2 * shares / shares.sum())
    np.testing.assert_allclose(found.invloss, dense(jac, noise), rtol=1e-6)


def test_soteria_prunes_one_layer_and_the_others_say_all_the_same():
    found = explained("soteria", soteria_keep=0.34)
    kernel, bias = np.asarray(PARAMS["fc1"]["kernel"]), np.asarray(PARAMS["fc1"]["bias"])
    before = np.asarray(VICTIM.normalization.normalize(IMAGE[None])).reshape(-1) @ kernel + bias
    features = np.maximum(before, 0)
    scale = (
        np.asarray(VICTIM.normalization.normalize(jnp.ones((1, 3, 3, 1)))).mean()
        - np.asarray(VICTIM.normalization.normalize(jnp.zeros((1, 3, 3, 1)))).mean()
    )
    sizes = scale * np.linalg.norm(kernel, axis=0) * (before > 0)
    scores = sizes / (np.abs(features) + 1e-10)
    kept = np.isin(np.arange(6), np.argsort(-scores, kind="stable")[:3])
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape), PARAMS)
    masks["head"]["kernel"] = np.broadcast_to(kept[:, None], (6, 3)).astype(float)
    mask = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(masks)])
    jac = jacobian()
    np.testing.assert_allclose(found.invloss, dense(mask[:, None] * jac, white()), rtol=1e-7)
    none = explained("top_k", keep_fraction=1.0)
    assert found.invloss < 1.2 * none.invloss  # the bypass
    assert found.layer_risk["head"] <= none.layer_risk["head"]
    np.testing.assert_allclose(found.layer_risk["fc1"], none.layer_risk["fc1"], rtol=1e-9)


def test_dropout_and_augmentation_are_means_over_draws_that_the_attacker_knows():
    def masked(key):
        loss = DropoutLoss(victim=VICTIM, rate=0.5)
        return lambda x: flat(jax.grad(loss)(PARAMS, x[None], jnp.array([1]), key))

    def moved(key):
        return lambda x: gradient(augment(key, x[None], policy=("crop", "flip"), crop_padding=1)[0])

    found = explained("dropout")
    keys = [keys[1] for keys in draw_keys(2)]
    errors = [dense(jacobian(masked(key)), white()) for key in keys]
    np.testing.assert_allclose(found.invloss, np.mean(errors), rtol=1e-7)
    found = explained("augment", crop_padding=1, draws=3)
    keys = [keys[0] for keys in draw_keys(3)]
    errors = [dense(jacobian(moved(key)), white()) for key in keys]
    np.testing.assert_allclose(found.invloss, np.mean(errors), rtol=1e-7)


def test_every_defense_of_the_command_has_words_and_no_knob_is_lost():
    names = ExplainName.__args__[0].__args__ + ExplainName.__args__[1].__args__
    assert set(EFFECTS) == {"none", *names}
    fields = {field.name for field in dataclasses.fields(ExplainConfig)}
    from jgia.config.defense import READERS

    renamed = {"noise_std": "defense_noise_std", "clip_norm": "defense_clip_norm"}
    assert {renamed.get(name, name) for name in READERS} - {"noise_known"} <= fields
