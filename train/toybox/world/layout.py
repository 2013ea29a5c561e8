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


def plan_actions(rng: Rng, count: int, verb: str | None, direction: str | None) -> tuple[Action, ...]:
    """Who does what; the first action leads. Slots are shuffled: slot 1 is no more often the actor than slot 2."""
    slots = [int(k) + 1 for k in rng.permutation(count)]
    lead = verb or _pick_lead_verb(rng, count)
    turn = direction or pick(rng, ("left", "right"))
    if lead not in DIRECTED:
        turn = ""
    actors = 1
    if lead in PAIR_VERBS:
        actors = 2
    actions = [Action(lead, tuple(slots[:actors]), turn)]
    # Walking needs a row of its own, flying and falling a column: the others act where they stand.
    others = IN_PLACE
    if count == 2 and lead in (*IN_PLACE, *UPRIGHT):
        others = (*IN_PLACE, *UPRIGHT)
    elif count == 2:
        others = (*IN_PLACE, "walks", "walks")
    for slot in slots[actors:]:
        other_verb, other_turn = pick(rng, others), ""
        if other_verb == "walks":
            other_turn = pick(rng, ("left", "right"))
        actions.append(Action(other_verb, (slot,), other_turn))
    return tuple(actions)


def _pick_lead_verb(rng: Rng, count: int) -> str:
    roll = rng.random()
    if count == 1:
        return pick(rng, (*SINGLE_VERBS, "walks"))  # it counts twice: left and right
    if count == 2:
        pair_share, pairs, singles = 0.62, PAIR_VERBS, (*IN_PLACE, *UPRIGHT)
    else:
        pair_share, pairs, singles = 0.5, IN_A_ROW, IN_PLACE
    if roll < pair_share:
        return pick(rng, pairs)
    if roll < 0.75 and count < 4:
        return "walks"
    return pick(rng, singles)


class _Layout:
    """Finds a place for every slot of a plan so that nobody overlaps heavily or leaves the frame."""

    def __init__(self, rng: Rng, subjects: tuple[ToySubject, ...], width: float) -> None:
        self.rng, self.subjects, self.width = rng, subjects, width
        self.places: dict[int, Place] = {}

    def between(self, low: float, high: float) -> float:
        """A random number from `low` to `high`."""
        return float(self.rng.uniform(low, high))

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
        """Stand a slot at x with its feet at feet_y; a subject wider than `room` to each side is made smaller.

        `flip` None lets a coin decide which way the subject faces.
        """
        s = self.subjects[slot - 1]
        _, _, right, bottom = extents(s, Pose(0, 0, 1.0))
        scale = max(0.24, min(scale, room / right))
        if flip is None:
            flip = bool(self.rng.random() < 0.5)
        p = Place(
            x=x,
            y=feet_y - bottom * scale,
            feet=bottom * scale,
            half=right * scale,
            scale=scale,
            flip=flip,
            phase=float(self.rng.random()),
            travel=travel,
            high=high,
            steps=float(self.rng.uniform(1.3, 1.9)),
            rolls=s.kind == "ball",
        )
        self.places[slot] = p
        return p

    def place_row(self, action: Action, feet_y: float, scale: float) -> None:
        """A walker, or two that chase, push or meet, with the whole width for themselves."""
        slots, flip = action.slots, action.direction == "left"
        if len(slots) == 1:
            p = self.place(slots[0], 0.5, feet_y, scale, room=0.24, flip=flip)
            self.places[slots[0]] = replace(p, travel=min(0.34, 0.48 * self.width - p.half))
            return
        gap = 0.0
        if action.verb == "chases":
            gap = self.between(0.07, 0.11)
        a, b = (self.place(k, 0.5, feet_y, scale, room=0.19, flip=flip) for k in slots)
        # The rest of the width is their way: a quarter of the frame (a third between two that meet) shows in 9 frames.
        share = 0.72
        if action.verb == "meets":
            share = 0.66
        longest = share * self.width - gap
        if 2 * (a.half + b.half) > longest:
            less = longest / (2 * (a.half + b.half))
            a, b = (self.place(k, 0.5, feet_y, less * p.scale, flip=flip) for k, p in zip(slots, (a, b), strict=True))
        if action.verb == "meets":
            self._place_meeting(slots, a, b)
            return
        if action.verb == "pushes":
            gap = -0.06 * (a.half + b.half)
        ahead = 1.0
        if flip:
            ahead = -1.0
        length = 2 * (a.half + b.half) + gap
        travel = min(0.27, (0.98 * self.width - length) / 2)
        self.places[slots[0]] = replace(a, x=0.5 - ahead * (length / 2 - a.half), travel=travel)
        self.places[slots[1]] = replace(b, x=0.5 + ahead * (length / 2 - b.half), travel=travel)

    def _place_meeting(self, slots: tuple[int, ...], a: Place, b: Place) -> None:
        """Two start at the edges and meet in the middle; the first comes from the left or from the right."""
        side = -1.0
        if self.rng.random() < 0.5:
            side = 1.0
        middle = 0.5 + 0.5 * side * (a.half - b.half)
        between = 0.49 * self.width - 0.5 * (a.half + b.half)
        self.places[slots[0]] = replace(a, x=middle - side * a.half, travel=between - a.half, flip=side < 0)
        self.places[slots[1]] = replace(b, x=middle + side * b.half, travel=between - b.half, flip=side > 0)

    def place_around(self, action: Action) -> None:
        """One circles or jumps over another in the middle."""
        actor, other = action.slots
        x = self.between(0.47, 0.53)
        if action.verb == "circles":
            b = self.place(other, x, 0.76, self.between(0.36, 0.44), room=0.19)
            self.place(other, x, 0.58 + b.feet, b.scale, flip=b.flip)
            a = self.place(actor, x, 0.7, self.between(0.3, 0.36), room=0.16)
            self.places[actor] = replace(a, y=0.55, travel=0.47 * self.width - a.half, high=min(0.2, 0.42 - a.feet))
            return
        b = self.place(other, x, 0.93, self.between(0.3, 0.36), room=0.17)
        a = self.place(actor, x, 0.92, self.between(0.32, 0.4), room=0.19, flip=action.direction == "left")
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


def arrange_places(
    rng: Rng, subjects: tuple[ToySubject, ...], actions: tuple[Action, ...], width: float = 1.0
) -> tuple[Place, ...]:
    """A place for every slot; `width` is the part of the frame's width that stays in view until the end (a zoom)."""
    lay, count = _Layout(rng, subjects, width), len(subjects)
    lead = actions[0]
    if count == 1:
        _place_alone(lay, lead)
    elif lead.verb in ("circles", "jumps over"):
        lay.place_around(lead)
    elif count == 2 and len(lead.slots) == 2:
        lay.place_row(lead, lay.between(0.84, 0.93), lay.between(0.34, 0.45))
    elif count == 2 and not any(a.verb == "walks" for a in actions):
        for a, x in zip(actions, rng.permutation([0.27, 0.73]), strict=True):
            lay.stand(a, float(x), lay.between(0.82, 0.95), lay.between(0.36, 0.48), 0.21, 0.04)
    else:
        _place_two_rows(lay, lead, actions[1:], count)
    return tuple(lay.places[k + 1] for k in range(count))


def _place_alone(lay: _Layout, action: Action) -> None:
    """The only subject of a scene: a walker has the whole width, the others stand near the middle."""
    if action.verb == "walks":
        lay.place_row(action, lay.between(0.86, 0.94), lay.between(0.36, 0.48))
        return
    scales = (0.4, 0.6)
    if action.verb in UPRIGHT:
        scales = (0.34, 0.44)
    scale = lay.between(*scales)
    lay.stand(action, lay.between(0.4, 0.6), lay.between(0.86, 0.94), scale, 0.3, 0.04)


def _place_two_rows(lay: _Layout, lead: Action, rest: tuple[Action, ...], count: int) -> None:
    """Crowds stand in two rows, one above the other; whoever travels has a row alone."""
    rows = [0.95, 0.5]
    if lay.rng.random() < 0.5:
        rows = [0.5, 0.95]
    scales = (0.31, 0.4)
    if count == 4:
        scales = (0.3, 0.36)
    scale = lay.between(*scales)
    if lead.direction or len(lead.slots) == 2:
        lay.place_row(lead, rows[0], scale)
        spots = [(float(x), rows[1]) for x in lay.rng.permutation([0.26, 0.74])]
        if len(rest) == 1:
            spots = [(lay.between(0.28, 0.72), rows[1])]
        standing = rest
    else:
        corners = [(0.26, rows[0]), (0.74, rows[0]), (0.26, rows[1]), (0.74, rows[1])]
        spots = [corners[int(k)] for k in lay.rng.permutation(4)]
        standing = (lead, *rest)
    for a, (x, y) in zip(standing, spots, strict=False):
        if a.verb == "walks":
            lay.place_row(a, y, scale)
        else:
            lay.stand(a, x, y + lay.between(-0.02, 0.02), scale, 0.2, y - 0.47)
