"""The leakage term: what it estimates, what it does to training, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config.training import TrainOptions
from jgia.models import make_victim
from jgia.risk import UpdateRelease, function_of_image, invloss, spectrum
from jgia.training import train_victim
from jgia.training.leakage import leakage_term

pytestmark = pytest.mark.slow

OPTIONS = TrainOptions(
    epochs=6,
    batch_size=12,
    optimizer="adam",
    learning_rate=0.01,
    flip=False,
    crop=False,
    risk_noise_std=0.02,
    risk_images=4,
    risk_every=2,
)


def exact_fraction(victim, params, dataset, *, count, noise_std, variance):
    """By the singular values of every image's Jacobian."""
    images, labels = dataset.take(range(count))
    release = UpdateRelease(victim=victim)
    found = []
    for image, label in zip(images, labels, strict=True):
        fn = function_of_image(release, params, jnp.asarray(label))
        sigma = spectrum(fn, jnp.asarray(image)).sigma
        left = invloss(sigma, noise_std=noise_std, prior_variance=variance, num_inputs=image.size)
        found.append(1 - float(left) / (variance * image.size))
    return float(np.mean(found))


def test_the_fraction_is_that_of_the_spectrum(stripes, models):
    _, victim = models("mlp")
    dataset = stripes()
    options = dataclasses.replace(OPTIONS, risk_weight=0.5, risk_probes=200, risk_noise_std=0.5)
    term = leakage_term(options, victim, dataset)
    assert term is not None
    pixels, labels = dataset.take(range(len(dataset)))
    assert term.weight == 1.0  # half the weight, every second step
    assert term.prior_variance == pytest.approx(pixels.var(axis=0).mean())
    params = victim.init(jax.random.key(1))
    found = term.fraction(
        jax.random.key(2), victim, params, jnp.asarray(pixels), jnp.asarray(labels)
    )
    expected = exact_fraction(
        victim, params, dataset, count=4, noise_std=0.5, variance=term.prior_variance
    )
    assert 0.05 < expected < 0.95
    assert float(found) == pytest.approx(expected, abs=0.02)


def test_training_with_the_term_leaks_less(stripes, models):
    _, victim = models("mlp")
    dataset = stripes()
    plain, guarded = (
        train_victim(
            jax.random.key(3), victim, dataset, dataclasses.replace(OPTIONS, risk_weight=weight)
        )
        for weight in (0.0, 2.0)
    )
    assert [epoch.risk for epoch in plain.history] == [None] * 6
    assert all(epoch.risk and 0 < epoch.risk < 1 for epoch in guarded.history)
    leaks = [
        exact_fraction(victim, trained.params, dataset, count=12, noise_std=0.02, variance=0.05)
        for trained in (plain, guarded)
    ]
    assert leaks[1] < 0.8 * leaks[0]


def test_an_interrupted_run_ends_with_the_same_bits(stripes, models, tmp_path):
    _, victim = models("mlp")
    options = dataclasses.replace(OPTIONS, risk_weight=1.0, epochs=3)
    whole = train_victim(jax.random.key(3), victim, stripes(), options)

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage.startswith("epoch 3"):
            raise Stop

    arguments = (victim, stripes(), options)
    path = tmp_path / "c.npz"
    with pytest.raises(Stop):
        train_victim(jax.random.key(3), *arguments, checkpoint=path, progress=stop)
    continued = train_victim(jax.random.key(3), *arguments, checkpoint=path)
    assert continued.history == whole.history
    for a, b in zip(*(jax.tree.leaves(t.params) for t in (whole, continued)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_convolutions_pass(stripes):
    victim = make_victim("lenet", input_shape=(6, 4, 1), num_classes=2, widths=(2, 2, 2))
    options = dataclasses.replace(OPTIONS, risk_weight=0.1, epochs=1, risk_iterations=5)
    trained = train_victim(jax.random.key(3), victim, stripes(), options)
    risk = trained.history[0].risk
    assert risk is not None
    assert 0 < risk < 1


def test_what_is_refused(stripes, models):
    _, victim = models("resnet")
    options = dataclasses.replace(OPTIONS, risk_weight=1.0)
    with pytest.raises(ValueError, match="batch normalization mixes"):
        train_victim(jax.random.key(3), victim, stripes(), options)
    _, victim = models("mlp")
    flat = dataclasses.replace(stripes(), images=np.zeros((24, 6, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="nothing that could leak"):
        train_victim(jax.random.key(3), victim, flat, options)
    refused: tuple[dict[str, Any], ...] = (
        {"risk_weight": -1.0},
        {"risk_noise_std": 0.0},
        {"risk_every": 0},
    )
    for bad in refused:
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainOptions(**bad)
