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
    if (search := result.get("staged_search")) is not None:
        console.print(Text(f"Returned: {search['why']}"))
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
    rounds = f" in each of {result['rounds']} rounds" if result["rounds"] > 1 else ""
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
            f"{result['release']['num_inputs']:,} pixels, noise {result['noise_std']:g}{rounds}, "
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
            _linear(ratio),
        )
    console.print(table)
    if any(not row["diagnostics"]["squared_safely"] for row in result["inputs"]):
        console.print(
            Text("The route squares singular values that the noise does not hide: use --route qr.")
        )
    if "explanations" in result:
        print_explanations(console, result["explanations"])
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)


def print_explanations(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what each defense does: in words, as predicted, and as an attack came to.

    Args:
      console: where to print.
      rows: ``explanations`` of ``risk.json``; the first without a defense.
    """
    for row in rows[1:]:
        console.print(Text(row["options"], style="bold"))
        console.print(Text(f"  Jacobian: {row['jacobian']}"))
        console.print(Text(f"  Noise: {row['covariance']}"))
        if row["caveat"]:
            console.print(Text(f"  But: {row['caveat']}."))
        if row["invloss_least"] != row["invloss"]:
            console.print(Text(f"  Least error: {_figure(row['invloss_least'])}."))
        if row["defense"] == "soteria":
            console.print(Text(f"  Risk of each layer: {_layer_changes(row)}"))
    table = Table("defense")
    for name in ("InvLoss", "risk", "here", "attack", "±", "ratio", "curve"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            Text(row["defense"].replace("_", " ")),
            _figure(row["invloss"]),
            _figure(row["risk"], ".3f"),
            _figure(row["expected"]),
            _figure(row["realized"]),
            _figure(row["standard_error"], ".1g"),
            _figure(row["ratio"], ".2f"),
            _figure(row["linearization_ratio"]),
        )
    console.print(table)
    console.print(
        Text(
            f"Squared errors summed over pixels; {rows[0]['energy']:.3g} knowing the prior alone. "
            "InvLoss: predicted from J and C, over the prior. Here: predicted at these images for "
            "the attack beside it, which knows J and C. Ratio: what it came to over that. Where it "
            "is not 1, the update is not linear (curve above 0.3), or the noise not Gaussian."
        )
    )
    for row in rows:
        if row["converged"] < 1:
            console.print(
                Text(
                    f"{row['defense']}: {words.percent(1 - row['converged'])} of the searches did "
                    "not converge to an image that the noise explains; a better attack may do "
                    "better there."
                )
            )


def _layer_changes(row: Mapping[str, Any]) -> str:
    before = row["layer_risk_before"]
    return ", ".join(
        f"{layer} {_figure(before[layer], '.3f')} to {_figure(risk, '.3f')}"
        for layer, risk in row["layer_risk"].items()
    )


def _figure(value: float | None, form: str = ".2g") -> str:
    return "–" if value is None else format(value, form)


def _linear(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return "yes" if ratio < 0.3 else f"no ({ratio:.2g})"


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
