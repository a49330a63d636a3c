"""Summary of a result for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jgia.report import words
from jgia.report.records import THRESHOLDS


def print_summary(
    console: Console, result: Mapping[str, Any], paths: Mapping[str, Path] | None = None
) -> None:
    """Print the verdict, the scores beside the baselines, the timings, and where the report is.

    Strings of the result are printed as they are: markup in a data set's name stays text.

    Args:
      console: where to print.
      result: a result that passes :func:`jgia.report.validate_result`.
      paths: what :func:`jgia.report.write_report` returned, if a report was written.
    """
    console.print(Text(words.verdict(result), style="bold"))
    console.print(Text(words.summary(result)))
    if result["scores"] is not None:
        console.print(_score_table(result))
    counts = result["attack"]["status_counts"]
    listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    console.print(Text(f"Candidates: {listed or 'none'}"))
    if (risk := result.get("risk")) is not None:
        console.print(
            Text(
                f"Risk without an attack: {words.percent(risk['mean'])} of what is not known "
                f"beforehand recoverable ({words.plural(risk['num_images'], 'image')}, noise "
                f"{words.number(risk['noise_std'])}, {risk['noise_from']})"
            )
        )
    timings = result["timings"]
    console.print(
        Text(
            f"Time: {words.seconds(timings['run_s'])} run, {words.seconds(timings['compile_s'])} "
            f"compilation, {words.seconds(timings['total_s'])} in total "
            f"on {result['environment']['device']}"
        )
    )
    if paths and "report.html" in paths:
        console.print(Text(f"Report: {paths['report.html']}"), soft_wrap=True)


def print_risk(console: Console, result: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Print a risk estimate: one row for each input, and where the files are.

    Args:
      console: where to print.
      result: the content of ``risk.json``.
      paths: files that were written.
    """
    risk, prior = result["risk"], result["prior"]
    console.print(
        Text(
            f"Risk {risk['mean']:.3f} on average, {risk['worst']:.3f} at worst, of "
            f"{risk['count']} inputs: the part of an image's variance that any attack can learn.",
            style="bold",
        )
    )
    console.print(
        Text(
            f"{result['release']['num_outputs']:,} shared numbers of "
            f"{result['release']['num_inputs']:,} pixels, noise {result['noise_std']:g}, "
            f"{prior['kind'].replace('_', ' ')} prior (pixel std {prior['pixel_std']:.3f}); route "
            f"{result['route']['route']}: {result['route']['reason']}."
        )
    )
    table = Table("input")
    columns = ("label", "risk", "PSNR", "≥ 25 dB", "dimensions", "nats", "linear")
    for name in columns:
        table.add_column(name, justify="right")
    for index, row in enumerate(result["inputs"]):
        ratio = row["diagnostics"]["linearization_ratio"]
        table.add_row(
            str(index),
            ", ".join(map(str, row["labels"][:4])),
            f"{row['risk']:.3f}",
            words.decibel(row["predicted_psnr"]),
            words.percent(row["success_rates"]["25"]),
            f"{row['dimensions']:.0f}",
            f"{row['information']:.0f}",
            "–" if ratio is None else ("yes" if ratio < 0.3 else f"no ({ratio:.2g})"),
        )
    console.print(table)
    if any(not row["diagnostics"]["squared_safely"] for row in result["inputs"]):
        console.print(
            Text("The route squares singular values that the noise does not hide: use --route qr.")
        )
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)


def _score_table(result: Mapping[str, Any]) -> Table:
    scores = result["scores"]
    table = Table("")
    table.add_column("median", justify="right")
    table.add_column("capped mean", justify="right")
    for threshold in THRESHOLDS:
        table.add_column(f"≥ {threshold} dB", justify="right")
    attack = {**scores["psnr"], "success_rate": scores["success_rate"]}
    for name, values in [(result["attack"]["name"], attack), *scores["baselines"].items()]:
        rates = values.get("success_rate")
        shares = [words.percent(rates[t]["rate"]) if rates else "–" for t in THRESHOLDS]
        table.add_row(
            Text(name.replace("_", " "), style="bold" if values is attack else ""),
            words.decibel(values["median"]),
            words.decibel(values["mean_capped"]),
            *shares,
        )
    return table
