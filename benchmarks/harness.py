"""What every benchmark shares: repeats with spread, the machine in words, atomic JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jgia
from jgia._io import atomic_write_bytes


def machine() -> dict[str, Any]:
    """Device, processor, versions, commit: enough to place a number."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "jgia": jgia.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def repeat(function: Callable[[], Any], *, repeats: int = 5) -> dict[str, float]:
    """Seconds of a function that blocks until its result is ready: first call, then repeats."""
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    low, median, high = np.percentile(times, [25, 50, 75])
    return {
        "first_s": first,
        "median_s": float(median),
        "q25_s": float(low),
        "q75_s": float(high),
        "min_s": float(min(times)),
        "repeats": repeats,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file atomically, sorted, with a newline at its end."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())
    print(f"wrote {path}")


def psnr(mse: np.ndarray) -> np.ndarray:
    """Decibels of mean squared errors, exact hits at the 200 dB ceiling."""
    return -10 * np.log10(np.maximum(np.asarray(mse, np.float64), 1e-20))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
