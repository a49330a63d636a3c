"""The report as one self-contained HTML file."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jgia.report import images as pixels_of
from jgia.report import words
from jgia.report.markup import Html, definitions, element, join, page, section, table
from jgia.report.pairs import image_section
from jgia.report.records import HEADLINE_DB, LEVELS, THRESHOLDS, Number
from jgia.report.risk import risk_section
from jgia.report.schema import validate_result
from jgia.report.search import SearchHistory, search_section
from jgia.report.stages import shows_stages, stages_section

_TIMING_NAMES = {
    "setup_s": "Setup (data, crafted parameters)",
    "compile_s": "Compilation",
    "run_s": "Run, compiled",
    "client_s": "Client's update",
    "leak_s": "Read-out",
    "invert_s": "Inversion",
    "search_s": "Search",
    "risk_s": "Risk estimate",
    "total_s": "Total",
}


def render_html(
    result: Mapping[str, Any],
    originals: Float[np.ndarray, "n h w c"] | None,
    reconstructions: Sequence[Float[np.ndarray, "h w c"] | None],
    *,
    statuses: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
    history: SearchHistory | None = None,
    pixel_errors: Float[np.ndarray, "k h w c"] | None = None,
) -> str:
    """Render a result as one HTML file that loads nothing and runs no script.

    Args:
      result: a result that passes :func:`jgia.report.validate_result`.
      originals: (N, H, W, C) true images in [0, 1]; ``None`` exactly when ``result["scores"]`` is.
      reconstructions: N images aligned with the originals, ``None`` where unmatched; without
        originals, all returned images.
      statuses: the attack's status of each aligned reconstruction, ``None`` where unmatched.
      labels: a caption per image, such as its class name.
      history: of the search, for attacks that iterate.
      pixel_errors: expected squared error of every pixel of the first originals, where a risk was
        estimated.

    Returns:
      The text of the page, below 8 MB: where the images would not fit, they are averaged down
      for the page, and past ``MAX_SHOWN`` pairs the first are shown; the page says so.

    Raises:
      ValueError: the result is invalid, or images, statuses and labels do not agree with it.
    """
    validate_result(result)
    originals, aligned = check_shown(result, originals, reconstructions)
    for name, values in (("statuses", statuses), ("labels", labels)):
        if values is not None and len(values) != len(aligned):
            raise ValueError(
                f"{name} must have one entry per shown image, {len(aligned)}, got {len(values)}."
            )
    body = join(
        _header(result),
        element(
            "main",
            _threat_model(result),
            image_section(result, originals, aligned, statuses, labels),
            stages_section(result, originals, history, labels),
            search_section(history, staged=shows_stages(result, history)),
            _scores(result),
            risk_section(result.get("risk"), originals, pixel_errors),
            _candidates(result),
            _reproduce(result),
        ),
        element(
            "footer",
            "Made by jgia for auditing one's own federated training. It states what this attack "
            "recovered under this threat model, not what no attack could.",
        ),
    )
    css = importlib.resources.files("jgia.report").joinpath("report.css").read_text("utf-8")
    return page(title=f"{words.verdict(result)} · jgia", css=css, body=body)


def check_shown(
    result: Mapping[str, Any],
    originals: Float[np.ndarray, "n h w c"] | None,
    reconstructions: Sequence[Float[np.ndarray, "h w c"] | None],
) -> tuple[Float[np.ndarray, "n h w c"] | None, list[Float[np.ndarray, "h w c"] | None]]:
    """Check that images and scores agree, and return the images as arrays.

    Raises:
      ValueError: originals without scores or the reverse, or counts that differ.
    """
    scores = result["scores"]
    if (scores is None) != (originals is None):
        raise ValueError(
            "originals and result['scores'] go together: give both, or neither when no truth is "
            f"known; got originals {'absent' if originals is None else 'present'}, scores "
            f"{'absent' if scores is None else 'present'}."
        )
    if originals is not None:
        originals = pixels_of.check_images("originals", originals)
        if len(originals) != scores["num_true"]:
            raise ValueError(
                f"originals must hold the {scores['num_true']} true images that were scored, "
                f"got {len(originals)}."
            )
    return originals, pixels_of.check_aligned(reconstructions, originals)


def _header(result: Mapping[str, Any]) -> Html:
    data, scores = result["data"], result["scores"]
    height, width, channels = data["image_shape"]
    size = words.plural(data["num_client"], "image")
    facts = [
        ("Data", f"{data['name']}, {size}" if data["num_client"] else data["name"]),
        ("Image", f"{height} × {width}, {'grey' if channels == 1 else 'RGB'}"),
    ]
    if scores is not None:
        rate = scores["success_rate"][str(HEADLINE_DB)]
        interval = f"{words.percent(rate['low'])} to {words.percent(rate['high'])}"
        facts += [
            ("Median PSNR", words.decibel(scores["psnr"]["median"])),
            ("Median SSIM", words.number(scores["ssim"]["median"])),
            (
                f"≥ {HEADLINE_DB} dB (95% CI)",
                f"{words.percent(rate['rate'])} ({interval})",
            ),
        ]
    facts.append(("Time", words.seconds(result["timings"]["total_s"])))
    return element(
        "header",
        element("p", f"jgia · {result['attack']['name']}", class_="kicker"),
        element("h1", words.verdict(result)),
        element("p", words.summary(result), class_="lead"),
        element("div", definitions(facts), class_="facts"),
    )


def _threat_model(result: Mapping[str, Any]) -> Html:
    answers = definitions(words.threat_model_words(result["threat_model"]))
    return section("Threat model", element("div", answers, class_="answers"), id_="threat-model")


def _scores(result: Mapping[str, Any]) -> Html:
    scores = result["scores"]
    if scores is None:
        text = "Not scored: no true images were given. Attack and statuses are as usual."
        return section("Scores", element("p", text), id_="scores")
    psnr, quantiles = scores["psnr"], scores["psnr"]["quantiles"]
    distribution = table(
        ["", *(f"{level}%" for level in LEVELS)],
        [["PSNR", *(_plain_decibel(quantiles[level]) for level in LEVELS)]],
        caption="Quantiles over matched images",
    )
    counts = [
        ("Median, matched", _plain_decibel(psnr["median"])),
        ("Median, all images", _plain_decibel(psnr["median_all"])),
        ("Capped mean", _plain_decibel(psnr["mean_capped"])),
        ("PSNR of mean MSE", _plain_decibel(psnr["of_mean_mse"])),
        ("Mean squared error", words.number(scores["mse"])),
        ("Median SSIM", words.number(scores["ssim"]["median"])),
    ]
    if "label_accuracy" in scores:
        counts.append(("Labels found", words.percent(scores["label_accuracy"])))
    if "lpips" in scores:
        counts.append(("Median LPIPS", words.number(scores["lpips"]["median"])))
    notes = [scores[name]["note"] for name in ("ssim", "lpips") if "note" in scores.get(name, {})]
    meanings = [m for m in words.METRIC_MEANINGS if m[0] != "LPIPS" or "lpips" in scores]
    return section(
        "Scores",
        _success_table(scores),
        _comparison_table(result),
        distribution,
        element("div", definitions(counts), class_="facts"),
        *(element("p", note, class_="note") for note in notes),
        element("h3", "What the numbers mean"),
        element("div", definitions(meanings), class_="answers"),
        id_="scores",
    )


def _plain_decibel(value: Number | None) -> str:
    return "–" if value is None else f"{value:.1f} dB"


def _success_table(scores: Mapping[str, Any]) -> Html:
    rows = []
    for threshold in THRESHOLDS:
        rate = scores["success_rate"][threshold]
        values = scores["psnr"]["per_image"]
        count = sum(value is not None and value >= float(threshold) for value in values)
        interval = f"{words.percent(rate['low'])} to {words.percent(rate['high'])}"
        rows.append(
            [
                f"≥ {threshold} dB",
                f"{count} of {scores['num_true']}",
                words.percent(rate["rate"]),
                interval,
                _bar(rate),
            ]
        )
    headers = ["PSNR", "Images", "Rate", "95% interval", "Rate with its interval"]
    caption = "Success rates over all true images"
    return table(headers, rows, caption=caption, class_="wide rates")


def _bar(rate: Mapping[str, Number]) -> Html:
    """A bar to the rate with a whisker over the interval; the numbers stand beside it."""
    low, high = 100 * rate["low"], 100 * rate["high"]
    fill = element("span", class_="fill", style=f"width:{100 * rate['rate']:.1f}%")
    whisker = element("span", class_="whisker", style=f"left:{low:.1f}%;width:{high - low:.1f}%")
    return element("span", fill, whisker, class_="bar", aria_hidden="true")


def _comparison_table(result: Mapping[str, Any]) -> Html:
    scores = result["scores"]
    attack = {**scores["psnr"], "success_rate": scores["success_rate"]}
    rows = []
    for name, values in [(result["attack"]["name"], attack), *scores["baselines"].items()]:
        rates = values.get("success_rate")
        rows.append(
            [
                element("strong", name) if values is attack else name.replace("_", " "),
                _plain_decibel(values["median"]),
                _plain_decibel(values["mean_capped"]),
                *(words.percent(rates[t]["rate"]) if rates else "–" for t in THRESHOLDS),
            ]
        )
    headers = ["", "Median PSNR", "Capped mean", *(f"≥ {t} dB" for t in THRESHOLDS)]
    return table(headers, rows, caption="Beside guesses that never saw the update")


def _candidates(result: Mapping[str, Any]) -> Html:
    attack = result["attack"]
    rows = [
        [status.replace("_", " "), str(count), words.STATUS_MEANINGS.get(status, "–")]
        for status, count in sorted(attack["status_counts"].items(), key=lambda item: -item[1])
        if count
    ]
    expected = attack["expected_recovered"]
    text = f"{words.plural(attack['num_candidates'], 'candidate')}, ordered and accepted by: "
    text += f"{attack['selected_by']}."
    if expected is not None:
        text += f" Theory expected {words.number(expected)} images to be recoverable."
    parts = [element("p", text)]
    if rows:
        caption = "Candidates by status"
        parts.append(table(["Status", "Count", "Meaning"], rows, caption=caption, class_="prose"))
    if attack["stats"]:
        shown = {k: v for k, v in attack["stats"].items() if not k.startswith("curve_")}
        parts.append(_details("Attack statistics", flatten(shown)))
    return section("Candidates", *parts, id_="candidates")


def _details(title: str, pairs: Sequence[tuple[str, str]]) -> Html:
    rows = [[name, value] for name, value in pairs]
    inner = table(["Name", "Value"], rows, caption=title, class_="keys")
    return element("details", element("summary", title), inner)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mapping as (dotted name, text) pairs.

    >>> flatten({"a": {"b": 1}, "c": [2, 3], "d": None})
    [('a.b', '1'), ('c', '2, 3'), ('d', 'none')]
    """
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", _text(value)))
    return pairs


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _reproduce(result: Mapping[str, Any]) -> Html:
    phases = sorted(result["timings"].items(), key=lambda item: item[0] == "total_s")
    timings = [[_TIMING_NAMES.get(name, name), words.seconds(value)] for name, value in phases]
    data = result["data"]
    facts = [
        ("Data", data["name"]),
        ("Provenance", data["provenance"]),
        ("Public images", str(data["num_public"])),
        ("Classes", str(data["num_classes"])),
        ("Seed", str(result["seed"])),
        *flatten(result["environment"]),
        ("Schema", result["version"]),
    ]
    return section(
        "Reproduce",
        element(
            "p",
            "The same versions on the same device give the same result. Click selects the line.",
        ),
        element("pre", element("code", result["command"]), class_="command"),
        table(["Phase", "Wall-clock time"], timings, caption="Timings", class_="keys"),
        table(
            ["Name", "Value"],
            [[name, value] for name, value in facts],
            caption="Data, seed and environment",
            class_="keys",
        ),
        _details("Configuration", flatten(result["config"])),
        id_="reproduce",
    )
