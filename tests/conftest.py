"""Strict modes for every test: float64 on, no silent promotion, keys used once."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest


def _quick_to_compile() -> str:
    """Flags for XLA: programs that are compiled three to ten times faster and run slower.

    Nearly all of the tests' time on a CPU is compilation. XLA ends the process at a flag that it
    does not know, hence the version. ``XLA_FLAGS=`` in the environment tests optimized programs.
    """
    if any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu"))):
        return ""
    major, minor = map(int, importlib.metadata.version("jaxlib").split(".")[:2])
    emitters = " --xla_cpu_use_fusion_emitters=false" if (major, minor) < (0, 11) else ""
    return f"--xla_backend_optimization_level=0{emitters}"


os.environ.setdefault("XLA_FLAGS", _quick_to_compile())

STRICT = {
    "enable_x64": True,
    "numpy_rank_promotion": "raise",
    "numpy_dtype_promotion": "strict",
    "debug_key_reuse": True,
}
for _name, _value in STRICT.items():
    jax.config.update(f"jax_{_name}", _value)

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(params=[1, 2, 3], ids="seed{}".format)
def key(request: pytest.FixtureRequest) -> jax.Array:
    return jax.random.key(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with lossless benchmark images, outside the repository; tests skip without it."""
    folder = Path(os.environ.get("JGIA_TEST_DATA", _SHARED_DATA))
    if not folder.is_dir():
        pytest.skip(f"no benchmark images at {folder}; set JGIA_TEST_DATA to run this test")
    return folder
