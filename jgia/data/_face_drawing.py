"""Draws faces layer by layer, back to front, with anti-aliased edges; all images at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from jgia.data._face_traits import Traits

Plane = Float32[np.ndarray, "n h w"]
Canvas = Float32[np.ndarray, "n 3 h w"]


class Frame(NamedTuple):
    """Coordinates of every pixel.

    Attributes:
      x, y: (N, H, W) in head units.
      sharp: (N, 1, 1) pixels per head unit: an edge is one pixel wide.
    """

    x: Plane
    y: Plane
    sharp: Float32[np.ndarray, "n 1 1"]


def _r(rows: np.ndarray) -> np.ndarray:
    """(N,) as (N, 1, 1)."""
    return rows[:, None, None]


def _c(colors: np.ndarray) -> np.ndarray:
    """(N, 3) as (N, 3, 1, 1)."""
    return colors[:, :, None, None]


def _inside(frame: Frame, distance: Plane) -> Plane:
    """Share of each pixel that lies inside, from a signed distance (negative inside)."""
    share = distance * -frame.sharp
    share += 0.5
    return np.clip(share, 0.0, 1.0, out=share)


def _ellipse(x: Plane, y: Plane, a: np.ndarray | float, b: np.ndarray | float) -> Plane:
    """Approximate signed distance to an axis-parallel ellipse: exact on it, near it close."""
    u, v = x / a, y / b
    return (np.sqrt(u * u + v * v) - 1.0) * (a * b) ** 0.5


def _bump(x: np.ndarray, y: np.ndarray, a: np.ndarray | float, b: np.ndarray | float) -> Plane:
    """A soft spot: 1 in its middle, 0 outside the ellipse."""
    u, v = x / a, y / b
    spot = np.maximum(1.0 - u * u - v * v, 0.0)
    return spot * spot


def _paint(canvas: Canvas, share: Plane, color: np.ndarray) -> None:
    """Lay a color, (N, 3, 1, 1) or (N, 3, H, W), over the canvas, in place."""
    change = color - canvas
    change *= share[:, None]
    canvas += change


def _darken(canvas: Canvas, share: Plane) -> None:
    canvas *= (1.0 - share)[:, None]


def paint(traits: Traits, pixels: int) -> Canvas:
    """Draw the faces at ``pixels`` x ``pixels``.

    Args:
      traits: N persons.
      pixels: side, at least 1.

    Returns:
      (N, 3, pixels, pixels) float32 in [0, 1].
    """
    side = ((np.arange(pixels, dtype=np.float32) + 0.5) * (2.0 / pixels) - 1.0).astype(np.float32)
    u, v = side[None, None, :], side[None, :, None]
    canvas = _background(traits, u, v)
    cos, sin = _r(np.cos(traits.tilt)), _r(np.sin(traits.tilt))
    du, dv = u - _r(traits.center_x), v - _r(traits.center_y)
    scale = _r(traits.scale)
    frame = Frame(
        x=(cos * du + sin * dv) / scale,
        y=(cos * dv - sin * du) / scale,
        sharp=scale * np.float32(pixels / 2),
    )
    strands = _strands(traits, frame)
    _hair_behind(canvas, traits, frame, strands)
    _body(canvas, traits, frame)
    _head(canvas, traits, frame)
    _nose(canvas, traits, frame)
    _on_some(_beard, traits.beard > 0, canvas, traits, frame)
    _mouth(canvas, traits, frame)
    _eyes(canvas, traits, frame)
    _hair_in_front(canvas, traits, frame, strands)
    _on_some(_glasses, traits.glasses > 0, canvas, traits, frame)
    canvas *= _r(traits.gain)[:, None]
    return np.clip(canvas, 0.0, 1.0, out=canvas)


def _background(traits: Traits, u: np.ndarray, v: np.ndarray) -> Canvas:
    angle = traits.back_angle
    along = (_r(np.cos(angle)) * u + _r(np.sin(angle)) * v) * np.float32(0.36) + np.float32(0.5)
    canvas = _c(traits.back_from) + along[:, None] * _c(traits.back_to - traits.back_from)
    spot = _bump(u - _r(traits.blob_x), v - _r(traits.blob_y), 0.9, 0.9)
    _paint(canvas, spot * 0.5, _c(traits.blob_color))
    return canvas


def _strands(traits: Traits, frame: Frame) -> Canvas:
    """The color of hair everywhere: streaks that fan out from the crown, and a sheen."""
    x = frame.x + _r(traits.wave) * np.sin(frame.y * 6.0 + _r(traits.strand_phase))
    fan = x / (1.9 + 0.3 * np.abs(frame.y))
    streak = np.sin(fan * (2.0 * _r(traits.strand_rate)) + _r(traits.strand_phase))
    sheen = _bump(frame.x - 0.5 * _r(traits.light_x), frame.y + 0.78, 0.75, 0.32)
    tone = (0.95 + 0.12 * streak) * (1.0 - 0.10 * frame.y)
    return _c(traits.hair) * tone[:, None] + (0.16 * sheen)[:, None]


def _cap(traits: Traits, frame: Frame) -> Plane:
    """Signed distance to the outline of hair around the skull."""
    volume = _r(traits.volume)
    cap = _ellipse(frame.x, frame.y + 0.12, _r(traits.width) + volume, 0.93 + volume)
    curls = np.sin((2.2 * frame.x + frame.y) * 5.0 + _r(traits.strand_phase))
    curls *= np.sin((2.2 * frame.x - frame.y) * 5.0)
    return cap + _r(traits.messy) * curls


def _curtain(traits: Traits, frame: Frame) -> Plane:
    """Signed distance to long hair: a hanging curtain, rounded at its lower end."""
    x = np.abs(frame.x + _r(traits.wave) * np.sin(frame.y * 5.0 + _r(traits.strand_phase)))
    outer = _r(traits.width + traits.volume) + 0.10 * np.maximum(frame.y + 0.1, 0.0)
    sides = x - outer
    top = -0.15 - frame.y
    bottom = frame.y - _r(traits.length) + 0.35 * x * x
    return np.maximum(np.maximum(sides, top), bottom)


def _hair_behind(canvas: Canvas, traits: Traits, frame: Frame, strands: Canvas) -> None:
    cap = _cap(traits, frame)
    short = np.maximum(cap, frame.y - 0.15)
    long = np.minimum(cap, _curtain(traits, frame))
    outline = np.where(_r(traits.long), long, short)
    shade = np.where(_r(traits.long), 1.0 - 0.25 * (frame.y > -0.1), 1.0).astype(np.float32)
    _paint(canvas, _inside(frame, outline), strands * shade[:, None])


def _body(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    neck = np.maximum(np.abs(frame.x) - 0.55 * _r(traits.width), 0.4 - frame.y)
    under_chin = 0.62 + 0.45 * np.clip(frame.y - 0.95, 0.0, 0.5)
    _paint(canvas, _inside(frame, neck), _c(traits.skin) * under_chin[:, None])
    top = _r(traits.shoulders)
    collar = 0.16 * np.maximum(1.0 - (frame.x / 0.45) ** 2, 0.0)  # lower under the chin
    clothes = _ellipse(frame.x, frame.y - top - 0.9, 1.75, 0.9) + collar
    fold = 1.0 - 0.25 * np.abs(frame.x) + 0.1 * _r(traits.light_x) * frame.x
    _paint(canvas, _inside(frame, clothes), _c(traits.clothes) * fold[:, None])


def _head_outline(traits: Traits, frame: Frame) -> tuple[Plane, Plane]:
    """The head's x in units of its half width there, and the radius: 1 on the outline."""
    down = np.maximum(frame.y, 0.0)
    across = frame.x / (_r(traits.width) * (1.0 - _r(traits.jaw) * down * down))
    return across, np.sqrt(across * across + frame.y * frame.y)


def _head(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    ear = _ellipse(np.abs(frame.x) - _r(traits.width), frame.y - 0.02, 0.11, 0.2)
    _paint(canvas, _inside(frame, ear), _c(traits.skin * np.float32(0.82)))
    across, radius = _head_outline(traits, frame)
    share = _inside(frame, (radius - 1.0) * np.sqrt(_r(traits.width)))
    depth = np.sqrt(np.maximum(1.0 - radius * radius, 0.0))
    lit = _r(traits.light_x) * across + _r(traits.light_y) * frame.y + 0.9 * depth
    shade = 0.70 + 0.34 * lit
    skin = _c(traits.skin)
    red_shift = np.array([0.06, -0.01, -0.03], np.float32)[None, :, None, None]
    color = skin * (shade[:, None] + red_shift * (1.0 - shade)[:, None] * 3.0)
    _paint(canvas, share, color)
    x = np.abs(frame.x - _r(traits.turn))
    cheeks = _bump(x - 0.42, frame.y - 0.3, 0.28, 0.22) * _r(traits.blush) * share
    _paint(canvas, cheeks, skin * np.array([0.98, 0.55, 0.5], np.float32)[None, :, None, None])


def _nose(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    x = frame.x - 1.25 * _r(traits.turn)
    y = frame.y - _r(traits.nose_y)
    half = _r(traits.nose_width)
    side = np.where(_r(traits.light_x) > 0, -1.0, 1.0).astype(np.float32)
    _darken(canvas, 0.24 * _bump(x - side * 0.8 * half, y + 0.14, 0.13, 0.34))
    ridge = 0.25 * _bump(x + side * 0.15 * half, y + 0.12, 0.08, 0.32)
    _paint(canvas, ridge, np.ones((1, 3, 1, 1), np.float32))
    _darken(canvas, 0.5 * _bump(x, y - 0.05, 1.25 * half, 0.085))


def _on_some(
    layer: Callable[[Canvas, Traits, Frame], None],
    rows: Bool[np.ndarray, " n"],
    canvas: Canvas,
    traits: Traits,
    frame: Frame,
) -> None:
    """Draw a layer on the images where ``rows`` holds."""
    if rows.any():
        part = canvas[rows]
        layer(part, Traits(*(t[rows] for t in traits)), Frame(*(f[rows] for f in frame)))
        canvas[rows] = part


def _beard(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    x = frame.x - 1.1 * _r(traits.turn)
    y = frame.y - _r(traits.mouth_y)
    _, radius = _head_outline(traits, frame)
    head = _inside(frame, radius - 1.0)
    cheek = np.clip((frame.y - 0.62 + 0.55 * np.abs(frame.x)) * 7.0, 0.0, 1.0)
    lip = np.clip(_bump(x, y + 0.1, 1.5 * _r(traits.mouth_width), 0.16) * 3.0, 0.0, 1.0)
    beard = np.maximum(cheek, lip) * head * _r(traits.beard)
    _paint(canvas, beard, _c(traits.hair * np.float32(0.9)))


def _mouth(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    x = frame.x - 1.1 * _r(traits.turn)
    y = frame.y - _r(traits.mouth_y)
    across = x / _r(traits.mouth_width)
    arch = np.maximum(1.0 - across * across, 0.0)
    y = y - _r(traits.smile) * (arch - 0.5)
    opening = _r(traits.opening)
    beyond = np.abs(x) - _r(traits.mouth_width)
    lips = np.maximum(np.abs(y) - (_r(traits.lips) + opening) * arch, beyond)
    _paint(canvas, _inside(frame, lips), _c(traits.lip_color))
    gap = np.maximum(np.abs(y) - np.maximum(opening, 0.012) * arch, beyond)
    mouth = _inside(frame, gap)
    _paint(canvas, mouth, _c(traits.lip_color * np.float32(0.35)))
    teeth = _inside(frame, np.maximum(np.abs(y + 0.3 * opening) - 0.65 * opening * arch, gap))
    _paint(canvas, teeth * (opening > 0.03), np.full((1, 3, 1, 1), 0.95, np.float32))


def _eyes(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    x = frame.x - _r(traits.turn)
    y = frame.y - _r(traits.eye_y)
    sign = np.where(x > 0, 1.0, -1.0).astype(np.float32)
    out = np.abs(x) - _r(traits.eye_x)  # distance from the eye's middle, outward
    a, b = _r(traits.eye_width), _r(traits.eye_height)
    _darken(canvas, 0.30 * _bump(out, y + 0.02, 0.32, 0.25))
    lid = _inside(frame, _ellipse(out, y + 0.025, a + 0.03, b + 0.025))
    _paint(canvas, lid, _c(traits.skin * np.float32(0.35)))
    white = _inside(frame, _ellipse(out, y, a, b))
    _paint(canvas, white, np.full((1, 3, 1, 1), 0.94, np.float32))
    look = out - sign * _r(traits.gaze)
    iris = np.minimum(_inside(frame, _ellipse(look, y, 0.105, 0.105)), white)
    _paint(canvas, iris, _c(traits.iris))
    pupil = np.minimum(_inside(frame, _ellipse(look, y, 0.05, 0.05)), white)
    _paint(canvas, pupil, np.full((1, 3, 1, 1), 0.03, np.float32))
    bow = frame.y - _r(traits.brow_y) - _r(traits.brow_slope) * out - 1.6 * out * out + 0.03
    taper = _r(traits.brow_thick) * (1.0 - 0.3 * out / a)
    brow = _inside(frame, np.maximum(np.abs(bow) - taper, np.abs(out) - a - 0.05))
    _paint(canvas, brow * 0.9, _c(traits.hair * np.float32(0.62)))


def _hair_in_front(canvas: Canvas, traits: Traits, frame: Frame, strands: Canvas) -> None:
    jag = _r(0.01 + 0.7 * traits.messy) * np.sin(
        frame.x * (2.5 * _r(traits.strand_rate)) + _r(traits.strand_phase)
    )
    x = frame.x - 0.6 * _r(traits.turn)
    line = _r(traits.hairline) + _r(traits.parting) * x + _r(traits.hairline_bend) * x * x + jag
    cap = _cap(traits, frame)
    fringe = np.maximum(cap, np.maximum(frame.y - line, frame.y - 0.15))
    edge = _r(traits.side_cover * traits.width) - 0.08 * np.maximum(-frame.y, 0.0)
    sides = np.maximum(np.minimum(cap, _curtain(traits, frame)), edge - np.abs(x))
    outline = np.where(_r(traits.long), np.minimum(fringe, sides), fringe)
    shadow = np.maximum(outline - 0.06, cap + _r(traits.volume) + 0.05)  # on the skin only
    _darken(canvas, 0.28 * _inside(frame, shadow))
    _paint(canvas, _inside(frame, outline), strands)


def _glasses(canvas: Canvas, traits: Traits, frame: Frame) -> None:
    x = frame.x - _r(traits.turn)
    y = frame.y - _r(traits.eye_y) - 0.02
    apart, thick = _r(traits.eye_x), _r(traits.glasses)
    lens = _ellipse(np.abs(x) - apart, y, 0.26, 0.21)
    color = _c(traits.frame_color)
    _paint(canvas, _inside(frame, lens) * _r(traits.lens), color * np.float32(0.5))
    bridge = np.maximum(np.abs(y + 0.04) - thick, np.abs(x) - apart + 0.2)
    ring = np.minimum(np.abs(lens) - thick, bridge)
    _paint(canvas, _inside(frame, ring), color)
