"""The captions of the toybox world: plain facts about a scene in, one of many sentences out.

In:  slots with kinds, actions, a background, a camera; for attribute captions the subjects themselves.
Out: a lower-case caption and the list of all words captions are made of. Knows nothing of pixels or poses.

Captions name slots and kinds, never identities, unless attributes are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.toybox.world.drawing import PALETTE
from train.toybox.world.subjects import KINDS
from train.toybox.world.traits import CREATURES, PATCHWORK, ToySubject

Rng = np.random.Generator

SINGLE_VERBS = ("walks", "jumps", "spins", "bounces", "flies up", "falls down", "stands still", "wobbles", "grows")
PAIR_VERBS = ("chases", "jumps over", "circles", "pushes", "meets")
VERBS: tuple[str, ...] = (*SINGLE_VERBS, *PAIR_VERBS)
DIRECTED = ("walks", "chases", "pushes", "jumps over")  # verbs that go left or right
CAMERAS = ("still", "pan left", "pan right", "zoom in")
MAX_SUBJECTS = 4


@dataclass(frozen=True)
class Action:
    """Who does what: verb from VERBS; slots (1-based): the actor and, for PAIR_VERBS, whom it concerns.

    direction: 'left' or 'right' for DIRECTED verbs, otherwise ''.
    """

    verb: str
    slots: tuple[int, ...]
    direction: str = ""


@dataclass(frozen=True)
class Facts:
    """What a judge may ask of a clip. kinds[k - 1] is slot k's kind."""

    kinds: tuple[str, ...]
    actions: tuple[Action, ...]
    background: str
    camera: str


# Every wording of a verb; the first is the name itself. {b} stands for the other subject, {d} for the direction.
WORDINGS: dict[str, tuple[str, ...]] = {
    "walks": ("walks {d}", "runs {d}", "moves {d}", "goes {d}"),
    "jumps": ("jumps", "jumps up and down", "leaps", "leaps up"),
    "spins": ("spins", "spins around", "turns around", "rotates"),
    "bounces": ("bounces", "bounces up and down", "keeps bouncing"),
    "flies up": ("flies up", "flies upwards", "rises", "goes up"),
    "falls down": ("falls down", "falls", "drops", "drops down"),
    "stands still": ("stands still", "stays still", "stands", "does not move"),
    "wobbles": ("wobbles", "sways", "rocks from side to side"),
    "grows": ("grows", "gets bigger", "becomes bigger", "grows larger"),
    "chases": ("chases {b} {d}", "runs after {b} {d}", "follows {b} {d}", "chases after {b} {d}"),
    "jumps over": ("jumps over {b} {d}", "leaps over {b} {d}", "hops over {b} {d}"),
    "circles": ("circles {b}", "runs around {b}", "goes around {b}", "moves around {b}"),
    "pushes": ("pushes {b} {d}", "shoves {b} {d}"),
    "meets": ("meets {b}", "goes to meet {b}", "comes towards {b}"),
}
PASSIVE: dict[str, str] = {
    "chases": "is chased by {b} {d}",
    "circles": "is circled by {b}",
    "pushes": "is pushed by {b} {d}",
    "meets": "meets {b}",
}
WAVING = ("waves", "waves and sways", "wobbles")  # creatures have an arm or a wing for it
OWN_WAY: dict[str, str] = {
    "ball": "rolls {d}",
    "kite": "flies {d}",
    "car": "drives {d}",
    "boat": "sails {d}",
    "rocket": "flies {d}",
    "umbrella": "slides {d}",
    "balloon": "floats {d}",
    "house": "slides {d}",
    PATCHWORK: "slides {d}",
    "bird": "flies {d}",
}
DIRECTIONS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "left", "leftwards"),
    "right": ("to the right", "right", "rightwards"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "on the beach", "at the beach"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "night city": ("in a city at night", "in the city at night", "in a night city"),
    "meadow": ("on a meadow", "in a meadow", "on the meadow"),
    "snow": ("in the snow", "on snow", "in a snowy place"),
    "desert": ("in a desert", "in the desert"),
    "space": ("in space", "in outer space", "on the moon"),
    "room": ("in a room", "in the room", "indoors"),
    "underwater": ("underwater", "under water", "under the sea"),
    "mountains": ("in the mountains", "in front of mountains", "near the mountains"),
}
CAMERA_WORDS: dict[str, tuple[str, ...]] = {
    "still": ("the camera is still", "still camera"),
    "pan left": ("the camera pans left", "the camera pans to the left"),
    "pan right": ("the camera pans right", "the camera pans to the right"),
    "zoom in": ("the camera zooms in", "slow zoom in"),
}
PATTERN_WORDS: dict[str, str] = {
    "plain": "",
    "stripes": "striped",
    "spots": "spotted",
    "checks": "checked",
    "halves": "two-coloured",
    "rings": "ringed",
}
WORN_WORDS: dict[str, str] = {
    "hat": "with a {c} hat",
    "scarf": "with a {c} scarf",
    "bow": "with a {c} bow",
    "glasses": "with {c} glasses",
    "backpack": "with a {c} backpack",
    "star": "with a {c} star",
    "heart": "with a {c} heart",
    "disc": "with a {c} dot",
    "cross": "with a {c} cross",
}
WORN_NOUNS = "hat scarf bow glasses backpack star heart dot cross"
ATTRIBUTE_WORDS: frozenset[str] = frozenset(
    re.findall(r"[a-z-]+", " ".join([*PALETTE, *PATTERN_WORDS.values(), WORN_NOUNS]))
)


def noun(kind: str) -> str:
    """The word a caption uses for a kind; patchwork has no name."""
    if kind == PATCHWORK:
        return "thing"
    return kind


def with_article(words: str) -> str:
    """'a fox', 'an orange fox'."""
    if words[0] in "aeiou":
        return f"an {words}"
    return f"a {words}"


def _pick_one(rng: Rng, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def describe(subject: ToySubject, rng: Rng) -> str:
    """A noun phrase with attributes, without article: 'striped red fox with a blue hat'."""
    colour = subject.body
    if subject.pattern != "plain" and rng.random() < 0.5:
        colour = f"{subject.body} and {subject.second}"
    words = f"{colour} {noun(subject.kind)}"
    if PATTERN_WORDS[subject.pattern]:
        words = f"{PATTERN_WORDS[subject.pattern]} {words}"
    if subject.accessory != "none" and rng.random() < 0.5:
        worn = WORN_WORDS[subject.accessory].format(c=subject.third)
        words = f"{words} {re.sub(r'a (?=[aeiou])', 'an ', worn)}"
    return words


class _Speaker:
    """Mentions subjects: number and perhaps kind the first time, the number alone afterwards."""

    def __init__(self, kinds: Sequence[str], subjects: Sequence[ToySubject] | None, rng: Rng) -> None:
        self.kinds, self.subjects, self.rng = kinds, subjects, rng
        self.kinds_too = rng.random() < 0.8
        self.closing = ""
        if rng.random() < 0.6:
            self.closing = ","
        # {s} is 'subject 1', {n} a noun phrase, {a} the same with its article, {c} the closing comma.
        self.form = _pick_one(
            rng, ("{s}, {a}{c}", "{s}, {a}{c}", "{s}, {a}{c}", "{s}, the {n}{c}", "{s} the {n}", "{s} ({a})")
        )
        self.said: set[int] = set()

    def mention(self, slot: int) -> str:
        """'subject 1, a fox,' the first time, 'subject 1' from then on."""
        name = f"subject {slot}"
        if slot in self.said or not (self.kinds_too or self.subjects):
            return name
        self.said.add(slot)
        words = noun(self.kinds[slot - 1])
        if self.subjects:
            words = describe(self.subjects[slot - 1], self.rng)
        return self.form.format(s=name, a=with_article(words), n=words, c=self.closing)


def _clause(action: Action, kinds: Sequence[str], speaker: _Speaker, rng: Rng) -> str:
    direction = ""
    if action.direction:
        direction = _pick_one(rng, DIRECTIONS[action.direction])
    if len(action.slots) == 2:
        return _pair_clause(action, direction, speaker, rng)
    [actor] = action.slots
    kind = kinds[actor - 1]
    words = _pick_one(rng, WORDINGS[action.verb])
    if action.verb == "wobbles" and kind in CREATURES:
        words = _pick_one(rng, WAVING)
    if action.verb == "walks" and kind in OWN_WAY and rng.random() < 0.4:
        words = OWN_WAY[kind]
    return f"{speaker.mention(actor)} {words.format(d=direction)}"


def _pair_clause(action: Action, direction: str, speaker: _Speaker, rng: Rng) -> str:
    """'subject 1 chases subject 2 left' or its passive; the order of draws and mentions is part of the world."""
    actor, other = action.slots
    if action.verb != "walks" and rng.random() < 0.25:
        direction = ""  # a person often leaves it out
    if action.verb in PASSIVE and rng.random() < 0.2:
        first, second = speaker.mention(other), speaker.mention(actor)
        return f"{first} {PASSIVE[action.verb].format(b=second, d=direction)}"
    first = speaker.mention(actor)
    wording = _pick_one(rng, WORDINGS[action.verb])
    return f"{first} {wording.format(b=speaker.mention(other), d=direction)}"


def write_caption(facts: Facts, subjects: Sequence[ToySubject] | None, rng: Rng) -> str:
    """One caption of the facts, worded at random.

    Args:
        facts: who does what, where.
        subjects: when given, the caption also names their attributes; None keeps identity out.
        rng: decides the wording, the order of mention, and whether kind, place and camera are said.
    """
    speaker = _Speaker(facts.kinds, subjects, rng)
    clauses = [_clause(a, facts.kinds, speaker, rng) for a in rng.permutation(np.array(facts.actions, dtype=object))]
    joint = _pick_one(rng, (" and ", ", and ", ", while ", ", "))
    text = joint.join(clauses)
    place = _pick_one(rng, PLACES[facts.background])
    roll = rng.random()
    if roll < 0.7:
        text = f"{text} {place}"
    elif roll < 0.94:
        text = f"{place}, {text}"
    if rng.random() < 0.5:
        camera = _pick_one(rng, CAMERA_WORDS[facts.camera])
        parts = [text, camera]
        if rng.random() >= 0.7:
            parts = [camera, text]
        text = ", ".join(parts)
    text = re.sub(r"\s+", " ", text).strip(" ,").replace(",,", ",").replace(" ,", ",")
    if rng.random() < 0.4:
        text += "."
    return text


def vocabulary() -> tuple[str, ...]:
    """Every word captions can contain, sorted; punctuation apart."""
    texts: list[str] = []
    for table in (WORDINGS, DIRECTIONS, PLACES, CAMERA_WORDS):
        for wordings in table.values():
            texts += wordings
    texts += [*PASSIVE.values(), *OWN_WAY.values(), *WAVING, *WORN_WORDS.values(), *PATTERN_WORDS.values(), *PALETTE]
    texts += [noun(kind) for kind in KINDS] + ["a an the and while subject"]
    texts += [str(k + 1) for k in range(MAX_SUBJECTS)]
    words: set[str] = set()
    for text in texts:
        words.update(words_of(re.sub(r"\{.\}", " ", text)))
    return tuple(sorted(words))


def words_of(text: str) -> list[str]:
    """A caption's words, punctuation dropped."""
    return re.findall(r"[a-z0-9]+(?:-[a-z]+)*", text)
