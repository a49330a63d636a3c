"""What any attack could have got, beside what this one did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jgia.report import images as pixels_of
from jgia.report import words
from jgia.report.markup import Html, element, join, section, table

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 30
_SIDE = 300
_BUDGET = 1 << 19
_MOST_LAYERS = 40
_MOST_MAPS = 8
_WORDS = {
    "gaussian": "the mean and covariance of public images",
    "isotropic": "the mean variance of public images' pixels",
    "low_rank": "the leading principal components of public images",
}


def risk_section(
    risk: Mapping[str, Any] | None,
    originals: Float[np.ndarray, "n h w c"] | None,
    pixel_errors: Float[np.ndarray, "k h w c"] | None,
) -> Html:
    """The section of the page; nothing where no risk was estimated.

    Args:
      risk: ``result["risk"]``.
      originals: the true images.
      pixel_errors: of the first images: expected squared error of every pixel.
    """
    if risk is None:
        return Html("")
    count = words.plural(risk["num_images"], "image")
    lead = (
        f"Of {count}, the best attack recovers {words.percent(risk['mean'])} of what is not known "
        f"beforehand on average, {words.percent(risk['worst'])} at worst. That is not an attack "
        "but an estimate from the update's derivative at the client's own images: linearized, for "
        "an attacker who knows the labels, the other images of the batch and, beforehand, "
        f"{_WORDS[risk['prior']]}."
    )
    noise = f"Noise on every shared entry: standard deviation {words.number(risk['noise_std'])}"
    if risk["noise_from"] == "assumed":
        noise += ", assumed: the attacked update carries less, so the attack may do better"
    if risk["left_out"]:
        noise += f". Not in the estimate: {', '.join(risk['left_out'])}"
    parts = [element("p", lead), element("p", f"{noise}.", class_="note")]
    parts += [_images(risk), _scatter(risk["images"])]
    if originals is not None and pixel_errors is not None and len(pixel_errors):
        shown = originals[: len(pixel_errors)]
        parts.append(_pixel_maps(shown, pixel_errors, risk["prior_energy"]))
    parts += [_layers(risk["layers"]), _spectrum(risk["spectrum"])]
    return section("Risk without an attack", *parts, id_="risk")


def _images(risk: Mapping[str, Any]) -> Html:
    rows = [
        [
            f"{index + 1}",
            words.percent(row["risk"]),
            _decibel(row["predicted_psnr"]),
            _decibel(row["attack_psnr"]),
            "–" if row["information"] is None else f"{row['information'] / math.log(2):.0f}",
            _ratio(row["linearization_ratio"]),
        ]
        for index, row in enumerate(risk["images"])
    ]
    headers = ["Image", "Risk", "Best attack", "This attack", "Bits that leak", "Nonlinearity"]
    table_ = table(headers, rows, caption="Predicted and attained, per image", class_="wide")
    note = (
        "Above 0.3 in the last column the release bends too much within what the attacker is left "
        "uncertain of for the prediction to be relied on."
    )
    return join(table_, element("p", note, class_="note"))


def _decibel(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} dB"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _scatter(rows: list[Mapping[str, Any]]) -> Html:
    """Predicted against attained PSNR, with the diagonal; nothing for fewer than two points."""
    points = [
        (row["predicted_psnr"], row["attack_psnr"])
        for row in rows
        if row["predicted_psnr"] is not None and row["attack_psnr"] is not None
    ]
    if len(points) < 2:
        return Html("")
    values = [value for point in points for value in point]
    low = 5.0 * math.floor(min(values) / 5)
    high = max(5.0 * math.ceil(max(values) / 5), low + 5.0)

    def place(x: float, y: float) -> tuple[float, float]:
        span = _SIDE - _LEFT - _RIGHT
        along, up = ((v - low) / (high - low) for v in (x, y))
        return round(_LEFT + span * along, 1), round(_TOP + span * (1 - up), 1)

    (x1, y1), (x2, y2) = place(low, low), place(high, high)
    marks = [element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="gridline")]
    for value in (low, high):
        x, y = place(value, value)
        anchor = "start" if value == low else "end"
        marks.append(element("text", f"{value:g}", x=x, y=y1 + 18, text_anchor=anchor))
        marks.append(element("text", f"{value:g}", x=_LEFT - 8, y=y + 4, text_anchor="end"))
    dots = [
        element("circle", cx=x, cy=y, r=4, class_="dot") for x, y in (place(*p) for p in points)
    ]
    label = f"Attained over predicted PSNR of {len(points)} images, in dB"
    size = _SIDE - _RIGHT - _LEFT + _TOP + _BOTTOM
    svg = element(
        "svg",
        *marks,
        *dots,
        viewBox=f"0 0 {_SIDE} {size}",
        role="img",
        aria_label=label,
        class_="curve square",
    )
    text = f"{label}: on the line this attack does what the best one is predicted to."
    return element("figure", svg, element("figcaption", text))


def _pixel_maps(
    originals: Float[np.ndarray, "k h w c"],
    errors: Float[np.ndarray, "k h w c"],
    prior_energy: float,
) -> Html:
    """The images over themselves with what stays hidden covered."""
    prior_std = math.sqrt(prior_energy / originals[0].size)
    hidden = np.sqrt(np.maximum(errors, 0).mean(axis=-1, keepdims=True)) / prior_std
    hidden = np.clip(hidden, 0.0, 1.0)
    covered = originals * (1 - hidden) + 0.5 * hidden
    count = min(len(originals), _MOST_MAPS)
    addresses, _ = pixels_of.encode_within([*originals[:count], *covered[:count]], budget=_BUDGET)
    rows = []
    for name, shown in (("image", addresses[:count]), ("leaks", addresses[count:])):
        pictures = [
            element("img", src=address, alt=f"{name} {index + 1}")
            for index, address in enumerate(shown)
        ]
        rows.append(element("div", element("span", name), *pictures, class_="frame"))
    text = (
        "Which pixels leak: below each image what the best attack is expected to see of it. A "
        "pixel is gray in proportion to its expected error, wholly at the deviation of public "
        f"images' pixels, {prior_std:.2f}."
    )
    return element("figure", element("div", *rows, class_="film"), element("figcaption", text))


def _layers(layers: Mapping[str, Mapping[str, float]]) -> Html:
    if not layers:
        return Html("")
    order = sorted(layers, key=lambda name: -layers[name]["mean"])
    rows = [
        [
            name,
            words.percent(layers[name]["mean"]),
            words.percent(layers[name]["worst"]),
            _bar(layers[name]["mean"]),
        ]
        for name in order[:_MOST_LAYERS]
    ]
    caption = "Risk of each layer's update alone"
    if len(order) > _MOST_LAYERS:
        caption += f": the {_MOST_LAYERS} largest of {len(order)}"
    return table(["Layer", "Mean", "Worst", "Mean"], rows, caption=caption, class_="wide rates")


def _bar(share: float) -> Html:
    fill = element("span", class_="fill", style=f"width:{100 * share:.1f}%")
    return element("span", fill, class_="bar", aria_hidden="true")


def _spectrum(spectrum: Mapping[str, Any] | None) -> Html:
    """Signal over noise by direction, both logarithmic, with a line where the noise is."""
    if spectrum is None or len(spectrum["ranks"]) < 2:
        return Html("")
    pairs = zip(spectrum["ranks"], spectrum["signal_over_noise"], strict=True)
    points = [(math.log10(rank), math.log10(value)) for rank, value in pairs if value > 0]
    if len(points) < 2:
        return Html("")
    levels = [level for _, level in points]
    low, high = min(*levels, -0.5), max(*levels, 0.5)
    last = points[-1][0] or 1.0

    def place(along: float, level: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * along / last
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - level) / (high - low)
        return round(x, 1), round(y, 1)

    line = element(
        "polyline",
        points=" ".join(f"{x},{y}" for x, y in (place(*point) for point in points)),
        fill="none",
        stroke="currentColor",
        stroke_width=2,
        stroke_linejoin="round",
    )
    marks: list[Html] = []
    for level in sorted({float(math.ceil(low)), 0.0, float(math.floor(high))}):
        _, y = place(0.0, level)
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="gridline"))
        marks.append(element("text", f"{10**level:g}", x=_LEFT - 8, y=y + 4, text_anchor="end"))
    for rank, anchor in ((spectrum["ranks"][0], "middle"), (spectrum["ranks"][-1], "end")):
        x, _ = place(math.log10(rank), low)
        marks.append(element("text", f"{rank}", x=x, y=_HEIGHT - 8, text_anchor=anchor))
    label = "Singular values of the update's derivative over the noise, by direction"
    svg = element(
        "svg",
        *marks,
        line,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
        class_="curve",
    )
    text = f"{label} (both logarithmic): below 1 the noise hides a direction."
    return element("figure", svg, element("figcaption", text))
