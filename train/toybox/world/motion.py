"""How the subjects of a scene move: a verb and a place in, a pose at any moment out.

In:  the part of the action that has passed (u from 0 to 1), the clip's duration, where each subject has room.
Out: poses. Knows nothing of colours, captions or pixels.

Travel (walking, falling, growing) is spread over the whole clip, whatever its length; what repeats (steps, jumps,
turns) keeps its pace in seconds and repeats more often in longer clips. So any number of frames stays in the frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.toybox.world.drawing import Pose

FPS = 8
ZOOM = 1.18  # how much nearer a zoom has come at the end of a clip


@dataclass(frozen=True)
class Place:
    """Where one subject stands at rest and how much room it has.

    x, y: centre at rest, fractions of the frame. feet: distance from centre to feet; half: half its width (both in
    fractions of the shorter side). scale, flip as in Pose. phase: 0 to 1, where repeating motion starts.
    travel: half the way a walker goes, frame widths; high: how far up there is room, frame heights.
    steps: cycles of gait per second; rolls: its gait follows the way it went (a ball).
    """

    x: float
    y: float
    feet: float
    half: float
    scale: float
    flip: bool
    phase: float
    travel: float
    high: float
    steps: float
    rolls: bool


def cycles(duration: float, period: float) -> int:
    """How often something of about `period` seconds repeats in a clip: a whole number, at least once."""
    return max(1, round(duration / period))


def _gait(p: Place, t: float, way: float, pace: float = 1.0) -> float:
    return way / (math.pi * 2 * p.feet) if p.rolls else p.phase + pace * p.steps * t


def _hop(w: float) -> tuple[float, float]:
    """(height 0 to 1, squash) at part w of one jump: crouch, parabola, landing."""
    w %= 1.0
    if w < 0.2:
        return 0.0, 1.0 - 0.28 * math.sin(math.pi * w / 0.2 / 2)
    if w < 0.85:
        s = (w - 0.2) / 0.65
        return 4 * s * (1 - s), 1.0 + 0.16 * abs(1 - 2 * s)
    return 0.0, 0.78 + 0.22 * (w - 0.85) / 0.15


def _tilted(p: Place, angle: float) -> tuple[float, float]:
    """Centre of a subject leaning by `angle` around its feet."""
    return p.x + p.feet * math.sin(angle), p.y + p.feet * (1 - math.cos(angle))


def single(verb: str, p: Place, u: float, duration: float) -> Pose:
    """Pose of one subject doing a verb of SINGLE_VERBS alone; 'walks' goes where it faces."""
    t = u * duration
    ahead = -1.0 if p.flip else 1.0
    flip = p.flip
    if verb == "walks":
        way = 2 * p.travel * u
        bob = 0.0 if p.rolls else 0.035 * p.scale * abs(math.sin(2 * math.pi * (p.phase + p.steps * t)))
        return Pose(p.x + ahead * (way - p.travel), p.y - bob, p.scale, flip=flip, gait=_gait(p, t, way), wave=0.0)
    if verb == "jumps":
        height, squash = _hop(cycles(duration, 1.0) * u + p.phase)
        return Pose(p.x, p.y - height * p.high, p.scale, squash=squash, flip=flip, wave=0.5 * height)
    if verb == "bounces":
        up = abs(math.sin(math.pi * (cycles(duration, 0.5) * u + p.phase)))
        return Pose(p.x, p.y - up * min(0.09, p.high), p.scale, squash=0.72 + 0.38 * math.sqrt(up), flip=flip)
    if verb == "spins":
        return Pose(
            p.x, p.y - min(0.05, p.high), p.scale, angle=ahead * 2 * math.pi * cycles(duration, 1.6) * u, flip=flip
        )
    if verb == "flies up":
        return Pose(
            p.x,
            p.y - p.high * u,
            p.scale,
            squash=1.06,
            flip=flip,
            gait=p.phase + 2.6 * t,
            wave=0.5 + 0.5 * math.sin(9 * t),
        )
    if verb == "falls down":
        angle = 0.3 * math.sin(5 * t + 6 * p.phase) + 0.25 * ahead * (1 - u)
        return Pose(
            p.x,
            p.y - p.high * (1 - u**1.5),
            p.scale,
            angle=angle,
            squash=1.04,
            flip=flip,
            gait=p.phase + 2.2 * t,
            wave=0.9,
        )
    if verb == "wobbles":
        angle = 0.26 * math.sin(2 * math.pi * (cycles(duration, 1.0) * u + p.phase))
        x, y = _tilted(p, angle)
        return Pose(
            x, y, p.scale, angle=angle, flip=flip, wave=0.6 + 0.4 * math.sin(2 * math.pi * cycles(duration, 0.6) * u)
        )
    if verb == "grows":
        k = 0.52 + 0.48 * u
        return Pose(p.x, p.y + p.feet * (1 - k), p.scale * k, flip=flip)
    if verb == "stands still":
        return Pose(p.x, p.y, p.scale, squash=1.0 + 0.02 * math.sin(2 * math.pi * (p.phase + 0.6 * t)), flip=flip)
    raise ValueError(f"{verb!r} is no verb for one subject.")


def pair(verb: str, a: Place, b: Place, direction: str, u: float, duration: float) -> tuple[Pose, Pose]:
    """Poses of an actor (place a) and of the one it concerns (place b), for a verb of PAIR_VERBS."""
    t = u * duration
    ahead = -1.0 if direction == "left" else 1.0
    flip = ahead < 0
    if verb in ("chases", "pushes"):
        way = 2 * a.travel * u
        shift = ahead * (way - a.travel)
        run = verb == "chases"
        poses = []
        for p, lean in ((a, 0.14 if run else 0.22), (b, 0.06 if run else 0.09 * math.sin(9 * t))):
            hop = (
                (0.09 if run else 0.0 if p is b else 0.02)
                * p.scale
                * abs(math.sin(2 * math.pi * (p.phase + p.steps * t)))
            )
            gait = _gait(p, t, way, 1.4 if run else 0.9) if run or p is a or p.rolls else 0.0
            lean = 0.0 if p.rolls else lean
            wave = 0.9 if p is a and not run else 0.3
            poses.append(Pose(p.x + shift, p.y - hop, p.scale, angle=ahead * lean, flip=flip, gait=gait, wave=wave))
        return poses[0], poses[1]
    if verb == "meets":
        near = min(1.0, u / 0.85)
        poses = []
        for p, side in ((a, -ahead), (b, ahead)):
            way = p.travel * near
            gait = _gait(p, t, way) if near < 1 or p.rolls else 0.0
            poses.append(
                Pose(
                    p.x + side * (p.travel - way),
                    p.y,
                    p.scale,
                    flip=side > 0,
                    gait=gait,
                    wave=0.8 if near == 1 else 0.0,
                )
            )
        return poses[0], poses[1]
    if verb == "circles":
        turn = 2 * math.pi * ((cycles(duration, 2.0) if duration > 1.4 else 0.8) * u + a.phase)
        k = 1.0 + 0.1 * math.sin(turn)
        gait = _gait(a, t, a.travel * turn)
        actor = Pose(
            a.x + a.travel * math.cos(turn),
            a.y + a.high * math.sin(turn),
            a.scale * k,
            flip=math.sin(turn) > 0,
            gait=gait,
        )
        return actor, Pose(b.x, b.y, b.scale, squash=1.0 + 0.02 * math.sin(4 * t), flip=b.flip)
    if verb == "jumps over":
        n = cycles(duration, 2.0)
        lap, w = min(int(n * u), n - 1), n * u - min(int(n * u), n - 1)
        back = lap % 2 == 1
        s = min(1.0, max(0.0, (w - 0.12) / 0.74))
        along = ahead * (1 - 2 * s if back else 2 * s - 1)
        squash = 1.0 if 0.12 < w < 0.86 else 0.86
        actor = Pose(
            a.x + a.travel * along,
            a.y - 4 * s * (1 - s) * a.high,
            a.scale,
            angle=0.25 * (2 * s - 1) * (-ahead if back else ahead),
            squash=squash,
            flip=flip != back,
            gait=_gait(a, t, 2 * a.travel * s),
            wave=0.6,
        )
        return actor, Pose(b.x, b.y, b.scale, squash=1.0 - 0.12 * 4 * s * (1 - s), flip=b.flip)
    raise ValueError(f"{verb!r} is no verb between two subjects.")


def camera_at(camera: str, reach: float, u: float) -> tuple[float, float]:
    """(offset to the right in frame widths, zoom) of a camera from CAMERAS; `reach` is half a pan's way."""
    if camera == "zoom in":
        return 0.0, 1.0 + (ZOOM - 1.0) * u
    side = {"still": 0.0, "pan left": -1.0, "pan right": 1.0}[camera]
    return side * reach * (2 * u - 1), 1.0
