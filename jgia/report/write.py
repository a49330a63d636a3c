"""The files of a report: page, result, arrays and picture."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jgia import _io
from jgia.report import images as pixels_of
from jgia.report.figures import grid_png
from jgia.report.html import render_html
from jgia.report.pairs import MAX_SHOWN
from jgia.report.schema import in_schema_order, validate_result
from jgia.report.search import SearchHistory

FILE_NAMES = ("report.html", "result.json", "reconstructions.npz", "grid.png")
"""What :func:`write_report` writes."""


def write_report(
    folder: str | Path,
    result: Mapping[str, Any],
    *,
    originals: Float[np.ndarray, "n h w c"] | None,
    reconstructions: Float[np.ndarray, "j h w c"],
    scores: Float[np.ndarray, " j"],
    statuses: Sequence[str],
    labels: Sequence[str] | None = None,
    classes: Int[np.ndarray, " j"] | None = None,
    history: SearchHistory | None = None,
    pixel_errors: Float[np.ndarray, "k h w c"] | None = None,
) -> dict[str, Path]:
    """Write ``report.html``, ``result.json``, ``reconstructions.npz`` and ``grid.png``.

    Everything is rendered in memory first and each file is replaced atomically, so that a failure
    leaves an earlier report as it was.

    Args:
      folder: made if it does not exist.
      result: a result that passes :func:`jgia.report.validate_result`; its
        ``scores.matching`` says which reconstruction belongs to which original.
      originals: (N, H, W, C) true images in [0, 1]; ``None`` exactly when ``result["scores"]`` is.
      reconstructions: (J, H, W, C) accepted images in [0, 1], best first; J may be 0.
      scores: (J,) the attack's own confidence of each.
      statuses: J words, such as :class:`jgia.observation.Status` members.
      labels: a caption per shown image (per original, or per reconstruction without originals).
      classes: (J,) the label of each reconstruction that the attack inferred or was given.
      history: of the search, for attacks that iterate.
      pixel_errors: expected squared error of every pixel of the first originals, where a risk was
        estimated.

    Returns:
      The path of each file by its name.

    Raises:
      ValueError: the result is invalid, the arrays disagree with it, or the folder cannot be
        written.
    """
    validate_result(result)
    images = _check_reconstructions(result, reconstructions, scores, statuses)
    target = _io.require_writable_folder(folder)
    words = [str(status) for status in statuses]
    index = truth_index(result, len(images))
    aligned, aligned_statuses = _align(result, images, words)
    per_image = result["scores"]["psnr"]["per_image"] if result["scores"] else [None] * len(aligned)
    shown = slice(0, MAX_SHOWN)
    contents = {
        "report.html": render_html(
            result,
            originals,
            aligned,
            statuses=aligned_statuses,
            labels=labels,
            history=history,
            pixel_errors=pixel_errors,
        ).encode("utf-8"),
        "result.json": to_json(result).encode("utf-8"),
        "reconstructions.npz": _npz(
            {
                "images": images.astype(np.float32),
                "scores": np.asarray(scores),
                "statuses": np.asarray(words, dtype=np.str_),
                "truth_index": index,
                **({} if classes is None else {"labels": np.asarray(classes, np.int64)}),
                **({} if history is None else history.arrays()),
                **({} if pixel_errors is None else {"pixel_errors": pixel_errors}),
            }
        ),
        "grid.png": grid_png(
            None if originals is None else originals[shown], aligned[shown], per_image[shown]
        ),
    }
    paths = {name: target / name for name in FILE_NAMES}
    for name, path in paths.items():
        try:
            _io.atomic_write_bytes(path, contents[name])
        except OSError as error:
            raise ValueError(
                f"cannot write {str(path)!r} ({error.strerror}); choose another folder with --out."
            ) from error
    return paths


def to_json(result: Mapping[str, Any]) -> str:
    """Strict JSON in the key order of the schema, indented, ending with a newline.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    return json.dumps(in_schema_order(result), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def truth_index(result: Mapping[str, Any], num_reconstructed: int) -> Int[np.ndarray, " j"]:
    """Index of the true image that each reconstruction was matched to, -1 where none was.

    The inverse of ``scores.matching``.
    """
    index = np.full(num_reconstructed, -1, np.int64)
    if result["scores"] is not None:
        for true, match in enumerate(result["scores"]["matching"]):
            if match is not None:
                index[match] = true
    return index


def _check_reconstructions(
    result: Mapping[str, Any],
    reconstructions: object,
    scores: np.ndarray,
    statuses: Sequence[str],
) -> Float[np.ndarray, "j h w c"]:
    images = pixels_of.check_images("reconstructions", reconstructions)
    shape = tuple(result["data"]["image_shape"])
    if images.shape[1:] != shape:
        raise ValueError(
            f"reconstructions must have image shape {shape} as in result['data'], got "
            f"{images.shape[1:]}."
        )
    if np.shape(scores) != (len(images),) or len(statuses) != len(images):
        raise ValueError(
            f"scores and statuses must have one entry per reconstruction, {len(images)}, got "
            f"shape {np.shape(scores)} and {len(statuses)}."
        )
    if result["scores"] is not None and result["scores"]["num_reconstructed"] != len(images):
        raise ValueError(
            f"reconstructions must hold the {result['scores']['num_reconstructed']} images that "
            f"were scored, got {len(images)}."
        )
    return images


def _align(
    result: Mapping[str, Any], images: Float[np.ndarray, "j h w c"], statuses: Sequence[str]
) -> tuple[list[Float[np.ndarray, "h w c"] | None], list[str | None]]:
    if result["scores"] is None:
        return list(images), list(statuses)
    matching = result["scores"]["matching"]
    aligned: list[np.ndarray | None] = []
    words: list[str | None] = []
    for match in matching:
        aligned.append(None if match is None else images[match])
        words.append(None if match is None else str(statuses[match]))
    return aligned, words


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # a fixed date: same arrays, same bytes
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return buffer.getvalue()
