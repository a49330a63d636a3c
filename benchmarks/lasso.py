"""Batched l1 recovery against scikit-learn, celer, skglm, jaxopt and cvxpy.

Every contender runs in its own process, with one and with two threads, and has to reach the same
relative sub-optimality, judged by one float64 NumPy referee against a reference whose own duality
gap NumPy confirms. Tolerances are scanned from loose to tight and the first that reaches it is
timed. Per-sample solvers are timed on as many right-hand sides as fit their share of the time,
and scaled; the rows say how many.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GOAL = 1e-6  # relative sub-optimality
PEERS = (
    "jgia-float32",
    "jgia-float64",
    "jaxopt-float32",
    "jaxopt-float64",
    "sklearn-float64",
    "sklearn-float32",
    "sklearn_gram-float64",
    "celer-float64",
    "celer-float32",
    "skglm-float64",
    "cvxpy-float64",
)
SECONDS_PER_ROW = 1.5


class Spec(NamedTuple):
    """One system: sizes, where the coefficients come from, l1 weight as a share of lam_max."""

    name: str
    rows: int
    columns: int
    batch: int
    kind: str
    ratio: float
    masked: bool

    @property
    def title(self) -> str:
        """Name and mask."""
        return f"{self.name}{'-masked' if self.masked else ''}"


class Problem(NamedTuple):
    """Float64 arrays: matrix, right-hand sides, masks and l1 weights."""

    a: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    lam: np.ndarray


def specs(smoke: bool, natural: bool) -> list[Spec]:
    """The systems of the benchmark, each with and without masks."""
    if smoke:
        base = [("sparse-64x128", 64, 128, 8, "sparse", 0.02)]
    else:
        base = [
            ("sparse-512x1024", 512, 1024, 32, "sparse", 0.02),
            ("natural-400x1024", 400, 1024, 64, "natural", 0.02),
            ("sparse-2048x3072", 2048, 3072, 32, "sparse", 0.02),
            ("sparse-2048x3072-wide", 2048, 3072, 256, "sparse", 0.02),
        ]
    kept = [entry for entry in base if natural or entry[4] != "natural"]
    return [Spec(*entry, masked) for entry in kept for masked in (False, True)]


def build(spec: Spec, data: Path | None) -> Problem:
    """The same arrays in every process."""
    rng = np.random.default_rng(spec.rows + spec.columns + spec.batch)
    a = rng.standard_normal((spec.rows, spec.columns)) / np.sqrt(spec.rows)
    if spec.kind == "sparse":
        c = np.zeros((spec.columns, spec.batch))
        for j in range(spec.batch):
            support = rng.choice(spec.columns, min(50, spec.columns // 8), replace=False)
            c[support, j] = rng.standard_normal(support.size)
        y = a @ c
        spread = np.linalg.norm(y, axis=0) / np.sqrt(spec.rows)
        y += 0.01 * spread * rng.standard_normal(y.shape)
    else:
        assert data is not None
        y = a @ _patches(data, spec.batch)
        a = a @ _block_dct(32, 8)
    # Half of the equations of every sample, as a rectified layer leaves them.
    mask = rng.random(y.shape) < 0.5 if spec.masked else np.ones(y.shape, bool)
    lam = spec.ratio * np.abs(a.T @ (mask * y)).max(axis=0)
    return Problem(a, y, mask, lam)


def _patches(data: Path, batch: int) -> np.ndarray:
    with np.load(data / "cifar10_test10k.npz") as file:
        images = file["images" if "images" in file.files else file.files[0]][:batch]
    gray = images.astype(np.float64) / 255 @ np.array([0.299, 0.587, 0.114])
    return gray.reshape(batch, -1).T


def _block_dct(side: int, block: int) -> np.ndarray:
    """Orthonormal synthesis matrix of gray images in blocks."""
    k = np.arange(block)
    rows = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / block) * np.sqrt(2 / block)
    rows[0] /= np.sqrt(2)
    line = np.kron(np.eye(side // block), rows)
    return np.kron(line, line).T


def objective(problem: Problem, c: np.ndarray) -> np.ndarray:
    """The referee's objective, float64, per sample of the leading right-hand sides."""
    num, c = c.shape[1], c.astype(np.float64)
    away = problem.mask[:, :num] * (problem.a @ c - problem.y[:, :num])
    return (away**2).sum(axis=0) / 2 + problem.lam[:num] * np.abs(c).sum(axis=0)


def relative_gap(problem: Problem, c: np.ndarray) -> float:
    """The referee's largest relative duality gap."""
    residual = problem.mask * (problem.y - problem.a @ c)
    scale = np.minimum(1, problem.lam / np.abs(problem.a.T @ residual).max(axis=0))
    data = problem.mask * problem.y
    dual = (data**2).sum(axis=0) / 2 - ((data - scale * residual) ** 2).sum(axis=0) / 2
    value = objective(problem, c)
    return float(((value - dual) / value).max())


# ---- contenders: each returns solve(tolerance, num) -> (n, num) coefficients, and its scan


class Contender(NamedTuple):
    """A solver of the leading ``num`` right-hand sides to a tolerance of its own kind."""

    solve: Callable[[float, int], np.ndarray]
    tolerances: Sequence[float]
    batched: bool


def _jgia(problem: Problem, dtype: Any) -> Contender:
    import jax
    import jax.numpy as jnp

    from jgia.sparse import FistaOptions, lasso

    a, y, lam = (jnp.asarray(v, dtype) for v in (problem.a, problem.y, problem.lam))
    mask = None if problem.mask.all() else jnp.asarray(problem.mask)

    @functools.partial(jax.jit, static_argnames="tolerance")
    def run(tolerance: float) -> Any:
        result = lasso(a, y, lam, mask=mask, options=FistaOptions(tolerance=tolerance))
        return result.x, result.iterations

    def solve(tolerance: float, num: int) -> np.ndarray:
        x, iterations = run(tolerance)
        solve.iterations = int(np.asarray(iterations).max())  # type: ignore[attr-defined]
        solve.mean_iterations = float(np.asarray(iterations).mean())  # type: ignore[attr-defined]
        return np.asarray(x)[:, :num]

    return Contender(solve, [3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6], True)


def _jaxopt(problem: Problem, dtype: Any) -> Contender:
    import jax
    import jax.numpy as jnp
    import jaxopt

    a, y, lam, mask = (
        jnp.asarray(v, dtype)
        for v in (problem.a, problem.y.T, problem.lam, problem.mask.T.astype(float))
    )
    # Its step is given, which spares it the line search; finding it is not timed.
    step = 1 / float(np.linalg.norm(problem.a, 2) ** 2)

    def fun(c: Any, y: Any, mask: Any) -> Any:
        return 0.5 * jnp.sum((mask * (a @ c - y)) ** 2)

    @functools.partial(jax.jit, static_argnames="steps")
    def run(steps: int) -> Any:
        solver = jaxopt.ProximalGradient(
            fun, jaxopt.prox.prox_lasso, stepsize=step, maxiter=steps, tol=0.0
        )
        start = jnp.zeros(a.shape[1], dtype)
        each = jax.vmap(lambda y, lam, mask: solver.run(start, lam, y, mask).params)
        return each(y, lam, mask)

    def solve(tolerance: float, num: int) -> np.ndarray:
        return np.asarray(run(int(tolerance))).T[:, :num]

    return Contender(solve, [30, 45, 70, 100, 150, 200, 300, 450, 700, 1000], True)


def _per_sample(problem: Problem, dtype: Any, make: Callable[..., Any]) -> Contender:
    a, y = np.asfortranarray(problem.a, dtype), problem.y.astype(dtype)
    whole = bool(problem.mask.all())

    def solve(tolerance: float, num: int) -> np.ndarray:
        columns = []
        for j in range(num):
            on = problem.mask[:, j]
            rows = a if whole else np.asfortranarray(a[on])
            data = y[:, j] if whole else y[on, j]
            model = make(float(problem.lam[j]) / len(data), tolerance)
            columns.append(np.asarray(model.fit(rows, data).coef_))
        return np.stack(columns, axis=1)

    return Contender(solve, [10.0**-k for k in range(3, 11)], False)


def _cvxpy(problem: Problem, dtype: Any) -> Contender:
    import cvxpy as cp

    def solve(tolerance: float, num: int) -> np.ndarray:
        del tolerance
        columns = []
        for j in range(num):
            c, on = cp.Variable(problem.a.shape[1]), problem.mask[:, j]
            fit = cp.sum_squares(problem.a[on] @ c - problem.y[on, j])
            penalty = float(problem.lam[j]) * cp.norm1(c)
            cp.Problem(cp.Minimize(0.5 * fit + penalty)).solve(solver=cp.CLARABEL)
            columns.append(np.asarray(c.value, dtype))
        return np.stack(columns, axis=1)

    return Contender(solve, [1e-8], False)


def contender(name: str, problem: Problem) -> Contender | None:
    """The contender of a name; None where it does not take the problem."""
    peer, dtype = name.split("-")
    dtype = np.dtype(dtype)
    if peer == "jgia":
        return _jgia(problem, dtype)
    if peer == "jaxopt":
        return _jaxopt(problem, dtype)
    if peer == "cvxpy":
        return _cvxpy(problem, dtype) if problem.a.size < 10**6 else None
    if peer.startswith("sklearn"):
        from sklearn.linear_model import Lasso

        gram: Any = False
        if peer == "sklearn_gram":
            if not problem.mask.all():  # every mask has a Gram matrix of its own
                return None
            gram = problem.a.T @ problem.a
        return _per_sample(
            problem,
            dtype,
            lambda lam, tol: Lasso(
                lam, fit_intercept=False, tol=tol, max_iter=100_000, precompute=gram
            ),
        )
    if peer == "celer":
        from celer import Lasso as Celer

        return _per_sample(
            problem, dtype, lambda lam, tol: Celer(lam, fit_intercept=False, tol=tol)
        )
    from skglm import Lasso as Skglm

    return _per_sample(
        problem, dtype, lambda lam, tol: Skglm(alpha=lam, fit_intercept=False, tol=tol)
    )


# ---- one contender in one process


def work(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Time one contender on every system."""
    warnings.filterwarnings("ignore")
    name, rows = arguments["contender"], []
    data = None if arguments["data"] is None else Path(arguments["data"])
    for spec in specs(arguments["smoke"], data is not None):
        problem = build(spec, data)
        best = np.load(Path(arguments["references"]) / f"{spec.title}.npy")
        try:
            made = contender(name, problem)
        except ImportError as error:
            return [{"contender": name, "skipped": str(error)}]
        if made is None:
            continue
        known = arguments["tolerances"].get(spec.title)
        row = time_one(made, problem, best, None if known is None else float(known))
        row |= {"contender": name, "problem": spec.title, "threads": arguments["threads"]}
        if name.startswith("jgia") and "tolerance" in row:
            row |= gemm_rates(spec, name.split("-")[1], row)
        rows.append(row)
    return rows


def time_one(
    made: Contender, problem: Problem, best: np.ndarray, known: float | None
) -> dict[str, Any]:
    """Scan the tolerance, then repeat at the first that reaches the goal."""
    batch = len(best)
    start = time.perf_counter()
    num, tried = (batch if made.batched else min(2, batch)), []
    for tolerance in made.tolerances if known is None else [known]:
        c = made.solve(tolerance, num)
        worst = float(((objective(problem, c) - best[:num]) / best[:num]).max())
        tried.append([tolerance, worst])
        if worst <= GOAL or (not made.batched and time.perf_counter() - start > 40):
            break
    tolerance, worst = tried[-1]
    if worst > GOAL and known is None:
        return {"failed": f"no tolerance reached {GOAL}", "tried": tried}
    if not made.batched:
        begin = time.perf_counter()
        made.solve(tolerance, num)
        each = (time.perf_counter() - begin) / num
        num = int(np.clip(SECONDS_PER_ROW / 3 / each, 1, batch))
        c = made.solve(tolerance, num)
        worst = float(((objective(problem, c) - best[:num]) / best[:num]).max())
    times: list[float] = []
    while len(times) < 2 or (len(times) < 7 and sum(times) < SECONDS_PER_ROW):
        begin = time.perf_counter()
        made.solve(tolerance, num)
        times.append((time.perf_counter() - begin) * batch / num)
        if times[0] > 4 * batch / num:
            break
    return {
        "tolerance": tolerance,
        "suboptimality": worst,
        "reached": worst <= GOAL,
        "right_hand_sides_timed": num,
        "seconds": min(times),
        "median_s": float(np.median(times)),
        "repeats": len(times),
        "solves_per_s": batch / min(times),
        "iterations": getattr(made.solve, "iterations", None),
        "mean_iterations": getattr(made.solve, "mean_iterations", None),
    }


def gemm_rates(spec: Spec, dtype: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the machine does at the iteration's products and at a square one, and our share.

    Of the iterations the mean counts: samples that are done leave the products.
    """
    import jax
    import jax.numpy as jnp

    def seconds(rows: int, inner: int, columns: int) -> float:
        product = jax.jit(jnp.matmul)
        factors = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product(*factors).block_until_ready()
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            product(*factors).block_until_ready()
            times.append(time.perf_counter() - begin)
        return min(times)

    m, n, batch = spec.rows, spec.columns, spec.batch
    pair = seconds(m, n, batch) + seconds(n, m, batch)
    side = 256 if m < 100 else 1536
    return {
        "gemm_gflops_same_shapes": 4e-9 * m * n * batch / pair,
        "gemm_gflops_square": 2e-9 * side**3 / seconds(side, side, side),
        "loop_gflops": 4e-9 * m * n * batch * row["mean_iterations"] / row["seconds"],
        "loop_share_of_gemm": row["mean_iterations"] * pair / row["seconds"],
    }


# ---- all of them


def main() -> None:
    """Run every contender in a process of its own and write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one small system, in a minute")
    parser.add_argument("--data", type=Path, default=None, help="folder with cifar10_test10k.npz")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--contenders", nargs="*", default=list(PEERS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        given = json.loads(Path(options.worker).read_text())
        Path(given["out"]).write_text(json.dumps(work(given)))
        return

    from benchmarks import harness

    natural = options.data is not None and (options.data / "cifar10_test10k.npz").is_file()
    if not natural and not options.smoke:
        print("no --data folder with cifar10_test10k.npz: the natural images are left out")
    data = options.data if natural else None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        certificates = _references(Path(folder), options.smoke, data)
        rows: list[dict[str, Any]] = []
        for name in options.contenders:
            rows += _run(name, Path(folder), options.smoke, data)
    print_table(rows)
    content = {
        "machine": harness.machine(),
        "goal_relative_suboptimality": GOAL,
        "reference_relative_gap": certificates,
        "rows": rows,
        "ratios": ratios(rows),
        "seconds_in_all": time.perf_counter() - started,
    }
    if options.out is not None:
        harness.write_json(options.out, content)


def _references(folder: Path, smoke: bool, data: Path | None) -> dict[str, float]:
    """Reference objectives, with the gap that NumPy finds at them."""
    script = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    del script
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    from jgia.sparse import FistaOptions, lasso

    gaps = {}
    for spec in specs(smoke, data is not None):
        problem = build(spec, data)
        a, y, lam = (jnp.asarray(v) for v in (problem.a, problem.y, problem.lam))
        solve = jax.jit(functools.partial(lasso, options=FistaOptions(tolerance=3e-9)))
        c = np.asarray(solve(a, y, lam, mask=jnp.asarray(problem.mask)).x)
        gaps[spec.title] = relative_gap(problem, c)
        if gaps[spec.title] > 0.01 * GOAL:
            raise RuntimeError(f"the reference of {spec.title} has a gap of {gaps[spec.title]}")
        np.save(folder / f"{spec.title}.npy", objective(problem, c))
    return gaps


def _run(name: str, folder: Path, smoke: bool, data: Path | None) -> list[dict[str, Any]]:
    """One contender with two threads, then with one at the tolerances found."""
    rows: list[dict[str, Any]] = []
    tolerances: dict[str, float] = {}
    for threads in (2, 1):
        given = {
            "contender": name,
            "threads": threads,
            "smoke": smoke,
            "data": None if data is None else str(data),
            "references": str(folder),
            "tolerances": tolerances,
            "out": str(folder / "rows.json"),
        }
        (folder / "given.json").write_text(json.dumps(given))
        single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "NUMBA_NUM_THREADS": str(threads),
            "XLA_FLAGS": single if threads == 1 else "",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "1" if name.endswith("64") else "0",
        }
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--worker", str(folder / "given.json")]
        begin = time.perf_counter()
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            lines = run.stderr.strip().splitlines() or ["no message"]
            return [*rows, {"contender": name, "threads": threads, "failed": lines[-1]}]
        found = json.loads(Path(given["out"]).read_text())
        print(f"{name}, {threads} threads: {time.perf_counter() - begin:.0f} s", flush=True)
        rows += found
        if any("skipped" in row for row in found) or name.startswith("cvxpy"):
            break
        tolerances = {row["problem"]: row["tolerance"] for row in found if "tolerance" in row}
    return rows


def fastest(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The better thread count of every contender on every problem."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if not row.get("reached"):
            continue
        key = row["problem"], row["contender"]
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return best


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster the better of our two precisions is, each at its best threads."""
    best = fastest(rows)
    out: dict[str, dict[str, float]] = {}
    for problem in dict.fromkeys(problem for problem, _ in best):
        times = {name: row["seconds"] for (p, name), row in best.items() if p == problem}
        ours = [seconds for name, seconds in times.items() if name.startswith("jgia")]
        if ours:
            out[problem] = {
                name: round(seconds / min(ours), 2)
                for name, seconds in times.items()
                if not name.startswith("jgia")
            }
    return out


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for every contender that reached the goal, and for every one that did not."""
    for (problem, name), row in sorted(fastest(rows).items()):
        share = row.get("loop_share_of_gemm")
        print(
            f"{problem:32s} {name:22s} {row['solves_per_s']:10.1f} solves/s, "
            f"sub-optimality {row['suboptimality']:.1e}, {row['threads']} threads"
            + (f", {share:.0%} of GEMM" if share else "")
        )
    for row in rows:
        if "failed" in row or "skipped" in row:
            print({k: row[k] for k in row if k != "tried"})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
