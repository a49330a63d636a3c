"""How fast a step of GIFD is beside PyTorch, what company costs, and the section for a GPU."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from gradient_matching_workers import Turn, Worker, rounds

if TYPE_CHECKING:
    from gifd import Setup

AGREEMENT = 1e-4
_CHECKED = 4  # steps of every stage over which losses have to agree: later, rounding grows
_COMPILE_LIMIT_S = 1800.0
_BUDGET = 300  # steps of a search in victims an hour


def speed(setup: Setup) -> dict[str, Any]:
    """The same losses first; then milliseconds a step, victims an hour, the derivative's rule."""
    found = {
        "prior": _prior(setup),
        "victim": _victim(setup),
        "agreement": {} if setup.smoke and setup.peer is None else _agreement(setup),
        "agreement_wanted": AGREEMENT,
    }
    found |= _paces(setup)
    found["clients"] = [] if setup.smoke else _clients(setup)
    found["memory"] = [] if setup.smoke else _memory(setup)
    found["rule"] = [] if setup.smoke else _rules(setup)
    return found


def _prior(setup: Setup) -> str:
    return "untrained8" if setup.smoke else "untrained"


def _victim(setup: Setup) -> str:
    return "tiny" if setup.smoke else "small"


def _ours(setup: Setup, *, threads: int = 2, dtype: str = "float32") -> Worker:
    extra = {"JAX_ENABLE_X64": "1"} if dtype == "float64" else {}
    # Where times mean nothing, compile once for all processes.
    if setup.smoke and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        extra |= {"JAX_COMPILATION_CACHE_DIR": str(setup.folder / "cache")}
        extra |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return Worker("ours", threads=threads, environment=extra, benchmark="gifd")


def _peer(setup: Setup, threads: int) -> Worker:
    assert setup.peer is not None
    return Worker("peer", setup.peer, threads=threads, benchmark="gifd")


def _load(setup: Setup, steps: int, victim: str | None = None, **more: Any) -> dict[str, Any]:
    data = "sample" if setup.smoke else setup.data
    return {
        "do": "load",
        "prior": _prior(setup),
        "victim": victim or _victim(setup),
        "data": data,
        "steps": steps,
    } | more


# ---- the same mathematics


def _agreement(setup: Setup) -> dict[str, Any]:
    """Largest relative difference of the losses of all steps, stage by stage and precision."""
    found: dict[str, Any] = {}
    steps = 2 if setup.smoke else _CHECKED
    path = str(setup.folder / "case.npz")
    for dtype in ("float32",) if setup.smoke else ("float64", "float32"):
        with _ours(setup, dtype=dtype) as worker:
            worker.ask(**_load(setup, steps, path=path, dtype=dtype))
            ours = worker.ask(do="search", steps=steps, losses=True)["losses"]
        found[f"losses_{dtype}"] = {"jgia": ours}
        if setup.peer is None:
            continue
        for mode in ("eager", "compile") if dtype == "float32" else ("eager",):
            with _peer(setup, 2) as worker:
                loaded = worker.ask(do="load", path=path, dtype=dtype, mode=mode)
                theirs = worker.ask(_COMPILE_LIMIT_S, do="search", losses=True)["losses"]
            found["peer_versions"] = loaded["versions"]
            found[f"losses_{dtype}"][mode] = theirs
            a, b = (np.asarray(v, float).reshape(-1, steps) for v in (ours, theirs))
            away = np.abs(a - b) / np.abs(b)
            name = f"{mode}, {dtype}"
            found.setdefault("largest_difference_by_stage", {})[name] = away.max(axis=1).tolist()
            found.setdefault("first_step", {})[name] = float(away[0, 0])
            print(f"losses against torch {name}: largest difference {away.max():.1e}", flush=True)
    if setup.peer is not None:
        worst = max(found["largest_difference_by_stage"].get("eager, float64", [0.0]))
        found["agrees"] = bool(worst <= AGREEMENT)
        if not found["agrees"]:
            raise SystemExit(f"the peer computes something else (losses differ by {worst:.1e}).")
    return found


# ---- milliseconds a step


def _paces(setup: Setup) -> dict[str, Any]:
    """Milliseconds a step and restart of whole searches, and ours to the peer's at their best."""
    steps = 2 if setup.smoke else 40
    path = str(setup.folder / "case.npz")
    with contextlib.ExitStack() as stack:
        turns, stages = [], 0
        for threads in (2,) if setup.smoke else (2, 1):
            worker = stack.enter_context(_ours(setup, threads=threads))
            stages = worker.ask(**_load(setup, steps, path=path))["stages"]
            words = f"{threads} thread{'s' if threads > 1 else ''}"
            command: dict[str, Any] = {"do": "search", "steps": steps}
            turns.append(Turn(f"jgia, {words}", worker, command))
            for size in () if setup.smoke else (1, 4):
                name = f"jgia 4 restarts, {size} at once, {words}"
                turns.append(Turn(name, worker, command | {"restarts": 4, "microbatch": size}))
            for mode in ("eager", "compile") if setup.peer is not None else ():
                worker = stack.enter_context(_peer(setup, threads))
                worker.ask(do="load", path=path, mode=mode)
                turns.append(Turn(f"torch {mode}, {words}", worker, command, _COMPILE_LIMIT_S))
        rows = []
        for name, row in rounds(turns, repeats=setup.repeats).items():
            restarts = 4 if "4 restarts" in name else 1
            rows.append({"contender": name, "restarts": restarts} | row)
            if "best_s" in row:
                rows[-1] |= _pace(row, steps * stages * restarts)
            print(_line(rows[-1]), flush=True)
    return {"rows": rows, "stages": stages, "steps": steps, "ratios": _ratios(rows)}


def _pace(row: dict[str, Any], count: int) -> dict[str, float]:
    """Milliseconds for each of so many steps."""
    return {
        "ms_per_step": 1e3 * row["best_s"] / count,
        "median_ms_per_step": 1e3 * row["median_s"] / count,
        "cpu_ms_per_step": 1e3 * row["cpu_best_s"] / count,
        "compile_s": max(0.0, row["first_s"] - row["best_s"]),
    }


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['contender']:40s} failed: {row['failed']}"
    return (
        f"{row['contender']:40s} {row['ms_per_step']:7.2f} ms a step (median "
        f"{row['median_ms_per_step']:.2f}), {row['cpu_ms_per_step']:.2f} CPU ms, compile "
        f"{row['compile_s']:.1f} s"
    )


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """PyTorch's time over ours for one restart, each at its best: by the clock and by processor."""
    measured = [row for row in rows if "ms_per_step" in row and row["restarts"] == 1]
    found: dict[str, dict[str, float]] = {}
    for peer in ("torch eager", "torch compile", "torch"):
        sides = [[r for r in measured if r["contender"].startswith(n)] for n in (peer, "jgia")]
        if all(sides):
            found[peer] = {}
            for key in ("ms_per_step", "cpu_ms_per_step"):
                theirs, ours = (min(row[key] for row in side) for side in sides)
                found[peer][key] = theirs / ours
            print(f"{peer}: {found[peer]['ms_per_step']:.2f} x our time a step", flush=True)
    return found


# ---- company, memory, the derivative's rule


def _clients(setup: Setup) -> list[dict[str, Any]]:
    """Clients attacked together: milliseconds a step and client, clients an hour."""
    counts, steps, rows = (1, 4, 8), 40, []
    with _ours(setup) as worker:
        stages = worker.ask(**_load(setup, steps))["stages"]
        turns = [
            Turn(
                f"{count} together",
                worker,
                {"do": "search", "steps": steps, "clients": count, "microbatch": count},
            )
            for count in counts
        ]
        found = rounds(turns, repeats=setup.repeats)
    for count, (name, row) in zip(counts, found.items(), strict=True):
        rows.append({"contender": name, "clients": count} | row)
        if "best_s" not in row:
            continue
        rows[-1] |= _pace(row, steps * stages * count)
        rows[-1]["clients_per_hour"] = 3.6e6 / rows[-1]["ms_per_step"] / _BUDGET
        print(
            _line(rows[-1]) + f", {rows[-1]['clients_per_hour']:.0f} clients an hour of "
            f"{_BUDGET} steps",
            flush=True,
        )
    return rows


def _memory(setup: Setup) -> list[dict[str, Any]]:
    """Peak memory of a process with and without a search."""
    path, rows = str(setup.folder / "case.npz"), []
    plans: list[tuple[str, bool, dict[str, Any]]] = [
        ("jgia", True, {}),
        ("jgia, 4 restarts at once", True, {"restarts": 4, "microbatch": 4}),
    ]
    if setup.peer is not None:
        plans += [("torch eager", False, {}), ("torch compile", False, {"mode": "compile"})]
    for name, own, more in plans:
        with _ours(setup) if own else _peer(setup, 2) as worker:
            load: dict[str, Any] = {"do": "load", "path": path}
            load = _load(setup, 10, path=path) if own else load
            load |= {} if own else more
            before = worker.ask(**load)["peak_mb"]
            command: dict[str, Any] = {"do": "search", "steps": 10} | (more if own else {})
            after = worker.ask(_COMPILE_LIMIT_S, **command)["peak_mb"]
        rows.append({"contender": name, "loaded_mb": before, "peak_mb": after})
        print(f"{name}: peak {after:.0f} MiB ({before:.0f} before)", flush=True)
    return rows


def _rules(setup: Setup) -> list[dict[str, Any]]:
    """The distance and its derivative in an image: a jvp, then a vjp; or reverse over reverse."""
    rows = []
    for victim, calls in (("small", 200), ("resnet18", 10)):
        with _ours(setup) as worker:
            worker.ask(**_load(setup, 1, victim))
            command = {"do": "rule", "calls": calls}
            for which in ("jvp", "reverse"):
                replies = [worker.ask(**command, which=which) for _ in range(setup.repeats)]
                best = min(replies, key=lambda reply: reply["seconds"])
                rows.append(
                    {
                        "victim": victim,
                        "rule": which,
                        "ms": 1e3 * best["seconds"] / calls,
                        "cpu_ms": 1e3 * min(r["cpu_s"] for r in replies) / calls,
                        "value": best["value"],
                        "slope_norm": best["slope_norm"],
                        "temporary_mb": best["temporary_mb"],
                    }
                )
                print(f"{victim}, {which}: {rows[-1]['ms']:.2f} ms", flush=True)
    return rows


# ---- a GPU


def device(setup: Setup) -> dict[str, Any]:
    """Many clients with four restarts each, and training, on whatever device there is."""
    count, restarts, steps = (1, 1, 2) if setup.smoke else (256, 4, 75)
    with _ours(setup, threads=0) as worker:
        stages = worker.ask(**_load(setup, steps))["stages"]
        command = {"do": "search", "steps": steps, "clients": count, "restarts": restarts}
        first = worker.ask(**command)
        best = min(worker.ask(**command)["seconds"] for _ in range(setup.repeats))
    many = {
        "clients": count,
        "restarts": restarts,
        "steps": steps * stages,
        "seconds": best,
        "compile_s": first["seconds"] - best,
        "clients_per_hour": 3600 * count / best,
        "peak_mb_of_the_host": first["peak_mb"],
    }
    print(f"{count} clients x {restarts} restarts: {many['clients_per_hour']:.0f} clients an hour")
    return {"many_clients": many, "training": _training(setup)}


def _training(setup: Setup) -> list[dict[str, Any]]:
    """Images a second of a prior's training, the penalty included in its share of steps."""
    plans = (("tiny32", 4),) if setup.smoke else (("tiny32", 256), ("mid32", 256))
    rows = []
    for size, batch in plans:
        rate = _images_per_second(setup, size, batch)
        rows.append({"size": size, "batch": batch, "images_per_s": rate})
        print(f"training {size}: {rate:.0f} images a second", flush=True)
    return rows


def _images_per_second(setup: Setup, size: Any, batch: int) -> float:
    from jgia.config.prior import PriorOptions
    from jgia.generators.steps import make_networks, train_step

    side = 8 if setup.smoke else 32
    small: dict[str, Any] = {}
    if setup.smoke:
        small = {"resolution": 8, "base": 64, "max_features": 8}
    options = PriorOptions(size=size, prior_batch=batch, **small)
    accelerated = jax.default_backend() != "cpu"
    networks = make_networks(options, channels=3, num_classes=0, accelerated=accelerated)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    state = jax.jit(networks.init)(key)
    images = jax.device_put(rng.integers(0, 256, (1024, side, side, 3), np.uint8))
    labels = jax.device_put(np.zeros(1024, np.int32))
    step = functools.partial(train_step, networks, mesh=None, path_length=False)
    if setup.smoke:  # traced only: it takes long to compile
        jax.eval_shape(functools.partial(step, r1=True), state, images, labels, key)
        return 0.0
    steps = options.r1_every

    def stretch(state: Any) -> Any:
        for i in range(steps):
            state, _ = step(state, images, labels, key, r1=i == 0)
        return jax.block_until_ready(state)

    state, times = stretch(state), []
    for _ in range(setup.repeats):
        begin = time.perf_counter()
        state = stretch(state)
        times.append(time.perf_counter() - begin)
    return steps * batch / min(times)
