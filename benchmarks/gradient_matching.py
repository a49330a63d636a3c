"""Gradient matching against breaching: same curve, steps a second, restarts, quality, scaling.

    python benchmarks/gradient_matching.py --peer-python PYTHON --data npz:PATH --out FOLDER
    python benchmarks/gradient_matching.py --smoke

``--peer-python`` is an interpreter with breaching 0.1.2; without it only our rows are measured.
Both sides run in processes of their own on the same files and take turns, so that what else the
machine does meets both; the best of the repeats counts, and processor time is kept beside it. A
time is that of a whole call: start, loop, best point, result. Compilation is apart.

Each section writes ``gradient_matching_SECTION.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from gradient_matching_workers import Turn, Worker, rounds

TV = 0.2
"""breaching's weight of total variation."""

COMPARED = 50
"""Steps over which the loss curves have to agree."""

COMPILE_LIMIT_S = 120.0


class Setup(NamedTuple):
    """What the command line says."""

    data: str
    peer: str | None
    smoke: bool
    repeats: int
    images: int
    steps: int
    trained: dict[str, Path]
    only: tuple[str, ...]
    peer_images: int
    out: Path | None
    folder: Path

    def ours(self, *, threads: int = 2, dtype: str = "float32") -> Worker:
        """A process of ours; threads=0 for all of the machine and its device."""
        extra = {"JAX_ENABLE_X64": "1"} if dtype == "float64" else {}
        if self.smoke:  # where times mean nothing, compile once for all processes
            extra |= {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache")}
            extra |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return Worker("ours", threads=threads, environment=extra)

    def write(self, section: str, content: dict[str, Any]) -> None:
        """Put a section's results into the output folder, with what they were measured on."""
        assert self.out is not None
        extra = {"data": Path(self.data).name, "total_variation": TV, "smoke": self.smoke}
        extra |= {"machine": content.get("machine") or harness.machine()}
        harness.write_json(self.out / f"gradient_matching_{section}.json", content | extra)

    def breaching(self, *, threads: int) -> Worker:
        """A process of the peer's."""
        assert self.peer is not None
        return Worker("peer", self.peer, threads=threads)


class Speed(NamedTuple):
    """One row: model, batch, steps of a timed call, and the ratio that is the goal."""

    model: str
    batch: int
    steps: int
    goal: float


SPEEDS = (
    Speed("lenet", 1, 1000, 5.0),
    Speed("lenet", 8, 500, 5.0),
    Speed("cnn6", 1, 1000, 5.0),
    Speed("convnet64", 1, 60, 1.5),
    Speed("resnet18", 1, 40, 1.5),
)


# ---- 1: the same mathematics


def maths(setup: Setup) -> dict[str, Any]:
    """Loss curves of both from the same weights, update and start, in both precisions."""
    plans = [("lenet", 120), ("cnn6", 120), ("convnet64", 60), ("resnet18", 60)]
    if setup.smoke:
        plans = [("lenet", 6)]
    rows = []
    for model, steps in plans:
        found: dict[str, dict[str, Any]] = {}
        for dtype in ("float32",) if setup.smoke else ("float64", "float32"):
            found[dtype] = _curves(setup, model, steps, dtype)
        rows.append(_compared(model, steps, found))
        print(_curve_line(rows[-1]), flush=True)
    return {"rows": rows, "compared_steps": COMPARED, "goal_relative_difference": 1e-3}


def _curves(setup: Setup, model: str, steps: int, dtype: str) -> dict[str, Any]:
    """Losses of both, by name."""
    path = setup.folder / "case.npz"
    load = {"do": "load", "model": model, "batch": 1, "data": setup.data, "dtype": dtype}
    with setup.ours(dtype=dtype) as ours:
        ours.ask(**load, path=str(path))
        reply = ours.ask(do="curve", steps=steps, total_variation=TV)
    found: dict[str, Any] = {"ours": reply["losses"]}
    if setup.peer is not None:
        with setup.breaching(threads=1) as peer:
            found["gradient_error"] = peer.ask(do="load", path=str(path), dtype=dtype)[
                "gradient_error"
            ]
            found["peer"] = peer.ask(
                do="attack", steps=steps, total_variation=TV, losses=True, from_file=True
            )["losses"]
    return found


def _compared(model: str, steps: int, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Largest relative differences over the steps compared, and until when float32 agrees."""

    def away(one: tuple[str, str], other: tuple[str, str]) -> np.ndarray | None:
        curves = [found.get(dtype, {}).get(side) for side, dtype in (one, other)]
        if curves[0] is None or curves[1] is None:
            return None
        a, b = (np.asarray(curve)[:COMPARED] for curve in curves)
        return np.abs(a - b) / np.abs(b)

    pairs = {
        "float64": (("ours", "float64"), ("peer", "float64")),
        "float32": (("ours", "float32"), ("peer", "float32")),
        "ours_float32_to_float64": (("ours", "float32"), ("ours", "float64")),
        "peer_float32_to_float64": (("peer", "float32"), ("peer", "float64")),
    }
    differences = {name: away(*pair) for name, pair in pairs.items()}
    row: dict[str, Any] = {"model": model, "steps": steps, "curves": found}
    row["largest_difference"] = {
        name: None if value is None else float(value.max()) for name, value in differences.items()
    }
    row["steps_within_goal"] = {
        name: None if value is None else int(np.argmax(np.append(value > 1e-3, True)))
        for name, value in differences.items()
    }
    return row


def _curve_line(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {value:.1e} ({row['steps_within_goal'][name]} steps within 1e-3)"
        for name, value in row["largest_difference"].items()
        if value is not None
    ]
    return f"{row['model']:10s} " + ", ".join(parts)


# ---- 2: speed, and restarts


def speed(setup: Setup) -> dict[str, Any]:
    """Iterations a second of whole calls, both sides at their best threads."""
    specs = [Speed("lenet", 1, 5, 5.0)] if setup.smoke else list(SPEEDS)
    specs = [spec for spec in specs if not setup.only or spec.model in setup.only]
    rows = []
    for spec in specs:
        with _contenders(setup, spec) as turns:
            found = rounds(turns, repeats=setup.repeats)
        for name, row in found.items():
            rows.append({"model": spec.model, "batch": spec.batch, "contender": name} | row)
            if "best_s" in row:
                rows[-1] |= _rates(row, spec.steps)
            print(_speed_line(rows[-1]), flush=True)
    return {"rows": rows, "ratios": _ratios(rows), "goals": [list(spec) for spec in specs]}


def _rates(row: dict[str, Any], count: int) -> dict[str, Any]:
    """Iterations a second, and processor milliseconds for each."""
    return {
        "steps": count,
        "iterations_per_s": count / row["best_s"],
        "median_iterations_per_s": count / row["median_s"],
        "cpu_ms_per_iteration": 1e3 * row["cpu_best_s"] / count,
        "compile_s": max(0.0, row["first_s"] - row["best_s"]),
    }


@contextlib.contextmanager
def _contenders(setup: Setup, spec: Speed) -> Iterator[list[Turn]]:
    """Loaded processes: ours and the peer's with one and two threads, and the peer compiled."""
    path = setup.folder / "case.npz"
    load = {"do": "load", "model": spec.model, "batch": spec.batch, "data": setup.data}
    command = {"do": "attack", "steps": spec.steps, "total_variation": TV}
    with contextlib.ExitStack() as stack:
        turns = []
        for threads in (2,) if setup.smoke else (2, 1):
            worker = stack.enter_context(setup.ours(threads=threads))
            worker.ask(**load, path=str(path))
            turns.append(Turn(f"jgia, {_threads(threads)}", worker, command))
        if setup.peer is not None:
            modes = ((1, None), (2, None), (1, "trace"), (1, "compile"))
            for threads, mode in modes:
                worker = stack.enter_context(setup.breaching(threads=threads))
                worker.ask(do="load", path=str(path), mode=mode)
                name = f"breaching{' ' + mode if mode else ''}, {_threads(threads)}"
                limit = COMPILE_LIMIT_S if mode == "compile" else 900.0
                turns.append(Turn(name, worker, command, limit))
        yield turns


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _speed_line(row: dict[str, Any]) -> str:
    title = f"{row['model']:10s} B={row['batch']} K={row.get('restarts', 1)} {row['contender']:30s}"
    if "failed" in row:
        return f"{title} failed: {row['failed']}"
    return (
        f"{title} {row['iterations_per_s']:8.1f} it/s (median "
        f"{row['median_iterations_per_s']:.1f}), {row['cpu_ms_per_iteration']:.2f} CPU ms/it, "
        f"compile {row['compile_s']:.1f} s"
    )


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours to the peer's, each at its best: by the clock, and by processor time."""
    out: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys((r["model"], r["batch"], r.get("restarts", 1)) for r in rows):
        mine: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in rows:
            here = (row["model"], row["batch"], row.get("restarts", 1)) == case
            if here and "iterations_per_s" in row:
                mine[row["contender"].startswith("jgia")].append(row)
        if mine[True] and mine[False]:
            best = {us: max(r["iterations_per_s"] for r in found) for us, found in mine.items()}
            cpu = {us: min(r["cpu_ms_per_iteration"] for r in found) for us, found in mine.items()}
            name = f"{case[0]} B={case[1]} K={case[2]}"
            out[name] = {
                "iterations_per_s": best[True] / best[False],
                "cpu": cpu[False] / cpu[True],
            }
            print(f"{name}: {out[name]['iterations_per_s']:.2f} x, {out[name]['cpu']:.2f} x by CPU")
    return out


def restarts(setup: Setup) -> dict[str, Any]:
    """Restarts times iterations a second: ours one by one and all at once, breaching's loop."""
    counts, steps = ((2,), 5) if setup.smoke else ((1, 4, 8), 300)
    path, rows = setup.folder / "case.npz", []
    model = "lenet" if setup.smoke else "cnn6"
    load = {"do": "load", "model": model, "batch": 1, "data": setup.data}
    for count in counts:
        command = {"do": "attack", "steps": steps, "total_variation": TV, "restarts": count}
        with contextlib.ExitStack() as stack:
            turns = []
            for threads in (2,) if setup.smoke else (2, 1):
                worker = stack.enter_context(setup.ours(threads=threads))
                worker.ask(**load, path=str(path))
                for size in dict.fromkeys((1, count)):
                    name = f"jgia, microbatch {size}, {_threads(threads)}"
                    turns.append(Turn(name, worker, command | {"microbatch": size}))
            for threads in (1, 2) if setup.peer is not None else ():
                worker = stack.enter_context(setup.breaching(threads=threads))
                worker.ask(do="load", path=str(path))
                turns.append(Turn(f"breaching, {_threads(threads)}", worker, command))
            found = rounds(turns, repeats=setup.repeats)
        for name, row in found.items():
            rows.append({"model": model, "batch": 1, "restarts": count, "contender": name} | row)
            if "best_s" in row:
                rows[-1] |= _rates(row, steps * count)
            print(_speed_line(rows[-1]), flush=True)
    return {"rows": rows, "ratios": _ratios(rows), "goal": 2.0}


# ---- all of them


def main() -> None:
    """Run the sections and write one file for each."""
    from gradient_matching_figures import draw
    from gradient_matching_quality import quality
    from gradient_matching_scaling import device, scaling

    sections = {
        "maths": maths,
        "speed": speed,
        "restarts": restarts,
        "quality": quality,
        "scaling": scaling,
        "device": device,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--data", default="sample", help="images, as for jgia: npz:PATH")
    parser.add_argument("--peer-python", default=None, help="interpreter that has breaching")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON files")
    parser.add_argument("--sections", nargs="*", choices=list(sections), default=None)
    parser.add_argument("--device", action="store_true", help="only the section for a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--images", type=int, default=8, help="per model and batch (quality)")
    parser.add_argument("--steps", type=int, default=600, help="of each search (quality)")
    parser.add_argument(
        "--trained", nargs="*", default=[], metavar="NAME=FOLDER", help="victims (quality)"
    )
    parser.add_argument(
        "--peer-images", type=int, default=10, help="of them, that the peer attacks too (quality)"
    )
    parser.add_argument("--models", nargs="*", default=[], help="only these (speed, quality)")
    given = parser.parse_args()
    chosen = given.sections or [name for name in sections if given.smoke or name != "device"]
    chosen = ["device"] if given.device else chosen
    trained = {name: Path(folder) for name, _, folder in (t.partition("=") for t in given.trained)}
    with tempfile.TemporaryDirectory() as folder:
        repeats = 1 if given.smoke else given.repeats
        setup = Setup(
            given.data,
            given.peer_python,
            given.smoke,
            repeats,
            given.images,
            given.steps,
            trained,
            tuple(given.models),
            given.peer_images,
            given.out,
            Path(folder),
        )
        for name in chosen:
            print(f"# {name}", flush=True)
            before, begin = harness.machine(), time.perf_counter()
            content = sections[name](setup)
            content |= {
                "machine": before,
                "load_average_after": harness.machine()["load_average"],
                "seconds_in_all": time.perf_counter() - begin,
            }
            if given.out is not None:
                setup.write(name, content)
    if given.out is not None and not given.smoke:
        draw(given.out)


if __name__ == "__main__":
    main()
