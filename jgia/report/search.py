"""How an iterative attack went: its loss curve, and its images on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jgia.report import images as pixels_of
from jgia.report.markup import Html, element, join, section
from jgia.report.records import Number

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 30
_IMAGES_SHOWN = 8
_BUDGET = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchHistory:
    """What a search left.

    Attributes:
      steps: (T,) step numbers, increasing, from 1.
      losses: (T,) the attack's loss at these steps; NaN where a step was undone.
      frame_steps: (F,) steps at which images were kept.
      frames: (F, J, H, W, C) pixels in [0, 1].
    """

    steps: np.ndarray
    losses: np.ndarray
    frame_steps: np.ndarray
    frames: np.ndarray

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(
                f"steps and losses must be as many, got {len(self.steps)} and {len(self.losses)}."
            )
        if len(self.frame_steps) != len(self.frames):
            raise ValueError(
                f"frame_steps and frames must be as many, got {len(self.frame_steps)} and "
                f"{len(self.frames)}."
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into ``reconstructions.npz``."""
        return {
            "curve_steps": np.asarray(self.steps, np.int64),
            "curve_losses": np.asarray(self.losses, np.float64),
            "frame_steps": np.asarray(self.frame_steps, np.int64),
            "frames": np.asarray(self.frames, np.float32),
        }


class Line(NamedTuple):
    """One curve of a :func:`chart`.

    Attributes:
      places: from left to right, any unit.
      values: positive.
      dots: whether each point is marked.
      aside: whether it stands back behind the others.
    """

    places: Sequence[Number]
    values: Sequence[Number]
    dots: bool = False
    aside: bool = False


def search_section(history: SearchHistory | None, *, staged: bool = False) -> Html:
    """The section of the page; nothing where there was no search.

    Args:
      history: of the search.
      staged: whether another section shows its images, one of each stage; ends of stages are
        then marked on the curve.
    """
    if history is None:
        return Html("")
    finite = np.isfinite(history.losses) & (history.losses > 0)
    parts: list[Html] = []
    if finite.sum() >= 2:
        ends = history.frame_steps[:-1].tolist() if staged else []
        parts.append(_curve(history.steps[finite], history.losses[finite], ends))
    if len(history.frames) and history.frames.shape[1] and not staged:
        parts.append(_film(history))
    if not parts:
        return Html("")
    return section("How the search went", *parts, id_="search")


def _curve(steps: np.ndarray, losses: np.ndarray, ends: Sequence[int]) -> Html:
    """Loss over steps, the loss logarithmic."""
    last = max(2, int(steps[-1]))
    label = f"Loss over {last} steps: from {losses[0]:.3g} to {losses.min():.3g}"
    svg = chart(
        [Line(steps.tolist(), losses.tolist())],
        ticks=[(step, f"{step}") for step in (1, (1 + last) // 2, last)],
        rules=ends,
        label=label,
    )
    caption = f"{label} (logarithmic scale)"
    if ends:
        caption += "; upright lines where a stage ends"
    return element("figure", svg, element("figcaption", caption))


def chart(
    lines: Sequence[Line],
    *,
    ticks: Sequence[tuple[Number, str]],
    label: str,
    rules: Sequence[Number] = (),
) -> Html:
    """Curves with a logarithmic axis of values.

    Args:
      lines: at least one, with at least one point; those that stand aside first.
      ticks: places and their names below the axis; the first and last are its ends.
      label: what is seen, for those who do not see it.
      rules: places of upright lines.
    """
    values = [value for line in lines for value in line.values]
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 0.1:
        low, high = low - 0.05, high + 0.05
    first, last = ticks[0][0], ticks[-1][0]

    def place(where: Number, level: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (where - first) / (last - first)
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - level) / (high - low)
        return round(x, 1), round(y, 1)

    marks: list[Html] = []
    for level in _levels(low, high):
        x, y = place(last, level)
        marks.append(element("line", x1=_LEFT, x2=x, y1=y, y2=y, class_="gridline"))
        text = f"{10**level:.2g}"
        marks.append(element("text", text, x=_LEFT - 8, y=y + 4, text_anchor="end"))
    for where, text in ticks:
        anchor = "end" if where == last else "middle"
        x, _ = place(where, low)
        marks.append(element("text", text, x=x, y=_HEIGHT - 8, text_anchor=anchor))
    for where in rules:
        x, bottom = place(where, low)
        marks.append(element("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="gridline"))
    return element(
        "svg",
        *marks,
        *(part for line in lines for part in _drawn(line, place)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
        class_="curve",
    )


def _drawn(line: Line, place: Callable[[Number, float], tuple[float, float]]) -> Iterator[Html]:
    points = [place(x, math.log10(v)) for x, v in zip(line.places, line.values, strict=True)]
    class_ = "aside" if line.aside else None
    yield element(
        "polyline",
        points=" ".join(f"{x},{y}" for x, y in points),
        fill="none",
        stroke="currentColor",
        stroke_width=2,
        stroke_linejoin="round",
        class_=class_,
    )
    for x, y in points if line.dots else ():
        yield element("circle", cx=x, cy=y, r=4, class_=f"dot {class_ or ''}".strip())


def _levels(low: float, high: float) -> list[float]:
    """Powers of ten inside the range, at most five; else its ends."""
    inside = list(range(math.ceil(low), math.floor(high) + 1))
    inside = inside[:: max(1, math.ceil(len(inside) / 5))]
    return [float(level) for level in inside] if len(inside) >= 2 else [low, high]


def _film(history: SearchHistory) -> Html:
    """Images side by side, one row per kept step; one column where there are few images."""
    shown = history.frames[:, :_IMAGES_SHOWN]
    flat = [image for row in shown for image in row]
    addresses, _ = pixels_of.encode_within(flat, budget=_BUDGET)
    rows = []
    for f, step in enumerate(history.frame_steps):
        first = f * shown.shape[1]
        pictures = [
            element("img", src=address, alt=f"image {j + 1} after {step} steps")
            for j, address in enumerate(addresses[first : first + shown.shape[1]])
        ]
        rows.append(element("div", element("span", f"{step}"), *pictures, class_="frame"))
    more = history.frames.shape[1] - shown.shape[1]
    note = f" The first {_IMAGES_SHOWN} of {history.frames.shape[1]} images." if more > 0 else ""
    caption = element("figcaption", f"Best images after so many steps.{note}")
    kind = "film wide" if shown.shape[1] <= 2 else "film"
    return element("figure", element("div", join(*rows), class_=kind), caption)
