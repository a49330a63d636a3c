"""When do the active neurons of a Gaussian ReLU layer determine a sparse example?

    python benchmarks/phase_transition.py --out results/cpu
    python benchmarks/phase_transition.py --smoke

Masked recovery uses the active neurons as exact equations; the K-Lasso of ARES (eq. 7) uses all
neurons and takes the rectifier for noise, with and without its mean subtracted. Every example is
s-sparse with normal entries and of norm 1, every layer has independent standard normal rows and
zero biases. The l1 weight of the K-Lasso is picked by the true error among a grid, in its favor.
Predictions: the transition at |T| = D, the statistical dimension of the l1 descent cone, and
sigma sqrt(D / (m - D)) / mu for the K-Lasso.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jgia._io import atomic_write_bytes
from jgia.attacks import ares
from jgia.metrics.rates import wilson_interval
from jgia.sparse import FistaOptions, MatrixOperator, lasso

SHARES = (0.02, 0.05, 0.1, 0.2)
"""Sparsity levels s / n."""
RATIOS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Neurons m in units of the rule of thumb 4 s log(n / s)."""
EXACT = 1e-2
"""A relative error up to this counts as recovery: the l1 weight below biases by less."""
_MASKED_LAM = 1e-4  # of lam_max
_NOISY_LAMS = (0.02, 0.05, 0.1, 0.2, 0.4)
_OPTIONS = FistaOptions(tolerance=1e-4, max_iterations=1500, check_every=25)


def draw(rng: np.random.Generator, s: int, n: int, num: int) -> np.ndarray:
    """(n, num) s-sparse columns of norm 1."""
    x = np.zeros((n, num))
    for column in x.T:
        column[rng.choice(n, s, replace=False)] = rng.normal(size=s)
    return x / np.linalg.norm(x, axis=0)


@jax.jit
def _solve(a: jax.Array, y: jax.Array, mask: jax.Array, ratio: jax.Array) -> jax.Array:
    operator = MatrixOperator(a)
    largest = jnp.abs(operator.adjoint(jnp.where(mask, y, 0.0))).max(axis=0)
    lam = ratio * jnp.maximum(largest, 1e-30)
    return lasso(operator, y, lam, mask=mask, options=_OPTIONS).x


def errors(
    rng: np.random.Generator, s: int, n: int, ms: np.ndarray, num: int
) -> dict[str, np.ndarray]:
    """Relative errors (M, num) of each method, and the numbers of active neurons."""
    a = rng.normal(size=(int(ms.max()), n)).astype(np.float32)
    x = draw(rng, s, n, num)
    h = np.maximum(a.astype(np.float64) @ x, 0.0)
    used = np.arange(len(a))[:, None, None] < ms[None, :, None]  # (rows, M, 1)
    shape = (len(a), len(ms) * num)
    on = np.broadcast_to(used & (h > 0)[:, None, :], (len(a), len(ms), num)).reshape(shape)
    everything = np.broadcast_to(used, (len(a), len(ms), num)).reshape(shape)
    measured = np.broadcast_to(h[:, None, :], (len(a), len(ms), num)).reshape(shape)
    truth = np.broadcast_to(x[:, None, :], (n, len(ms), num)).reshape(n, -1)

    def error(y: np.ndarray, mask: np.ndarray, ratio: float) -> np.ndarray:
        y32 = jnp.asarray(y, jnp.float32)
        found = _solve(jnp.asarray(a), y32, jnp.asarray(mask), jnp.float32(ratio))
        wrong = np.linalg.norm(np.asarray(found, np.float64) - truth, axis=0)
        return wrong.reshape(len(ms), num)

    def noisy(intercept: bool) -> np.ndarray:
        c = ares.lasso_constants(lambda t: np.maximum(t, 0.0), intercept=intercept)
        y = (measured - c.intercept) / c.mu
        return np.min([error(y, everything, ratio) for ratio in _NOISY_LAMS], axis=0)

    return {
        "masked": error(measured, on, _MASKED_LAM),
        "k_lasso": noisy(False),
        "k_lasso_intercept": noisy(True),
        "active": on.sum(axis=0).reshape(len(ms), num),
    }


def row(s: int, n: int, m: int, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """One line of the table: a cell of the (s, m) grid."""
    rule, dimension = ares.sufficient_equations(s, n), ares.statistical_dimension(s, n)
    successes, total = int((found["masked"] <= EXACT).sum()), found["masked"].size
    low, high = wilson_interval(successes, total)
    line: dict[str, Any] = {
        "n": n,
        "s": s,
        "m": m,
        "rule": rule,
        "statistical_dimension": dimension,
        "active_mean": float(found["active"].mean()),
        "active_over_rule": float(found["active"].mean()) / rule,
        "trials": total,
        "successes": successes,
        "success_rate": successes / total,
        "success_low": low,
        "success_high": high,
        "success_predicted": ares.masked_recovery_probability(m, s, n),
    }
    for name in ("masked", "k_lasso", "k_lasso_intercept"):
        quarter, median, upper = np.percentile(found[name], [25, 50, 75])
        line |= {f"{name}_q25": quarter, f"{name}_median": median, f"{name}_q75": upper}
        line[f"{name}_successes"] = int((found[name] <= EXACT).sum())
    for name, intercept in (("k_lasso", False), ("k_lasso_intercept", True)):
        c = ares.lasso_constants(lambda t: np.maximum(t, 0.0), intercept=intercept)
        predicted = ares.constrained_lasso_error(c, dimension, m) / c.mu
        line[f"{name}_predicted"] = predicted if math.isfinite(predicted) else None
    return {key: float(v) if isinstance(v, np.floating) else v for key, v in line.items()}


def half_point(rows: list[dict[str, Any]]) -> float | None:
    """Active neurons at which half the trials succeed, interpolated between cells."""
    active = [r["active_mean"] for r in rows]
    rate = np.maximum.accumulate([r["success_rate"] for r in rows])
    if rate[0] > 0.5 or rate[-1] < 0.5:
        return None
    above = int(np.argmax(rate >= 0.5))
    if above == 0:
        return float(active[0])
    share = (0.5 - rate[above - 1]) / (rate[above] - rate[above - 1])
    return float(active[above - 1] + share * (active[above] - active[above - 1]))


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Success against |T| / (2 s log(n / s)), and error against m, one color per sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, s in enumerate(sorted({r["s"] for r in rows})):
        mine = [r for r in rows if r["s"] == s]
        color = f"C{index}"
        at = np.array([r["active_over_rule"] for r in mine])
        rate, low, high = (
            np.array([r[key] for r in mine])
            for key in ("success_rate", "success_low", "success_high")
        )
        label = f"s = {s} of n = {mine[0]['n']}"
        left.errorbar(at, rate, [rate - low, high - rate], fmt="o-", color=color, label=label)
        left.axvline(mine[0]["statistical_dimension"] / mine[0]["rule"], color=color, ls=":")
        neurons = [r["m"] / (2 * r["rule"]) for r in mine]
        right.plot(neurons, [r["masked_median"] for r in mine], "o-", color=color)
        right.plot(neurons, [r["k_lasso_intercept_median"] for r in mine], "s--", color=color)
        right.plot(
            neurons, [r["k_lasso_intercept_predicted"] or math.nan for r in mine], ":", color=color
        )
    left.set(
        xlabel="active neurons |T| / (2 s log(n / s))",
        ylabel="recovered (Wilson 95 %)",
        title="masked recovery; dotted: statistical dimension",
    )
    left.legend()
    right.set(
        xlabel="neurons m / (4 s log(n / s))",
        ylabel="median relative error",
        yscale="log",
        title="masked (dots), K-Lasso (squares), predicted (dotted)",
    )
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    plt.close(drawn)
    atomic_write_bytes(path, buffer.getvalue())
    print(f"wrote {path}")


def main() -> None:
    """Run the grid, print one line per cell, write JSON, CSV and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for phase_transition.{json,csv,png}")
    parser.add_argument("--smoke", action="store_true", help="one sparsity, few trials")
    parser.add_argument("--size", type=int, default=128, help="n, entries of an example")
    parser.add_argument("--layers", type=int, default=5, help="Gaussian layers per sparsity")
    parser.add_argument("--examples", type=int, default=12, help="examples per layer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares, ratios, n = SHARES, RATIOS, arguments.size
    layers, examples = arguments.layers, arguments.examples
    if arguments.smoke:
        shares, ratios, n, layers, examples = (0.1,), (0.4, 1.0, 2.0), 40, 1, 6
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    transitions = []
    for share in shares:
        s = max(1, round(share * n))
        rule = ares.sufficient_equations(s, n)
        ms = np.unique([max(2, round(2 * rule * ratio)) for ratio in ratios])
        rng = np.random.default_rng((arguments.seed, s))
        parts = [errors(rng, s, n, ms, examples) for _ in range(layers)]
        merged = {key: np.concatenate([p[key] for p in parts], axis=1) for key in parts[0]}
        mine = [
            row(s, n, int(m), {key: value[index] for key, value in merged.items()})
            for index, m in enumerate(ms)
        ]
        for line in mine:
            print(
                f"s={s} m={line['m']} |T|/rule={line['active_over_rule']:.2f} "
                f"success={line['success_rate']:.2f} "
                f"[{line['success_low']:.2f}, {line['success_high']:.2f}] "
                f"predicted={line['success_predicted']:.2f} errors: "
                f"masked {line['masked_median']:.1e}, K-Lasso {line['k_lasso_median']:.2f}, "
                f"with intercept {line['k_lasso_intercept_median']:.2f} "
                f"(predicted {line['k_lasso_intercept_predicted'] or math.inf:.2f})",
                flush=True,
            )
        rows += mine
        half = half_point(mine)
        dimension = ares.statistical_dimension(s, n)
        transitions.append(
            {"s": s, "n": n, "half_point": half, "statistical_dimension": dimension, "rule": rule}
        )
        print(f"s={s}: half at |T| = {half}, D = {dimension:.1f}, rule {rule:.1f}")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")
    if arguments.out:
        content = {
            "machine": harness.machine(),
            "options": {
                "exact": EXACT,
                "masked_lam_ratio": _MASKED_LAM,
                "noisy_lam_ratios": list(_NOISY_LAMS),
                "layers": layers,
                "examples": examples,
                "seed": arguments.seed,
            },
            "seconds": seconds,
            "transitions": transitions,
            "rows": rows,
        }
        harness.write_json(arguments.out / "phase_transition.json", content)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_bytes(arguments.out / "phase_transition.csv", text.getvalue().encode())
        figure(rows, arguments.out / "phase_transition.png")


if __name__ == "__main__":
    main()
