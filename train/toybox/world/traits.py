"""What makes one toybox subject itself: its kind and every drawn attribute.

In:  values drawn from a seed by `subjects.make_subject`.
Out: `ToySubject`, and the names of the kinds of creature.
Knows nothing of drawing, scenes or captions; those import this.
"""

from __future__ import annotations

from dataclasses import dataclass

CREATURES = ("fox", "cat", "bear", "rabbit", "bird", "frog", "robot", "monster")

PATCHWORK = "patchwork"


@dataclass(frozen=True)
class ToySubject:
    """One identity: every drawn attribute, nothing about any scene.

    body, second, third: palette names of the main colour, the pattern's or belly's colour, the accessory's colour.
    pattern: one of PATTERNS, drawn in `second` on `body`; pattern_angle in radians, pattern_period in local units.
    eyes, eye_colour, mouth: creatures only ("" otherwise).
    accessory: one of WORN for creatures, of EMBLEMS for things, "none" for patchwork.
    variant: 0, 1 or 2, a different build of the same kind (ears, horns, roof, sail ...); detail: the same, smaller.
    wide, head, limb: proportions around 1.
    numbers: 24 more numbers in [0, 1), for what a single kind varies (patchwork's silhouette, a monster's eyes).
    """

    seed: int
    kind: str
    body: str
    second: str
    third: str
    pattern: str
    pattern_angle: float
    pattern_period: float
    eyes: str
    eye_colour: str
    mouth: str
    accessory: str
    variant: int
    detail: int
    wide: float
    head: float
    limb: float
    numbers: tuple[float, ...]

    @property
    def role(self) -> str:
        """'creature', 'thing' or 'patchwork'; only creatures have a face."""
        if self.kind == PATCHWORK:
            return PATCHWORK
        if self.kind in CREATURES:
            return "creature"
        return "thing"
