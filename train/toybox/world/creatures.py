"""How the eight creatures of the toybox world are drawn: one body plan each, shared eyes, mouths and clothes.

In:  a brush, a subject's attributes and a pose (only its gait and wave are read here).
Out: strokes of the brush, and the declared face region. Knows nothing of scenes, captions or seeds.

Local units: about one unit high, y down, facing +x; the brush has already been placed, turned and flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from train.toybox.world.drawing import OUTLINE, PALETTE, Brush, Colour, Points, Pose, mix, smooth

if TYPE_CHECKING:
    from train.toybox.world.traits import ToySubject

WHITE: Colour = (250, 250, 246)
NOSE_PINK: Colour = (240, 110, 130)
MOUTH_FILLS: dict[str, Colour] = {"open": (170, 40, 60), "teeth": WHITE}


def _colours(s: ToySubject) -> tuple[Colour, Colour, Colour]:
    return PALETTE[s.body], PALETTE[s.second], PALETTE[s.third]


def round_corners(points: list[tuple[float, float]]) -> Points:
    """An open line with its corners rounded, ends kept."""
    p = np.array(points)
    for _ in range(2):
        q = np.stack([0.75 * p[:-1] + 0.25 * p[1:], 0.25 * p[:-1] + 0.75 * p[1:]], 1).reshape(-1, 2)
        p = np.concatenate([p[:1], q[1:-1], p[-1:]])
    return p


def _swing(pose: Pose, offset: float = 0.0) -> float:
    return math.sin(2 * math.pi * (pose.gait + offset))


def _eye(b: Brush, s: ToySubject, x: float, y: float, r: float) -> None:
    """One eye about `r` in radius, looking ahead."""
    if s.eyes == "dots":
        b.ellipse(x + 0.1 * r, y, 0.62 * r, 0.8 * r, OUTLINE, outline=False, inside=True)
        b.ellipse(x + 0.28 * r, y - 0.3 * r, 0.24 * r, 0.24 * r, WHITE, outline=False, inside=True)
        return
    tall = 1.0
    if s.eyes == "wide":
        tall = 1.3
    iris = OUTLINE
    if s.eye_colour != "black":
        iris = PALETTE[s.eye_colour]
    b.ellipse(x, y, r, tall * r, WHITE, inside=True)
    b.ellipse(x + 0.3 * r, y, 0.58 * r, 0.66 * r, iris, outline=False, inside=True)
    if s.eyes == "sleepy":
        lid = [(x + r * math.cos(t), y + r * math.sin(t)) for t in np.linspace(math.pi, 2 * math.pi, 9)]
        b.poly(lid, PALETTE[s.second], inside=True)


def _mouth(b: Brush, s: ToySubject, x: float, y: float, r: float) -> None:
    """A mouth about `r` wide to each side."""
    curve = [(x + r * t, y + 0.4 * r * (1 - t * t)) for t in (-1, -0.5, 0, 0.5, 1)]
    if s.mouth == "line":
        b.stroke([(x - r, y + 0.15 * r), (x + r, y + 0.15 * r)], 0.035, OUTLINE, outline=False, inside=True)
    elif s.mouth == "smile":
        b.stroke(curve, 0.035, OUTLINE, outline=False, inside=True)
    else:
        lower_lip = [(px, py + 0.5 * r) for px, py in curve[1:4]]
        b.poly([(x - r, y), *lower_lip, (x + r, y)], MOUTH_FILLS[s.mouth], inside=True)


def _face(b: Brush, s: ToySubject, x: float, y: float, r: float, *, gap: float = 0.42, eye: float = 0.27) -> None:
    """Two eyes and a mouth on a head of radius r, moved ahead: a three-quarter view tells where it faces."""
    ahead = x + 0.24 * r
    for side in (-1, 1):
        _eye(b, s, ahead + side * gap * r, y - 0.08 * r, eye * r)
    _mouth(b, s, ahead + 0.06 * r, y + 0.5 * r, 0.3 * r)


def _hat(b: Brush, s: ToySubject, x: float, top: float, r: float) -> None:
    """A hat sitting at height `top` on a head of radius r."""
    fill, band = PALETTE[s.third], PALETTE[s.second]
    if s.detail == 0:  # top hat
        b.poly(
            [
                (x - 0.5 * r, top + 0.1 * r),
                (x - 0.55 * r, top - 0.75 * r),
                (x + 0.55 * r, top - 0.75 * r),
                (x + 0.5 * r, top + 0.1 * r),
            ],
            fill,
        )
        b.poly(
            [
                (x - 0.5 * r, top - 0.05 * r),
                (x - 0.5 * r, top - 0.28 * r),
                (x + 0.5 * r, top - 0.28 * r),
                (x + 0.5 * r, top - 0.05 * r),
            ],
            band,
            outline=False,
            inside=True,
        )
        b.stroke([(x - 0.85 * r, top + 0.1 * r), (x + 0.85 * r, top + 0.1 * r)], 0.05, fill)
    elif s.detail == 1:  # party hat
        b.poly([(x - 0.6 * r, top + 0.18 * r), (x, top - 1.0 * r), (x + 0.6 * r, top + 0.18 * r)], fill)
        b.ellipse(x, top - 1.0 * r, 0.2 * r, 0.2 * r, band)
    else:  # cap with its peak ahead
        dome = [
            (x + 0.72 * r * math.cos(t), top + 0.25 * r + 0.75 * r * math.sin(t))
            for t in np.linspace(math.pi, 2 * math.pi, 10)
        ]
        b.poly(dome, fill)
        b.stroke([(x + 0.2 * r, top + 0.25 * r), (x + 1.15 * r, top + 0.3 * r)], 0.06, band)


def _wear_behind(b: Brush, s: ToySubject, x: float, y: float, r: float) -> None:
    """What sits on the back (facing +x the back is at -x), drawn before the body of half-width r."""
    if s.accessory == "backpack":
        b.poly(
            smooth(((x - 1.75 * r, y - 0.9 * r), (x, y - 0.9 * r), (x, y + 0.9 * r), (x - 1.75 * r, y + 0.9 * r)), 1),
            PALETTE[s.third],
        )


def _wear(b: Brush, s: ToySubject, neck: tuple[float, float, float], head: tuple[float, float, float]) -> None:
    """Clothes in front; neck and head are (x, y, half-width). The head's y is its centre."""
    fill = PALETTE[s.third]
    x, y, r = neck
    hx, hy, hr = head
    if s.accessory == "scarf":
        b.stroke([(x - 0.7 * r, y + 0.12 * r), (x - 0.55 * r, y + 0.85 * r)], 0.08, fill)
        b.stroke([(x - 0.85 * r, y), (x, y + 0.12 * r), (x + 0.85 * r, y)], 0.085, fill)
    elif s.accessory == "bow":
        if s.detail:  # at the neck
            cx, cy = x + 0.2 * r, y + 0.05 * r
        else:  # on the head
            cx, cy = hx - 0.35 * hr, hy - 0.88 * hr
        for side in (-1, 1):
            b.poly([(cx, cy), (cx + side * 0.15, cy - 0.1), (cx + side * 0.15, cy + 0.1)], fill)
        b.ellipse(cx, cy, 0.045, 0.045, fill)
    elif s.accessory == "glasses":
        ex = hx + 0.24 * hr
        frame = mix(fill, (0, 0, 0), 0.1)
        for side in (-1, 1):
            ring = [
                (ex + side * 0.46 * hr + 0.44 * hr * math.cos(t), hy - 0.08 * hr + 0.46 * hr * math.sin(t))
                for t in np.linspace(0, 2 * math.pi, 15)
            ]
            b.stroke(ring, 0.036, frame, outline=False, inside=True)
    elif s.accessory == "hat":
        _hat(b, s, hx, hy - 0.85 * hr, hr)


def _legs(b: Brush, fill: Colour, pose: Pose, hips: tuple[float, float], top: float, foot: float, width: float) -> None:
    """Two legs from y = top to y = foot; the gait swings them against each other and lifts the feet."""
    for x, offset in zip(hips, (0.5, 0.0), strict=True):
        s = _swing(pose, offset)
        lift = 0.0
        if pose.gait:
            lift = 0.05 * max(0.0, _swing(pose, offset + 0.25))
        b.stroke([(x, top), (x + 0.1 * s, foot - lift), (x + 0.1 * s + 0.05, foot - lift)], width, fill)


def _arm(b: Brush, fill: Colour, pose: Pose, x: float, y: float, length: float, width: float, side: int) -> None:
    """An arm from the shoulder; side +1 is the near one, which also waves."""
    angle = side * 0.5 + 0.45 * _swing(pose)
    if side > 0:
        angle = side * 0.5 + 0.45 * _swing(pose, 0.5) + pose.wave * 2.0
    b.stroke([(x, y), (x + length * math.sin(angle), y + length * math.cos(angle))], width, fill)


def _fox(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    wag = 0.12 * _swing(pose)
    t = b.at(-0.26 * s.wide, 0.12, -0.5 + wag - 0.25 * s.detail)
    t.poly(
        smooth(((0.04, -0.06), (-0.18, -0.2), (-0.46, -0.16), (-0.6, 0.0), (-0.42, 0.12), (-0.16, 0.1), (0.04, 0.08))),
        body,
        textured=True,
    )
    t.poly(smooth(((-0.4, -0.15), (-0.6, -0.06), (-0.6, 0.03), (-0.42, 0.09), (-0.46, -0.02))), second, inside=True)
    for x, offset, fill in ((-0.2, 0.5, body), (0.16, 0.0, second), (-0.12, 0.0, second), (0.24, 0.5, body)):
        k = 0.08 * _swing(pose, offset)
        b.stroke([(x * s.wide, 0.2), (x * s.wide + k, 0.28 + 0.14 * s.limb)], 0.085, fill)
    _wear_behind(b, s, 0.06, 0.0, 0.13)
    b.ellipse(0.0, 0.14, 0.31 * s.wide, 0.165, body, textured=True)
    hx, hy, r = 0.25 * s.wide, -0.12, 0.21 * s.head
    tall = (1.5, 1.15, 1.8)[s.variant]
    ear_fill = (body, second, body)[s.variant]
    for side in (-1, 1):
        ear = [
            (hx + side * 0.95 * r, hy - 0.3 * r),
            (hx + side * (0.75 + 0.15 * s.variant) * r, hy - tall * r),
            (hx + side * 0.1 * r, hy - 0.8 * r),
        ]
        b.poly(ear, ear_fill)
    h = b.at(hx, hy)
    h.poly(
        smooth(
            (
                (-1.15 * r, -0.2 * r),
                (-0.6 * r, -0.95 * r),
                (0.6 * r, -0.95 * r),
                (1.15 * r, -0.3 * r),
                (1.05 * r, 0.5 * r),
                (0.3 * r, 1.0 * r),
                (-0.6 * r, 0.9 * r),
                (-1.2 * r, 0.45 * r),
            )
        ),
        body,
    )
    h.poly(
        smooth(
            (
                (0.1 * r, 0.2 * r),
                (1.0 * r, 0.1 * r),
                (1.75 * r, 0.42 * r),
                (1.0 * r, 0.95 * r),
                (0.0 * r, 0.95 * r),
                (-0.4 * r, 0.6 * r),
            )
        ),
        second,
    )
    h.ellipse(1.6 * r, 0.38 * r, 0.2 * r, 0.18 * r, OUTLINE, outline=False)
    for side in (-1, 1):
        _eye(h, s, 0.2 * r + side * 0.4 * r, -0.18 * r, 0.27 * r)
    _mouth(h, s, 0.75 * r, 0.6 * r, 0.25 * r)
    b.face(hx + 0.15 * r, hy, 1.45 * r, 1.05 * r)
    _wear(b, s, (hx - 0.15 * r, hy + 1.05 * r, 0.17), (hx - 0.05 * r, hy - 0.1 * r, r))


def _biped(
    b: Brush, s: ToySubject, pose: Pose, half: float, head: float, leg: float, arm: float, thick: float
) -> tuple[float, float, float]:
    """Legs, arms and a patterned body of cat, bear and rabbit; returns the head (x, y, radius), not yet drawn."""
    body, second, _ = _colours(s)
    foot = 0.5
    top = foot - leg
    _arm(b, body, pose, -0.75 * half, 0.1, arm, thick, -1)
    _wear_behind(b, s, -0.35 * half, 0.16, 0.14)
    _legs(b, body, pose, (-0.5 * half, 0.5 * half), top - 0.06, foot, thick * 1.1)
    b.ellipse(0.0, 0.18, half, 0.25, body, textured=True)
    if s.pattern == "plain" or s.detail == 0:
        b.ellipse(0.1 * half, 0.22, 0.58 * half, 0.16, second, outline=False, inside=True)
    _arm(b, body, pose, 0.7 * half, 0.1, arm, thick, 1)
    return 0.03, -0.16, head


def _cat(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    wag = 0.1 * _swing(pose)
    tail = [(-0.12, 0.34), (-0.34, 0.36), (-0.46 - wag, 0.18), (-0.4 - wag, -0.02), (-0.52 - wag, -0.14)]
    b.stroke(round_corners(tail), 0.075, body)
    b.stroke(round_corners(tail)[-8:], 0.075, second, outline=False, inside=True)
    x, y, r = _biped(b, s, pose, 0.2 * s.wide, 0.25 * s.head, 0.14 * s.limb, 0.19, 0.08)
    h = b.at(x, y, sx=1.12)
    for side in (-1, 1):
        tip = (1.0, 0.85, 1.25)[s.variant]
        ear = [
            (side * 1.0 * r, -0.2 * r),
            (side * tip * r, -(1.35, 1.65, 1.15)[s.variant] * r),
            (side * 0.15 * r, -0.85 * r),
        ]
        h.poly(ear, body)
        h.poly(
            [
                (side * 0.85 * r, -0.5 * r),
                (side * (tip - 0.1) * r, -(1.1, 1.3, 0.95)[s.variant] * r),
                (side * 0.4 * r, -0.75 * r),
            ],
            second,
            outline=False,
            inside=True,
        )
    h.ellipse(0, 0, r, 0.88 * r, body, textured=s.detail > 0)
    for side in (-1, 1):
        h.stroke(
            [(0.24 * r + side * 0.75 * r, 0.3 * r), (0.24 * r + side * 1.25 * r, 0.2 * r)],
            0.022,
            OUTLINE,
            outline=False,
        )
    muzzle = (second, WHITE, WHITE)[s.detail]
    h.ellipse(0.3 * r, 0.42 * r, 0.42 * r, 0.3 * r, muzzle, outline=False, inside=True)
    nose = [(0.18 * r, 0.18 * r), (0.46 * r, 0.18 * r), (0.32 * r, 0.36 * r)]
    h.poly(nose, NOSE_PINK, outline=False, inside=True)
    _face(h, s, 0, 0, r, gap=0.46, eye=0.28)
    b.face(x, y, 1.1 * r, 0.88 * r)
    _wear(b, s, (x, y + 0.86 * r, 0.2), (x, y, r))


def _bear(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    b.ellipse(-0.26 * s.wide, 0.3, 0.07, 0.07, second)
    x, y, r = _biped(b, s, pose, 0.28 * s.wide, 0.25 * s.head, 0.12 * s.limb, 0.17, 0.125)
    for side in (-1, 1):
        big = (0.4, 0.52, 0.3)[s.variant]
        b.ellipse(x + side * 0.82 * r, y - 0.72 * r, big * r, big * r, body)
        b.ellipse(x + side * 0.82 * r, y - 0.72 * r, 0.55 * big * r, 0.55 * big * r, second, outline=False, inside=True)
    b.ellipse(x, y, 1.05 * r, 0.95 * r, body, textured=s.detail == 2)
    b.ellipse(x + 0.32 * r, y + 0.42 * r, 0.52 * r, 0.4 * r, second, inside=True)
    b.ellipse(x + 0.36 * r, y + 0.2 * r, 0.2 * r, 0.14 * r, OUTLINE, outline=False, inside=True)
    ahead = x + 0.26 * r
    for side in (-1, 1):
        _eye(b, s, ahead + side * 0.46 * r, y - 0.2 * r, 0.24 * r)
    _mouth(b, s, ahead + 0.06 * r, y + 0.52 * r, 0.24 * r)
    b.face(x, y, 1.05 * r, 0.95 * r)
    _wear(b, s, (x, y + 0.9 * r, 0.24), (x, y, r))


def _rabbit(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    tail_fill = WHITE
    if s.body == "white":
        tail_fill = second
    b.ellipse(-0.21 * s.wide, 0.3, 0.085, 0.085, tail_fill)
    x, y, r = _biped(b, s, pose, 0.18 * s.wide, 0.21 * s.head, 0.13 * s.limb, 0.17, 0.08)
    y = -0.08
    droop = 0.06 * _swing(pose)
    for side in (-1, 1):
        lean = side * (0.14, 0.45, 0.1)[s.variant] + droop
        if s.variant == 2 and side > 0:
            lean = 1.9  # one ear hangs
        e = b.at(x + side * 0.45 * r, y - 0.6 * r, lean)
        length = 0.19 + 0.05 * s.limb
        e.ellipse(0, -length * 0.85, 0.085, length, body)
        e.ellipse(0, -length * 0.85, 0.042, length * 0.7, second, outline=False, inside=True)
    b.ellipse(x, y, 1.04 * r, 0.95 * r, body, textured=s.detail == 1)
    b.ellipse(x + 0.3 * r, y + 0.45 * r, 0.42 * r, 0.3 * r, WHITE, outline=False, inside=True)
    b.ellipse(x + 0.32 * r, y + 0.22 * r, 0.13 * r, 0.1 * r, NOSE_PINK, outline=False, inside=True)
    _face(b, s, x, y, r, gap=0.45, eye=0.28)
    b.face(x, y, 1.04 * r, 0.95 * r)
    _wear(b, s, (x, y + 0.93 * r, 0.19), (x, y, r))


def _bird(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    flap = _swing(pose)
    beak: Colour = (250, 176, 40)
    if s.accessory in ("none", "bow"):
        beak = third
    for x, offset in ((-0.06, 0.5), (0.1, 0.0)):
        k = 0.06 * _swing(pose, offset)
        b.stroke([(x, 0.25), (x + k, 0.42), (x + k + 0.07, 0.42)], 0.04, beak)
    tail_feathers = (2, 3, 3)[s.variant]
    for k in range(tail_feathers):
        b.at(-0.22, 0.06 + 0.03 * k, 0.35 - 0.33 * k).ellipse(-0.2, 0, 0.2, 0.065, second)
    _wear_behind(b, s, -0.12, 0.0, 0.13)
    hx, hy, r = 0.17, -0.18, 0.2 * s.head
    crest_angles = ((), (-0.6, -0.6 + 0.5, -0.6 + 0.5 * 2), (0.5,))[s.variant]
    for angle in crest_angles:
        b.at(hx - 0.03, hy - 0.8 * r, angle).ellipse(0, -0.1, 0.045, 0.12, second)
    b.ellipse(0.0, 0.06, 0.27 * s.wide, 0.25, body, textured=True)
    b.poly(
        [
            (hx + 0.75 * r, hy - 0.3 * r),
            (hx + (1.6 + 0.35 * s.detail) * r, hy + 0.08 * r),
            (hx + 0.75 * r, hy + 0.4 * r),
        ],
        beak,
    )
    b.ellipse(hx, hy, r, r, body)
    _eye(b, s, hx + 0.38 * r, hy - 0.12 * r, 0.36 * r)
    w = b.at(-0.02, 0.0, 0.25 - 1.1 * flap - 1.6 * pose.wave)
    w.poly(smooth(((0.06, -0.06), (0.03, 0.09), (-0.16, 0.17), (-0.34, 0.1), (-0.24, -0.05), (-0.1, -0.12))), second)
    b.face(hx + 0.2 * r, hy, 1.2 * r, r)
    if s.accessory == "glasses":
        ring = [
            (hx + 0.38 * r + 0.52 * r * math.cos(t), hy - 0.12 * r + 0.52 * r * math.sin(t))
            for t in np.linspace(0, 2 * math.pi, 15)
        ]
        b.stroke(ring, 0.036, third, outline=False, inside=True)
    else:
        _wear(b, s, (hx - 0.25 * r, hy + 0.95 * r, 0.17), (hx, hy, r))


def _frog(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, _ = _colours(s)
    k = 0.07 * _swing(pose)
    for side in (-1, 1):
        x = side * 0.3 * s.wide
        b.stroke(
            [(x * 0.8, 0.2), (x * 1.5, 0.1 - side * k), (x * 1.25, 0.36), (x * 1.25 + 0.12, 0.37)], 0.1 * s.limb, body
        )
    _wear_behind(b, s, -0.24, 0.05, 0.12)
    b.ellipse(0.0, 0.12, 0.37 * s.wide, 0.27, body, textured=True)
    belly = WHITE
    if s.pattern == "plain" or s.detail:
        belly = second
    b.ellipse(0.08, 0.26, 0.22 * s.wide, 0.12, belly, outline=False, inside=True)
    for side in (-1, 1):
        x = 0.1 + side * 0.13 * s.wide
        b.stroke(
            [
                (x, 0.22),
                (x + side * 0.03 + k, 0.38 - 0.3 * pose.wave * (side > 0)),
                (x + side * 0.03 + 0.07 + k, 0.39 - 0.34 * pose.wave * (side > 0)),
            ],
            0.07,
            body,
        )
    r = 0.125 * s.head
    spread = (0.17, 0.24, 0.13)[s.variant] * s.wide
    socket = (body, body, second)[s.variant]
    for side in (-1, 1):
        x = 0.08 + side * spread
        b.ellipse(x, -0.15, 1.15 * r, 1.15 * r, socket)
        _eye(b, s, x + 0.01, -0.16, 0.82 * r)
    width = 0.2 * s.wide
    lips = [(0.1 + width * t, 0.07 + 0.07 * (1 - t * t)) for t in np.linspace(-1, 1, 7)]
    if s.mouth in MOUTH_FILLS:
        b.poly([*lips, (0.1, 0.06)], MOUTH_FILLS[s.mouth], inside=True)
    else:
        b.stroke(lips, 0.04, OUTLINE, outline=False, inside=True)
    b.face(0.08, -0.03, 0.3 * s.wide, 0.24)
    head_y = -0.15
    if s.accessory == "hat":
        head_y = -0.12
    _wear(b, s, (0.05, 0.22, 0.3), (0.08, head_y, 0.2))


def _robot(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, second, third = _colours(s)
    steel = (176, 182, 196)
    if s.variant == 0:  # two legs
        for x, offset in ((-0.12, 0.5), (0.12, 0.0)):
            k = 0.08 * _swing(pose, offset)
            b.stroke([(x, 0.3), (x + k, 0.44)], 0.08, steel)
            b.poly([(x + k - 0.09, 0.5), (x + k - 0.06, 0.42), (x + k + 0.1, 0.42), (x + k + 0.13, 0.5)], second)
    elif s.variant == 1:  # one wheel, its spoke turning with the gait
        b.ellipse(0, 0.4, 0.13, 0.13, second)
        c, t = 2 * math.pi * pose.gait, 0.1
        b.stroke(
            [(-t * math.cos(c), 0.4 - t * math.sin(c)), (t * math.cos(c), 0.4 + t * math.sin(c))],
            0.03,
            OUTLINE,
            outline=False,
            inside=True,
        )
    else:  # treads
        b.poly(smooth(((-0.3, 0.34), (0.3, 0.34), (0.3, 0.52), (-0.3, 0.52)), 1), second)
        for x in (-0.16, 0.0, 0.16):
            b.ellipse(x + 0.03 * _swing(pose), 0.43, 0.045, 0.045, OUTLINE, outline=False, inside=True)
    _wear_behind(b, s, -0.1, 0.16, 0.14)
    w = 0.22 * s.wide
    _arm(b, steel, pose, -w, 0.08, 0.2, 0.06, -1)
    b.poly([(-w, -0.02), (w, -0.02), (1.06 * w, 0.34), (-1.06 * w, 0.34)], body, textured=True)
    if s.pattern == "plain" or s.detail == 0:
        b.poly([(-0.3 * w, 0.08), (0.7 * w, 0.08), (0.7 * w, 0.25), (-0.3 * w, 0.25)], second, inside=True)
    _arm(b, steel, pose, w, 0.08, 0.2, 0.06, 1)
    hw, hh, y = 0.25 * s.head * s.wide, 0.17 * s.head, -0.22
    for x in ((0.0,), (-0.12, 0.12), (0.1,))[s.detail]:
        b.stroke([(x, y - hh), (x - 0.03, y - hh - 0.13)], 0.03, steel)
        b.ellipse(x - 0.03, y - hh - 0.15, 0.05, 0.05, third)
    b.poly(smooth(((-hw, y - hh), (hw, y - hh), (hw, y + hh), (-hw, y + hh)), 1) * (1.12, 1.0), body)
    if s.eyes == "sleepy":  # a visor instead of eyes
        b.poly(
            [
                (-0.3 * hw, y - 0.5 * hh),
                (0.95 * hw, y - 0.5 * hh),
                (0.95 * hw, y + 0.1 * hh),
                (-0.3 * hw, y + 0.1 * hh),
            ],
            OUTLINE,
            inside=True,
        )
        b.ellipse(0.55 * hw, y - 0.2 * hh, 0.05, 0.04, PALETTE[s.third], outline=False, inside=True)
    else:
        for side in (-1, 1):
            _eye(b, s, 0.25 * hw + side * 0.42 * hw, y - 0.2 * hh, 0.4 * hh)
    _mouth(b, s, 0.27 * hw, y + 0.45 * hh, 0.42 * hw)
    b.face(0, y, hw, hh)
    _wear(b, s, (0, y + 1.12 * hh, 0.22), (0, y, 0.2 * s.head))


def _monster_headgear(b: Brush, s: ToySubject, k: float, top: float) -> None:
    """Horns, spikes or stalks on a monster whose head begins at height `top`; `k` sways the stalks."""
    body, second, _ = _colours(s)
    if s.variant == 0:  # horns
        for side in (-1, 1):
            b.poly(
                smooth(
                    (
                        (side * 0.06, top + 0.12),
                        (side * 0.3, top + 0.14),
                        (side * (0.3 + 0.08 * s.numbers[0]), top - 0.2),
                        (side * 0.2, top - 0.04),
                    ),
                    1,
                ),
                second,
            )
    elif s.variant == 1:  # a crown of spikes
        for x in (-0.2, 0.0, 0.2):
            b.poly([(x - 0.1, top + 0.14), (x - 0.03, top - 0.17), (x + 0.1, top + 0.1)], second)
    else:  # stalks
        for x in (-0.16, 0.16):
            b.stroke([(x * 0.7, top + 0.1), (x + k, top - 0.14)], 0.035, body)
            b.ellipse(x + k, top - 0.17, 0.06, 0.06, second)


def _monster_feet(s: ToySubject, pose: Pose, half: float) -> list[tuple[float, float]]:
    """The scalloped lower edge of a monster, `half` wide to each side: points up and down in turn, swinging."""
    feet = []
    for i, x in enumerate(np.linspace(half, -half, 5 + 2 * s.detail)):
        odd = i % 2
        depth = 0.07 + 0.05 * _swing(pose, 0.5 * odd) * (pose.gait > 0)
        if odd:
            feet.append((x, 0.48 + depth))
        else:
            feet.append((x, 0.48 - depth))
    return feet


def _monster_eyes_and_mouth(b: Brush, s: ToySubject, y: float) -> None:
    """One to three eyes at height y, a mouth below them, and fangs on a closed mouth."""
    number = 1 + int(s.numbers[2] * 3)
    radius = (0.14, 0.1, 0.085)[number - 1]
    places = (((0.08, 0.0),), ((-0.08, 0.0), (0.2, 0.0)), ((-0.16, 0.0), (0.07, 0.06), (0.28, 0.0)))[number - 1]
    for x, lift in places:
        _eye(b, s, x * s.wide, y - lift, radius)
    m = b.at(0.08, y + 0.22)
    _mouth(m, s, 0, 0, 0.14)
    if s.mouth in ("smile", "line"):
        for side in (-1, 1):
            m.poly([(side * 0.1 - 0.04, 0.03), (side * 0.1 + 0.04, 0.03), (side * 0.1, 0.12)], WHITE, inside=True)


def _monster(b: Brush, s: ToySubject, pose: Pose) -> None:
    body, _, _ = _colours(s)
    k = 0.06 * _swing(pose)
    w, top = 0.3 * s.wide, -0.26 - 0.06 * s.head
    _monster_headgear(b, s, k, top)
    _wear_behind(b, s, -0.16, 0.1, 0.14)
    b.stroke([(-0.9 * w, 0.1), (-1.35 * w, 0.24 - k)], 0.09, body)
    flare = 1.0 + 0.35 * (s.numbers[1] - 0.3)
    b.poly(
        smooth(
            (
                (-0.62 * w, top),
                (0.62 * w, top),
                (w, top + 0.24),
                (flare * w, 0.3),
                *_monster_feet(s, pose, flare * w),
                (-flare * w, 0.3),
                (-w, top + 0.24),
            )
        ),
        body,
        textured=True,
    )
    b.stroke([(0.9 * w, 0.1), (1.35 * w, 0.24 + k - 0.4 * pose.wave)], 0.09, body)
    y = top + 0.22
    _monster_eyes_and_mouth(b, s, y)
    b.face(0.04, top + 0.26, 0.95 * w, 0.26)
    if s.accessory == "glasses":
        _wear(b, s, (0, 0, 0), (0.02, y, 0.21))
    else:
        _wear(b, s, (0.02, 0.24, 0.3), (0.0, top + 0.16, 0.2))


_PAINTERS: dict[str, Callable[[Brush, ToySubject, Pose], None]] = {
    "fox": _fox,
    "cat": _cat,
    "bear": _bear,
    "rabbit": _rabbit,
    "bird": _bird,
    "frog": _frog,
    "robot": _robot,
    "monster": _monster,
}


def draw_creature(b: Brush, s: ToySubject, pose: Pose) -> None:
    """Draw a creature of any kind in CREATURES with a placed brush."""
    _PAINTERS[s.kind](b, s, pose)
