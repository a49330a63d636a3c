"""The benchmark runs at smoke size and says what it did not time."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soft_threshold.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_soft_threshold", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_run(benchmark, tmp_path, capsys):
    out = tmp_path / "results" / "cpu.json"
    benchmark.main(["--smoke", "--repeats", "5", "--out", str(out)])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    reason = benchmark.pallas_reason(jax.devices()[0])
    assert report["pallas_timed"] is (reason is None)
    assert ("The Pallas kernel was NOT timed" in printed) is (reason is not None)
    assert {"device", "jax", "jaxlib", "python", "commit"} <= report["environment"].keys()
    for result in report["results"]:
        assert ("pallas_over_xla" in result) is (reason is None)
        row = result["implementations"]["xla"]
        assert len(row["samples_s"]) == 5
        assert row["q25_s"] <= row["median_s"] <= row["q75_s"]
        assert row["median_s"] == np.median(row["samples_s"])
        assert 0 < row["max_error_over_eps"] <= 0.5  # one rounding


def test_too_few_repeats_are_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--smoke", "--repeats", "4"])
    assert "at least 5" in capsys.readouterr().err


class _Device:
    def __init__(self, platform, version="", **attributes):
        self.platform = platform
        self.client = type("Client", (), {"platform_version": version})()
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("device", "timed"),
    [
        (_Device("cpu"), False),
        (_Device("tpu"), True),
        (_Device("gpu", "cuda 12", compute_capability="9.0"), True),
        (_Device("gpu", "cuda 12", compute_capability="10.0"), True),
        (_Device("gpu", "cuda 12", compute_capability="8.6"), False),
        (_Device("gpu", "rocm 6", compute_capability="gfx942"), False),
    ],
)
def test_devices_on_which_the_kernel_is_timed(benchmark, device, timed):
    assert (benchmark.pallas_reason(device) is None) is timed
