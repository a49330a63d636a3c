"""Label mapping on a conditional 8 px generator: what good, bad and perfect labels are worth."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gifd
from jgia.attacks.gifd import attack_with_label_mapping, map_labels
from jgia.config import ClientConfig, RunOptions
from jgia.config.gifd_baselines import LabelMappingOptions
from jgia.federated import client_update
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization


def _tiny():
    name = "jgia_tiny_generator_mapping"
    path = Path(__file__).with_name("tiny_generator.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CLASSES = 4
PRIOR = _tiny().make_prior(num_classes=CLASSES)
PRIOR.params["embed"] *= 4  # classes that differ more than images of one
VICTIM = make_victim("mlp", input_shape=(8, 8, 3), num_classes=5, widths=(16,))
PARAMS = VICTIM.init(jax.random.key(0))
LABELS, TRUE_CLASSES = (0, 4), (2, 1)
"""Of the federated model, and of the generator: nothing relates them."""
SETTINGS = gifd.Settings(last_stage=0, num_steps=30, restarts=1, radius_mode="none")
SEEDS = range(8)


class _Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


@jax.jit
def _sample(key, labels):
    generator, params = PRIOR.generator, PRIOR.params
    side = generator.draw(params, key, len(labels), labels)
    return (generator.image(params, side, generator.run(params, side, None)) + 1) / 2


def _classifier(num_classes=CLASSES, shape=(8, 8, 3)) -> Victim:
    return Victim(_Linear(num_classes), shape, num_classes, Normalization.identity(3))


@functools.cache
def _nearest_mean(*, shift=0) -> Any:
    """Parameters of a linear classifier that takes the class whose mean image is nearest."""
    labels = np.arange(800) % CLASSES
    images = np.asarray(_sample(jax.random.key(9), jnp.asarray(labels))).reshape(800, -1)
    means = np.stack([images[labels == c].mean(axis=0) for c in range(CLASSES)])
    means = np.roll(means, shift, axis=0)
    return {"Dense_0": {"kernel": jnp.asarray(2 * means.T), "bias": -jnp.sum(means**2, axis=1)}}


@functools.cache
def _observe(seed, *, known=True):
    images = np.asarray(_sample(jax.random.key(100 + seed), jnp.array(TRUE_CLASSES)))
    seen = client_update(
        jax.random.key(1), VICTIM, PARAMS, images, np.array(LABELS), ClientConfig()
    )
    threat = dataclasses.replace(
        seen.threat_model, server="honest_but_curious", labels=LABELS if known else None
    )
    return dataclasses.replace(seen, threat_model=threat)


def _mapped(seed, params=None, *, known=True, classifier=None, **fields):
    return attack_with_label_mapping(
        jax.random.key(20 + seed),
        _observe(seed, known=known),
        PRIOR,
        classifier or _classifier(),
        _nearest_mean() if params is None else params,
        options=fields.pop("options", SETTINGS),
        coarse_steps=fields.pop("coarse_steps", 60),
        **fields,
    )


def _with_classes(seed, classes):
    return gifd.attack(
        jax.random.key(20 + seed),
        _observe(seed),
        PRIOR,
        options=SETTINGS,
        generator_labels=np.array(classes),
    )


@functools.cache
def _results():
    return [_mapped(seed) for seed in SEEDS]


def _mean(results):
    return np.mean([-found.scores[0] for found in results])


def test_the_classifier_tells_classes_apart():
    labels = np.arange(400) % CLASSES
    images = _sample(jax.random.key(10), jnp.asarray(labels))
    classes, probabilities = map_labels(_classifier(), _nearest_mean(), images, CLASSES)
    assert classes.shape == probabilities.shape == (CLASSES, 400)
    assert np.mean(classes[0] == labels) > 0.8
    assert np.all(np.diff(probabilities, axis=0) <= 0)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, rtol=1e-5)


def test_mapped_labels_are_worth_something_and_the_true_ones_more():
    unmapped = [_with_classes(seed, np.array(LABELS) % CLASSES) for seed in SEEDS]
    oracle = [_with_classes(seed, TRUE_CLASSES) for seed in SEEDS]
    mapped = _results()
    assert _mean(oracle) <= _mean(mapped) <= _mean(unmapped)
    assert _mean(mapped) < 0.9 * _mean(unmapped)
    for found, known in zip(mapped, oracle, strict=True):
        if found.stats["generator_labels"] == list(TRUE_CLASSES):  # the same search, then
            np.testing.assert_array_equal(found.images, known.images)


def test_a_wrong_classifier_is_worse():
    wrong = [_mapped(seed, _nearest_mean(shift=1)) for seed in SEEDS]
    assert _mean(wrong) > 1.1 * _mean(_results())


def test_the_update_is_matched_with_the_victims_labels():
    for found in _results():
        assert list(found.labels) == list(LABELS)
        assert found.stats["labels_by"] == "given"
        assert found.stats["label_mapping"]["coarse_labels"] == [0, 0]
    inferred = _mapped(0, known=False)
    assert sorted(inferred.labels) == sorted(LABELS)
    assert inferred.stats["labels_by"] != "given"


def test_the_best_of_several_classes_wins():
    one, two = _results()[0], _mapped(0, candidates=2)
    record, before = two.stats["label_mapping"], one.stats["label_mapping"]
    assert record["classes"][0] == before["classes"][0]
    assert record["distances"][0] == before["distances"][0]
    assert record["coarse_distance"] == before["coarse_distance"]
    best = int(np.argmin(record["distances"]))
    assert record["chosen"] == best
    assert two.stats["generator_labels"] == record["classes"][best]
    assert -two.scores[0] == min(record["distances"]) <= -one.scores[0]
    assert record["steps"] == 60 + 2 * 30


def test_budget_progress_and_files_are_for_all_passes(tmp_path):
    told = []
    options = dataclasses.replace(SETTINGS, budget_steps=20)
    run = RunOptions(checkpoint=tmp_path / "search.npz", dump=tmp_path / "shown")
    found = _mapped(
        0,
        options=options,
        coarse_steps=10,
        candidates=2,
        run_options=run,
        progress=lambda *args: told.append(args[:2]),
    )
    assert found.stats["label_mapping"]["steps"] == 20
    assert told == [(10, 20), (15, 20), (20, 20)]
    names = ["coarse", "fine-1", "fine-2"]
    assert sorted(path.name for path in tmp_path.glob("search-*")) == [
        f"search-{name}.npz" for name in names
    ]
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == names
    with pytest.raises(ValueError, match="do not suffice"):
        _mapped(0, options=options, coarse_steps=20)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 classes apart, and has 3"):
        _mapped(0, classifier=_classifier(3))
    with pytest.raises(ValueError, match="victim's shape"):
        _mapped(0, classifier=_classifier(shape=(16, 16, 3)))
    with pytest.raises(ValueError, match="at most 4"):
        _mapped(0, candidates=5)
    with pytest.raises(ValueError, match="coarse_steps"):
        _mapped(0, coarse_steps=0)
    with pytest.raises(ValueError, match="missing"):
        _mapped(0, {"other": _nearest_mean()["Dense_0"]})
    plain = dataclasses.replace(
        PRIOR, generator=dataclasses.replace(PRIOR.generator, num_classes=0)
    )
    with pytest.raises(ValueError, match="needs a conditional prior"):
        attack_with_label_mapping(
            jax.random.key(0), _observe(0), plain, _classifier(), _nearest_mean()
        )


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="mapping_coarse_steps"):
        LabelMappingOptions(mapping_coarse_steps=0)
    with pytest.raises(ValueError, match="mapping_candidates"):
        LabelMappingOptions(mapping_candidates=0)
