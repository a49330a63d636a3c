"""How an iterative attack went: its loss curve, and its images on the way."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jgia.report import images as pixels_of
from jgia.report.markup import Html, element, join, section

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


def search_section(history: SearchHistory | None) -> Html:
    """The section of the page; nothing where there was no search."""
    if history is None:
        return Html("")
    finite = np.isfinite(history.losses) & (history.losses > 0)
    parts: list[Html] = []
    if finite.sum() >= 2:
        parts.append(_curve(history.steps[finite], history.losses[finite]))
    if len(history.frames) and history.frames.shape[1]:
        parts.append(_film(history))
    if not parts:
        return Html("")
    return section("How the search went", *parts, id_="search")


def _curve(steps: np.ndarray, losses: np.ndarray) -> Html:
    """Loss over steps, the loss logarithmic."""
    low, high = math.log10(losses.min()), math.log10(losses.max())
    if high - low < 0.1:
        low, high = low - 0.05, high + 0.05
    last = max(2, int(steps[-1]))

    def place(step: int, level: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - 1) / (last - 1)
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - level) / (high - low)
        return round(x, 1), round(y, 1)

    points = (place(s, math.log10(v)) for s, v in zip(steps.tolist(), losses.tolist(), strict=True))
    line = element(
        "polyline",
        points=" ".join(f"{x},{y}" for x, y in points),
        fill="none",
        stroke="currentColor",
        stroke_width=2,
        stroke_linejoin="round",
    )
    marks: list[Html] = []
    for level in _levels(low, high):
        x, y = place(last, level)
        marks.append(element("line", x1=_LEFT, x2=x, y1=y, y2=y, class_="gridline"))
        text = f"{10**level:.2g}"
        marks.append(element("text", text, x=_LEFT - 8, y=y + 4, text_anchor="end"))
    for step in (1, (1 + last) // 2, last):
        x, _ = place(step, low)
        anchor = "end" if step == last else "middle"
        marks.append(element("text", f"{step}", x=x, y=_HEIGHT - 8, text_anchor=anchor))
    first, best = losses[0], losses.min()
    label = f"Loss over {last} steps: from {first:.3g} to {best:.3g}"
    svg = element(
        "svg",
        *marks,
        line,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
        class_="curve",
    )
    return element("figure", svg, element("figcaption", f"{label} (logarithmic scale)"))


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
