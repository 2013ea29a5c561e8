"""Subjects of the toybox world: what a seed decides about one, and how it is drawn in a pose.

In:  an integer seed (and a kind); later a canvas, a pose and a light.
Out: a frozen ToySubject; its pixels, its pixels in an instance map, its face box. Knows nothing of scenes or captions.

Local units of every drawing: about one unit high, y down, facing +x. `draw` measures each subject once and rescales
it, so that a pose's `scale` is the true height of the resting subject (wide ones are bounded by their width).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.creatures import draw_creature
from train.toybox.world.drawing import (
    PALETTE,
    PATTERNS,
    Brush,
    Pixels,
    Points,
    Pose,
    apply_light,
    far_apart,
    rotation,
    texture,
)
from train.toybox.world.things import THINGS, draw_patchwork, draw_thing
from train.toybox.world.traits import CREATURES, PATCHWORK, ToySubject

KINDS: tuple[str, ...] = (*CREATURES, *THINGS, PATCHWORK)
PATCHWORK_SHARE = 0.25
MAX_ASPECT = 1.15  # wider subjects (car, fox) are drawn lower instead, so that all take up a similar area

EYES = ("dots", "round", "wide", "sleepy")
MOUTHS = ("smile", "open", "line", "teeth")
WORN = ("none", "hat", "scarf", "bow", "glasses", "backpack")
EMBLEMS = ("none", "star", "heart", "disc", "cross")


def make_subject(seed: int, kind: str | None = None) -> ToySubject:
    """The subject a seed stands for; the same seed and kind give the same subject.

    Args:
        seed: any integer >= 0; see `train.toybox.world.subject_seed` for the ranges kept apart.
        kind: one of KINDS; None lets the seed choose (a quarter patchwork).

    Raises:
        ValueError: an unknown kind.
    """
    rng = np.random.default_rng(seed)
    if kind is None:
        kind = PATCHWORK
        if rng.random() >= PATCHWORK_SHARE:
            kind = KINDS[int(rng.integers(len(KINDS) - 1))]
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of subject. Use one of {', '.join(KINDS)}.")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    colours = list(PALETTE)
    body = str(rng.choice(colours))
    second = str(rng.choice([c for c in colours if far_apart(c, body)]))
    third = str(rng.choice([c for c in colours if far_apart(c, body) and c != second]))
    # Every kind draws eyes and a mouth, so that the draws which follow do not depend on the kind.
    eye_colour = str(rng.choice(["black", "blue", "green", "brown", "red", "purple"]))
    eyes, mouth = str(rng.choice(EYES)), str(rng.choice(MOUTHS))
    accessories: tuple[str, ...] = ("none",)
    if kind in CREATURES:
        accessories = WORN
    else:
        eyes = eye_colour = mouth = ""
        if kind in THINGS:
            accessories = EMBLEMS
    # Patterns carry most of what is seen at 64x64: plain is one in five, and never on patchwork.
    weights = np.full(len(PATTERNS), 0.16)
    weights[PATTERNS.index("plain")] = 0.2
    if kind == PATCHWORK:
        weights[PATTERNS.index("plain")] = 0.0
    return ToySubject(
        seed=int(seed),
        kind=kind,
        body=body,
        second=second,
        third=third,
        pattern=str(rng.choice(PATTERNS, p=weights / weights.sum())),
        pattern_angle=float(rng.choice([0.0, 0.5, 1.0, 1.5])) * math.pi / 2,
        pattern_period=float(rng.uniform(0.2, 0.32)),
        eyes=eyes,
        eye_colour=eye_colour,
        mouth=mouth,
        accessory=str(rng.choice(accessories)),
        variant=int(rng.integers(3)),
        detail=int(rng.integers(3)),
        wide=float(rng.uniform(0.82, 1.2)),
        head=float(rng.uniform(0.86, 1.16)),
        limb=float(rng.uniform(0.75, 1.3)),
        numbers=tuple(float(v) for v in rng.random(24)),
    )


def _painter(subject: ToySubject) -> Callable[[Brush, ToySubject, Pose], None]:
    if subject.kind == PATCHWORK:
        return draw_patchwork
    if subject.kind in CREATURES:
        return draw_creature
    return draw_thing


@lru_cache(maxsize=4096)
def _fit(subject: ToySubject) -> tuple[float, float, float, Points]:
    """(centre x, centre y, size, outline points) of the resting drawing in its own local units."""
    dry = Brush(None, None, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    _painter(subject)(dry, subject, Pose(0, 0, 1))
    points = np.concatenate(dry.trace)
    low, high = points.min(0), points.max(0)
    width, height = high - low
    return float(low[0] + high[0]) / 2, float(low[1] + high[1]) / 2, float(max(height, width / MAX_ASPECT)), points


def _local_matrix(subject: ToySubject, pose: Pose) -> Points:
    """(2, 3): the drawing's local units -> units of the subject's height around its centre, posed but not placed."""
    cx, cy, size, points = _fit(subject)
    facing = 1.0
    if pose.flip:
        facing = -1.0
    stretch = np.array([facing / math.sqrt(pose.squash), pose.squash]) / size
    feet = (points[:, 1].max() - cy) / size  # squash leaves the feet where they are
    turn = rotation(pose.angle)
    m = np.empty((2, 3))
    m[:, :2] = turn * stretch
    m[:, 2] = -m[:, :2] @ (cx, cy) + turn @ (0.0, feet * (1 - pose.squash))
    return m * pose.scale


def extents(subject: ToySubject, pose: Pose) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the posed subject around its centre, in fractions of the frame's shorter side."""
    m = _local_matrix(subject, pose)
    points = _fit(subject)[3] @ m[:, :2].T + m[:, 2]
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right), float(bottom)


def draw(
    canvas: Pixels,
    subject: ToySubject,
    pose: Pose,
    light: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    instance_ids: Pixels | None = None,
    label: int = 1,
) -> NDArray[np.float64] | None:
    """Draw a posed subject on a (supersampled) canvas, in place.

    Args:
        canvas: uint8 (H, W, 3), RGB.
        pose: x and y in fractions of width and height, scale in fractions of the shorter side.
        light: gains for red, green and blue.
        instance_ids: uint8 (H, W), drawn in place with `label` wherever the subject is.

    Returns:
        The face box (x0, y0, x1, y1) in pixels of the canvas; None for things and patchwork.
    """
    height, width = canvas.shape[:2]
    short = min(height, width)
    m = _local_matrix(subject, pose) * short
    m[:, 2] += (pose.x * width, pose.y * height)
    # 1.2 final pixels at least: a thinner outline is lost in a 4x VAE.
    line = max(2, round(0.034 * pose.scale * short))
    body, second = apply_light(PALETTE[subject.body], light), apply_light(PALETTE[subject.second], light)
    tiles = None
    if subject.pattern != "plain":
        # About one texel to a canvas pixel: coarser shows steps at 256x256, finer flickers at 64x64.
        side = 48 * 2 ** max(0, min(4, round(math.log2(max(1.0, pose.scale * short / 40)))))
        tiles = texture(subject.pattern, body, second, subject.pattern_angle, subject.pattern_period, side)
    brush = Brush(canvas, instance_ids, m, label=label, line=line, light=light, texture=tiles)
    _painter(subject)(brush, subject, pose)
    if not brush.faces:
        return None
    corners = np.concatenate(brush.faces)
    return np.concatenate([corners.min(0), corners.max(0)])
