"""What importing costs and touches, and who may import whom."""

import ast
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jgia_kernels
import pytest

import jgia

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "jgia", ROOT / "kernels" / "jgia_kernels"

# docs/architecture.md, "Who may import whom": parts of jgia that each part may import.
BASE = {"_checks", "_io", "_clock", "normalization", "config"}
ALLOWED = {
    "_checks": set(),
    "_io": set(),
    "_clock": set(),
    "_progress": set(),
    "normalization": {"_checks"},
    "config": {"_checks"},
    "models": {"_checks", "normalization"},
    "observation": {"_checks", "models"},
    "data": {"_checks", "normalization"},
    "defenses": BASE | {"models", "risk"},
    "federated": BASE | {"models", "observation", "defenses"},
    "sparse": {"_checks"},
    "replay": {"models", "observation"},
    "generators": BASE | {"models", "data", "federated", "training"},
    "attacks": BASE | {"models", "observation", "replay", "risk", "sparse", "generators"},
    "risk": BASE | {"models", "observation", "replay"},
    "explain": BASE | {"models", "risk", "defenses"},
    "metrics": {"_checks"},
    "report": {"_checks", "_io"},
    "training": BASE | {"_io", "data", "federated", "models", "risk"},
    "methods": BASE | {"_clock", "models", "observation", "attacks", "generators", "training"},
    "audit_risk": BASE | {"models", "risk"},
    "audit": None,  # the composition sees everything but the command line
    "exchange": None,
    "train_command": None,
    "train_prior_command": None,
    "audit_stages": {"metrics", "observation"},
    "_commands": {"config"},
    "risk_command": None,
    "sweep": None,
    "inspect": BASE | {"models", "federated", "defenses"},
    "cli": None,
    "__main__": {"cli"},
}


def run(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter that finds this checkout's packages."""
    paths = [str(ROOT), str(KERNELS.parent)]
    source = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def modules(package) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [m.name for m in found if not m.name.endswith("__main__")]


def imported_parts(source: str) -> set[str]:
    """Parts of jgia that a source file imports anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jgia.")}


def test_import_loads_neither_jax_nor_flax():
    heavy = run("import jgia; print({'jax', 'flax', 'numpy', 'optax', 'PIL'} & set(sys.modules))")
    assert heavy == "set()"


def test_parsing_the_command_line_loads_no_jax():
    code = """
import jgia.cli
try:
    jgia.cli.main(["audit", "--help"])
except SystemExit:
    print("jax loaded:", "jax" in sys.modules)
"""
    assert run(code).splitlines()[-1] == "jax loaded: False"


def test_every_exported_name_resolves():
    for name in jgia.__all__:
        assert getattr(jgia, name) is not None
    assert set(dir(jgia)) == set(jgia.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        jgia.no_such_name  # noqa: B018


def test_importing_every_module_touches_no_device():
    names = modules(jgia) + modules(jgia_kernels)
    assert len(names) > 40
    code = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
from jax._src import xla_bridge
print("backends:", dict(xla_bridge._backends))
"""
    assert run(code) == "backends: {}"


def test_device_check_notices_a_device():
    code = (
        "import jax; jax.devices(); from jax._src import xla_bridge as b; print(len(b._backends))"
    )
    assert int(run(code)) > 0


def test_every_part_is_in_the_table():
    parts = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.name[0].isalpha()}
    private = {p.stem for p in PACKAGE.glob("_*.py")} - {"__init__"}
    assert (parts | private) - {"py"} == set(ALLOWED)


@pytest.mark.parametrize("part", [p for p, allowed in ALLOWED.items() if allowed is not None])
def test_imports_follow_the_table(part: str):
    path = PACKAGE / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for file in files:
        found = imported_parts(file.read_text("utf-8"))
        beyond = found - ALLOWED[part] - {part, "__version__"}
        assert not beyond, f"{file.relative_to(ROOT)} imports {sorted(beyond)}"


def test_composition_does_not_import_the_command_line():
    composition = [PACKAGE / "audit.py", PACKAGE / "exchange.py", *(PACKAGE / "sweep").glob("*.py")]
    for file in composition:
        assert "cli" not in imported_parts(file.read_text("utf-8"))


def test_kernels_import_nothing_of_jgia():
    files = sorted(KERNELS.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "jgia"], file


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from jgia.metrics import score", {"metrics"}),
        ("def f():\n    from jgia import data", {"data"}),
        ("import jgia.report.html as h", {"report"}),
        ("import jgia_kernels.soft_threshold, numpy", set()),
    ],
)
def test_import_scan_sees_every_form(source: str, parts: set[str]):
    assert imported_parts(source) == parts


def test_wheel_names_and_files():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "jgia",
        "kernels/jgia_kernels",
    ]
    for name in (*project["project"]["license-files"], project["project"]["readme"]):
        assert (ROOT / name).is_file()
    for package in (PACKAGE, KERNELS):
        assert (package / "py.typed").is_file()
        assert (package / "__init__.py").is_file()


def test_torch_is_in_no_requirement_of_users_and_tests():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    required = project["dependencies"] + project["optional-dependencies"]["test"]
    assert not [name for name in required if name.startswith("torch")]
