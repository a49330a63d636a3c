"""What a spectrum costs: a LeNet's gradient at 32x32x3, exactly and its leading values.

The peer forms the Jacobian by ``torch.func`` and takes its singular values; ours is
``jgia.risk.spectrum`` by the routes that fit, and ``top_spectrum``. Every contender runs in a
process of its own, with one and with two threads (one thread = one core), the best of both counts,
and singular values have to agree. Whole calls after one that compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROUTES = ("rows", "gram", "qr", "krylov")
REPEATS = 3


def main() -> None:
    """Run every contender and print a ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, default=None, help="interpreter with torch")
    parser.add_argument("--smoke", action="store_true", help="8x8 pixels, once")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _worker(*arguments.worker)
        return
    from harness import machine, write_json

    rows: list[dict[str, Any]] = []
    counts = (2,) if arguments.smoke else (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.npz"
        _write_case(path, side=8 if arguments.smoke else 32)
        for route in ROUTES:
            for threads in counts:
                command = [sys.executable, __file__, "--worker", str(path), route]
                rows.append({"name": route, "threads": threads, **_run(command, threads)})
                _show(rows[-1])
        if arguments.peer_python is not None:
            peer = Path(__file__).with_name("risk_cost_peer.py")
            for mode in ("jacfwd", "jacrev"):
                for threads in counts:
                    command = [str(arguments.peer_python), str(peer), str(path), mode, str(threads)]
                    rows.append({"name": mode, "threads": threads, **_run(command, threads)})
                    _show(rows[-1])
    summary = _summary(rows)
    print(json.dumps(summary, indent=2))
    if arguments.out is not None:
        for row in rows:
            row["sigma"] = row["sigma"][:5]
        content = {"machine": machine(), "rows": rows, "summary": summary}
        write_json(arguments.out, content | {"smoke": arguments.smoke})


def _write_case(path: Path, *, side: int) -> None:
    import jax

    from jgia.models import make_victim

    victim = make_victim("lenet", input_shape=(side, side, 3), num_classes=10)
    params = jax.tree.map(np.asarray, victim.init(jax.random.key(0)))
    x = np.random.default_rng(0).uniform(size=(side, side, 3)).astype("float32")
    arrays: dict[str, Any] = {"x": x.transpose(2, 0, 1).copy(), "y": np.array([3])}
    for i in (1, 2, 3):
        arrays[f"w{i}"] = params[f"conv{i}"]["kernel"].transpose(3, 2, 0, 1).copy()
        arrays[f"b{i}"] = params[f"conv{i}"]["bias"]
    arrays["w4"], arrays["b4"] = params["head"]["kernel"], params["head"]["bias"]
    np.savez(path, **arrays)


def _run(command: list[str], threads: int) -> dict[str, Any]:
    cores = set(sorted(os.sched_getaffinity(0))[:threads])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout.splitlines()[-1])


def _worker(path: str, route: str) -> None:
    import jax
    import jax.numpy as jnp

    from jgia.models import make_victim
    from jgia.risk import UpdateRelease, sizes, spectrum, top_spectrum

    with np.load(path) as arrays:
        x = jnp.asarray(arrays["x"].transpose(1, 2, 0))
        params = {
            f"conv{i}": {
                "kernel": jnp.asarray(arrays[f"w{i}"].transpose(2, 3, 1, 0)),
                "bias": jnp.asarray(arrays[f"b{i}"]),
            }
            for i in (1, 2, 3)
        }
        params["head"] = {"kernel": jnp.asarray(arrays["w4"]), "bias": jnp.asarray(arrays["b4"])}
        label = jnp.asarray(arrays["y"][0])
    height, width, channels = x.shape
    victim = make_victim("lenet", input_shape=(height, width, channels), num_classes=10)
    release = UpdateRelease(victim=victim)
    assert sizes(lambda z: release(params, z, label), x).num_inputs == x.size

    @jax.jit
    def values(params: Any, x: Any) -> Any:
        def fn(z: Any) -> Any:
            return release(params, z, label)

        if route == "krylov":
            return top_spectrum(jax.random.key(0), fn, x, num_steps=30).sigma
        return spectrum(fn, x, route=route).sigma  # pyright: ignore[reportArgumentType]

    start = time.perf_counter()
    sigma = jax.block_until_ready(values(params, x))
    first = time.perf_counter() - start
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(values(params, x))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "seconds": float(np.median(times)),
        "first_seconds": first,
        "peak_bytes": peak,
        "sigma": np.asarray(sigma).tolist(),
    }
    print(json.dumps(result))


def _show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:7} {row['threads']} threads: {row['seconds']:8.3f} s, "
        f"{row['peak_bytes'] / 2**20:6.0f} MiB, largest {row['sigma'][0]:.5g}",
        flush=True,
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] not in best or row["seconds"] < best[row["name"]]["seconds"]:
            best[row["name"]] = row
    summary: dict[str, Any] = {name: row["seconds"] for name, row in best.items()}
    top = np.asarray(best["qr"]["sigma"][:5])
    summary["leading_values_relative_difference"] = {
        name: float(np.max(np.abs(np.asarray(row["sigma"][:5]) / top - 1)))
        for name, row in best.items()
    }
    peers = [best[name] for name in ("jacfwd", "jacrev") if name in best]
    if peers:
        peer = min(row["seconds"] for row in peers)
        exact = min(best[name]["seconds"] for name in ("rows", "gram", "qr"))
        least = min(best[name]["peak_bytes"] for name in ("rows", "gram", "qr"))
        summary["ratio_exact"] = peer / exact
        summary["ratio_leading"] = peer / best["krylov"]["seconds"]
        summary["ratio_peak_memory"] = min(row["peak_bytes"] for row in peers) / least
    return summary


if __name__ == "__main__":
    main()
