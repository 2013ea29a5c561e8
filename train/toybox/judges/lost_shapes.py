"""Subjects that have lost their shape and kept their colours, as an unfinished model draws them.

In:  a frame without the subject, the frame with it, where it is in it, and an integer seed.
Out: the frame with something else in its place, and where that is. The same seed draws the same thing at any place, so
     that a whole clip can be changed frame by frame.
Knows nothing of judges.

Shapes: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.toybox import world
from train.toybox.world.drawing import OUTLINE, cv

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

FINE = 4  # shapes are drawn this many times larger and averaged down
LEAST = 6  # pixels across and down; what is smaller cannot be told
COLOUR_REACH = 3.0  # pixels over which a subject's colours run into each other
DARK = 70  # what is darker than this in every colour is outline, not a colour of the subject


class _Place(NamedTuple):
    """Where a shape goes, in fine pixels: its centre, and half of its width and height."""

    x: float
    y: float
    wide: float
    high: float


def blob(canvas: Pixels, mask: Pixels, colours: Pixels, place: _Place, rng: np.random.Generator) -> None:
    """Its colours where they were, in a round shape without parts; half of them outlined."""
    outline = _round_outline(place, rng)
    cv().fillPoly(mask, [outline], 1)
    canvas[mask > 0] = colours[mask > 0]
    if rng.random() < 0.5:
        cv().polylines(canvas, [outline], True, OUTLINE, FINE + 1, cv().LINE_AA)


def scribble(canvas: Pixels, mask: Pixels, colours: Pixels, place: _Place, rng: np.random.Generator) -> None:
    """The same under lines that lead nowhere, dark ones and some of its own colours."""
    outline = _round_outline(place, rng)
    cv().fillPoly(mask, [outline], 1)
    canvas[mask > 0] = colours[mask > 0]
    own = colours[mask > 0]
    for number in range(int(rng.integers(5, 10))):
        points = rng.uniform(-1, 1, (4, 2)) * (0.9 * place.wide, 0.9 * place.high) + (place.x, place.y)
        colour = OUTLINE
        if number % 3 == 2:
            colour = tuple(int(value) for value in own[rng.integers(len(own))])
        cv().polylines(
            canvas, [points.astype(np.int32)], False, colour, int(rng.integers(FINE, 2 * FINE)), cv().LINE_AA
        )
    cv().polylines(canvas, [outline], True, OUTLINE, FINE, cv().LINE_AA)


def box_on_legs(canvas: Pixels, mask: Pixels, colours: Pixels, place: _Place, rng: np.random.Generator) -> None:
    """A box of its main colour on legs, half of them with eyes."""
    share = float(rng.uniform(0.55, 0.75))  # of its height
    top, left = place.y - place.high, place.x - place.wide
    bottom = top + 2 * place.high * share
    legs = int(rng.integers(2, 5))
    thick = 2 * place.wide / (2 * legs)
    parts = [(left, top, 2 * place.wide, bottom - top)]
    for leg in range(legs):
        x = left + 2 * place.wide * (leg + 0.5) / legs - thick / 2
        parts.append((x, bottom - FINE, thick, place.y + place.high - bottom + FINE))
    fill = _main_colour(colours, place)
    for x, y, wide, high in parts[::-1]:
        corners = (round(x), round(y)), (round(x + wide), round(y + high))
        cv().rectangle(canvas, *corners, fill, -1)
        cv().rectangle(canvas, *corners, OUTLINE, FINE)
        cv().rectangle(mask, *corners, 1, -1)
    if rng.random() < 0.5:
        for side in (-0.4, 0.4):
            centre = (round(place.x + side * place.wide), round(top + (bottom - top) * 0.35))
            cv().circle(canvas, centre, max(FINE, round(0.12 * place.wide)), OUTLINE, -1, cv().LINE_AA)


def _main_colour(colours: Pixels, place: _Place) -> tuple[int, ...]:
    """The commonest colour about the middle of the place."""
    rows = slice(max(0, int(place.y - 0.6 * place.high)), int(place.y + 0.6 * place.high) + 1)
    columns = slice(max(0, int(place.x - 0.6 * place.wide)), int(place.x + 0.6 * place.wide) + 1)
    near = colours[rows, columns].reshape(-1, 3)
    coarse = (near // 48).astype(int) @ (36, 6, 1)
    commonest = near[coarse == np.bincount(coarse).argmax()]
    return tuple(int(value) for value in commonest.mean(0))


def _round_outline(place: _Place, rng: np.random.Generator) -> NDArray[np.int32]:
    """A closed smooth outline about an ellipse: (36, 2) fine pixels."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    radius = np.full_like(angle, 0.95)
    for wave in (2, 3, 5):
        radius += rng.uniform(-0.1, 0.1) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    points = np.stack([place.x + place.wide * radius * np.cos(angle), place.y + place.high * radius * np.sin(angle)], 1)
    return points.round().astype(np.int32)


SHAPES: dict[str, Callable[[Pixels, Pixels, Pixels, _Place, np.random.Generator], None]] = {
    "blob": blob,
    "scribble": scribble,
    "box on legs": box_on_legs,
}
NEAR = {  # a shape that is nearly right for a kind is no fault
    "blob": ("ball", "balloon", world.PATCHWORK),
    "scribble": (),
    "box on legs": ("robot", "house", "car", "boat", "rocket", world.PATCHWORK),
}


def lose_shape(without: Pixels, clean: Pixels, mask: Mask, shape: str, seed: int) -> tuple[Pixels, Mask]:
    """Put a shape of SHAPES where the subject was.

    Args:
        without: uint8 (H, W, 3), the frame without the subject.
        clean: the same with it.
        mask: (H, W), where it is. Nothing changes where it is nowhere.

    Returns:
        The changed frame, and where the shape is in it.
    """
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if len(rows) == 0:
        return without, mask
    H, W = mask.shape
    size = (W * FINE, H * FINE)
    canvas = cv().resize(without, size, interpolation=cv().INTER_LINEAR)
    colours = cv().resize(_spread_colours(clean, mask), size, interpolation=cv().INTER_LINEAR)
    held = np.zeros((H * FINE, W * FINE), np.uint8)
    place = _Place(
        x=FINE * (columns[0] + columns[-1] + 1) / 2,
        y=FINE * (rows[0] + rows[-1] + 1) / 2,
        wide=FINE * max(LEAST, len(columns)) / 2,
        high=FINE * max(LEAST, len(rows)) / 2,
    )
    SHAPES[shape](canvas, held, colours, place, np.random.default_rng((91, seed)))
    frame = cv().resize(canvas, (W, H), interpolation=cv().INTER_AREA)
    share = cv().resize(held.astype(np.float32), (W, H), interpolation=cv().INTER_AREA)
    return frame, share >= 0.5


def _spread_colours(clean: Pixels, mask: Mask) -> Pixels:
    """The subject's colours, run into each other and out over the whole frame."""
    coloured = mask & (clean.max(-1) > DARK)
    if not coloured.any():
        coloured = mask
    weight = coloured.astype(np.float32)
    loud = clean.astype(np.float32) * weight[..., None]
    spread = cv().GaussianBlur(loud, (0, 0), COLOUR_REACH)
    total = cv().GaussianBlur(weight, (0, 0), COLOUR_REACH)[..., None]
    mean = loud.sum((0, 1)) / weight.sum()
    return np.where(total > 1e-3, spread / np.maximum(total, 1e-3), mean).clip(0, 255).astype(np.uint8)


def other_kind(subject: world.ToySubject, rng: np.random.Generator) -> world.ToySubject | None:
    """Another kind of the same role in the same colours, pattern and accessory; None for patchwork, which has none."""
    kinds = {"creature": world.CREATURES, "thing": world.THINGS}.get(subject.role, ())
    others = [kind for kind in kinds if kind != subject.kind]
    if not others:
        return None
    return replace(subject, kind=str(rng.choice(others)))


class LostShape(NamedTuple):
    """A frame in which one subject has lost its shape."""

    frame: Pixels
    """uint8 (H, W, 3)."""
    mask: Mask
    """(H, W), where it is."""
    kind: str
    """Which kind it shows now; patchwork, which is none, where it shows no kind."""


def draw_lost(scene: world.Scene, slot: int, clip: world.Clip, rng: np.random.Generator) -> LostShape:
    """The first frame of a clip with one subject's shape lost in a random way.

    Args:
        clip: of the scene; its first frame is changed.
    """
    subject = scene.subjects[slot - 1]
    ways = [shape for shape, near in NEAR.items() if subject.kind not in near]
    changed = other_kind(subject, rng)
    if changed is not None:
        ways.append("another kind")
    way = str(rng.choice(ways))
    if way == "another kind":
        assert changed is not None
        cast = tuple(changed if place == slot else each for place, each in enumerate(scene.subjects, start=1))
        other = world.render(replace(scene, subjects=cast), num_frames=len(clip.frames))
        return LostShape(other.frames[0], other.instance_ids[0] == slot, changed.kind)
    without = world.render(scene, num_frames=len(clip.frames), hide=(slot,)).frames[0]
    seed = int(rng.integers(2**31))
    return LostShape(*lose_shape(without, clip.frames[0], clip.instance_ids[0] == slot, way, seed), world.PATCHWORK)
