"""Training of a prior: the same bits after an interruption, and what is refused."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.data import Dataset
from jgia.generators import StagedGenerator, training
from jgia.generators.training import PriorTrainingError, train_generator
from jgia.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("single_precision")


def _data(images=None, seed=0):
    rng = np.random.default_rng(seed)
    if images is None:
        images = rng.integers(0, 256, (12, 8, 8, 3)).astype("uint8")
    labels = (np.arange(len(images)) % 2).astype("int32")
    return Dataset(images, labels, ("one", "two"), "noise", "Made up.")


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a minute each time one looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(ticks)))


@pytest.fixture
def no_steps(monkeypatch):
    """Replaces the compiled step by one that counts and tells given losses."""

    def use(loss=1.0):
        def step(networks, state, images, labels, key, **flags):
            steps.append(SimpleNamespace(images=images, labels=labels, **flags))
            value = jnp.asarray(loss, "float32")
            nothing = jnp.full((), jnp.nan)
            info = training.GanInfo(value, value, value if flags["r1"] else nothing, nothing, value)
            return state._replace(step=state.step + 1), info

        steps = []
        monkeypatch.setattr(training, "train_step", step)
        monkeypatch.setattr(
            training,
            "style_statistics",
            lambda generator, params, key: {"mean": jnp.zeros(8)},
        )
        return steps

    return use


def test_interrupted_and_continued_gives_the_same_bits(options, clock, tmp_path):
    given = options(r1_gamma=0.0, kimg=0.02)  # five steps of four images
    data = _data()

    def train(seed=5, data=data, given=given, **rest):
        return train_generator(jax.random.key(seed), data, given, **rest)

    whole = train(checkpoint_minutes=1000.0)
    assert whole.finished
    assert [report.step for report in whole.history] == [5]
    assert isinstance(whole.generator, StagedGenerator)
    path = tmp_path / "state.npz"
    part = train(minutes=4.0, checkpoint_minutes=1.5, checkpoint=path)
    assert not part.finished
    assert 0 < part.history[-1].step < 5
    rest = train(
        checkpoint_minutes=1000.0, checkpoint=path, look=lambda generator, params, report: report
    )
    assert rest.finished
    assert [report.step for report in rest.history] == [r.step for r in part.history] + [5]
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), part.params, whole.params)
    assert any(jax.tree.leaves(moved))
    # A finished run has nothing left to do.
    again = train(checkpoint=path)
    assert again.finished
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    # Other runs do not go on from it.
    others: tuple[dict[str, Any], ...] = (
        {"seed": 6},
        {"data": _data(seed=1)},
        {"given": dataclasses.replace(given, learning_rate=1e-3)},
    )
    for other in others:
        with pytest.raises(CheckpointError, match="another training run"):
            train(**other, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="remove it"):
        train(checkpoint=path)


def test_penalties_are_lazy_and_a_run_may_be_extended(options, no_steps, clock, tmp_path):
    steps = no_steps()
    given = options(kimg=0.02, r1_every=2, path_length_weight=1.0, path_length_every=3)
    path = tmp_path / "state.npz"
    first = train_generator(jax.random.key(0), _data(), given, checkpoint=path)
    assert first.finished
    assert [call.r1 for call in steps] == [True, False, True, False, True]
    assert [call.path_length for call in steps] == [True, False, False, True, False]
    assert first.history[-1].r1 == 1.0
    longer = dataclasses.replace(given, kimg=0.032)
    train_generator(jax.random.key(0), _data(), longer, checkpoint=path)
    assert len(steps) == 8
    assert [call.r1 for call in steps[5:]] == [False, True, False]


def test_looks_and_progress(options, no_steps, clock):
    no_steps()
    seen, told = [], []

    def look(generator, params, report):
        seen.append((report.step, set(params)))
        return dataclasses.replace(report, kid=0.5)

    result = train_generator(
        jax.random.key(0),
        _data(),
        options(kimg=0.02),
        checkpoint_minutes=2.5,
        look=look,
        progress=lambda *words: told.append(words),
    )
    assert [step for step, _ in seen] == [report.step for report in result.history]
    assert len(seen) > 1
    assert all(report.kid == 0.5 for report in result.history)
    assert seen[0][1] == {"mapping", "synthesis", "styles"}
    assert told[-1][1:] == (5, 5)
    seconds = [report.seconds for report in result.history]
    assert seconds == sorted(seconds)


def test_float_images_count_as_bytes(options, no_steps, clock):
    steps = no_steps()
    images = np.linspace(0, 1, 12 * 8 * 8 * 3, dtype="float32").reshape(12, 8, 8, 3)
    train_generator(jax.random.key(0), _data(images), options(kimg=0.004))
    found = np.asarray(steps[0].images)
    assert found.dtype == np.uint8
    assert np.abs(found / 255 - images).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(steps[0].labels, np.arange(12) % 2)


def test_a_loss_that_is_not_finite_ends_the_run(options, no_steps, clock, tmp_path):
    no_steps(loss=float("nan"))
    path = tmp_path / "state.npz"
    with pytest.raises(PriorTrainingError, match=r"not finite after 5 steps.*learning_rate=0.0025"):
        train_generator(
            jax.random.key(0), _data(), options(), checkpoint_minutes=1000.0, checkpoint=path
        )
    assert not path.exists()  # a spoiled state is not kept


def test_what_does_not_fit_is_refused_before_any_step(options, no_steps):
    steps = no_steps()
    with pytest.raises(ValueError, match=r"makes images of 16 x 16 pixels, the data have 8 x 8"):
        train_generator(jax.random.key(0), _data(), options(resolution=16))
    with pytest.raises(ValueError, match="8 x 4"):
        train_generator(jax.random.key(0), _data(np.zeros((4, 8, 4, 1), "uint8")), options())
    with pytest.raises(ValueError, match="power of two"):
        train_generator(jax.random.key(0), _data(), options(resolution=12))
    with pytest.raises(ValueError, match="base"):
        train_generator(jax.random.key(0), _data(), options(base=4))
    assert not steps


def test_more_devices_than_the_batch_can_be_divided_among(options, no_steps, monkeypatch):
    no_steps()
    monkeypatch.setattr(training.jax, "local_device_count", lambda: 3)
    with pytest.raises(ValueError, match="cannot be divided among 3 devices"):
        train_generator(jax.random.key(0), _data(), options(prior_batch=4))


def test_a_conditional_prior_learns_the_classes_of_the_data(options, no_steps, clock):
    no_steps()
    result = train_generator(jax.random.key(0), _data(), options(conditional=True, kimg=0.004))
    assert result.generator.num_classes == 2
    assert result.generator.channels == 3
    assert "embed" in result.params["mapping"]
