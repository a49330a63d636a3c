"""What a drawn face looks like, as numbers: one row of every array is one person.

Lengths are in head units: the head's half height is 1, its centre (0, 0), y points down.
Colors are RGB in [0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

HAIR_COLORS: dict[str, tuple[float, float, float]] = {
    "black": (0.09, 0.08, 0.09),
    "brown": (0.38, 0.23, 0.13),
    "blond": (0.87, 0.71, 0.40),
    "red": (0.70, 0.27, 0.10),
    "gray": (0.66, 0.67, 0.69),
}
LENGTHS = ("short", "long")
CLASS_NAMES = tuple(f"{color} {length}" for color in HAIR_COLORS for length in LENGTHS)
"""``label = 2 * color + (1 if long else 0)``."""

_SKIN = np.array(
    [[0.98, 0.85, 0.76], [0.93, 0.74, 0.61], [0.80, 0.59, 0.43], [0.60, 0.41, 0.29],
     [0.38, 0.25, 0.18]]
)  # fmt: skip
_IRIS = np.array([[0.25, 0.14, 0.07], [0.25, 0.42, 0.62], [0.28, 0.43, 0.24], [0.42, 0.44, 0.46]])

Rows = Float32[np.ndarray, " n"]
Colors = Float32[np.ndarray, "n 3"]


class Traits(NamedTuple):
    """N faces; every field has N rows."""

    labels: Int32[np.ndarray, " n"]
    long: Bool[np.ndarray, " n"]
    # the picture: background, and where the head is in it (x and y in [-1, 1], y down)
    back_from: Colors
    back_to: Colors
    back_angle: Rows
    blob_color: Colors
    blob_x: Rows
    blob_y: Rows
    center_x: Rows
    center_y: Rows
    scale: Rows
    tilt: Rows
    turn: Rows
    light_x: Rows
    light_y: Rows
    gain: Rows
    # head and body
    skin: Colors
    width: Rows
    jaw: Rows
    blush: Rows
    clothes: Colors
    shoulders: Rows
    # hair
    hair: Colors
    volume: Rows
    hairline: Rows
    hairline_bend: Rows
    parting: Rows
    strand_phase: Rows
    strand_rate: Rows
    wave: Rows
    messy: Rows
    side_cover: Rows
    length: Rows
    beard: Rows
    # eyes and brows
    eye_x: Rows
    eye_y: Rows
    eye_width: Rows
    eye_height: Rows
    iris: Colors
    gaze: Rows
    brow_y: Rows
    brow_slope: Rows
    brow_thick: Rows
    # nose and mouth
    nose_y: Rows
    nose_width: Rows
    mouth_y: Rows
    mouth_width: Rows
    smile: Rows
    lips: Rows
    opening: Rows
    lip_color: Colors
    # glasses: 0 for none; darkness of the lenses
    glasses: Rows
    lens: Rows
    frame_color: Colors
    # used by the style "art" only
    grade_dark: Colors
    grade_light: Colors


def draw(rng: np.random.Generator, count: int) -> Traits:
    """Draw ``count`` persons; hair color and length are uniform and independent.

    Args:
      rng: consumed in a fixed order, whatever the values.
      count: at least 1.

    Returns:
      Traits with ``count`` rows.
    """

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, count).astype(np.float32)

    def color(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 3)).astype(np.float32)

    labels = rng.integers(len(CLASS_NAMES), size=count).astype(np.int32)
    long = labels % 2 == 1
    knots = np.linspace(0.0, 1.0, len(_SKIN))
    tone = rng.uniform(0.0, 1.0, count)
    skin = np.stack([np.interp(tone, knots, _SKIN[:, c]) for c in range(3)], axis=1)
    skin = (skin * rng.uniform(0.95, 1.05, (count, 3))).astype(np.float32)
    hair = np.array(list(HAIR_COLORS.values()))[labels // 2]
    hair = (
        hair * rng.uniform(0.85, 1.15, (count, 1)) * rng.uniform(0.96, 1.04, (count, 3))
    ).astype(np.float32)
    bearded = (rng.random(count) < 0.3) & ~long
    smile = uniform(-0.06, 0.22)
    opens = rng.random(count) < 0.45
    wears = rng.random(count) < 0.22
    dark_lens = rng.random(count) < 0.3
    lip_tint = rng.uniform(0.25, 0.75, (count, 1)).astype(np.float32)
    red = np.array([0.78, 0.25, 0.27], np.float32)
    base = color(0.08, 0.92)
    base = base + np.float32(0.35) * (base.mean(axis=1, keepdims=True) - base)
    turn = uniform(-0.16, 0.16)
    return Traits(
        labels=labels,
        long=long,
        back_from=base,
        back_to=np.clip(base + color(-0.3, 0.3), 0.03, 0.97),
        back_angle=uniform(0.0, 2.0 * np.pi),
        blob_color=color(0.05, 0.95),
        blob_x=uniform(-1.1, 1.1),
        blob_y=uniform(-1.1, 1.1),
        center_x=uniform(-0.12, 0.12),
        center_y=uniform(-0.10, 0.10),
        scale=uniform(0.64, 0.80),
        tilt=uniform(-0.20, 0.20),
        turn=turn,
        light_x=uniform(-0.8, 0.8),
        light_y=uniform(-0.7, 0.1),
        gain=uniform(0.85, 1.08),
        skin=np.clip(skin, 0.0, 1.0),
        width=uniform(0.70, 0.82),
        jaw=uniform(0.04, 0.30),
        blush=uniform(0.0, 0.30),
        clothes=color(0.05, 0.9),
        shoulders=uniform(1.18, 1.36),
        hair=np.clip(hair, 0.0, 1.0),
        volume=uniform(0.03, 0.17),
        hairline=uniform(-0.80, -0.42),
        hairline_bend=uniform(0.1, 1.0),
        parting=uniform(-0.25, 0.25),
        strand_phase=uniform(0.0, 2.0 * np.pi),
        strand_rate=uniform(8.0, 16.0),
        wave=uniform(0.0, 0.07),
        messy=uniform(0.0, 0.08),
        side_cover=uniform(0.78, 0.98),
        length=uniform(1.0, 1.9),
        beard=np.where(bearded, uniform(0.35, 0.9), np.float32(0)),
        eye_x=uniform(0.29, 0.35),
        eye_y=uniform(-0.12, 0.00),
        eye_width=uniform(0.15, 0.20),
        eye_height=uniform(0.065, 0.12),
        iris=np.clip(
            _IRIS[rng.choice(4, count, p=(0.5, 0.22, 0.16, 0.12))] * color(0.85, 1.15), 0, 1
        ).astype(np.float32),
        gaze=uniform(-0.06, 0.06) + np.float32(0.2) * turn,
        brow_y=uniform(-0.32, -0.22),
        brow_slope=uniform(-0.14, 0.14),
        brow_thick=uniform(0.025, 0.055),
        nose_y=uniform(0.22, 0.34),
        nose_width=uniform(0.11, 0.18),
        mouth_y=uniform(0.52, 0.62),
        mouth_width=uniform(0.22, 0.36),
        smile=smile,
        lips=uniform(0.045, 0.085),
        opening=np.where(opens, uniform(0.03, 0.11), np.float32(0)),
        lip_color=(
            skin * (1 - lip_tint) + red[None, :] * lip_tint * skin.max(axis=1, keepdims=True)
        ),
        glasses=np.where(wears, uniform(0.022, 0.042), np.float32(0)),
        lens=np.where(dark_lens, uniform(0.6, 0.9), uniform(0.0, 0.15)),
        frame_color=color(0.02, 0.35),
        grade_dark=color(0.0, 0.40),
        grade_light=color(0.55, 1.0),
    )
