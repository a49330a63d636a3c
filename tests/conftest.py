"""Strict modes for every test: float64 on, no silent promotion, keys used once."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

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
