"""What the Generate tab holds while a creator works: a cast of subjects and the values around the prompt.

In:  values as the page's fields give them, or a finished job to start from.
Out: a checked `GenerateJob`, or a `StudioError` that names its field.
Knows nothing of Gradio, of the queue, or of how a picture is read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from engine import lora_files
from engine.document import explain_validation_error
from engine.job import GenerateJob, Lora, Picture, Sampling, Subject, make_job
from engine.messages import StudioError
from engine.presets import Preset
from engine.resolve import resolve

MAX_PICTURES = 3
MAX_TRIES = 50
SEEDS = 2**31  # a drawn seed stays short enough to be read aloud
PRECISIONS = [
    ("What fits", ""),
    ("32 bits", "fp32"),
    ("16 bits", "bf16"),
    ("8 bits, floating", "fp8"),
    ("8 bits", "int8"),
    ("4 bits", "nf4"),
]
Role = Literal["person", "object", "background"]


@dataclass(frozen=True)
class Slot:
    """One subject while it is being set up; it may still lack a picture or a good name."""

    name: str = ""
    pictures: tuple[Picture, ...] = ()
    role: Role = "object"
    noun: str = ""
    weight: float = 1.0
    cut_out: bool = True

    @classmethod
    def of(cls, subject: Subject) -> Slot:
        """The slot that gives back this subject."""
        return cls(**{name: getattr(subject, name) for name in Subject.model_fields})

    def values(self) -> dict[str, Any]:
        """Plain values, as `make_job` takes them."""
        pictures = [picture.model_dump() for picture in self.pictures]
        return {
            "name": self.name,
            "pictures": pictures,
            "role": self.role,
            "noun": self.noun.strip(),
            "weight": self.weight,
            "cut_out": self.cut_out,
        }

    def subject(self) -> Subject:
        """The finished subject.

        Raises:
            StudioError: it lacks a picture or a name; field "subjects".
        """
        try:
            return Subject(**self.values())
        except ValidationError as error:
            reason = explain_validation_error(error)
            raise StudioError(reason.what, reason.why, reason.next_step, field="subjects") from None


@dataclass(frozen=True)
class Cast:
    """The subjects of one clip in order, and which of them is open in the editor (-1: none)."""

    slots: tuple[Slot, ...] = ()
    chosen: int = -1

    @property
    def open(self) -> Slot | None:
        """The slot in the editor."""
        return self.slots[self.chosen] if 0 <= self.chosen < len(self.slots) else None

    def names(self) -> list[str]:
        """Every slot's name, in order."""
        return [slot.name for slot in self.slots]

    def choose(self, index: int) -> Cast:
        """Open one slot in the editor; anything out of range closes it."""
        return replace(self, chosen=index if 0 <= index < len(self.slots) else -1)

    def add(self, slot: Slot, *, most: int) -> Cast:
        """One more subject, under a name that is still free, and open in the editor.

        Raises:
            StudioError: there is no room; field "subjects".
        """
        if len(self.slots) >= most:
            raise StudioError(
                f"There are already {len(self.slots)} subjects.",
                f"This preset keeps at most {most} recognisable.",
                "Remove one first.",
                field="subjects",
            )
        named = replace(slot, name=free_name(slot.name, self.names()))
        return Cast((*self.slots, named), len(self.slots))

    def remove(self, index: int) -> Cast:
        """Without that slot; the editor closes."""
        return Cast(tuple(slot for place, slot in enumerate(self.slots) if place != index), -1)

    def change(self, **values: Any) -> Cast:
        """The open slot with new values; nothing happens when none is open."""
        if self.open is None:
            return self
        changed = replace(self.open, **values)
        return replace(self, slots=tuple(changed if i == self.chosen else s for i, s in enumerate(self.slots)))


@dataclass(frozen=True)
class Form:
    """The fields around the prompt. None means: take the preset's own value."""

    preset: str
    prompt: str = ""
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    seed: str = "0"
    fresh_seed: bool = True
    count: int = 1
    num_inference_steps: int | None = None
    scheduler: str | None = None
    guidance: str | None = None
    guidance_scale: float | None = None
    subject_scale: float | None = None
    text_scale: float | None = None
    step_cache: str | None = None
    shift: float | None = None
    final_sigma: float | None = None
    negative_prompt: str | None = None
    until: float | None = None
    tries: int | None = 5
    loras: tuple[Lora, ...] = ()
    precision: str = ""

    @classmethod
    def of(cls, job: GenerateJob) -> Form:
        """The fields that make this job again, seed kept.

        Raises:
            StudioError: its preset is not here, or it does not fit that preset.
        """
        filled = resolve(job).document
        return cls(
            preset=filled.preset,
            prompt=filled.prompt,
            num_frames=filled.num_frames,
            width=filled.width,
            height=filled.height,
            seed=str(filled.seed),
            fresh_seed=False,
            negative_prompt=filled.negative_prompt,
            loras=filled.loras,
            precision=filled.precision or "",
            **{name: getattr(filled.sampling, name) for name in Sampling.model_fields},
        )

    @classmethod
    def fresh(cls, preset: Preset, *, prompt: str = "") -> Form:
        """A preset's own values."""
        return cls(
            preset=preset.name,
            prompt=prompt,
            num_frames=preset.num_frames,
            width=preset.sizes[0].width,
            height=preset.sizes[0].height,
            negative_prompt=preset.negative_prompt,
            **{name: getattr(preset.sampling, name) for name in Sampling.model_fields},
        )

    def job(self, cast: Cast, *, seed: int) -> GenerateJob:
        """The document these values make, every value filled in and checked against the preset.

        Raises:
            StudioError: with `field` naming the field it belongs beside.
        """
        without = [slot.name for slot in cast.slots if not slot.pictures]
        if without:
            raise StudioError(
                f"@{without[0]} has no picture.",
                "A subject is kept recognisable by its pictures.",
                "Add one to three pictures, or remove it.",
                field="subjects",
            )
        values = {
            "preset": self.preset,
            "prompt": self.prompt or "",
            "negative_prompt": self.negative_prompt,
            "subjects": [slot.values() for slot in cast.slots],
            "seed": seed,
            "num_frames": self.num_frames,
            "width": self.width,
            "height": self.height,
            "sampling": {name: getattr(self, name) for name in Sampling.model_fields},
            "loras": [lora.model_dump() for lora in self.loras],
            "precision": self.precision or None,
        }
        job = resolve(make_job(**values)).document
        lora_files.check(job)
        return job

    def priced(self, cast: Cast = Cast()) -> GenerateJob:
        """The same clip with blank subjects and words: enough to say what it costs while the form is unfinished.

        Raises:
            StudioError: a number does not fit the preset.
        """
        slots = [replace(slot, name=f"s{number}") for number, slot in enumerate(cast.slots) if slot.pictures]
        prompt = " ".join(f"@{slot.name}" for slot in slots) or "-"
        return replace(self, prompt=prompt, negative_prompt=None, loras=()).job(Cast(tuple(slots)), seed=0)

    def wanted(self) -> tuple[float | None, int]:
        """The likeness that every subject has to reach, None for any, and how many further seeds may be drawn for it.

        Raises:
            StudioError: a number out of range; field "until".
        """
        until, tries = self.until or 0.0, self.tries or 0
        if not 0 <= until <= 1 or not 0 <= tries <= MAX_TRIES:
            raise StudioError(
                f"Drawing again until {until:g}, {tries} times at most, is not possible.",
                f"A likeness lies between 0 and 1, and at most {MAX_TRIES} further seeds are drawn.",
                "Change these two numbers; 0 draws once.",
                field="until",
            )
        return (until, tries) if until > 0 else (None, 0)

    def first_seed(self, draw: Callable[[int], int] = secrets.randbelow) -> int:
        """A fresh seed, or the one in the field.

        Raises:
            StudioError: the field holds no whole number from 0 up; field "seed".
        """
        if self.fresh_seed:
            return draw(SEEDS)
        text = str(self.seed).strip()
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise StudioError(
                f"The seed is {text[:40]!r}.",
                "A seed is a whole number from 0 up, at most 18 digits.",
                'Write a number, or tick "New each time".',
                field="seed",
            )
        return int(text)


def free_name(wanted: str, taken: list[str]) -> str:
    """A mentionable name close to the wanted one that nobody has: `Red Fox.png` -> `red_fox`, then `red_fox2`."""
    plain = re.sub(r"[^a-z0-9]+", "_", wanted.lower()).strip("_0123456789")[:20].strip("_") or "subject"
    return next(name for name in (plain, *(f"{plain}{n}" for n in range(2, 99))) if name not in taken)


def renamed(prompt: str, old: str, new: str) -> str:
    """The prompt with every @old written as @new."""
    return re.sub(rf"@{re.escape(old)}(?![A-Za-z0-9_])", f"@{new}", prompt, flags=re.IGNORECASE) if old else prompt
