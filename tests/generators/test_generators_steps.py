"""One step of adversarial training: penalties against explicit sums, averages, the same bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.config.prior import TrainPriorConfig
from jgia.generators import steps
from jgia.generators.steps import GanState, make_networks, train_step

pytestmark = pytest.mark.usefixtures("single_precision")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3)).astype("uint8")
_NOTHING: Any = (None,) * len(GanState._fields)
_EMPTY = GanState(*_NOTHING)
LABELS = (np.arange(12) % 3).astype("int32")


@pytest.fixture(scope="module")
def setting(options, filled):
    """Networks with both penalties and adapted augmentation, and their state."""
    with jax.enable_x64(False):
        given = options(
            learning_rate=1e-3,
            r1_gamma=2.0,
            r1_every=3,
            path_length_weight=5.0,
            path_length_every=2,
            augmentation="adaptive",
            conditional=True,
        )
        networks = make_networks(given, channels=3, num_classes=3, accelerated=False)
        shapes = jax.eval_shape(networks.init, jax.random.key(0))
        generator = filled(shapes.generator, 1)
        state = GanState(
            *(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part) for part in shapes)
        )._replace(
            generator=generator,
            discriminator=filled(shapes.discriminator, 2),
            average=filled(shapes.average, 3),
            path_length=jnp.asarray(0.4, "float32"),
            probability=jnp.asarray(0.25, "float32"),
        )
        return networks, state


@functools.partial(jax.jit, static_argnums=0)
def _inputs(networks, state, key):
    """Keys, real images, classes and generated images of the next step."""
    keys = jax.random.split(jax.random.fold_in(key, state.step), 8)
    real, classes = steps._batch(
        keys[0], jnp.asarray(IMAGES), jnp.asarray(LABELS), networks.options, None
    )
    fake = steps._fakes(networks, state.generator, keys[1], classes)[0]
    return jax.random.key_data(keys), real, classes, fake


@functools.partial(jax.jit, static_argnums=0, static_argnames="r1")
def _judged(networks, params, state, images, labels, keys, *, r1):
    keys = jax.random.wrap_key_data(keys)[2:4]
    return steps._discriminator_loss(networks, params, state, images, labels, keys, r1=r1)


@pytest.fixture(scope="module")
def stepped(setting):
    """The state after a step with all penalties, and what the step told."""
    networks, state = setting
    with jax.enable_x64(False):
        return _step(networks, state)


def _step(networks, state, key=0):
    return train_step(
        networks,
        jax.tree.map(jnp.copy, state),
        jnp.asarray(IMAGES),
        jnp.asarray(LABELS),
        jax.random.key(key),
        mesh=None,
        r1=True,
        path_length=True,
    )


def test_r1_is_the_explicit_squared_gradient(setting):
    networks, state = setting
    keys, real, classes, fake = _inputs(networks, state, jax.random.key(0))

    @jax.jit
    def jacobian(images):
        key = jax.random.wrap_key_data(keys)[2]
        return jax.jacrev(
            lambda x: steps._judge(networks, state.discriminator, state, x, classes, key)
        )(images)

    slope = np.asarray(jacobian(real), float).sum(axis=0)  # of the sum of logits
    expected = np.square(slope).sum(axis=(1, 2, 3)).mean()
    judged = functools.partial(
        _judged, networks, state.discriminator, state, (real, fake), classes, keys
    )
    with_it, (_, penalty) = judged(r1=True)
    without, (_, none) = judged(r1=False)
    np.testing.assert_allclose(penalty, expected, rtol=1e-4)
    assert np.isnan(none)
    # gamma / 2, and as often as it is left out: 2 / 2 * 3.
    np.testing.assert_allclose(with_it - without, 3 * expected, rtol=1e-3)


def test_the_discriminators_loss_is_two_softplus_terms(setting):
    networks, state = setting
    keys, real, classes, fake = _inputs(networks, state, jax.random.key(0))

    @jax.jit
    def logits():
        inner = jax.random.wrap_key_data(keys)
        return [
            steps._judge(networks, state.discriminator, state, x, classes, inner[i])
            for i, x in ((2, real), (3, fake))
        ]

    of_real, of_fake = (np.asarray(x, float) for x in logits())
    expected = np.log1p(np.exp(of_fake)).mean() + np.log1p(np.exp(-of_real)).mean()
    loss, (sign, _) = _judged(
        networks, state.discriminator, state, (real, fake), classes, keys, r1=False
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sign, np.sign(of_real).mean(), rtol=1e-6)


def test_path_lengths_are_those_of_an_explicit_loop(setting):
    networks, state = setting
    generator, data = networks.generator, jax.random.key_data
    keys = data(jax.random.split(jax.random.key(3), 4))
    classes = jnp.array([0, 1, 2, 1])

    @functools.partial(jax.jit, static_argnames="path_length")
    def loss(*, path_length):
        inner = jax.random.wrap_key_data(keys)
        return steps._generator_loss(
            networks, state.generator, state, classes, inner, path_length=path_length
        )

    @jax.jit
    def drawn():
        inner = jax.random.wrap_key_data(keys)
        styles = steps._fakes(networks, state.generator, inner[0], classes)[1]
        direction = jax.random.normal(inner[2], (2, 8, 8, 3))  # half of the batch
        return styles, direction, generator.draw_noise(inner[3], 2)

    @jax.jit
    def pulled_back(style, noise, direction):
        def image(style):
            side = {"styles": style[None], "noise": noise}
            return generator.run(state.generator, side, None).image[0]

        return jax.vjp(image, style)[1](direction)[0]

    styles, direction, noise = drawn()
    lengths = []
    for i in range(2):
        own = {name: leaf[i : i + 1] for name, leaf in noise.items()}
        slope = np.asarray(pulled_back(styles[i], own, direction[i]), float) / 8  # sqrt(H W)
        lengths.append(np.sqrt(np.square(slope).sum(axis=-1).mean()))
    (with_it, (mean, penalty)), (without, (kept, none)) = (
        loss(path_length=True),
        loss(path_length=False),
    )
    expected = 0.4 + 0.01 * (np.mean(lengths) - 0.4)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    np.testing.assert_allclose(penalty, np.square(np.array(lengths) - expected).mean(), rtol=1e-3)
    np.testing.assert_allclose(with_it - without, 5 * 2 * penalty, rtol=1e-3)
    np.testing.assert_allclose(kept, 0.4, rtol=1e-6)
    assert np.isnan(none)


def test_a_step_moves_everything_and_counts(setting, stepped):
    networks, state = setting
    new, info = stepped
    assert int(new.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, info)))
    for name in ("generator", "discriminator", "average"):
        moved = jax.tree.map(
            lambda a, b: bool(np.any(a != b)), getattr(new, name), getattr(state, name)
        )
        if name != "discriminator":
            moved.pop("styles")  # filled in at the end of training
        assert all(jax.tree.leaves(moved)), (name, moved)
    np.testing.assert_allclose(new.sign, 0.1 * info.sign, rtol=1e-6)
    keys, real, classes, fake = _inputs(networks, state, jax.random.key(0))
    loss, (sign, penalty) = _judged(
        networks, state.discriminator, state, (real, fake), classes, keys, r1=True
    )
    np.testing.assert_allclose(info.discriminator_loss, loss, rtol=1e-4)
    np.testing.assert_allclose(info.r1, penalty, rtol=1e-4)
    np.testing.assert_allclose(info.sign, sign, rtol=1e-6)


def test_a_step_lowers_the_discriminators_loss_on_its_batch(setting, stepped):
    networks, state = setting
    keys, real, classes, fake = _inputs(networks, state, jax.random.key(0))
    before, after = (
        _judged(networks, params, state, (real, fake), classes, keys, r1=True)[0]
        for params in (state.discriminator, stepped[0].discriminator)
    )
    assert after < before


def test_the_average_is_exponential(setting, stepped):
    _, state = setting
    new, _ = stepped
    # Four images shown: a half-life of a twentieth of them.
    kept = 0.5 ** (4 / (0.05 * 4))
    jax.tree.map(
        lambda a, old, g: np.testing.assert_allclose(
            a, kept * old + (1 - kept) * g, rtol=1e-5, atol=1e-7
        ),
        new.average,
        state.average,
        new.generator,
    )


@pytest.mark.parametrize(("step", "half_life"), [(0, 1.6), (99, 160.0), (9999, 10_000.0)])
def test_half_life_grows_to_what_is_asked_for(options, step, half_life):
    state = _EMPTY._replace(step=jnp.asarray(step), average={"w": jnp.zeros(())})
    average = steps._averaged(options(prior_batch=32), state, {"w": jnp.ones(())})["w"]
    expected = 1 - 0.5 ** (32 / half_life)
    np.testing.assert_allclose(average, expected, rtol=1e-4)


@pytest.mark.parametrize(("sign", "goes"), [(1.0, 1), (0.0, -1)])
def test_probability_follows_the_sign(options, sign, goes):
    given = options(augmentation="adaptive", adaptive_target=0.6)
    state = _EMPTY._replace(sign=jnp.asarray(sign), probability=jnp.asarray(0.5))
    found = steps._adapted(given, state, jnp.asarray(sign))
    np.testing.assert_allclose(found["probability"], 0.5 + goes * 4 / 500_000, rtol=1e-7)
    np.testing.assert_allclose(found["sign"], sign, atol=1e-7)
    state = state._replace(probability=jnp.asarray(float(goes > 0)))
    assert float(steps._adapted(given, state, jnp.asarray(sign))["probability"]) in (0.0, 1.0)
    still = steps._adapted(options(), state, jnp.asarray(sign))
    assert float(still["probability"]) == float(state.probability)


def test_optimizers_are_slowed_down_for_lazy_penalties(setting, options):
    networks, _ = setting
    plain = make_networks(options(r1_gamma=0.0), channels=3, num_classes=3, accelerated=False)
    one = {"w": jnp.ones(())}

    def nu_and_change(optimizer):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
            change, state = optimizer.update(one, optimizer.init(one))
        return float(state[0].nu["w"]), float(change["w"]), float(state[0].mu["w"])

    for optimizer, share, rate in (
        (networks.discriminator_optimizer(), 3 / 4, 1e-3),
        (networks.generator_optimizer(), 2 / 3, 1e-3),
        (plain.discriminator_optimizer(), 1.0, 2.5e-3),
        (plain.generator_optimizer(), 1.0, 2.5e-3),
    ):
        nu, change, mu = nu_and_change(optimizer)
        np.testing.assert_allclose(nu, 1 - 0.99**share, rtol=1e-4)
        np.testing.assert_allclose(change, -rate * share, rtol=1e-4)
        assert mu == 1.0  # no momentum


def test_same_key_same_bits_and_no_second_compilation(setting, stepped):
    networks, state = setting
    compiled_step: Any = train_step
    compiled = compiled_step._cache_size()
    again = _step(networks, state)
    assert compiled_step._cache_size() == compiled
    jax.tree.map(np.testing.assert_array_equal, again, stepped)
    other, _ = _step(networks, state, key=1)
    assert any(
        np.any(a != b)
        for a, b in zip(
            jax.tree.leaves(other.generator), jax.tree.leaves(stepped[0].generator), strict=True
        )
    )


def test_the_length_of_training_compiles_nothing(setting, stepped, options):
    networks, state = setting
    given = dataclasses.replace(networks.options, kimg=7.0)
    longer = make_networks(given, channels=3, num_classes=3, accelerated=False)
    assert longer == networks
    # Nor does what else a run is told.
    config = TrainPriorConfig(**vars(given), minutes=3.0, seed=4, checkpoint_minutes=1.0)
    assert make_networks(config, channels=3, num_classes=3, accelerated=False) == networks
    compiled_step: Any = train_step
    compiled = compiled_step._cache_size()
    again = _step(longer, state)
    assert compiled_step._cache_size() == compiled
    jax.tree.map(np.testing.assert_array_equal, again, stepped)
    other = dataclasses.replace(given, ema_kimg=3.0)  # of which a step makes use
    assert make_networks(other, channels=3, num_classes=3, accelerated=False) != networks


def test_a_step_keeps_its_types_with_float64_on(options):
    with jax.enable_x64(True):
        given = options(conditional=True, augmentation="adaptive", path_length_weight=5.0)
        networks = make_networks(given, channels=3, num_classes=3, accelerated=False)
        state = jax.eval_shape(networks.init, jax.random.key(0))
        new, info = jax.eval_shape(
            functools.partial(train_step, networks, mesh=None, r1=True, path_length=True),
            state,
            jnp.asarray(IMAGES),
            jnp.asarray(LABELS),
            jax.random.key(1),
        )
    before, after = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (state, new))
    assert after == before
    assert {str(leaf.dtype) for leaf in info} == {"float32"}


@pytest.mark.parametrize(("batch", "some"), [(1, 1), (4, 2), (5, 2)])
def test_path_lengths_are_of_half_of_the_images(options, monkeypatch, batch, some):
    given = options(prior_batch=batch, path_length_weight=1.0)
    networks = make_networks(given, channels=3, num_classes=3, accelerated=False)
    state = jax.eval_shape(networks.init, jax.random.key(0))
    made, synthesized = [], steps._synthesized

    def count(networks, params, styles, key):
        made.append(len(styles))
        return synthesized(networks, params, styles, key)

    monkeypatch.setattr(steps, "_synthesized", count)
    jax.eval_shape(
        lambda state, key: steps._generator_loss(
            networks, state.generator, state, None, jax.random.split(key, 4), path_length=True
        ),
        state,
        jax.random.key(0),
    )
    assert made == [batch, some]


def test_batches_are_images_in_range_half_of_them_mirrored(options):
    images = jnp.asarray(np.arange(256, dtype="uint8").reshape(1, 8, 32, 1))
    given = options(prior_batch=400)
    real, classes = jax.jit(
        lambda key: steps._batch(key, images, jnp.array([7], "int32"), given, None)
    )(jax.random.key(0))
    assert set(np.asarray(classes)) == {7}
    np.testing.assert_allclose([real.min(), real.max()], [-1, 1], atol=1e-6)
    plain = np.asarray(images, float) / 127.5 - 1
    straight = np.abs(np.asarray(real) - plain).max(axis=(1, 2, 3)) < 1e-5
    mirrored = np.abs(np.asarray(real) - plain[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert (straight ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4.5 * 0.5 / 20


def test_precision_and_group_follow_the_options(options):
    networks = make_networks(
        options(precision="auto", discriminator="plain"),
        channels=1,
        num_classes=5,
        accelerated=True,
    )
    assert networks.generator.dtype == "bfloat16"
    assert networks.generator.num_classes == 0  # not conditional
    assert networks.discriminator.group_size == 32
    slow = make_networks(options(precision="auto"), channels=1, num_classes=5, accelerated=False)
    assert slow.generator.dtype == "float32"
    assert slow.discriminator.group_size == 4
