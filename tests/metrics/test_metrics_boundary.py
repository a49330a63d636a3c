"""D10, D12: an attack that can see the true images can select by them. None here can.

Every module under ``jgia/attacks`` is parsed, not imported, and must not reach the scorer, the
data loaders or the truth in any way that Python spells.
"""

import ast
from pathlib import Path

import pytest

import jgia.attacks

ATTACKS = Path(jgia.attacks.__file__).parent
PACKAGE = ATTACKS.parent
FORBIDDEN_MODULES = ("jgia.metrics", "jgia.data", "jgia.audit", "jgia.cli", "jgia.report")
FORBIDDEN_NAME = "Truth"
SUBMODULES = {path.stem for path in PACKAGE.iterdir()}


def forbidden(module):
    return any(module == f or module.startswith(f"{f}.") for f in FORBIDDEN_MODULES)


def imported(node, package):
    """Dotted names that an import statement binds or loads, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def violations(source, package="jgia.attacks"):
    """What a module of ``package`` does that an attack may not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = imported(node, package)
            found += [name for name in names if forbidden(name)]
            found += [name for name in names if name.split(".")[-1] == FORBIDDEN_NAME]
            if isinstance(node, ast.ImportFrom) and names[0] == "jgia":  # re-exports hide origins
                found += [a.name for a in node.names if a.name not in SUBMODULES]
            if isinstance(node, ast.ImportFrom) and names[0].split(".")[0] == "jgia":
                found += [f"{names[0]}.*" for a in node.names if a.name == "*"]
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if node.attr == FORBIDDEN_NAME or forbidden(dotted):
                found.append(dotted)
        elif isinstance(node, ast.Name) and node.id == FORBIDDEN_NAME:
            found.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("jgia.metrics"), getattr(observation, "Truth")
            if forbidden(node.value) or node.value == FORBIDDEN_NAME:
                found.append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module") and not (
                node.args and isinstance(node.args[0], ast.Constant)
            ):
                found.append(f"{called} of a computed name")
    return found


def package_of(path):
    return ".".join(["jgia", *path.relative_to(PACKAGE).parent.parts])


MODULES = sorted(ATTACKS.rglob("*.py"))


def test_there_are_attacks_to_look_at():
    assert ATTACKS / "__init__.py" in MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ATTACKS)))
def test_no_attack_reaches_the_truth_or_the_scorer(path):
    source = path.read_text(encoding="utf-8")
    assert violations(source, package_of(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import jgia.metrics",
        "import jgia.metrics.image as anything",
        "from jgia import metrics",
        "from jgia import metrics as m",
        "from jgia.metrics import psnr",
        "from jgia.metrics.image import psnr",
        "from ..metrics import psnr",
        "from .. import metrics",
        "from jgia.data import load_dataset",
        "import jgia.data.sample",
        "from jgia.observation import Truth",
        "from jgia.observation import Observation, Truth as T",
        "from jgia import observation\nobservation.Truth",
        "from jgia import Truth",
        "from jgia import score",
        "from jgia import *",
        "from jgia.observation import *",
        "import jgia\njgia.metrics.psnr",
        "def select(images, truth: Truth): ...",
        "def f():\n    from jgia.metrics import psnr",
        "import importlib\nimportlib.import_module('jgia.metrics')",
        "__import__('jgia.data')",
        "import importlib\nimportlib.import_module(name)",
        "from jgia import observation\ngetattr(observation, 'Truth')",
        "try:\n    import jgia.audit\nexcept ImportError: ...",
    ],
)
def test_the_check_rejects(source):
    assert violations(source)


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from jgia import _checks", "jgia.attacks"),
        ("from jgia.observation import Observation, Reconstruction, Status", "jgia.attacks"),
        ("from jgia.sparse.operators import ConvOperator", "jgia.attacks.ares"),
        ("from .leak import read_out", "jgia.attacks.ares"),
        ("from ...sparse import operators", "jgia.attacks.ares"),
        ("'''Select by the loss, never by the Truth or jgia.metrics.'''", "jgia.attacks"),
        ("import jax.numpy as jnp\ndata = jnp.zeros(3)\ndata.sum()", "jgia.attacks"),
    ],
)
def test_the_check_accepts_honest_code(source, package):
    assert violations(source, package) == []


def test_a_relative_import_is_resolved_from_where_it_stands():
    assert violations("from ...metrics import psnr", "jgia.attacks.ares")
    assert not violations("from .metrics import residual", "jgia.attacks.ares")
