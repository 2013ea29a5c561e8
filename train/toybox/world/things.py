"""How the eight things of the toybox world and its patchwork shapes are drawn.

In:  a brush, a subject's attributes and a pose (only its gait and wave are read here).
Out: strokes of the brush. Things have no face. Knows nothing of scenes, captions or seeds.

Local units: about one unit high, y down, facing +x; the brush has already been placed, turned and flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from train.toybox.world.drawing import OUTLINE, PALETTE, Brush, Colour, Points, Pose, apply_light, smooth, texture

if TYPE_CHECKING:
    from train.toybox.world.traits import ToySubject

GLASS: Colour = (190, 232, 248)
THINGS = ("ball", "kite", "car", "boat", "rocket", "umbrella", "balloon", "house")


def _colours(s: ToySubject) -> tuple[Colour, Colour, Colour]:
    return PALETTE[s.body], PALETTE[s.second], PALETTE[s.third]


def _star(points: int, inner: float) -> Points:
    angles = np.arange(2 * points) * math.pi / points - math.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


_STAR = _star(5, 0.48)
_HEART = np.array(
    [(0, 0.95), (-0.85, 0.1), (-0.9, -0.45), (-0.5, -0.8), (0, -0.4), (0.5, -0.8), (0.9, -0.45), (0.85, 0.1)]
)
_CROSS = np.array(
    [
        (-0.3, -1),
        (0.3, -1),
        (0.3, -0.3),
        (1, -0.3),
        (1, 0.3),
        (0.3, 0.3),
        (0.3, 1),
        (-0.3, 1),
        (-0.3, 0.3),
        (-1, 0.3),
        (-1, -0.3),
        (-0.3, -0.3),
    ]
)


def _emblem(b: Brush, s: ToySubject, x: float, y: float, r: float) -> None:
    """The thing's mark, big enough (a quarter of its width) to be read at 64x64."""
    fill = PALETTE[s.third]
    if s.accessory == "disc":
        b.ellipse(x, y, 0.85 * r, 0.85 * r, fill, inside=True)
    elif s.accessory != "none":
        shape = {"star": _STAR * 1.15, "heart": _HEART, "cross": _CROSS * 0.9}[s.accessory]
        b.poly(shape * r + (x, y), fill, inside=True)


def _swing(pose: Pose, offset: float = 0.0) -> float:
    return math.sin(2 * math.pi * (pose.gait + offset))


def _ball(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    r = b.at(0, 0, 2 * math.pi * pose.gait)  # it rolls
    r.ellipse(0, 0, 0.5, 0.5, body, textured=True)
    if s.variant == 0:
        r.stroke([(-0.5, 0), (-0.25, 0.12), (0.25, 0.12), (0.5, 0)], 0.05, OUTLINE, outline=False, inside=True)
    elif s.variant == 1:
        for k in range(3):
            a = k * 2 * math.pi / 3
            r.poly(
                [
                    (0.02 * math.cos(a), 0.02 * math.sin(a)),
                    *[(0.48 * math.cos(a + t), 0.48 * math.sin(a + t)) for t in (0, 0.25, 0.5, 0.75, 1.0)],
                ],
                second,
                inside=True,
            )
    else:
        r.stroke([(-0.46, 0.12), (0.46, 0.12)], 0.12, second, inside=True)
    _emblem(r, s, 0, -0.06, 0.24)
    b.ellipse(0.2, -0.26, 0.1, 0.07, (255, 255, 255), outline=False, inside=True)


def _kite(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    k = 0.06 * _swing(pose)
    tail = [(-0.06, 0.12), (-0.14 - k, 0.22), (-0.06 + k, 0.32), (-0.16 - k, 0.42), (-0.1 + k, 0.5)]
    b.stroke(tail, 0.025, OUTLINE, outline=False)
    bows = tail[1:]
    if s.detail:
        bows = tail[1::2]
    for x, y in bows:
        b.poly(
            [(x - 0.12, y - 0.055), (x + 0.12, y + 0.055), (x + 0.12, y - 0.055), (x - 0.12, y + 0.055)],
            third,
            outline=False,
        )
    w = 0.3 * s.wide
    if s.variant == 2:  # delta
        b.poly([(0.05, -0.5), (-1.35 * w, 0.12), (0.0, 0.02), (1.35 * w, 0.12)], body, textured=True)
        b.poly([(0.05, -0.5), (-0.3 * w, 0.1), (0.35 * w, 0.1)], second, inside=True)
    else:
        low = (0.12, 0.2)[s.variant]
        top, right, bottom, left = (0.06, -0.5), (w, -0.18), (-0.06, low), (-w, -0.14)
        b.poly([top, right, bottom, left], body, textured=True)
        if s.variant == 0:
            b.poly([top, right, (0, -0.16)], second, inside=True)
            b.poly([bottom, left, (0, -0.16)], second, inside=True)
        else:
            b.stroke([left, right], 0.035, OUTLINE, outline=False, inside=True)
            b.stroke([top, bottom], 0.035, OUTLINE, outline=False, inside=True)
    _emblem(b, s, 0.0, -0.16, 0.13)


def _wheel(b: Brush, x: float, y: float, r: float, hub: Colour, turn: float) -> None:
    b.ellipse(x, y, r, r, (58, 54, 64))
    b.ellipse(x, y, 0.55 * r, 0.55 * r, hub, outline=False, inside=True)
    c = 2 * math.pi * turn
    b.stroke(
        [
            (x - 0.5 * r * math.cos(c), y - 0.5 * r * math.sin(c)),
            (x + 0.5 * r * math.cos(c), y + 0.5 * r * math.sin(c)),
        ],
        0.03,
        OUTLINE,
        outline=False,
        inside=True,
    )


def _car(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    w = 0.52
    if s.variant == 0:  # beetle
        cabin = smooth(((-0.34, 0.0), (-0.24, -0.3), (0.16, -0.3), (0.3, 0.0)))
        hull = smooth(((-w, 0.28), (-w, 0.02), (-0.3, -0.06), (0.34, -0.06), (w, 0.08), (w, 0.28)), 1)
    elif s.variant == 1:  # van
        cabin = np.array([(-w, 0.0), (-w, -0.36), (0.28, -0.36), (0.46, 0.0)])
        hull = np.array([(-w, 0.28), (-w, -0.02), (w, -0.02), (w, 0.28)])
    else:  # pick-up
        cabin = np.array([(-0.08, 0.02), (-0.02, -0.3), (0.2, -0.3), (0.34, 0.02)])
        hull = np.array([(-w, 0.28), (-w, -0.04), (0.4, -0.04), (w, 0.08), (w, 0.28)])
    cabin_fill = (second, body, second)[s.detail]
    b.poly(cabin * (s.wide, 1), cabin_fill)
    x0, x1 = ((-0.2, 0.2), (0.0, 0.36), (0.0, 0.24))[s.variant]
    b.poly(
        np.array([(x0, -0.04), (x0 + 0.03, -0.22), (x1 - 0.07, -0.22), (x1, -0.04)]) * (s.wide, 1), GLASS, inside=True
    )
    b.poly(hull * (s.wide, 1), body, textured=True)
    b.ellipse(0.44 * s.wide, 0.12, 0.055, 0.055, (255, 236, 130), inside=True)
    _emblem(b, s, -0.06 * s.wide, 0.12, 0.12)
    for x in (-0.28, 0.28):
        _wheel(b, x * s.wide, 0.3, 0.115 + 0.03 * (s.limb - 1), third, pose.gait)
    if s.detail == 2:
        load = [(-0.1, -0.36), (0.06, -0.36), (0.06, -0.28), (-0.1, -0.28)]  # on the roof
        if s.variant == 2:  # on the bed of the pick-up
            load = [(-0.46, -0.16), (-0.18, -0.16), (-0.18, -0.04), (-0.46, -0.04)]
        b.poly(load, third)


def _boat(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    r = b.at(0, 0.3, 0.06 * _swing(pose))
    w = 0.44 * s.wide
    if s.variant == 2:  # steamer
        r.poly([(-0.24, -0.12), (-0.24, -0.36), (0.2, -0.36), (0.2, -0.12)], second)
        for x in (-0.12, 0.08):
            r.ellipse(x, -0.24, 0.06, 0.06, GLASS, inside=True)
        r.poly([(-0.12, -0.36), (-0.1, -0.68), (0.1, -0.68), (0.12, -0.36)], third)
        r.poly([(-0.1, -0.5), (-0.1, -0.6), (0.1, -0.6), (0.1, -0.5)], body, outline=False, inside=True)
    else:
        r.stroke([(0.0, -0.1), (0.0, -0.76)], 0.035, PALETTE["brown"])
        r.poly([(0.04, -0.72), (0.04, -0.18), (0.4 * s.wide, -0.18)], second)
        if s.variant == 1:
            r.poly([(-0.05, -0.64), (-0.05, -0.18), (-0.34 * s.wide, -0.18)], third)
        else:
            r.poly([(0.0, -0.78), (-0.18, -0.71), (0.0, -0.64)], third)
    if s.detail:
        hull = np.array([(-w, -0.14), (1.1 * w, -0.14), (0.7 * w, 0.17), (-0.65 * w, 0.17)])
    else:
        stern, bow = (-w, -0.14), (1.1 * w, -0.14)  # twice each: corners that stay when the rest is rounded
        hull = smooth((stern, stern, bow, bow, (0.7 * w, 0.2), (-0.7 * w, 0.2)))
    r.poly(hull, body, textured=True)
    _emblem(r, s, 0.1 * w, 0.01, 0.12)


def _rocket(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    flick = 0.05 * _swing(pose) + 0.03
    w = 0.19 * s.wide
    b.poly([(-0.11, 0.3), (0.0, 0.5 + flick), (0.11, 0.3)], (250, 190, 50))
    wing = [(w * 0.8, 0.02), (w * 2.0, 0.26), (w * 1.8, 0.38), (w * 0.7, 0.28)]
    if s.variant == 1:
        wing = [(w * 0.8, -0.05), (w * 2.3, 0.32), (w * 0.7, 0.24)]
    for side in (-1, 1):
        b.poly([(side * x, y) for x, y in wing], second)
    hull = smooth(
        ((-0.8 * w, 0.32), (-1.1 * w, 0.05), (-w, -0.24), (0, -0.6), (w, -0.24), (1.1 * w, 0.05), (0.8 * w, 0.32))
    )
    b.poly(hull, body, textured=True)
    nose = hull[hull[:, 1] < (-0.36, -0.26, -0.22)[s.detail]]  # the top of the hull itself, however it is curved
    nose_fill = (second, second, third)[s.detail]
    b.poly(nose, nose_fill, inside=True)
    if s.accessory in ("none", "disc"):
        b.ellipse(0.02, -0.09, 0.11, 0.11, third, inside=True)
        b.ellipse(0.02, -0.09, 0.06, 0.06, GLASS, outline=False, inside=True)
    else:
        _emblem(b, s, 0.02, -0.06, 0.13)
    if s.variant == 2:
        b.poly([(-0.03, 0.12), (0.03, 0.12), (0.03, 0.38), (-0.03, 0.38)], second)


def _umbrella(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    u = b.at(0, 0, 0.08 * _swing(pose))
    hook = 0.1 + 0.03 * s.limb
    u.stroke([(0, -0.3), (0, 0.38), (0.03, 0.46), (hook, 0.47), (hook + 0.03, 0.38)], 0.04, third)
    u.stroke([(0, -0.5), (0, -0.4)], 0.04, third)
    r, ribs = 0.46 * s.wide, (3, 4, 5)[s.variant]
    dome = [
        (r * math.cos(t), 0.02 + (0.44 + 0.06 * s.detail) * math.sin(t)) for t in np.linspace(math.pi, 2 * math.pi, 17)
    ]
    edge: list[tuple[float, float]] = []
    for k in range(ribs):
        right = r - 2 * r * k / ribs
        edge += [
            (right - 2 * r / ribs * t, 0.02 - 0.3 * (t - t * t) * (1 + 0.2 * s.detail)) for t in (0.25, 0.5, 0.75, 1.0)
        ]
    u.poly([*dome, *edge[:-1]], body, textured=True)
    if s.pattern == "plain" or s.detail == 0:
        for k in range(0, ribs, 2):
            a, z = -r + 2 * r * k / ribs, -r + 2 * r * (k + 1) / ribs
            u.poly(
                [
                    (0, -0.42),
                    (0.72 * a, -0.24),
                    (a * 0.98, -0.01),
                    ((a + z) / 2, -0.07),
                    (z * 0.98, -0.01),
                    (0.72 * z, -0.24),
                ],
                second,
                inside=True,
            )
    _emblem(u, s, 0.05, -0.2, 0.12)


def _balloon(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    k = 0.05 * _swing(pose)
    ry = 0.3 + 0.04 * s.head
    if s.variant == 2:  # hot air, with a basket
        for x in (-0.1, 0.1):
            b.stroke([(2 * x, 0.08), (x + k, 0.34)], 0.02, OUTLINE, outline=False)
        b.poly([(k - 0.13, 0.3), (k + 0.13, 0.3), (k + 0.1, 0.48), (k - 0.1, 0.48)], third)
        b.poly(
            smooth(
                (
                    (-0.12, 0.2),
                    (-0.4 * s.wide, -0.06),
                    (-0.36 * s.wide, -0.44),
                    (0, -0.58),
                    (0.36 * s.wide, -0.44),
                    (0.4 * s.wide, -0.06),
                    (0.12, 0.2),
                )
            ),
            body,
            textured=True,
        )
    else:
        b.stroke([(0, 0.18), (0.06 + k, 0.28), (-0.05 - k, 0.38), (0.04 + k, 0.5)], 0.03, third)
        b.poly([(0, 0.1), (-0.07, 0.22), (0.07, 0.22)], second)
        b.ellipse(0, -0.16, 0.31 * s.wide, ry, body, textured=True)
    if s.pattern == "plain" or s.variant == 1:
        b.poly(
            [(-0.3 * s.wide, -0.16), (0.3 * s.wide, -0.16), (0.28 * s.wide, -0.02), (-0.28 * s.wide, -0.02)],
            second,
            inside=True,
        )
    _emblem(b, s, 0, -0.2, 0.16)
    b.ellipse(0.12, -0.36, 0.05, 0.07, (255, 255, 255), outline=False, inside=True)


def _house(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    w = 0.34 * s.wide
    puff = 0.03 * _swing(pose)
    if s.detail:
        b.poly([(0.12, -0.44 - puff), (0.26, -0.44 - puff), (0.26, -0.1), (0.12, -0.1)], third)
    b.poly([(-w, -0.06), (w, -0.06), (w, 0.46), (-w, 0.46)], body, textured=True)
    roof = (
        ((-1.25 * w, -0.04), (0, -0.5), (1.25 * w, -0.04)),
        ((-1.2 * w, -0.04), (-0.7 * w, -0.36), (0.7 * w, -0.36), (1.2 * w, -0.04)),
        smooth(
            (
                (-1.1 * w, -0.04),
                (-1.1 * w, -0.04),
                (-1.0 * w, -0.52),
                (1.0 * w, -0.52),
                (1.1 * w, -0.04),
                (1.1 * w, -0.04),
            )
        ),
    )[s.variant]
    b.poly(roof, second)
    b.poly([(-0.75 * w, 0.46), (-0.75 * w, 0.18), (-0.15 * w, 0.18), (-0.15 * w, 0.46)], third, inside=True)
    b.poly([(0.2 * w, 0.1), (0.78 * w, 0.1), (0.78 * w, 0.3), (0.2 * w, 0.3)], GLASS, inside=True)
    _emblem(b, s, 0, -0.2, 0.11)


def draw_patchwork(b: Brush, s: ToySubject, pose: Pose) -> None:
    """A shape without a name: a random silhouette cut in two or three textures, with knobs around it."""
    n = s.numbers
    turn = 2 * math.pi * n[2]
    wobble = 0.04 * _swing(pose)
    _patchwork_knobs(b, s, turn, wobble)
    outline = _patchwork_outline(s, turn, wobble)
    b.poly(outline, PALETTE[s.body], textured=True)
    if n[22] < 0.7:
        _patchwork_inlay(b, s, outline, turn)
    if s.variant == 0:
        b.ellipse(0.06, -0.02, 0.1, 0.1, PALETTE[s.second], inside=True)


def _patchwork_outline(s: ToySubject, turn: float, wobble: float) -> Points:
    """The silhouette: five to nine corners at random distances, which move out and in by `wobble` in turn."""
    n = s.numbers
    corners = 5 + int(n[0] * 5)
    spread = 0.25 + 0.3 * n[1]
    shape = []
    for k in range(corners):
        a = turn + 2 * math.pi * (k + 0.5 * (n[3 + k % 9] - 0.5)) / corners
        radius = 0.5 * (1 - spread * n[(12 + 5 * k) % 24])
        if k % 2:
            radius += wobble
        else:
            radius -= wobble
        shape.append((radius * math.cos(a) * (0.7 + 0.6 * n[13]), radius * math.sin(a)))
    if n[21] < 0.5:
        return smooth(tuple(shape), 2)
    return np.array(shape)


def _patchwork_knobs(b: Brush, s: ToySubject, turn: float, wobble: float) -> None:
    """Up to three knobs around the silhouette, drawn before it: round, pointed or square."""
    n = s.numbers
    third = PALETTE[s.third]
    knobs = int(n[14] * 4)
    for k in range(knobs):
        a = turn + 2 * math.pi * (k / max(1, knobs) + 0.2 * n[15 + k])
        p = b.at(0.4 * math.cos(a) * (0.7 + 0.6 * n[13]), 0.4 * math.sin(a), a + 2 * wobble)
        if n[18 + k % 3] < 0.4:
            p.ellipse(0.08, 0, 0.13, 0.13, third)
        elif n[18 + k % 3] < 0.7:
            p.poly([(-0.06, -0.15), (0.26, 0.0), (-0.06, 0.15)], third)
        else:
            p.poly([(-0.05, -0.07), (0.24, -0.07), (0.24, 0.07), (-0.05, 0.07)], third)


def _patchwork_inlay(b: Brush, s: ToySubject, outline: Points, turn: float) -> None:
    """A second texture on part of the silhouette: on a smaller copy of it, or on everything to one side."""
    n = s.numbers
    body, second, third = _colours(s)
    ink = body
    if n[16] < 0.5:
        ink = second
    side = 96
    if b.texture is not None:
        side = b.texture.shape[0]
    pattern = ("stripes", "spots", "checks", "rings", "plain")[int(n[23] * 5)]
    inlay = b.at(0, 0)
    inlay.texture = texture(pattern, apply_light(third, b.light), apply_light(ink, b.light), turn, 0.2, side)
    if n[17] < 0.5:
        inlay.poly(outline * (0.5 + 0.2 * n[20]), third, textured=True, inside=True)
        return
    along = outline @ np.array([math.cos(turn), math.sin(turn)])
    if (along > 0).sum() > 2:
        # Start at the point farthest on the other side, so that the points kept follow each other.
        first = int(np.argmin(along))
        on_one_side = np.roll(outline, -first, axis=0)[np.roll(along, -first) > 0]
        inlay.poly(on_one_side, third, textured=True, inside=True)


_PAINTERS: dict[str, Callable[[Brush, ToySubject, Pose], None]] = {
    "ball": _ball,
    "kite": _kite,
    "car": _car,
    "boat": _boat,
    "rocket": _rocket,
    "umbrella": _umbrella,
    "balloon": _balloon,
    "house": _house,
}


def draw_thing(b: Brush, s: ToySubject, pose: Pose) -> None:
    """Draw a thing of any kind in THINGS with a placed brush."""
    _PAINTERS[s.kind](b, s, pose)
