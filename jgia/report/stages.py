"""How a search in stages went: every stage's images, distances, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jgia.report import images as pixels_of
from jgia.report import words
from jgia.report.markup import Html, definitions, element, join, section, table
from jgia.report.search import Line, SearchHistory, chart

_IMAGES_SHOWN = 32
_BUDGET = 1_000_000  # characters of embedded images
_RESTARTS_LISTED = 6


def stages_section(
    result: Mapping[str, Any],
    originals: Float[np.ndarray, "n h w c"] | None,
    history: SearchHistory | None,
    labels: Sequence[str] | None,
) -> Html:
    """The section of the page; nothing where the attack has no stages.

    Args:
      result: a valid result.
      originals: (N, H, W, C) true images, or ``None``.
      history: of the restart returned, one frame for each stage.
      labels: a caption per image, as the page shows them.
    """
    search = result.get("staged_search")
    if search is None:
        return Html("")
    names = ", ".join(stage["searched"] for stage in search["stages"])
    first = f"{result['attack']['name']} searched the generator {search['prior']}: {names}"
    if len(search["stages"]) > 1:
        first += "; each stage from where the one before ended"
    first += f". Returned: {search['why']}. The choice knows distances alone, never the originals."
    parts = [
        element("p", first),
        element("div", definitions(_facts(search)), class_="facts"),
        _distance_curve(search),
        _table(search),
        _film(result, search, originals, history, labels),
    ]
    return section("Stages", *parts, id_="stages")


def shows_stages(result: Mapping[str, Any], history: SearchHistory | None) -> bool:
    """Whether there is one image of every stage to show."""
    stages = result.get("staged_search", {}).get("stages")
    return stages is not None and history is not None and len(history.frames) == len(stages)


def _facts(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = search["stages"]
    limits = []
    if search["budget_seconds"] is not None:
        limits.append(words.seconds(search["budget_seconds"]))
    if search["budget_steps"] is not None:
        limits.append(words.plural(search["budget_steps"], "step"))
    budget = ", ".join(limits) or "none set"
    if limits:
        budget += ", used up" if search["stopped_early"] else ", all steps done"
    return [
        ("Stages", str(len(stages))),
        ("Restarts", str(len(stages[0]["distances"]))),
        ("Steps of each", str(sum(stage["steps"] for stage in stages))),
        ("Time", words.seconds(sum(stage["seconds"] for stage in stages))),
        ("Budget", budget),
    ]


def _distance_curve(search: Mapping[str, Any]) -> Html:
    """Distance after each stage, one line for each restart, that returned in front."""
    stages, chosen = search["stages"], search["restart"]
    lines = []
    for restart in range(len(stages[0]["distances"])):
        known = [(k, stage["distances"][restart]) for k, stage in enumerate(stages)]
        known = [(k, value) for k, value in known if value is not None and value > 0]
        if known:
            places, values = zip(*known, strict=True)
            lines.append(Line(places, values, dots=True, aside=restart != chosen))
    if len(stages) < 2 or not lines:
        return Html("")
    label = f"Gradient distance after each of {len(stages)} stages"
    svg = chart(
        sorted(lines, key=lambda line: not line.aside),
        ticks=[(k, f"stage {k}") for k in range(len(stages))],
        label=label,
    )
    caption = f"{label}, one line for each restart (logarithmic scale); that of restart {chosen}, "
    return element("figure", svg, element("figcaption", caption + "which was returned, in front"))


def _table(search: Mapping[str, Any]) -> Html:
    stages, chosen = search["stages"], (search["stage"], search["restart"])
    restarts = range(len(stages[0]["distances"]))
    listed = [r for r in restarts if r < _RESTARTS_LISTED or r == search["restart"]]
    scored = all("psnr" in stage for stage in stages)
    rows = []
    for k, stage in enumerate(stages):
        cells = [f"{k}: {stage['searched']}", str(stage["steps"]), words.seconds(stage["seconds"])]
        for r in listed:
            text = words.number(stage["distances"][r], 4)
            cells.append(element("strong", text) if (k, r) == chosen else text)
        if scored:
            known = [value for value in stage["psnr"] if value is not None]
            cells.append(words.decibel(float(np.median(known)) if known else None))
        rows.append(cells)
    headers = ["Stage", "Steps", "Time", *(f"Restart {r}" for r in listed)]
    caption = "Gradient distance after each stage; returned: in bold"
    if len(listed) < len(restarts):
        caption += f". The first {_RESTARTS_LISTED} of {len(restarts)} restarts"
    if scored:
        headers.append(f"Median PSNR, restart {search['restart']}")
    return table(headers, rows, caption=caption)


def _film(
    result: Mapping[str, Any],
    search: Mapping[str, Any],
    originals: Float[np.ndarray, "n h w c"] | None,
    history: SearchHistory | None,
    labels: Sequence[str] | None,
) -> Html:
    """One row for each returned image: the original, then the image of every stage."""
    if history is None or not shows_stages(result, history):
        return Html("")
    rows = _rows(result, history.frames.shape[1])
    shown = rows[:_IMAGES_SHOWN]
    if not shown:
        return Html("")
    height, width = history.frames.shape[2:4]
    tops = [] if originals is None else [originals[true] for true, _ in shown]
    stages = [frame[j] for _, j in shown for frame in history.frames]
    addresses, factor = pixels_of.encode_within([*tops, *stages], budget=_BUDGET)
    tile = width * max(1, round(96 / width)) if factor == 1 and width <= 96 else 112
    count = len(search["stages"])
    body = []
    for row, (true, _) in enumerate(shown):
        name = f"image {true + 1}"
        cells = []
        if tops:
            cells.append(_cell(addresses[row], f"Original {name}", ""))
        for k, stage in enumerate(search["stages"]):
            caption = words.decibel(stage["psnr"][true]) if "psnr" in stage else ""
            address = addresses[len(tops) + row * count + k]
            cells.append(_cell(address, f"{name} after stage {k}", caption))
        label = labels[true] if labels and originals is not None else None
        body.append([f"{name} ({label})" if label else name, *cells])
    headers = ["", *(["original"] if tops else [])]
    for k in range(count):
        name = f"stage {k}"
        headers.append(element("strong", f"{name}, returned") if k == search["stage"] else name)
    caption = f"Images of restart {search['restart']} after each stage"
    if len(shown) < len(rows):
        caption += f"; the first {len(shown)} of {len(rows)}"
    film = table(headers, body, caption=caption, class_="stages")
    return element("div", film, style=f"--tile:{tile}px;--shape:{width}/{height}")


def _rows(result: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
    """(index on the page, index among the returned images) of every returned image."""
    returned = words.num_accepted(result)
    if result["scores"] is None:
        return [(j, j) for j in range(min(count, returned))]
    matching = result["scores"]["matching"]
    return [(true, j) for true, j in enumerate(matching) if j is not None and j < count]


def _cell(address: str | None, alt: str, caption: str) -> Html:
    return join(element("img", src=address, alt=alt), element("span", caption))
