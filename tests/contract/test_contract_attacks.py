"""What every attack owes its callers, whatever it does."""

import dataclasses
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jgia.attacks
from jgia.observation import Reconstruction, Status, ThreatModel

_HERE = Path(__file__).resolve().parent
_PACKAGE = Path(next(iter(jgia.attacks.__path__)))


def _load_cases():
    name = "jgia_attack_contract_cases"
    spec = importlib.util.spec_from_file_location(name, _HERE / "cases_attacks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_MODULE = _load_cases()
CASES = _MODULE.CASES
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _attacks(package: Path) -> set[str]:
    """Names of the packages and modules that are attacks: all but those with an underscore."""
    return {
        path.stem
        for path in package.iterdir()
        if not path.name.startswith(("_", "."))
        and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }


def _copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def test_every_attack_has_exactly_one_case():
    assert {case.package for case in CASES} == _attacks(_PACKAGE) - _MODULE.NOT_ATTACKS
    assert len({case.name for case in CASES}) == len(CASES)


def test_an_attack_without_a_case_is_seen(tmp_path):
    for name in ("ares", "forgotten", "_private", "notes"):
        (tmp_path / name).mkdir()
    for name in ("ares", "forgotten", "_private"):
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "single.py").touch()
    (tmp_path / "__init__.py").touch()
    missing = _attacks(tmp_path) - {case.package for case in CASES}
    assert missing == {"forgotten", "single"}


@cases
def test_reconstruction_is_complete(case):
    observation = case.observe()
    result = case.attack(jax.random.key(0), observation)
    assert isinstance(result, Reconstruction)
    images = np.asarray(result.images)
    assert images.shape[1:] == observation.victim.input_shape
    assert len(images) >= 1
    assert len(images) == len(result.scores) == len(result.statuses)
    assert np.all(np.isfinite(images))
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.all(np.isfinite(result.scores))
    assert np.all(np.diff(result.scores) <= 0)
    assert all(isinstance(status, Status) and status.accepted for status in result.statuses)
    assert result.selected_by
    accepted = [c for c in result.candidates if Status(c["status"]).accepted]
    assert len(accepted) == len(images)
    json.dumps([dict(c) for c in result.candidates], allow_nan=False)
    json.dumps(dict(result.stats), allow_nan=False)


@cases
def test_same_key_gives_the_same_bits(case):
    first, second = (case.attack(jax.random.key(3), case.observe()) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.statuses == second.statuses
    assert first.candidates == second.candidates


@cases
def test_observation_is_left_as_it_was(case):
    observation = case.observe()
    update, params = _copied(observation.update), _copied(observation.params)
    arrays = dataclasses.replace(observation, update=_copied(update), params=_copied(params))
    case.attack(jax.random.key(0), arrays)
    jax.tree.map(np.testing.assert_array_equal, arrays.update, update)
    jax.tree.map(np.testing.assert_array_equal, arrays.params, params)


@cases
def test_threat_model_is_respected(case):
    curious = ThreatModel(server="honest_but_curious")
    observation = dataclasses.replace(case.observe(), threat_model=curious)
    if case.needs_malicious_server:
        with pytest.raises(ValueError, match="malicious"):
            case.attack(jax.random.key(0), observation)
    else:
        case.attack(jax.random.key(0), observation)


@cases
def test_key_comes_first_and_truth_never(case):
    function = getattr(case.attack, "func", case.attack)
    names = list(inspect.signature(function).parameters)
    assert names[:2] == ["key", "observation"]
    assert not {"truth", "labels", "images"} & set(names)
