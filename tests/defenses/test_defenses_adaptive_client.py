"""Adaptive noise as a client's defense: from the options to the observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia import AuditConfig, DataConfig, ModelConfig, run_audit
from jgia.config import ClientConfig, DefenseConfig
from jgia.config.defense import ADAPTIVE
from jgia.defenses import make_defense
from jgia.federated import client_update
from jgia.models import flatten_params, make_victim

VICTIM = make_victim("mlp", input_shape=(3, 3, 1), num_classes=3, widths=(12,))
PIXELS = np.random.default_rng(0).uniform(0.2, 0.8, (2, 3, 3, 1))
LABELS = np.array([0, 2])
ENERGY = 2 * 9 * 0.25**2
names = pytest.mark.parametrize("name", ADAPTIVE)


def params():
    drawn = VICTIM.init(jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf.astype("float64"), drawn)


def gradient(pixels):
    return jax.grad(VICTIM.loss)(params(), pixels, jnp.asarray(LABELS))


def flat_of(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def dense_jacobian():
    leaves = jax.tree.leaves(jax.jacfwd(gradient)(jnp.asarray(PIXELS)))
    return np.concatenate([np.asarray(leaf).reshape(-1, PIXELS.size) for leaf in leaves])


def shared(name, seed=0, *, config=ClientConfig(), pixels=PIXELS, **options):
    defense = make_defense(DefenseConfig(defense=(name,), **options))
    return client_update(
        jax.random.key(seed), VICTIM, params(), pixels, LABELS[: len(pixels)], config, defense
    )


def noise_of(name, count, **options):
    """Noise on the gradient in many rounds, a row for each, and what the last declared."""
    defense = make_defense(DefenseConfig(defense=(name,), **options))
    assert defense is not None

    def draw(key):
        made, stats = defense.gradient(
            key, VICTIM, params(), jnp.asarray(PIXELS), jnp.asarray(LABELS)
        )
        assert stats is not None
        return made, stats.noise_std

    made, stds = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(7), count))
    plain = gradient(jnp.asarray(PIXELS))
    rows = [
        (np.asarray(m) - np.asarray(p)[None]).reshape(count, -1)
        for m, p in zip(jax.tree.leaves(made), jax.tree.leaves(plain), strict=True)
    ]
    return np.concatenate(rows, axis=1), float(stds[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.2, 0.8])
def test_adaptive_scale_leaves_the_target_by_a_dense_oracle(target):
    seen = shared("adaptive_scale", target_error=target)
    std = seen.threat_model.noise_std
    squares = np.linalg.svd(dense_jacobian(), compute_uv=False) ** 2
    error = np.sum(0.25**2 * std**2 / (0.25**2 * squares + std**2))
    np.testing.assert_allclose(error, target * ENERGY, rtol=1e-6)
    noise, declared = noise_of("adaptive_scale", 500, target_error=target)
    np.testing.assert_allclose(declared, std, rtol=1e-9)
    spread = 4.5 * np.sqrt(2 / noise.size)
    assert abs(np.mean(noise**2) / std**2 - 1) < spread
    assert abs(np.mean(noise**2) / (1.1 * std) ** 2 - 1) > spread


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["water_filling", "uniform"])
def test_shaped_noise_leaves_the_target_by_a_dense_oracle(shape):
    """The posterior trace of the measured covariance, to its statistical error."""
    noise, declared = noise_of("shaped", 4000, noise_shape=shape, noise_floor=0.01)
    jacobian = dense_jacobian()
    assert abs(np.mean(noise**2) / declared**2 - 1) < 0.1
    left, values, _ = np.linalg.svd(jacobian, full_matrices=False)
    outside = noise - noise @ left @ left.T
    floor = np.sum(outside**2) / len(noise) / (noise.shape[1] - left.shape[1])
    shaped_energy = declared**2 * noise.shape[1] / 1.01
    np.testing.assert_allclose(floor, 0.01 * shaped_energy / noise.shape[1], rtol=0.02)
    seen = values > 1e-7 * values[0]
    inside = noise @ left[:, seen]
    covariance = inside.T @ inside / len(noise)
    rows = left[:, seen].T @ jacobian
    information = rows.T @ np.linalg.solve(covariance, rows)
    error = np.trace(np.linalg.inv(np.eye(PIXELS.size) / 0.25**2 + information))
    assert 0.97 < error / (0.5 * ENERGY) < 1.2


@pytest.mark.slow
def test_input_noise_is_the_gradient_of_noisy_images():
    noise, declared = noise_of("input_noise", 3, target_error=0.5)
    assert declared == 0
    key = jax.random.split(jax.random.key(7), 3)[1]
    draw = jax.random.normal(jax.random.split(key, 3)[2], PIXELS.shape)
    moved = gradient(PIXELS + 0.25 * draw)  # error one half: noise of the prior's own size
    expected = flat_of(moved) - flat_of(gradient(jnp.asarray(PIXELS)))
    np.testing.assert_allclose(noise[1], expected, rtol=1e-9, atol=1e-12)
    assert shared("input_noise").threat_model.noise_std == 0


@pytest.mark.slow
@names
def test_same_key_same_bits_and_more_error_is_more_noise(name):
    first, again, other = (flat_of(shared(name, seed).update) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    plain = flat_of(gradient(jnp.asarray(PIXELS)))
    moved = [
        np.linalg.norm(flat_of(shared(name, target_error=t).update) - plain) for t in (0.1, 0.9)
    ]
    assert moved[1] > 2 * moved[0] > 0


@pytest.mark.slow
@names
def test_shapes_are_kept_in_float32(name):
    defense = make_defense(DefenseConfig(defense=(name,)))
    start = VICTIM.init(jax.random.key(1))
    seen = client_update(
        jax.random.key(0), VICTIM, start, PIXELS.astype("float32"), LABELS, defense=defense
    )
    for path, leaf in flatten_params(seen.update).items():
        assert leaf.dtype == jnp.float32
        assert leaf.shape == flatten_params(start)[path].shape
        assert np.all(np.isfinite(leaf))


def test_the_attacker_is_told_unless_it_is_not():
    assert shared("shaped").threat_model.noise_std > 0
    assert shared("shaped", noise_known=False).threat_model.noise_std == 0
    assert "shaped(target_error=0.5)" in shared("shaped").threat_model.defense


def test_other_steps_come_after():
    defense = make_defense(DefenseConfig(defense=("shaped", "clip"), clip_norm=1e-3))
    seen = client_update(jax.random.key(0), VICTIM, params(), PIXELS, LABELS, defense=defense)
    np.testing.assert_allclose(np.linalg.norm(flat_of(seen.update)), 1e-3, rtol=1e-9)
    assert seen.threat_model.noise_std < shared("shaped").threat_model.noise_std


@names
def test_fedavg_is_refused(name):
    with pytest.raises(ValueError, match="fedsgd"):
        shared(name, config=ClientConfig(protocol="fedavg"))


def test_large_batches_are_refused_where_they_need_a_matrix():
    victim = make_victim("mlp", input_shape=(64, 64, 3), num_classes=2, widths=(2,))
    start, pixels = victim.init(jax.random.key(0)), np.full((1, 64, 64, 3), 0.5, "float32")
    for name in ("adaptive_scale", "shaped"):
        with pytest.raises(ValueError, match="at most 8192"):
            client_update(
                jax.random.key(0),
                victim,
                start,
                pixels,
                np.array([1]),
                defense=make_defense(DefenseConfig(defense=(name,))),
            )
    client_update(
        jax.random.key(0),
        victim,
        start,
        pixels,
        np.array([1]),
        defense=make_defense(DefenseConfig(defense=("input_noise",))),
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"defense": ("shaped", "dp_sgd")}, "name one"),
        ({"defense": ("shaped", "adaptive_scale")}, "name one"),
        ({"defense": ("shaped",), "target_error": 1.0}, "target_error"),
        ({"defense": ("shaped",), "target_error": 0.0}, "target_error"),
        ({"defense": ("shaped",), "prior_std": 0.0}, "prior_std"),
        ({"defense": ("shaped",), "noise_floor": -1.0}, "noise_floor"),
        ({"defense": ("gaussian",), "target_error": 0.3}, "no effect"),
        ({"defense": ("input_noise",), "noise_floor": 0.3}, "no effect"),
        ({"defense": ("input_noise",), "noise_known": False}, "no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        DefenseConfig(**options)


@pytest.mark.slow
def test_audit_runs_with_it(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "small.npz"
    np.savez(path, images=rng.random((40, 5, 5, 1)).astype("float32"), labels=np.arange(40) % 4)
    config = AuditConfig(
        data=DataConfig(data=f"npz:{path}", num_public=16),
        model=ModelConfig(fc_width=32),
        defense=DefenseConfig(defense=("shaped",), target_error=0.5),
        batch=2,
    )
    threat = run_audit(config).result["threat_model"]
    assert threat["defense"] == "shaped(target_error=0.5)"
    assert threat["noise_std"] > 0
