"""The images of the report: originals over reconstructions, each pair with its PSNR and status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jgia.report import images as pixels_of
from jgia.report import words
from jgia.report.markup import Html, element, section
from jgia.report.records import HEADLINE_DB, RECOGNIZABLE_DB, Number

MAX_SHOWN = 512
"""Pairs shown in the page and in the picture; the arrays hold all of them."""

_IMAGE_BUDGET = 6_000_000  # characters of embedded images; keeps a page below 8 MB


def image_section(
    result: Mapping[str, Any],
    originals: Float[np.ndarray, "n h w c"] | None,
    aligned: Sequence[Float[np.ndarray, "h w c"] | None],
    statuses: Sequence[str | None] | None,
    labels: Sequence[str] | None,
) -> Html:
    """The section with the images themselves; arguments as for ``render_html``, checked there."""
    shown = min(len(aligned), MAX_SHOWN)
    if shown == 0:
        return section("Images", element("p", "No image was reconstructed."), id_="images")
    tops = [None] * shown if originals is None else list(originals[:shown])
    addresses, factor = pixels_of.encode_within([*tops, *aligned[:shown]], budget=_IMAGE_BUDGET)
    height, width, _ = result["data"]["image_shape"]
    tile, enlarged = _tile_width(shown, width, factor)
    psnr = result["scores"]["psnr"]["per_image"] if result["scores"] else [None] * shown
    items = [
        _pair(
            index,
            addresses[index],
            addresses[shown + index],
            psnr=psnr[index],
            status=statuses[index] if statuses else None,
            label=labels[index] if labels else None,
            scored=originals is not None,
        )
        for index in range(shown)
    ]
    grid = element(
        "ol",
        *items,
        class_="pairs enlarged" if enlarged else "pairs",
        style=f"--tile:{tile}px;--cell:{max(tile, 72)}px;--shape:{width}/{height}",
    )
    title = "Reconstructions" if originals is None else "Originals over reconstructions"
    return section(title, *_image_notes(result, aligned, shown, factor), grid, id_="images")


def _tile_width(count: int, width: int, factor: int) -> tuple[int, bool]:
    """Shown width in CSS pixels, and whether that is a whole multiple of the image's width."""
    target = 192 if count <= 4 else 96 if count <= 64 else 64
    if factor == 1 and width <= target:
        return width * max(1, round(target / width)), True
    return max(target, 112), False


def _image_notes(
    result: Mapping[str, Any], aligned: Sequence[object], shown: int, factor: int
) -> Iterator[Html]:
    scores = result["scores"]
    if scores is None:
        yield element("p", "No true images were given; best score of the attack first.")
    else:
        missing = sum(image is None for image in aligned)
        text = "Top: what the client trained on. Bottom: what the server reconstructed from the "
        text += "update. PSNR and the attack's own status are below each pair."
        if missing:
            text += f" Hatched: {words.plural(missing, 'image')} without a reconstruction."
        extra = scores["num_reconstructed"] - (len(aligned) - missing)
        if extra > 0:
            text += f" {words.plural(extra, 'further reconstruction')} matched no true image and "
            text += "can be found in reconstructions.npz."
        yield element("p", text)
    if shown < len(aligned):
        yield element("p", f"The first {shown} of {len(aligned)} are shown.", class_="note")
    if factor > 1:
        yield element(
            "p",
            f"Shown averaged over {factor} × {factor} pixels to keep this page small; "
            "reconstructions.npz has every pixel of the reconstructions.",
            class_="note",
        )


def _pair(
    index: int,
    top: str | None,
    bottom: str | None,
    *,
    psnr: Number | None,
    status: str | None,
    label: str | None,
    scored: bool,
) -> Html:
    name = f"image {index + 1}" + (f" ({label})" if label else "")
    score = words.decibel(psnr) if bottom else "none"
    parts = []
    if top is not None:
        parts.append(element("img", src=top, alt=f"Original {name}"))
    if bottom is None:
        parts.append(
            element("div", class_="hatched", role="img", aria_label=f"No reconstruction of {name}")
        )
    else:
        known = f", PSNR {score}" if scored else ""
        parts.append(element("img", src=bottom, alt=f"Reconstruction of {name}{known}"))
    caption = [element("b", score)] if scored else []
    if label:
        caption.append(element("span", label, class_="label"))
    if status:
        caption.append(element("span", status.replace("_", " "), class_="status"))
    figure = element("figure", *parts, element("figcaption", *caption))
    return element("li", figure, class_=_quality(psnr) if scored else None)


def _quality(psnr: Number | None) -> str:
    if psnr is None:
        return "absent"
    return "recovered" if psnr >= HEADLINE_DB else "partial" if psnr >= RECOGNIZABLE_DB else "poor"
