"""Who does what in a scene, and where everybody stands so that the action fits into the frame.

In:  a random generator, a number of subjects, a cast; perhaps a verb and a direction.
Out: actions and places. Knows nothing of colours, captions or pixels.

Everything is laid out for a square frame: fractions of its width and height. Crowds stand in two rows; whoever travels
has a row, or a column, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from train.toybox.world.captions import DIRECTED, PAIR_VERBS, SINGLE_VERBS, Action
from train.toybox.world.drawing import Pose
from train.toybox.world.motion import Place
from train.toybox.world.subjects import extents
from train.toybox.world.traits import ToySubject

Rng = np.random.Generator

IN_PLACE = ("jumps", "spins", "bounces", "stands still", "wobbles", "grows")
UPRIGHT = ("flies up", "falls down")
IN_A_ROW = ("chases", "pushes", "meets")  # pairs that leave room for others


def pick(rng: Rng, choices: Sequence[str]) -> str:
    """One of several names."""
    return choices[int(rng.integers(len(choices)))]


def plan(rng: Rng, count: int, verb: str | None, direction: str | None) -> tuple[Action, ...]:
    """Who does what; the first action leads. Slots are shuffled: slot 1 is no more often the actor than slot 2."""
    slots = [int(k) + 1 for k in rng.permutation(count)]
    lead = verb or _lead(rng, count)
    turn = direction or pick(rng, ("left", "right"))
    actors = 2 if lead in PAIR_VERBS else 1
    actions = [Action(lead, tuple(slots[:actors]), turn if lead in DIRECTED else "")]
    # Walking needs a row of its own, flying and falling a column: the others act where they stand.
    others = IN_PLACE
    if count == 2 and lead in (*IN_PLACE, *UPRIGHT):
        others = (*IN_PLACE, *UPRIGHT)
    elif count == 2:
        others = (*IN_PLACE, "walks", "walks")
    for slot in slots[actors:]:
        one = pick(rng, others)
        actions.append(Action(one, (slot,), pick(rng, ("left", "right")) if one == "walks" else ""))
    return tuple(actions)


def _lead(rng: Rng, count: int) -> str:
    roll = rng.random()
    if count == 1:
        return pick(rng, (*SINGLE_VERBS, "walks"))  # it counts twice: left and right
    if roll < (0.62 if count == 2 else 0.5):
        return pick(rng, PAIR_VERBS if count == 2 else IN_A_ROW)
    if roll < 0.75 and count < 4:
        return "walks"
    return pick(rng, (*IN_PLACE, *UPRIGHT) if count == 2 else IN_PLACE)


class _Layout:
    """Finds a place for every slot of a plan so that nobody overlaps heavily or leaves the frame."""

    def __init__(self, rng: Rng, subjects: tuple[ToySubject, ...], width: float) -> None:
        self.rng, self.subjects, self.width = rng, subjects, width
        self.places: dict[int, Place] = {}

    def place(
        self,
        slot: int,
        x: float,
        feet_y: float,
        scale: float,
        *,
        room: float = 0.5,
        travel: float = 0.0,
        high: float = 0.1,
        flip: bool | None = None,
    ) -> Place:
        """Stand slot at x with its feet at feet_y; made smaller where it is wider than `room` to each side."""
        s = self.subjects[slot - 1]
        _, _, right, bottom = extents(s, Pose(0, 0, 1.0))
        scale = max(0.24, min(scale, room / right))
        p = Place(
            x=x,
            y=feet_y - bottom * scale,
            feet=bottom * scale,
            half=right * scale,
            scale=scale,
            flip=bool(self.rng.random() < 0.5) if flip is None else flip,
            phase=float(self.rng.random()),
            travel=travel,
            high=high,
            steps=float(self.rng.uniform(1.3, 1.9)),
            rolls=s.kind == "ball",
        )
        self.places[slot] = p
        return p

    def row(self, action: Action, feet_y: float, scale: float) -> None:
        """A walker, or two that chase, push or meet, with the whole width for themselves."""
        slots, flip = action.slots, action.direction == "left"
        if len(slots) == 1:
            p = self.place(slots[0], 0.5, feet_y, scale, room=0.24, flip=flip)
            self.places[slots[0]] = replace(p, travel=min(0.34, 0.48 * self.width - p.half))
            return
        gap = float(self.rng.uniform(0.07, 0.11)) if action.verb == "chases" else 0.0
        a, b = (self.place(k, 0.5, feet_y, scale, room=0.19, flip=flip) for k in slots)
        # Leaves a way of a quarter of the frame (or of a third between two that meet), which nine frames make plain.
        longest = (0.66 if action.verb == "meets" else 0.72) * self.width - gap
        if 2 * (a.half + b.half) > longest:
            less = longest / (2 * (a.half + b.half))
            a, b = (self.place(k, 0.5, feet_y, less * p.scale, flip=flip) for k, p in zip(slots, (a, b), strict=True))
        if action.verb == "meets":
            self._towards(slots, a, b)
            return
        if action.verb == "pushes":
            gap = -0.06 * (a.half + b.half)
        ahead = -1.0 if flip else 1.0
        length = 2 * (a.half + b.half) + gap
        travel = min(0.27, (0.98 * self.width - length) / 2)
        self.places[slots[0]] = replace(a, x=0.5 - ahead * (length / 2 - a.half), travel=travel)
        self.places[slots[1]] = replace(b, x=0.5 + ahead * (length / 2 - b.half), travel=travel)

    def _towards(self, slots: tuple[int, ...], a: Place, b: Place) -> None:
        """Two start at the edges and meet in the middle; the first comes from the left or from the right."""
        side = 1.0 if self.rng.random() < 0.5 else -1.0
        middle = 0.5 + 0.5 * side * (a.half - b.half)
        between = 0.49 * self.width - 0.5 * (a.half + b.half)
        self.places[slots[0]] = replace(a, x=middle - side * a.half, travel=between - a.half, flip=side < 0)
        self.places[slots[1]] = replace(b, x=middle + side * b.half, travel=between - b.half, flip=side > 0)

    def around(self, action: Action) -> None:
        """One circles or jumps over another in the middle."""
        actor, other = action.slots
        x = float(self.rng.uniform(0.47, 0.53))
        if action.verb == "circles":
            b = self.place(other, x, 0.76, float(self.rng.uniform(0.36, 0.44)), room=0.19)
            self.place(other, x, 0.58 + b.feet, b.scale, flip=b.flip)
            a = self.place(actor, x, 0.7, float(self.rng.uniform(0.3, 0.36)), room=0.16)
            self.places[actor] = replace(a, y=0.55, travel=0.47 * self.width - a.half, high=min(0.2, 0.42 - a.feet))
            return
        b = self.place(other, x, 0.93, float(self.rng.uniform(0.3, 0.36)), room=0.17)
        a = self.place(actor, x, 0.92, float(self.rng.uniform(0.32, 0.4)), room=0.19, flip=action.direction == "left")
        self.places[actor] = replace(
            a, travel=0.47 * self.width - a.half, high=min(2 * b.feet + 0.06, 0.9 - 2 * a.feet)
        )

    def stand(self, action: Action, x: float, feet_y: float, scale: float, room: float, ceiling: float) -> None:
        """Somebody who acts where they stand; `ceiling` is how high their head may go."""
        slot = action.slots[0]
        if action.verb == "spins":
            scale, room = 0.85 * scale, room * 0.86
        p = self.place(slot, x, feet_y, scale, room=room)
        high = max(0.06, feet_y - 2 * p.feet - ceiling)
        limit = {"jumps": 0.3, "bounces": 0.1, "spins": 0.05}.get(action.verb, 0.6)
        self.places[slot] = replace(p, high=min(limit, high))


def arrange(
    rng: Rng, subjects: tuple[ToySubject, ...], actions: tuple[Action, ...], width: float = 1.0
) -> tuple[Place, ...]:
    """A place for every slot; `width` is the part of the frame's width that stays in view until the end (a zoom)."""
    lay, count = _Layout(rng, subjects, width), len(subjects)

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    lead, rest = actions[0], actions[1:]
    if count == 1:
        if lead.verb == "walks":
            lay.row(lead, between(0.86, 0.94), between(0.36, 0.48))
        else:
            tall = between(0.34, 0.44) if lead.verb in ("flies up", "falls down") else between(0.4, 0.6)
            lay.stand(lead, between(0.4, 0.6), between(0.86, 0.94), tall, 0.3, 0.04)
    elif lead.verb in ("circles", "jumps over"):
        lay.around(lead)
    elif count == 2 and len(lead.slots) == 2:
        lay.row(lead, between(0.84, 0.93), between(0.34, 0.45))
    elif count == 2 and not any(a.verb == "walks" for a in actions):
        for a, x in zip(actions, rng.permutation([0.27, 0.73]), strict=True):
            lay.stand(a, float(x), between(0.82, 0.95), between(0.36, 0.48), 0.21, 0.04)
    else:
        _two_rows(rng, lay, lead, rest, count)
    return tuple(lay.places[k + 1] for k in range(count))


def _two_rows(rng: Rng, lay: _Layout, lead: Action, rest: tuple[Action, ...], count: int) -> None:
    """Crowds stand in two rows, one above the other; whoever travels has a row alone."""
    rows = [0.5, 0.95] if rng.random() < 0.5 else [0.95, 0.5]
    scale = float(rng.uniform(0.31, 0.4)) if count < 4 else float(rng.uniform(0.3, 0.36))
    if lead.direction or len(lead.slots) == 2:
        lay.row(lead, rows[0], scale)
        spots = [(float(x), rows[1]) for x in rng.permutation([0.26, 0.74])]
        if len(rest) == 1:
            spots = [(float(rng.uniform(0.28, 0.72)), rows[1])]
        standing = rest
    else:
        spots = [(x, y) for y in rows for x in (0.26, 0.74)]
        spots = [spots[int(k)] for k in rng.permutation(4)]
        standing = (lead, *rest)
    for a, (x, y) in zip(standing, spots, strict=False):
        if a.verb == "walks":
            lay.row(a, y, scale)
        else:
            lay.stand(a, x, y + float(rng.uniform(-0.02, 0.02)), scale, 0.2, y - 0.47)
