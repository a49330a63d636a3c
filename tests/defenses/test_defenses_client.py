import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jgia.config import ClientConfig, DefenseConfig
from jgia.defenses import Defense, make_defense
from jgia.defenses import defense as module
from jgia.federated import ClientError, client_images, client_update
from jgia.models import make_victim

MLP = make_victim("mlp", input_shape=(4, 4, 1), num_classes=3, widths=(40,))
KEY = jax.random.key(9)
FEDAVG = ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=2, learning_rate=0.05)


def _params(dtype="float64"):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype), MLP.param_shapes()
    )


def _seen(defense=None, config=ClientConfig(), params=None, images=None, **knobs):
    if defense is not None and not isinstance(defense, Defense):
        defense = make_defense(DefenseConfig(defense=defense, **knobs))
    rng = np.random.default_rng(2)
    pixels = rng.random((5, 4, 4, 1)) if images is None else images
    labels = np.arange(5) % 3
    return client_update(
        KEY, MLP, _params() if params is None else params, pixels, labels, config, defense
    )


def _flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("config", [ClientConfig(), FEDAVG], ids=["fedsgd", "fedavg"])
def test_a_defense_changes_neither_order_nor_gradient_beneath_it(config):
    plain, through = _seen(config=config), _seen(("top_k",), config, keep_fraction=1.0)
    np.testing.assert_array_equal(_flat(plain.update), _flat(through.update))
    assert plain.threat_model.defense == "none"
    assert plain.threat_model.noise_std == 0.0
    assert through.threat_model.defense == "top_k(keep_fraction=1)"


@pytest.mark.parametrize("config", [ClientConfig(), FEDAVG], ids=["fedsgd", "fedavg"])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_noise_is_added_once_to_what_is_shared_with_the_declared_size(config, name):
    noisy = _seen((name,), config, noise_std=0.1)
    noise = _flat(noisy.update) - _flat(_seen(config=config).update)
    assert noisy.threat_model.noise_std == pytest.approx(0.1, rel=1e-12)
    law = stats.norm(scale=0.1) if name == "gaussian" else stats.laplace(scale=0.1 / np.sqrt(2))
    assert stats.kstest(noise, law.cdf).pvalue > 1e-3
    variance = np.mean(noise**2)
    assert 0.8 < variance / 0.01 < 1.25
    steps = config.num_steps(5)
    assert steps == 1 or variance < 0.5 * steps * 0.01  # not once per local step


def test_attacker_may_not_be_told():
    told, untold = (
        _seen(("gaussian",), noise_std=0.1, noise_known=known).threat_model
        for known in (True, False)
    )
    assert told.noise_std == pytest.approx(0.1)
    assert untold.noise_std == 0.0
    assert untold.defense == "gaussian(noise_std=0.1, noise_known=False)"


def test_relative_noise_is_told_in_absolute_terms():
    rms = np.sqrt(np.mean(_flat(_seen().update) ** 2))
    seen = _seen(("gaussian",), noise_std=0.5, noise_relative=True)
    assert seen.threat_model.noise_std == pytest.approx(0.5 * rms, rel=1e-9)


def test_transformations_apply_in_the_order_given():
    first = _seen(("clip", "top_k"), clip_norm=1e-3, keep_fraction=0.5)
    second = _seen(("top_k", "clip"), clip_norm=1e-3, keep_fraction=0.5)
    assert np.linalg.norm(_flat(second.update)) == pytest.approx(1e-3, rel=1e-9)
    assert np.linalg.norm(_flat(first.update)) < 0.9999e-3
    noisy = _seen(("gaussian", "clip"), noise_std=1.0, clip_norm=2.0)
    size = _flat(noisy.update).size
    assert noisy.threat_model.noise_std == pytest.approx(2 / np.sqrt(size), rel=0.1)


def test_dp_sgd_with_sgd_declares_the_noise_of_a_fedavg_update():
    clip_norm, multiplier = 1e-9, 1e6
    private = _seen(("dp_sgd",), FEDAVG, clip_norm=clip_norm, noise_multiplier=multiplier)
    batches = [2, 2, 1, 2, 2, 1]
    expected = 0.05 * multiplier * clip_norm * np.sqrt(sum(1 / b**2 for b in batches))
    assert private.threat_model.noise_std == pytest.approx(expected, rel=1e-9)
    noise = _flat(private.update)  # the clipped gradients are invisible beside it
    statistic = np.sum(noise**2) / expected**2
    assert 1e-4 < stats.chi2.cdf(statistic, noise.size) < 1 - 1e-4
    one_step = 0.05 * multiplier * clip_norm / 5
    assert stats.chi2.sf(np.sum(noise**2) / one_step**2, noise.size) < 1e-12


def test_dp_sgd_of_fedsgd_is_the_clipped_mean_with_declared_noise():
    private = _seen(("dp_sgd",), clip_norm=2.0, noise_multiplier=3.0)
    assert private.threat_model.noise_std == pytest.approx(2.0 * 3.0 / 5, rel=1e-12)
    loose = _seen(("dp_sgd",), clip_norm=1e6, noise_multiplier=0.0)
    np.testing.assert_allclose(_flat(loose.update), _flat(_seen().update), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_no_noise_is_declared_where_it_has_no_closed_form(optimizer):
    config = dataclasses.replace(FEDAVG, optimizer=optimizer)
    assert _seen(("dp_sgd",), config).threat_model.noise_std == 0.0


def test_augmented_images_are_those_the_defense_names():
    defense = make_defense(DefenseConfig(defense=("augment",), augmentations=("flip", "rotate")))
    assert defense is not None
    pixels = np.random.default_rng(2).random((5, 4, 4, 1))
    changed = client_images(KEY, pixels, defense)
    np.testing.assert_array_equal(client_images(KEY, pixels, None), pixels)
    assert not np.array_equal(changed, pixels)
    expected = _seen(images=np.asarray(changed))
    np.testing.assert_allclose(
        _flat(_seen(defense).update), _flat(expected.update), rtol=1e-11, atol=1e-14
    )


def test_every_local_step_draws_anew():
    config = ClientConfig(protocol="fedavg", local_epochs=2, learning_rate=1e-7)
    one = dataclasses.replace(config, local_epochs=1)
    two_steps, one_step = (
        _flat(_seen(("dropout",), c, dropout_rate=0.5).update) for c in (config, one)
    )
    assert not np.allclose(two_steps, 2 * one_step, rtol=1e-3, atol=0)
    plain = _flat(_seen(config=config).update), _flat(_seen(config=one).update)
    np.testing.assert_allclose(plain[0], 2 * plain[1], rtol=1e-3, atol=1e-14)


def test_everything_at_once():
    seen = _seen(
        ("augment", "dropout", "dp_sgd", "clip", "gaussian", "quantize_stochastic", "top_k")
    )
    update = _flat(seen.update)
    assert np.all(np.isfinite(update))
    assert np.count_nonzero(update) <= np.ceil(0.1 * update.size)
    assert seen.threat_model.defense.count("(") == 7


def _halved(key):
    del key
    return optax.scale(0.5)


def test_transformations_of_ones_own():
    defense = Defense(transforms=(_halved,))
    np.testing.assert_array_equal(_flat(_seen(defense).update), 0.5 * _flat(_seen().update))
    assert defense.words == "custom(_halved)"
    assert Defense().words == "none"


def test_second_call_traces_nothing():
    _seen(("laplace", "clip"), noise_std=0.25)
    compiled: Any = module._share
    before = compiled._cache_size()
    _seen(("laplace", "clip"), noise_std=0.25)
    assert compiled._cache_size() == before


def test_noise_that_overflows_is_an_error():
    with pytest.raises(ClientError, match="defended update"):
        _seen(("gaussian",), params=_params("float32"), noise_std=3e38)


def test_nonfinite_gradient_of_one_example_is_an_error():
    broken = jax.tree.map(lambda leaf: leaf * 1e300, _params())
    with pytest.raises(ClientError, match="examples have NaN"):
        _seen(("dp_sgd",), params=broken)


def test_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="head"):
        _seen(("dropout",), dropout_layer="fc7")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"noise_std": 0.1}, "noise_std has no effect"),
        ({"defense": ("gaussian",), "keep_fraction": 0.5}, "keep_fraction has no effect"),
        ({"defense": ("clip",), "noise_multiplier": 2.0}, "noise_multiplier has no effect"),
        ({"defense": ("clip", "clip")}, "once"),
        ({"defense": ("gaussian",), "noise_std": -1.0}, "noise_std"),
        ({"defense": ("clip",), "clip_norm": 0.0}, "clip_norm"),
        ({"defense": ("quantize",), "num_bits": 1}, "num_bits"),
        ({"defense": ("top_k",), "keep_fraction": 0.0}, "keep_fraction"),
        ({"defense": ("dropout",), "dropout_rate": 1.0}, "dropout_rate"),
        ({"defense": ("augment",), "jitter": -0.1}, "jitter"),
        ({"defense": ("augment",), "crop_padding": -1}, "crop_padding"),
    ],
)
def test_bad_configurations_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        DefenseConfig(**fields)


def test_words_name_every_knob_that_matters():
    config = DefenseConfig(
        defense=("augment", "dp_sgd", "top_k"), sparsity_scope="layer", augmentations=("flip",)
    )
    assert config.words() == (
        "augment(augmentations=flip), dp_sgd(clip_norm=1, noise_multiplier=1), "
        "top_k(keep_fraction=0.1, sparsity_scope=layer)"
    )
