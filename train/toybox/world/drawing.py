"""The drawing tools of the toybox world: palette, pose, a brush for outlined flat shapes, textures.

In:  points in the local units of whatever is drawn, colours by name.
Out: pixels on an RGB canvas, and the same shapes in an instance map. Knows nothing of subjects, scenes or captions.

Local units: y points down, x points to where the subject faces. Canvases are uint8 RGB, drawn at SUPERSAMPLE times
the final size and averaged down. cv2 is imported on first use, so that importing this module costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

SUPERSAMPLE = 2
_SHIFT = 4  # cv2 takes integers; 4 bits below the pixel keep slow motion smooth

# Twelve colours a person tells apart at 64x64 and a 4x VAE keeps apart; no greys between white and black.
PALETTE: dict[str, Colour] = {
    "red": (224, 52, 48),
    "orange": (246, 138, 36),
    "yellow": (250, 214, 58),
    "lime": (156, 214, 60),
    "green": (36, 142, 76),
    "turquoise": (58, 202, 200),
    "blue": (52, 92, 222),
    "purple": (140, 72, 200),
    "pink": (250, 142, 188),
    "brown": (138, 88, 54),
    "white": (246, 244, 238),
    "black": (66, 64, 80),
}
OUTLINE: Colour = (30, 24, 38)
PATTERNS = ("plain", "stripes", "spots", "checks", "halves", "rings")

_CIRCLE: Points = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 28, endpoint=False)), np.sin(np.linspace(0, 2 * np.pi, 28, endpoint=False))], 1
)


@cache
def cv() -> Any:
    """cv2, imported once and held to one thread: many small shapes gain nothing from more."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


@dataclass(frozen=True)
class Pose:
    """Where and how one subject stands in one frame.

    x, y: centre of the subject, fractions of the frame's width and height, y down.
    scale: height of the resting subject, fraction of the frame's shorter side.
    angle: clockwise rotation on screen, radians.
    squash: height times this, width divided by its square root; the feet stay where they are. 1 is the resting shape.
    flip: False faces right, True faces left.
    gait: phase of legs, wings or wheels in cycles; 0 is at rest.
    wave: how far the near arm is lifted, 0 to 1.
    """

    x: float
    y: float
    scale: float
    angle: float = 0.0
    squash: float = 1.0
    flip: bool = False
    gait: float = 0.0
    wave: float = 0.0


def far_apart(first: str, second: str) -> bool:
    """Whether two palette colours stay distinct side by side in a few pixels; brightness counts more than hue."""
    a, b = PALETTE[first], PALETTE[second]
    brightness = 0.3 * (a[0] - b[0]) + 0.59 * (a[1] - b[1]) + 0.11 * (a[2] - b[2])
    return math.hypot(math.dist(a, b), 1.5 * brightness) > 165


def rotation(angle: float) -> Points:
    """(2, 2) matrix, clockwise on screen because y points down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


@lru_cache(maxsize=512)
def smooth(points: tuple[tuple[float, float], ...], rounds: int = 3) -> Points:
    """A closed outline with its corners cut `rounds` times (Chaikin's scheme), (N * 2**rounds, 2)."""
    p = np.array(points, dtype=np.float64)
    for _ in range(rounds):
        q = np.roll(p, -1, axis=0)
        p = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], axis=1).reshape(-1, 2)
    return p


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """`colour` with `share` (0 to 1) of `other` in it."""
    r, g, b = (round((1 - share) * a + share * o) for a, o in zip(colour, other, strict=True))
    return r, g, b


def apply_light(colour: Colour, light: tuple[float, float, float]) -> Colour:
    """A colour under a light given as gains for red, green, blue."""
    r, g, b = (min(255, round(c * gain)) for c, gain in zip(colour, light, strict=True))
    return r, g, b


_TEXTURE_REACH = 0.6  # the texture covers local units from -0.6 to 0.6


@lru_cache(maxsize=256)
def texture(pattern: str, first: Colour, second: Colour, angle: float, period: float, side: int = 96) -> Pixels:
    """A pattern of two colours around the local origin, uint8 (side, side, 3); `period` in local units.

    Raises:
        ValueError: an unknown pattern.
    """
    axis = (np.arange(side) + 0.5) / side * 2 * _TEXTURE_REACH - _TEXTURE_REACH
    x, y = np.meshgrid(axis, axis)
    u = (math.cos(angle) * x + math.sin(angle) * y) / period
    v = (math.cos(angle) * y - math.sin(angle) * x) / period
    if pattern == "plain":
        on = np.zeros_like(u, dtype=bool)
    elif pattern == "stripes":
        on = (u + 0.25) % 1.0 < 0.5
    elif pattern == "spots":
        row = np.floor(v)
        on = ((u + 0.5 * row) % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.34**2
    elif pattern == "checks":
        on = (np.floor(1.6 * u) + np.floor(1.6 * v)) % 2 < 1
    elif pattern == "halves":
        on = u > 0
    elif pattern == "rings":
        on = (np.hypot(u, v) * 1.2 + 0.3) % 1.0 < 0.5
    else:
        raise ValueError(f"{pattern!r} is no pattern. Use one of {', '.join(PATTERNS)}.")
    return np.where(on[..., None], np.array(second, np.uint8), np.array(first, np.uint8))


class Brush:
    """Draws outlined flat shapes given in local units, through a 2x3 matrix, on a canvas and an instance map.

    Without a canvas it draws nothing and only collects the outline's points in `trace` (how extents are measured).
    `faces` collects the corners of what is declared to be the face region.
    """

    __slots__ = ("canvas", "faces", "instance_ids", "label", "light", "line", "matrix", "texture", "trace")

    def __init__(
        self,
        canvas: Pixels | None,
        instance_ids: Pixels | None,
        matrix: Points,
        *,
        label: int = 1,
        line: int = 2,
        light: tuple[float, float, float] = (1.0, 1.0, 1.0),
        texture: Pixels | None = None,
    ) -> None:
        """Canvas (H, W, 3) and instance_ids (H, W) are drawn in place; matrix (2, 3): local units -> canvas pixels."""
        self.canvas, self.instance_ids, self.matrix = canvas, instance_ids, matrix
        self.label, self.line, self.light, self.texture = label, line, light, texture
        self.trace: list[Points] = []
        self.faces: list[Points] = []

    def at(self, dx: float, dy: float, angle: float = 0.0, sx: float = 1.0, sy: float = 1.0) -> Brush:
        """The same brush in the frame of a part at (dx, dy), rotated and stretched; the texture goes along."""
        part = object.__new__(Brush)
        for name in Brush.__slots__:
            setattr(part, name, getattr(self, name))
        turn = rotation(angle) * np.array([sx, sy])
        part.matrix = np.empty((2, 3))
        part.matrix[:, :2] = self.matrix[:, :2] @ turn
        part.matrix[:, 2] = self.matrix[:, :2] @ (dx, dy) + self.matrix[:, 2]
        return part

    def to_canvas(self, points: Points | Sequence[tuple[float, float]]) -> Points:
        """Local points (N, 2) in canvas pixels."""
        return np.asarray(points, dtype=np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def pixels(self, length: float) -> float:
        """A local length in canvas pixels (the geometric mean over directions)."""
        m = self.matrix
        return length * math.sqrt(abs(m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]))

    def poly(
        self,
        points: Points | Sequence[tuple[float, float]],
        fill: Colour,
        *,
        outline: bool = True,
        textured: bool = False,
        inside: bool = False,
    ) -> None:
        """A filled polygon. `inside` promises that it lies on something already drawn, so the instance ids stay."""
        p = self.to_canvas(points)
        if self.canvas is None:
            if not inside:
                self.trace.append(p)
            return
        c = cv()
        q = np.round(p * (1 << _SHIFT)).astype(np.int32)[None]
        if textured and self.texture is not None:
            self._fill_textured(p, q)
        else:
            c.fillPoly(self.canvas, q, apply_light(fill, self.light), c.LINE_AA, _SHIFT)
        if outline:
            line = self.line
            if inside:  # thinner: at 64x64 a full outline around an eye leaves no eye
                line = max(1, self.line // 2)
            c.polylines(self.canvas, q, True, OUTLINE, line, c.LINE_AA, _SHIFT)
        if self.instance_ids is not None and not inside:
            c.fillPoly(self.instance_ids, q, self.label, c.LINE_8, _SHIFT)
            if outline:
                c.polylines(self.instance_ids, q, True, self.label, self.line, c.LINE_8, _SHIFT)

    def _fill_textured(self, p: Points, q: NDArray[np.int32]) -> None:
        canvas, c = self.canvas, cv()
        assert canvas is not None and self.texture is not None
        x0, y0 = np.maximum(np.floor(p.min(0)).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(p.max(0)).astype(int) + 2, (canvas.shape[1], canvas.shape[0]))
        if x1 <= x0 or y1 <= y0:
            return
        cell = 2 * _TEXTURE_REACH / self.texture.shape[0]
        m = self.matrix.copy()
        m[:, 2] += m[:, :2] @ (-_TEXTURE_REACH, -_TEXTURE_REACH) - (x0, y0)
        m[:, :2] *= cell
        patch = c.warpAffine(
            self.texture, m, (int(x1 - x0), int(y1 - y0)), flags=c.INTER_LINEAR, borderMode=c.BORDER_REPLICATE
        )
        mask = np.zeros(patch.shape[:2], np.uint8)
        c.fillPoly(mask, q - np.array([x0, y0], np.int32) * (1 << _SHIFT), 255, c.LINE_8, _SHIFT)
        part = canvas[y0:y1, x0:x1]
        part[mask > 0] = patch[mask > 0]

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        *,
        outline: bool = True,
        textured: bool = False,
        inside: bool = False,
    ) -> None:
        """A filled ellipse; the same switches as `poly`."""
        self.poly(_CIRCLE * (rx, ry) + (x, y), fill, outline=outline, textured=textured, inside=inside)

    def stroke(
        self,
        points: Points | Sequence[tuple[float, float]],
        width: float,
        fill: Colour,
        *,
        outline: bool = True,
        inside: bool = False,
    ) -> None:
        """An open line `width` local units thick with round ends: limbs, tails, strings."""
        p = self.to_canvas(points)
        if self.canvas is None:
            if not inside:
                half = self.pixels(width) / 2
                self.trace += [p - half, p + half]
            return
        c = cv()
        q = np.round(p * (1 << _SHIFT)).astype(np.int32)[None]
        thick = max(1, round(self.pixels(width)))
        rim = thick
        if outline:
            rim = thick + 2 * self.line
            c.polylines(self.canvas, q, False, OUTLINE, rim, c.LINE_AA, _SHIFT)
        c.polylines(self.canvas, q, False, apply_light(fill, self.light), thick, c.LINE_AA, _SHIFT)
        if self.instance_ids is not None and not inside:
            c.polylines(self.instance_ids, q, False, self.label, rim, c.LINE_8, _SHIFT)

    def face(self, x: float, y: float, rx: float, ry: float) -> None:
        """Declare the face region as an ellipse in local units; nothing is drawn."""
        self.faces.append(self.to_canvas(_CIRCLE * (rx, ry) + (x, y)))


def frame_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a frame; a single number means a square one."""
    if isinstance(size, int):
        return size, size
    return size


def shrink(canvas: Pixels, size: tuple[int, int]) -> Pixels:
    """Average a supersampled canvas down to (width, height)."""
    c = cv()
    return c.resize(canvas, size, interpolation=c.INTER_AREA)


def shrink_instance_ids(instance_ids: Pixels, size: tuple[int, int]) -> Pixels:
    """Owner of each final pixel: the label with most supersampled pixels in it; at a tie a subject, the lower first.

    Ties go to subjects because strings and whiskers are half a pixel wide and would otherwise belong to nobody.
    """
    width, height = size
    factor = instance_ids.shape[0] // height
    labels = int(instance_ids.max())
    if labels == 0:
        return np.zeros((height, width), np.uint8)
    votes = [shrink((instance_ids == k).astype(np.uint8) * 255, (width, height)) for k in range(labels + 1)]
    votes[0] -= votes[0] > 0
    assert factor * height == instance_ids.shape[0]
    return np.argmax(np.stack(votes), axis=0).astype(np.uint8)
