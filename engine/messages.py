"""What the engine says while it works, and the one error that is meant for people.

In:  nothing.
Out: small frozen messages. Whoever calls `engine.run.run(job, say)` receives them through `say`.
Knows nothing of torch, of the page or of the queue; every message becomes plain JSON with `as_dict`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class StudioError(Exception):
    """An error for a person: what happened, why, and what to do next.

    Args:
        what: what happened, one sentence, with the values.
        why: the reason, one sentence.
        next_step: what the person does now, one sentence.
        field: the form field it belongs to ("prompt", "subjects", "num_frames", ...), or "" when it belongs to none.
    """

    def __init__(self, what: str, why: str, next_step: str, *, field: str = "") -> None:
        super().__init__(f"{what} {why} {next_step}")
        self.what = what
        self.why = why
        self.next_step = next_step
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_error, (self.what, self.why, self.next_step, self.field))


def _rebuild_error(what: str, why: str, next_step: str, field: str) -> StudioError:
    return StudioError(what, why, next_step, field=field)


class Cancelled(Exception):
    """Raised inside a run when `say` asked it to stop; not an error."""


@dataclass(frozen=True)
class Progress:
    """One step forward. `total` 0 means the length of the stage is unknown; loading counts to 100."""

    stage: str  # "load", "encode", "sample", "decode", "save"
    step: int
    total: int
    eta_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Preview:
    """A rough picture of the clip so far: `picture` is a PNG file of a few frames side by side."""

    step: int
    total: int
    picture: Path


@dataclass(frozen=True)
class Saved:
    """The clip is on disk. `document` is the JSON beside it, the same that rides inside the file.

    `report` is the identity report beside it and `weakest` its lowest score; None where the preset names no judges.
    `judging_s` are the seconds of `seconds` that the report took.
    `notes` are sentences on what was not done as asked, such as weights of a LoRA that found no place.
    """

    clip: Path
    document: Path
    poster: Path
    seconds: float
    num_frames: int
    report: Path | None = None
    weakest: float | None = None
    judging_s: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The run stopped with an error for a person."""

    what: str
    why: str
    next_step: str
    field: str = ""

    @classmethod
    def of(cls, error: StudioError) -> Failed:
        return cls(error.what, error.why, error.next_step, error.field)


Message = Progress | Preview | Saved | Failed


def as_dict(message: Message) -> dict[str, Any]:
    """The message as plain JSON values, with its kind; paths become strings."""
    values = asdict(message)
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = str(value)
    return {"kind": type(message).__name__.lower(), **values}


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8 s`, `2 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
