import dataclasses

import jax
import numpy as np
import pytest

from jgia.config.training import TrainConfig, TrainOptions
from jgia.data import Dataset
from jgia.models import batch_norm_names, flatten_params, with_batch_norm, with_buffers
from jgia.training import (
    CheckpointError,
    TrainingError,
    evaluate,
    train_victim,
)
from jgia.training.measure import folded
from jgia.training.train import _step

WHOLE = TrainOptions(
    epochs=1,
    batch_size=100,
    optimizer="sgd",
    schedule="constant",
    learning_rate=0.1,
    flip=False,
    crop=False,
)


def _key():
    """A new one with the same bits: keys are used once."""
    return jax.random.key(11)


def _bits(trained):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained.params)]


def _logits(victim, params, dataset):
    images, labels = dataset.take(range(len(dataset)))
    inputs = victim.normalization.normalize(images)
    return np.asarray(jax.jit(victim.apply)(params, inputs), np.float64), labels


@pytest.fixture(scope="module")
def resnets(stripes, models):
    """A residual network after one and after two steps, each on the whole data set."""
    _, victim = models("resnet")
    one, two = (
        train_victim(_key(), victim, stripes(), dataclasses.replace(WHOLE, epochs=n))
        for n in (1, 2)
    )
    return one, two


def test_evaluation_is_the_mean_over_all_images(stripes, models, monkeypatch):
    _, victim = models("mlp")
    params, dataset = victim.init(jax.random.key(1)), stripes(23)
    monkeypatch.setattr("jgia.training.measure._BATCH", 5)  # 3 in the last batch
    logits, labels = _logits(victim, params, dataset)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(23), labels]
    found = evaluate(victim, params, dataset)
    np.testing.assert_allclose(found.loss, losses.mean(), rtol=1e-6)
    assert found.accuracy == np.mean(logits.argmax(axis=1) == labels)
    assert found.accuracy not in (0.0, 1.0)
    floats = dataclasses.replace(dataset, images=dataset.take(range(23))[0])
    np.testing.assert_allclose(evaluate(victim, params, floats).loss, found.loss, rtol=1e-6)


def test_sgd_takes_the_steps_of_the_formula(stripes, models):
    _, victim = models("mlp")
    dataset = stripes()
    images, labels = dataset.take(range(len(dataset)))
    now = jax.tree.map(np.asarray, victim.init(jax.random.split(_key())[0]))
    velocity = jax.tree.map(np.zeros_like, now)
    options = dataclasses.replace(WHOLE, weight_decay=0.01)
    gradient = jax.jit(jax.grad(victim.loss))
    for epochs in (1, 2, 3):
        step = jax.tree.map(
            lambda g, p: g + (0.01 * p if p.ndim > 1 else 0),
            jax.tree.map(np.asarray, gradient(now, images, labels)),
            now,
        )
        velocity = jax.tree.map(lambda v, s: 0.9 * v + s, velocity, step)
        now = jax.tree.map(lambda p, v: p - np.float32(0.1) * v.astype(p.dtype), now, velocity)
        if epochs == 2:
            continue
        trained = train_victim(_key(), victim, dataset, dataclasses.replace(options, epochs=epochs))
        for name, leaf in flatten_params(now).items():
            np.testing.assert_allclose(
                flatten_params(trained.params)[name], leaf, rtol=1e-4, atol=1e-6
            )


def test_training_learns_and_tells_how_well(stripes, models):
    _, victim = models("mlp")
    train, test = stripes(40), stripes(20, seed=1)
    config = TrainConfig(epochs=15, batch_size=16, learning_rate=0.03, flip=True, crop=False)
    trained = train_victim(_key(), victim, train, config, test=test)
    first, last = trained.history[0], trained.history[-1]
    assert [epoch.epoch for epoch in trained.history] == list(range(1, 16))
    assert last.train.loss < 0.2 < first.train.loss
    assert trained.test == last.test == evaluate(victim, trained.params, test)
    assert trained.train == evaluate(victim, trained.params, train)
    assert trained.test is not None
    assert trained.test.accuracy >= 0.95
    assert trained.victim == victim


def test_the_cosine_ends_at_zero(stripes, models):
    _, victim = models("mlp")
    options = dataclasses.replace(WHOLE, epochs=2, schedule="cosine", weight_decay=0.0)
    constant = dataclasses.replace(options, schedule="constant")
    one, two, three = (
        train_victim(_key(), victim, stripes(), o)
        for o in (dataclasses.replace(constant, epochs=1), options, constant)
    )
    moves = [
        np.abs(np.asarray(t.params["head"]["bias"]) - one.params["head"]["bias"]).max()
        for t in (two, three)
    ]
    # Second steps: with momentum 0.9, at half of the rate after half of the cosine.
    np.testing.assert_allclose(moves[0], 0.5 * moves[1], rtol=1e-3)


@pytest.mark.slow
def test_running_statistics_are_decayed_means_of_those_of_the_batches(resnets, stripes):
    one, two = resnets
    plain = with_batch_norm(with_buffers(one.victim, {}), "train")
    assert one.victim.module.batch_norm == "eval"
    images, _ = stripes().take(range(24))
    inputs = plain.normalization.normalize(images)
    start = plain.init(jax.random.split(_key())[0])
    moments = [jax.jit(plain.batch_statistics)(p, inputs) for p in (start, one.params)]
    after_one, after_two = one.victim.running_statistics(), two.victim.running_statistics()
    assert tuple(after_one) == batch_norm_names(plain)
    for name in after_one:
        for i in (0, 1):
            first, second = (np.asarray(m[name][i]) for m in moments)
            np.testing.assert_allclose(after_one[name][i], first, rtol=1e-5, atol=1e-6)
            expected = 0.9 * first + 0.1 * second
            np.testing.assert_allclose(after_two[name][i], expected, rtol=1e-5, atol=1e-6)


def test_what_is_reported_is_what_the_victim_with_its_buffers_does(resnets, stripes):
    trained, dataset = resnets[1], stripes()
    logits, labels = _logits(trained.victim, trained.params, dataset)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(24), labels]
    np.testing.assert_allclose(trained.train.loss, losses.mean(), rtol=1e-5)
    assert trained.train.accuracy == np.mean(logits.argmax(axis=1) == labels)
    bare, _ = _logits(with_buffers(trained.victim, {}), trained.params, dataset)
    assert not np.allclose(bare, logits, rtol=1e-2)
    statistics = trained.victim.running_statistics()
    small = folded(trained.params, jax.tree.map(lambda x: x.astype("float32"), statistics))
    again, _ = _logits(with_buffers(trained.victim, {}), small, dataset)
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)


def test_the_mode_of_batch_normalization_is_kept_and_does_not_change_training(
    resnets, models, stripes
):
    victim = with_batch_norm(models("resnet")[1], "train")
    trained = train_victim(_key(), victim, stripes(), WHOLE)
    assert trained.victim == with_batch_norm(resnets[0].victim, "train")
    assert trained.victim.running_statistics()
    assert _bits(trained) == _bits(resnets[0])
    assert trained.train == resnets[0].train


class _Killed(Exception):
    pass


def _kill_in(epoch, step):
    def progress(stage, done, total):
        assert total == 3
        if stage.startswith(f"epoch {epoch} of") and done == step:
            raise _Killed

    return progress


@pytest.mark.slow
@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 1), (3, 0), (3, 3)])
def test_a_killed_run_goes_on_to_the_same_result(epoch, step, tmp_path, stripes, models):
    _, victim = models("mlp")
    path = tmp_path / "checkpoint.npz"
    options = TrainOptions(epochs=3, batch_size=8)
    given = {"test": stripes(8, seed=1), "checkpoint": path}
    whole = train_victim(_key(), victim, stripes(26), options, test=given["test"])
    with pytest.raises(_Killed):
        train_victim(_key(), victim, stripes(26), options, **given, progress=_kill_in(epoch, step))
    assert path.exists() == (epoch > 1)
    seen = []
    resumed = train_victim(
        _key(), victim, stripes(26), options, **given, progress=lambda *now: seen.append(now)
    )
    assert seen[0][:2] == (f"epoch {epoch} of 3{seen[0][0][12:]}", 0)
    assert _bits(resumed) == _bits(whole)
    assert resumed.history == whole.history
    assert resumed == dataclasses.replace(whole, params=resumed.params)


@pytest.mark.slow
def test_checkpoints_of_other_runs_are_refused(tmp_path, stripes, models):
    _, victim = models("mlp")
    path = tmp_path / "checkpoint.npz"
    options = TrainOptions(epochs=1, batch_size=8)
    train_victim(_key(), victim, stripes(), options, checkpoint=path)
    train_victim(_key(), victim, stripes(), options, checkpoint=path)  # nothing left to do
    for key, dataset, other in (
        (jax.random.key(12), stripes(), options),
        (_key(), stripes(seed=3), options),
        (_key(), stripes(), dataclasses.replace(options, crop=False)),
    ):
        with pytest.raises(CheckpointError, match="belongs to another training run"):
            train_victim(key, victim, dataset, other, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"no checkpoint of a training run .*; remove it"):
        train_victim(_key(), victim, stripes(), options, checkpoint=path)


@pytest.mark.slow
def test_the_key_decides_everything_and_nothing_is_traced_twice(stripes, models):
    _, victim = models("mlp")
    options = TrainOptions(epochs=2, batch_size=8)
    one = train_victim(_key(), victim, stripes(), options)
    before = _step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    same = train_victim(_key(), victim, stripes(), options)
    assert _step._cache_size() == before  # pyright: ignore[reportAttributeAccessIssue]
    other = train_victim(jax.random.key(12), victim, stripes(), options)
    assert _bits(one) == _bits(same) != _bits(other)


def test_what_cannot_be_trained_is_refused_before_any_compute(stripes, models, monkeypatch):
    monkeypatch.setattr("jgia.training.train._step", None)
    _, victim = models("mlp")
    good = stripes()
    square = Dataset(good.images[:, :4], good.labels, good.class_names, "square", "Cut.")
    three = dataclasses.replace(good, class_names=("a", "b", "c"))
    single = dataclasses.replace(good, labels=np.zeros(24, np.int32))
    for dataset, test, message in (
        (square, None, r"training images have shape \(4, 4, 1\), the model takes \(6, 4, 1\)"),
        (good, square, r"test images have shape \(4, 4, 1\)"),
        (three, None, "training images have 3 classes, the model 2"),
        (single, None, "'stripes' have one class: there is nothing to learn"),
    ):
        with pytest.raises(ValueError, match=message):
            train_victim(_key(), victim, dataset, test=test)


def test_diverging_training_says_what_to_do(stripes, models):
    _, victim = models("mlp")
    options = dataclasses.replace(WHOLE, epochs=4, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"in epoch \d; lower learning_rate=1e\+30"):
        train_victim(_key(), victim, stripes(), options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be zero or more"),
        ({"test_fraction": 1.0}, r"test_fraction must lie in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be between 0"),
    ],
)
def test_options_must_make_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)
