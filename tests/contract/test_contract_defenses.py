"""What every defense owes its callers, whatever it does."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgia.defenses
from jgia.config import DefenseConfig, DefenseName
from jgia.config.defense import ON_SHARED
from jgia.defenses import Defense, make_defense

_HERE = Path(__file__).resolve().parent
_PACKAGE = Path(next(iter(jgia.defenses.__path__)))
_BASELINES = {"censor", "coordinate", "soteria"}  # to compare with; no name on the command line
_NOT_DEFENSES = {"accounting", "defense", "detector"} | _BASELINES
_HELPERS = {
    "censor_update",
    "coordinate_noise",
    "declared_noise_std",
    "detect_crafted",
    "dp_sgd_epsilon",
    "dp_sgd_noise_std",
    "gaussian_delta",
    "gaussian_epsilon",
    "layer_scales_for_target",
    "make_defense",
    "scale_for_target",
    "shaped_noise",
    "soteria",
    "soteria_scores",
}


def _load_cases():
    name = "jgia_defense_contract_cases"
    spec = importlib.util.spec_from_file_location(name, _HERE / "cases_defenses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_CASES = _load_cases()
CASES, VICTIM = _CASES.CASES, _CASES.VICTIM
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _modules(package: Path) -> set[str]:
    """Names of the modules that hold defenses."""
    return {p.stem for p in package.glob("*.py") if not p.name.startswith("_")} - _NOT_DEFENSES


def _inputs(case, dtype="float64"):
    rng = np.random.default_rng(11)
    if case.act_on != "update":
        return jnp.asarray(rng.random((6, 4, 4, 1)), dtype)
    return {
        "fc": {"kernel": jnp.asarray(rng.normal(size=(7, 3)), dtype)},
        "bias": jnp.asarray(rng.normal(size=(5,)), dtype),
    }


def _flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, "float64").ravel() for leaf in jax.tree.leaves(tree)])


def _types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def test_every_defense_has_exactly_one_case():
    assert sorted(case.name for case in CASES) == sorted(get_args(DefenseName))
    assert {case.module for case in CASES} == _modules(_PACKAGE)
    functions = {
        name
        for name in jgia.defenses.__all__
        if inspect.isfunction(getattr(jgia.defenses, name)) and name not in _HELPERS
    }
    assert functions <= {case.function for case in CASES}


def test_a_defense_without_a_case_is_seen(tmp_path):
    for name in ("gaussian", "forgotten", "_private", "defense"):
        (tmp_path / f"{name}.py").touch()
    assert _modules(tmp_path) - {case.module for case in CASES} == {"forgotten"}


@cases
def test_structure_shape_and_dtype_are_kept(case):
    dtype = "float32"  # the other tests run in float64
    inputs = _inputs(case, dtype)
    result = case.apply(jax.random.key(0), inputs, **case.knobs)
    if case.act_on == "gradient of images":
        shapes = jax.tree.map(lambda leaf: (leaf.shape, dtype), VICTIM.param_shapes())
        assert _types(result) == shapes
    else:
        assert _types(result) == _types(inputs)
    assert np.all(np.isfinite(_flat(result)))


@cases
def test_same_key_same_bits_and_another_key_other_bits(case):
    inputs = _inputs(case)
    first, again, other = (
        _flat(case.apply(jax.random.key(seed), inputs, **case.knobs)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) != case.random


@cases
def test_it_does_something(case):
    inputs = _inputs(case)
    weakest = case.apply(jax.random.key(3), inputs, **case.weakest)
    assert not np.allclose(
        _flat(case.apply(jax.random.key(3), inputs, **case.knobs)), _flat(weakest)
    )


@cases
def test_zero_strength_is_the_identity(case):
    inputs = _inputs(case)
    result = _flat(case.apply(jax.random.key(3), inputs, **case.weakest))
    if case.act_on == "gradient of images":
        expected = _flat(_CASES.plain_gradient(inputs))
    else:
        expected = _flat(inputs)
    slack = max(case.tolerance, 8 * np.finfo(float).eps)
    np.testing.assert_allclose(result, expected, rtol=0, atol=slack * np.abs(expected).max())


@cases
def test_compiled_and_eager_agree(case):
    if not case.jitted:
        pytest.skip("driven from Python; its parts are compiled in any case")
    inputs = _inputs(case)
    eager = case.apply(jax.random.key(4), inputs, **case.knobs)
    compiled = jax.jit(lambda key, tree: case.apply(key, tree, **case.knobs))
    result = compiled(jax.random.key(4), inputs)
    np.testing.assert_allclose(_flat(result), _flat(eager), rtol=1e-13, atol=1e-14)


@cases
def test_inputs_are_left_as_they_were(case):
    inputs = _inputs(case)
    before = _flat(inputs).copy()
    case.apply(jax.random.key(5), inputs, **case.knobs)
    np.testing.assert_array_equal(_flat(inputs), before)


@pytest.mark.parametrize("case", [c for c in CASES if c.deviation], ids=lambda c: c.name)
def test_declared_deviation_is_the_measured_one_and_a_wrong_one_is_rejected(case):
    size = 20_000
    zeros = {"a": jnp.zeros((size // 2,)), "b": jnp.zeros((2, size // 4))}
    declared = case.deviation(jax.random.key(6), zeros, **case.knobs)
    noise = _flat(case.apply(jax.random.key(6), zeros, **case.knobs))
    kurtosis = 5.0 if case.name == "laplace" else 2.0
    spread = np.sqrt(kurtosis / size)

    def accepted(std: float) -> bool:
        return abs(np.mean(noise**2) / std**2 - 1) < 4.5 * spread

    assert accepted(declared)
    assert abs(np.mean(noise)) < 4.5 * declared / np.sqrt(size)
    for factor in (0.9, 1.1, 2.0, 0.5):
        assert not accepted(factor * declared)


@cases
def test_bad_knobs_are_refused(case):
    for knobs, word in case.wrong:
        with pytest.raises(ValueError, match=word):
            case.apply(jax.random.key(7), _inputs(case), **{**case.knobs, **knobs})


@cases
def test_configuration_names_it_and_makes_it(case):
    defense = make_defense(DefenseConfig(defense=(case.name,)))
    assert isinstance(defense, Defense)
    assert defense.words.startswith(f"{case.name}(")
    assert defense == make_defense(DefenseConfig(defense=(case.name,)))
    assert hash(defense) == hash(make_defense(DefenseConfig(defense=(case.name,))))
    assert defense.changes_gradient == (case.name not in ON_SHARED)


@cases
def test_nonfinite_entries_stay_visible(case):
    if case.act_on != "update" or case.name == "dp_sgd":
        pytest.skip("checked where the images are; DP-SGD zeroes and counts such examples")
    for bad in (jnp.nan, jnp.inf):
        update = {"w": jnp.ones(6).at[2].set(bad)}
        assert not np.all(np.isfinite(_flat(case.apply(jax.random.key(8), update, **case.knobs))))


@pytest.mark.parametrize("case", [c for c in CASES if c.act_on == "update"], ids=lambda c: c.name)
def test_integers_are_refused(case):
    with pytest.raises((ValueError, TypeError)):
        case.apply(jax.random.key(9), {"w": jnp.arange(3)}, **case.knobs)
