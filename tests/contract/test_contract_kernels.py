"""What every kernel owes its callers, whatever it computes."""

import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jgia_kernels
import numpy as np
import pytest

_HERE = Path(__file__).resolve().parent
_PACKAGE = Path(jgia_kernels.__file__).resolve().parent
_README = _HERE.parents[1] / "kernels" / "README.md"
_FILES = ("__init__.py", "api.py", "reference.py", "pallas_gpu.py", "pallas_tpu.py", "specs.py")
_IMPLEMENTATIONS = ("auto", "xla", "pallas")


def _load_cases():
    name = "jgia_kernel_contract_cases"
    spec = importlib.util.spec_from_file_location(name, _HERE / "cases_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.CASES


CASES = _load_cases()
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder)
implementations = pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)


def _folders(package: Path) -> set[str]:
    skipped = ("_", ".")
    return {p.name for p in package.iterdir() if p.is_dir() and not p.name.startswith(skipped)}


def _imported(source: str) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else str(node.module).split(".")[0])
    return names


def _foreign(source: str) -> set[str]:
    allowed = {"jax", "jaxtyping", "jgia_kernels", *sys.stdlib_module_names}
    return _imported(source) - allowed


def test_every_folder_has_exactly_one_case():
    listed = [case.folder for case in CASES]
    assert sorted(listed) == sorted(_folders(_PACKAGE))


def test_a_folder_without_a_case_is_seen(tmp_path):
    (tmp_path / "soft_threshold").mkdir()
    (tmp_path / "forgotten").mkdir()
    (tmp_path / "__pycache__").mkdir()
    assert _folders(tmp_path) - {case.folder for case in CASES} == {"forgotten"}


@cases
def test_folder_is_complete_and_documented(case):
    assert [f for f in _FILES if not (_PACKAGE / case.folder / f).is_file()] == []
    assert f"| `{case.folder}` |" in _README.read_text()


@pytest.mark.parametrize("path", sorted(_PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_files_import_jax_and_never_jgia(path):
    assert _foreign(path.read_text()) == set()


def test_check_of_imports_sees_a_foreign_one():
    assert _foreign("import jax\ndef f():\n    from jgia.sparse import fista") == {"jgia"}
    assert _foreign("from . import x\nimport numpy.linalg") == {".", "numpy"}


@cases
def test_gpu_kernel_takes_no_deprecated_route(case):
    source = (_PACKAGE / case.folder / "pallas_gpu.py").read_text()
    called = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert "pallas_call" not in called


def test_importing_the_package_loads_no_pallas():
    modules = ", ".join(f"jgia_kernels.{case.folder}" for case in CASES)
    script = f"import {modules}, sys; print([m for m in sys.modules if 'pallas' in m])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(_PACKAGE.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = ast.literal_eval(run.stdout)
    assert [name for name in loaded if not name.startswith("jgia_kernels")] == []


@cases
def test_signature_and_docstring(case):
    parameter = inspect.signature(case.function).parameters["implementation"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default == "auto"
    api = importlib.import_module(f"jgia_kernels.{case.folder}.api")
    result = doctest.testmod(api)
    assert result.attempted > 0
    assert result.failed == 0


@cases
def test_unknown_implementation(case):
    with pytest.raises(ValueError, match="'auto', 'xla', 'pallas'"):
        case.function(*case.operands(jax.random.key(0)), implementation="triton")


@cases
@implementations
def test_agrees_with_the_oracle(case, implementation):
    operands = case.operands(jax.random.key(0))
    y = case.function(*operands, implementation=implementation)
    assert y.dtype == jnp.float32
    expected = case.oracle(*(np.asarray(operand, np.float64) for operand in operands))
    rtol = 4 * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)


@cases
@implementations
def test_jit_vmap_and_derivatives(case, implementation):
    fn = functools.partial(case.function, implementation=implementation)
    operands = case.operands(jax.random.key(1))
    y = fn(*operands)
    np.testing.assert_array_equal(jax.jit(fn)(*operands), y)
    stacked = [jnp.stack([operand, operand]) for operand in operands]
    np.testing.assert_array_equal(jax.vmap(fn)(*stacked), jnp.stack([y, y]))

    def gradients(fn):
        argnums = tuple(range(len(operands)))
        return jax.grad(lambda *args: (fn(*args) ** 2).sum(), argnums)(*operands)

    expected = gradients(functools.partial(case.function, implementation="xla"))
    for mine, theirs in zip(gradients(fn), expected, strict=True):
        assert np.any(mine != 0)
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@cases
@implementations
def test_second_call_does_not_trace_again(case, implementation):
    traces = []

    @jax.jit
    def fn(*operands):
        traces.append(1)
        return case.function(*operands, implementation=implementation)

    fn(*case.operands(jax.random.key(0)))
    fn(*case.operands(jax.random.key(1)))
    assert len(traces) == 1


def _lowered(case, implementation, platform) -> str:
    fn = jax.jit(functools.partial(case.function, implementation=implementation))
    traced = fn.trace(*case.operands(jax.random.key(0)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@cases
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernel_is_in_the_lowered_module_where_asked_for(case, platform):
    name = case.kernel_names[platform]
    assert name in _lowered(case, "pallas", platform)
    assert name not in _lowered(case, "xla", platform)


@cases
@implementations
def test_no_kernel_on_a_cpu(case, implementation):
    assert "custom_call" not in _lowered(case, implementation, "cpu")
