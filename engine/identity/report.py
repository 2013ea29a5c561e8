"""The identity report of a clip: per subject and frame the likeness to its own pictures and to the most similar other
subject's.

In:  figures that an evaluator found (`engine.identity.reporter`), or the JSON beside a clip.
Out: an `IdentityReport` and what follows from it: score, presence, margin, worst frames, the weakest subject.
Knows nothing of torch or of pages. Figures of different judges are not comparable, so every subject names its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 2
REPORT, STRIP = ".identity.json", ".who.webp"  # beside the clip: the report; some frames with outlines
MAX_BYTES = 2**20
# One colour per subject, by its place in the job: outlines have it, and so has its name wherever a dark page shows it.
COLOURS = ("#ff9a76", "#6ed3c2", "#b8a4ff", "#7fc4ff", "#f48fc0", "#c5d86d", "#e0b080", "#9fb4c8")


@dataclass(frozen=True)
class SubjectReport:
    """One subject over all frames; None where it cannot be seen."""

    name: str
    judge: str
    """Who found the figures."""
    own: tuple[float | None, ...]
    """Likeness to its own pictures, -1 to 1: a cosine, or what its judge's scale makes of it."""
    other: tuple[float | None, ...]
    """Likeness to whichever other subject's pictures it resembles most; None when it is alone."""

    @property
    def presence(self) -> float:
        """Share of frames in which it can be seen."""
        return sum(value is not None for value in self.own) / max(1, len(self.own))

    @property
    def score(self) -> float:
        """Mean likeness over all frames; a frame without it counts as 0, so that hiding does not pay."""
        return sum(max(0.0, value) for value in self.own if value is not None) / max(1, len(self.own))

    @property
    def margin(self) -> float | None:
        """How much more it looks like itself than like any other, mean over the frames in which it is seen."""
        gaps = [a - b for a, b in zip(self.own, self.other, strict=True) if a is not None and b is not None]
        if not gaps:
            return None
        return sum(gaps) / len(gaps)

    @property
    def worst_frames(self) -> tuple[int, ...]:
        """The three frames in which it looks least like itself, missing ones first."""

        def likeness(frame: int) -> float:
            value = self.own[frame]
            if value is None:
                return -2.0  # below every cosine
            return float(value)

        order = sorted(range(len(self.own)), key=likeness)
        return tuple(sorted(order[:3]))


@dataclass(frozen=True)
class IdentityReport:
    """What judges say of one clip."""

    fps: float
    """Of the clip."""
    every: int
    """Figure k is of the clip's frame k times this."""
    subjects: tuple[SubjectReport, ...]
    """In the order of the job."""

    @property
    def judges(self) -> tuple[str, ...]:
        """Everyone who was asked, in the order of their first subjects."""
        return tuple(dict.fromkeys(subject.judge for subject in self.subjects))

    def by(self, judge: str) -> tuple[SubjectReport, ...]:
        """The subjects whose figures compare with each other."""
        return tuple(subject for subject in self.subjects if subject.judge == judge)

    @property
    def weakest(self) -> float:
        """What variants are sorted by: the score of the subject that looks least like itself, by the first judge."""
        if not self.subjects:
            return 0.0
        return min(subject.score for subject in self.by(self.judges[0]))

    def as_json(self) -> str:
        """The report as it stands beside the clip."""
        subjects: list[dict[str, Any]] = []
        for subject in self.subjects:
            values = asdict(subject)
            for name in ("score", "presence", "margin", "worst_frames"):
                values[name] = getattr(subject, name)
            subjects.append(values)
        report = {"version": VERSION, "fps": self.fps, "every": self.every, "weakest": self.weakest}
        return json.dumps({**report, "subjects": subjects})


def read_report(clip: Path) -> IdentityReport | None:
    """The report beside a clip; None when there is none, or when another version or another program wrote it."""
    path = clip.with_suffix(REPORT)
    try:
        if not 0 < path.stat().st_size <= MAX_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] not in (1, VERSION):
            return None
        # Version 1 had one judge for all, and every frame was judged.
        subjects = tuple(
            SubjectReport(
                str(each["name"]),
                str(each.get("judge") or values["judge"]),
                _parse_likenesses(each["own"]),
                _parse_likenesses(each["other"]),
            )
            for each in values["subjects"]
        )
        return IdentityReport(float(values["fps"]), int(values.get("every", 1)), subjects)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours: the clip is shown without a report
        return None


def _parse_likenesses(values: list[float | None]) -> tuple[float | None, ...]:
    return tuple(None if value is None else float(value) for value in values)
