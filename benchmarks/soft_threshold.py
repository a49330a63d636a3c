"""Soft-thresholding: the Pallas kernel against XLA, time beside error against float64.

Run ``python benchmarks/soft_threshold.py`` (``--smoke`` for small shapes, ``--out FILE`` for
JSON). Compilation, the transfer of operands and a warm-up call are outside the timed region;
samples of the implementations alternate; the figure is the median over samples, with the
quartiles. On a machine without an accelerator that the kernels support, only XLA is timed, and
the output says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jgia_kernels.soft_threshold import soft_threshold
from jgia_kernels.soft_threshold.specs import BENCHMARK_SPECS, SMOKE_SPECS, Spec

MIN_REPEATS = 5


def pallas_reason(device: Any) -> str | None:
    """Say why the Pallas kernel cannot be timed on ``device``, or None if it can."""
    if device.platform == "tpu":
        return None
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or "rocm" in str(device.client.platform_version).lower():
        return f"no CUDA or TPU device (JAX runs on {device.platform})"
    if capability is None or float(capability) < 9.0:
        return f"compute capability {capability}, the kernel needs 9.0 or later"
    return None


def operands(spec: Spec, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw float32 operands of ``spec`` on the host."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(spec.x, np.float32)
    return x, np.abs(rng.standard_normal(spec.lam)).astype(np.float32)


def oracle(x: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """Compute the formula in float64 with NumPy."""
    wide, lam = x.astype(np.float64), lam.astype(np.float64)
    return np.sign(wide) * np.maximum(np.abs(wide) - lam, 0.0)


def sample(fn: Callable[..., jax.Array], args: Sequence[jax.Array], calls: int) -> float:
    """Seconds per call over one sample of ``calls`` calls."""
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = fn(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def measure(spec: Spec, names: Sequence[str], *, repeats: int, seconds: float) -> dict[str, Any]:
    """Time every implementation on ``spec``; samples last about ``seconds`` each."""
    x, lam = operands(spec)
    args = jax.device_put((x, lam))
    expected = oracle(x, lam)
    compiled, rows = {}, {}
    for name in names:
        start = time.perf_counter()
        fn = jax.jit(functools.partial(soft_threshold, implementation=name)).lower(*args).compile()
        compile_seconds = time.perf_counter() - start
        error = np.abs(np.asarray(fn(*args), np.float64) - expected)  # warm-up too
        calls = max(1, int(seconds / max(sample(fn, args, 1), 1e-6)))
        compiled[name] = fn, calls
        rows[name] = {
            "compile_s": compile_seconds,
            "calls_per_sample": calls,
            "max_abs_error_vs_float64": float(error.max()),
            "max_error_over_eps": float(
                (error / np.maximum(np.abs(expected), np.finfo(np.float32).tiny)).max()
                / np.finfo(np.float32).eps
            ),
            "samples_s": [],
        }
    for _ in range(repeats):
        for name, (fn, calls) in compiled.items():
            rows[name]["samples_s"].append(sample(fn, args, calls))
    for row in rows.values():
        row["q25_s"], row["median_s"], row["q75_s"] = (
            float(q) for q in np.quantile(row["samples_s"], [0.25, 0.5, 0.75])
        )
        # Bytes that any implementation must move: the operands in, the result out.
        row["gb_per_s"] = (2 * x.nbytes + lam.nbytes) / row["median_s"] / 1e9
    result = {"name": spec.name, "x": spec.x, "lam": spec.lam, "implementations": rows}
    if "pallas" in rows:
        result["pallas_over_xla"] = rows["pallas"]["median_s"] / rows["xla"]["median_s"]
    return result


def environment(device: Any) -> dict[str, Any]:
    """Describe device and versions for the result file."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "x64": jnp.zeros(()).dtype == jnp.float64,
    }


def show(result: dict[str, Any]) -> None:
    """Print one line per implementation, and the ratio."""
    for name, row in result["implementations"].items():
        print(
            f"{result['name']:<18} {name:<7} {row['median_s'] * 1e6:11.1f} us"
            f"  [{row['q25_s'] * 1e6:.1f}, {row['q75_s'] * 1e6:.1f}]"
            f" {row['gb_per_s']:9.1f} GB/s  error {row['max_error_over_eps']:.2f} eps"
            f"  compile {row['compile_s']:.2f} s"
        )
    if "pallas_over_xla" in result:
        print(f"{result['name']:<18} pallas / xla = {result['pallas_over_xla']:.3f} (below 1 wins)")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small shapes, seconds on any machine")
    parser.add_argument("--repeats", type=int, default=9, help=f"samples, at least {MIN_REPEATS}")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(argv)
    if options.repeats < MIN_REPEATS:
        parser.error(f"--repeats must be at least {MIN_REPEATS}, got {options.repeats}")

    device = jax.devices()[0]
    reason = pallas_reason(device)
    names = ("xla",) if reason else ("xla", "pallas")
    specs = SMOKE_SPECS if options.smoke else BENCHMARK_SPECS
    report: dict[str, Any] = {
        "benchmark": "soft_threshold",
        "smoke": options.smoke,
        "environment": environment(device),
        "pallas_timed": reason is None,
        "pallas_not_timed_because": reason,
        "results": [],
    }
    print(f"{device.device_kind}, JAX {jax.__version__}, median [quartiles] of {options.repeats}")
    for spec in specs:
        report["results"].append(
            measure(spec, names, repeats=options.repeats, seconds=0.002 if options.smoke else 0.05)
        )
        show(report["results"][-1])
    if reason:
        print(f"The Pallas kernel was NOT timed: {reason}. The numbers above are XLA alone.")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
