"""Does the predicted error agree with what real attacks reach, and do the bounds hold?"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import risk_agreement_bracket as bracket
import risk_agreement_cells as cells_of
from harness import machine, write_json
from risk_agreement_table import figure, lines, table

from jgia._io import atomic_write_bytes
from jgia.attacks.gauss_newton import Settings, posterior_mode
from jgia.risk import Prior, posterior_from_triangular

DEFAULT = Path("benchmarks/results/cpu")


def tightness(draws: int) -> dict[str, float]:
    """B1: the posterior mean's squared error in a linear-Gaussian channel over the prediction."""
    rng = np.random.default_rng(0)
    size, outputs, tau = 12, 20, 0.3
    matrix, root = rng.normal(size=(outputs, size)), rng.normal(size=(40, size))
    prior = Prior.gaussian((root.T @ root / 40).astype("float32"), np.full(size, 0.5))
    rows, mean = np.asarray(prior.rows(), np.float64), np.asarray(prior.mean, np.float64)
    predicted = float(
        posterior_from_triangular(jnp.asarray(matrix @ rows.T / tau, "float32"), prior.rows()).error
    )
    x = mean + rng.normal(size=(draws, size)) @ rows
    seen = x @ matrix.T + tau * rng.normal(size=(draws, outputs))
    precision = matrix.T @ matrix / tau**2 + np.linalg.inv(rows.T @ rows)
    gain = np.linalg.solve(precision, matrix.T) / tau**2
    found = mean + (seen - mean @ matrix.T) @ gain.T
    operator = jnp.asarray(matrix, "float32")
    one = posterior_mode(
        lambda v: operator @ v,
        seen[0].astype("float32"),
        prior,
        shape=(size,),
        noise=tau,
        settings=Settings(forcing=1e-4),
    )
    errors = np.sum((found - x) ** 2, axis=1)
    return {
        "draws": draws,
        "predicted": predicted,
        "measured": float(errors.mean()),
        "ratio": float(errors.mean() / predicted),
        "standard_error": float(errors.std(ddof=1) / math.sqrt(draws) / predicted),
        "attack_against_closed_form": float(np.abs(one.images - found[0]).max()),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All three sections; cells that are in ``--work`` already are kept."""
    smoke, work = arguments.smoke, arguments.work
    if not smoke and arguments.data is None:
        raise SystemExit("give --data, the folder of cifar10_*.npz (or --smoke).")
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    plan = cells_of.Plan(
        models=("mlp",) if smoke else tuple(arguments.models),
        noise=(1e-2, 1e-1) if smoke else cells_of.NOISE,
        side=4 if smoke else arguments.side,
        images=2 if smoke else arguments.images,
        matching_steps=3 if smoke else 300,
        newton_steps=3 if smoke else 60,
    )
    grid = bracket.Grid()
    if smoke:
        grid = bracket.Grid(("mlp",), (1e-2,), ("gaussian",), (1,), (True,), (0,), 4)
    found: dict[str, Any] = {"tightness": tightness(2000 if smoke else 200_000)}
    ratio = found["tightness"]
    print(
        f"B1 tightness: measured / predicted = {ratio['ratio']:.4f} "
        f"+- {ratio['standard_error']:.4f}",
        flush=True,
    )
    data = cells_of.load(None if smoke else arguments.data, plan.side, plan.images)
    path = None if work is None else work / "cells.jsonl"
    kept = cells_of.read_cells(path, plan)
    cells = kept if arguments.report_only else cells_of.run(plan, data, path)
    found["agreement"] = table(cells, draws=20 if smoke else 300)
    found["plan"] = plan.key() | {
        "models": list(plan.models),
        "noise": list(plan.noise),
        "cells_wanted": len(plan.models) * len(plan.noise) * plan.images,
        "cells": len(cells),
    }
    public = None
    if not smoke:
        with np.load(arguments.data / "cifar10_train20k.npz") as train:
            public = train["x"][:10_000]
    path = None if work is None else work / "bracket.jsonl"
    rows = bracket.read_rows(path)
    if not arguments.report_only:
        rows = bracket.run(grid, bracket.gray_priors(public, grid.side), path)
    found["bracket"] = bracket.summary(rows) | {"wanted": len(grid.configurations())}
    print("\n".join(lines(found)), flush=True)
    if arguments.out is not None and cells:
        atomic_write_bytes(arguments.out / "risk_agreement.png", figure(cells))
        found["points"] = _points(cells)
    return found


def _points(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Every cell in short: columns of numbers."""
    names = ("dlg", "inverting_gradients", "gauss_newton")
    return {
        "model": [cell["model"] for cell in cells],
        "image": [cell["image"] for cell in cells],
        "noise": [cell["noise"] for cell in cells],
        "predicted": [float(f"{cell['predicted']['invloss']:.5g}") for cell in cells],
    } | {
        name: [
            None
            if cell["attacks"][name]["error"] is None
            else float(f"{cell['attacks'][name]['error']:.5g}")
            for cell in cells
        ]
        for name in names
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up images")
    parser.add_argument("--data", type=Path, help="folder of cifar10_*.npz")
    parser.add_argument("--out", type=Path, help="folder for risk_agreement.json and .png")
    parser.add_argument("--work", type=Path, help="folder of finished cells, to go on from")
    parser.add_argument("--models", nargs="+", default=cells_of.MODELS, choices=cells_of.MODELS)
    parser.add_argument("--side", type=int, default=8, help="side of the images")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument(
        "--report-only", action="store_true", help="tables of what --work holds; nothing is run"
    )
    arguments = parser.parse_args()
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    found = run(arguments) | {"machine": machine(), "devices": len(jax.devices())}
    if arguments.out is not None:
        write_json(arguments.out / "risk_agreement.json", found)


if __name__ == "__main__":
    main()
