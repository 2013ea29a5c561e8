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
    """Phase of the gait at t seconds: a ball turns by the way it went, anybody else steps at a steady pace."""
    if p.rolls:
        return way / (math.pi * 2 * p.feet)
    return p.phase + pace * p.steps * t


def _step_height(p: Place, t: float) -> float:
    """How high a step lifts the body at t seconds, 0 to 1."""
    return abs(math.sin(2 * math.pi * (p.phase + p.steps * t)))


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


def pose_single(verb: str, p: Place, u: float, duration: float) -> Pose:
    """Pose of one subject doing a verb of SINGLE_VERBS alone; 'walks' goes where it faces."""
    t = u * duration
    flip = p.flip
    ahead = 1.0
    if flip:
        ahead = -1.0
    if verb == "walks":
        way = 2 * p.travel * u
        bob = 0.0
        if not p.rolls:
            bob = 0.035 * p.scale * _step_height(p, t)
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


def pose_pair(verb: str, a: Place, b: Place, direction: str, u: float, duration: float) -> tuple[Pose, Pose]:
    """Poses of an actor (place a) and of the one it concerns (place b), for a verb of PAIR_VERBS."""
    t = u * duration
    ahead = 1.0
    if direction == "left":
        ahead = -1.0
    if verb == "chases":
        return _pose_chase(a, b, ahead, u, t)
    if verb == "pushes":
        return _pose_push(a, b, ahead, u, t)
    if verb == "meets":
        near = min(1.0, u / 0.85)
        return _pose_meeting(a, -ahead, near, t), _pose_meeting(b, ahead, near, t)
    if verb == "circles":
        return _pose_circle(a, b, u, t, duration)
    if verb == "jumps over":
        return _pose_jump_over(a, b, ahead, u, t, duration)
    raise ValueError(f"{verb!r} is no verb between two subjects.")


def _pose_chase(a: Place, b: Place, ahead: float, u: float, t: float) -> tuple[Pose, Pose]:
    """Both run the same way, leaning into it; a ball rolls upright."""
    way = 2 * a.travel * u
    shift = ahead * (way - a.travel)
    poses = []
    for p, lean in ((a, 0.14), (b, 0.06)):
        if p.rolls:
            lean = 0.0
        hop = 0.09 * p.scale * _step_height(p, t)
        gait = _gait(p, t, way, 1.4)
        poses.append(Pose(p.x + shift, p.y - hop, p.scale, angle=ahead * lean, flip=ahead < 0, gait=gait, wave=0.3))
    return poses[0], poses[1]


def _pose_push(a: Place, b: Place, ahead: float, u: float, t: float) -> tuple[Pose, Pose]:
    """The actor steps with its arm up; the other slides along, wobbling, or rolls when it is a ball."""
    way = 2 * a.travel * u
    shift = ahead * (way - a.travel)
    actor_lean, other_lean = 0.22, 0.09 * math.sin(9 * t)
    if a.rolls:
        actor_lean = 0.0
    other_gait = 0.0
    if b.rolls:
        other_lean, other_gait = 0.0, _gait(b, t, way, 0.9)
    hop = 0.02 * a.scale * _step_height(a, t)
    actor = Pose(
        a.x + shift,
        a.y - hop,
        a.scale,
        angle=ahead * actor_lean,
        flip=ahead < 0,
        gait=_gait(a, t, way, 0.9),
        wave=0.9,
    )
    other = Pose(b.x + shift, b.y, b.scale, angle=ahead * other_lean, flip=ahead < 0, gait=other_gait, wave=0.3)
    return actor, other


def _pose_meeting(p: Place, side: float, near: float, t: float) -> Pose:
    """One of two that meet: comes from `side`, and stops and waves when `near` (the part of its way) is 1."""
    way = p.travel * near
    gait = 0.0
    if near < 1 or p.rolls:
        gait = _gait(p, t, way)
    wave = 0.0
    if near == 1:
        wave = 0.8
    return Pose(p.x + side * (p.travel - way), p.y, p.scale, flip=side > 0, gait=gait, wave=wave)


def _pose_circle(a: Place, b: Place, u: float, t: float, duration: float) -> tuple[Pose, Pose]:
    """The actor goes around the other, larger in front and smaller behind."""
    laps = 0.8
    if duration > 1.4:
        laps = cycles(duration, 2.0)
    turn = 2 * math.pi * (laps * u + a.phase)
    k = 1.0 + 0.1 * math.sin(turn)
    actor = Pose(
        a.x + a.travel * math.cos(turn),
        a.y + a.high * math.sin(turn),
        a.scale * k,
        flip=math.sin(turn) > 0,
        gait=_gait(a, t, a.travel * turn),
    )
    return actor, Pose(b.x, b.y, b.scale, squash=1.0 + 0.02 * math.sin(4 * t), flip=b.flip)


def _pose_jump_over(a: Place, b: Place, ahead: float, u: float, t: float, duration: float) -> tuple[Pose, Pose]:
    """The actor jumps over the other and, in longer clips, back again; the other ducks."""
    jumps = cycles(duration, 2.0)
    lap = min(int(jumps * u), jumps - 1)
    w = jumps * u - lap  # the part of this jump that has passed
    s = min(1.0, max(0.0, (w - 0.12) / 0.74))  # the part of its flight
    back = lap % 2 == 1
    heading, along = ahead, ahead * (2 * s - 1)
    if back:
        heading, along = -ahead, ahead * (1 - 2 * s)
    squash = 0.86
    if 0.12 < w < 0.86:
        squash = 1.0
    actor = Pose(
        a.x + a.travel * along,
        a.y - 4 * s * (1 - s) * a.high,
        a.scale,
        angle=0.25 * (2 * s - 1) * heading,
        squash=squash,
        flip=(ahead < 0) != back,
        gait=_gait(a, t, 2 * a.travel * s),
        wave=0.6,
    )
    return actor, Pose(b.x, b.y, b.scale, squash=1.0 - 0.12 * 4 * s * (1 - s), flip=b.flip)


def camera_at(camera: str, reach: float, u: float) -> tuple[float, float]:
    """(offset to the right in frame widths, zoom) of a camera from CAMERAS; `reach` is half a pan's way."""
    if camera == "zoom in":
        return 0.0, 1.0 + (ZOOM - 1.0) * u
    side = {"still": 0.0, "pan left": -1.0, "pan right": 1.0}[camera]
    return side * reach * (2 * u - 1), 1.0
