"""Documents: what a creator asks for, as one typed, versioned JSON.

In:  values from a form, a command line, a queue row, or the metadata of a finished clip.
Out: a frozen `GenerateJob`, or a `StudioError` whose three sentences a person can act on.
Knows nothing of torch, of the page, of files (a picture is a path, a hash and perhaps its bytes) or of presets.

The same document is the row in the queue, the input of the command line and of the API, the metadata inside the mp4
and what a dropped mp4 gives back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from engine.document import Document, explain_validation_error
from engine.messages import StudioError

VERSION = 6
MAX_SUBJECTS = 8  # what a document can say; every preset has its own, lower limit
NAME = re.compile(r"[a-z][a-z0-9_]{0,23}")
MENTION = re.compile(r"@([A-Za-z][A-Za-z0-9_]*)")


class Picture(Document):
    """One reference picture: where it lies, what it is, and, once prepared, the very pixels the model saw."""

    path: str = Field(default="", max_length=4096)
    """File on this machine. Empty when the pixels ride along."""
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Hash of the original file, in hexadecimal."""
    png: str = Field(default="", max_length=1_400_000)
    """The prepared picture as base64 PNG, cut out on white, at the size the model reads."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> Picture:
        if not self.path and not self.png:
            raise ValueError("a picture needs a path or its pixels")
        return self


class Subject(Document):
    """Someone or something to keep recognisable."""

    name: str
    """What the prompt calls it, without the @: lower case, letters, digits and underscores."""
    pictures: tuple[Picture, ...] = Field(min_length=1, max_length=3)
    """One to three pictures of this subject."""
    role: Literal["person", "object", "background"] = "object"
    """What it is in the clip. Backgrounds are not cut out."""
    noun: str = Field(default="", max_length=80)
    """What it is in words, such as "red fox". Empty: its name."""
    weight: float = Field(default=1.0, ge=0.0, le=2.0)
    """How strongly the clip follows its pictures; 1 is as trained, 0 ignores them."""
    cut_out: bool = True
    """Remove the picture's own background before use."""

    @field_validator("name")
    @classmethod
    def _name_is_mentionable(cls, name: str) -> str:
        name = name.removeprefix("@").strip().lower()
        if not NAME.fullmatch(name):
            raise ValueError("a subject's name starts with a letter and holds up to 24 letters, digits and underscores")
        return name


class Sampling(Document):
    """How one clip is drawn from noise. A field left out takes the preset's own value."""

    num_inference_steps: int | None = Field(default=None, ge=1, le=100)
    """Denoising steps. Time grows with them; past 50 the picture hardly changes."""
    scheduler: Literal["euler", "unipc", "wan_unipc"] | None = None
    """Solver of the flow: Euler, or UniPC for presets trained with it."""
    shift: float | None = Field(default=None, ge=0.1, le=20.0)
    """Shift of the noise schedule; larger spends more steps on layout."""
    final_sigma: float | None = Field(default=None, ge=0.0, le=0.9)
    """Noise level of the last evaluation, whose clean estimate is the clip; 0: the steps go on evenly down to no noise.
    Above 0 only for models whose estimates are clean by then; their presets say so."""
    guidance: Literal["none", "cfg", "dual", "apg", "chained"] | None = None
    """How predictions with and without conditions are merged: CFG by one weight; dual, APG and chained by two."""
    guidance_scale: float | None = Field(default=None, ge=0.0, le=20.0)
    """CFG: one weight for prompt and subjects together."""
    subject_scale: float | None = Field(default=None, ge=0.0, le=20.0)
    """Dual, APG and chained guidance: weight of the subjects."""
    text_scale: float | None = Field(default=None, ge=0.0, le=20.0)
    """Dual, APG and chained guidance: weight of the prompt."""
    step_cache: Literal["off", "careful", "fast"] | None = None
    """Predict steps that hardly differ from the one before instead of computing them: none, a few, many."""


class Lora(Document):
    """A small change of the transformer's weights, in a file of its own."""

    path: str = Field(min_length=1, max_length=4096)
    """A safetensors file on this machine, or its name in the folder of models under `loras/`."""
    weight: float = Field(default=1.0, ge=-4.0, le=4.0)
    """How much of the change; 1 is as trained, 0 none."""
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Hash of the file, in hexadecimal; another file of that name is refused."""


class GenerateJob(Document):
    """One clip to make from a prompt and its subjects."""

    version: Literal[6] = VERSION
    """Version of this document's format."""
    kind: Literal["generate"] = "generate"
    """What this document asks for."""
    preset: str = Field(default="toybox", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Which model and which defaults."""
    prompt: str = Field(max_length=4000)
    """What happens, mentioning every subject as @name."""
    negative_prompt: str | None = Field(default=None, max_length=4000)
    """What the clip should not show. Left out: the preset's own."""
    subjects: tuple[Subject, ...] = Field(default=(), max_length=MAX_SUBJECTS)
    """Who and what is in it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Starting noise; the same job gives the same frames on the same machine."""
    num_frames: int | None = Field(default=None, ge=1, le=1025)
    """Length in frames, 4k + 1 for Wan's video VAE. Left out: the preset's own."""
    width: int | None = Field(default=None, ge=16, le=4096)
    """Width in pixels. Left out: the preset's own."""
    height: int | None = Field(default=None, ge=16, le=4096)
    """Height in pixels. Left out: the preset's own."""
    sampling: Sampling = Sampling()
    """How the clip is drawn from noise."""
    loras: tuple[Lora, ...] = Field(default=(), max_length=8)
    """What is added to the transformer's weights."""
    precision: Literal["fp32", "bf16", "fp8", "int8", "nf4"] | None = None
    """Number format of the transformer's large weights. Left out: what fits this machine; a finished clip names it."""

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt.strip()

    @model_validator(mode="after")
    def _slots_and_mentions_agree(self) -> GenerateJob:
        check_mentions(self.prompt, [subject.name for subject in self.subjects])
        return self


def mentions(prompt: str) -> list[str]:
    """Names written as @name in a prompt, lower case, in order of first mention."""
    return list(dict.fromkeys(name.lower() for name in MENTION.findall(prompt)))


def check_mentions(prompt: str, names: list[str]) -> None:
    """Refuse a prompt that leaves a subject out or mentions one that is not there.

    Raises:
        StudioError: field "prompt" or "subjects", naming the names.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StudioError(
            what=f"Two subjects are called @{twice[0]}.",
            why="The prompt could not say which of them it means.",
            next_step="Give each subject a name of its own.",
            field="subjects",
        )
    mentioned = mentions(prompt)
    unknown = [name for name in mentioned if name not in names]
    if unknown:
        known = ", ".join(f"@{name}" for name in names) or "no subject yet"
        raise StudioError(
            what=f"The prompt mentions @{unknown[0]}, but there is no such subject.",
            why=f"This job has {known}.",
            next_step=f"Add a subject called {unknown[0]}, or write the name of one that is there.",
            field="prompt",
        )
    missing = [name for name in names if name not in mentioned]
    if missing:
        raise StudioError(
            what=f"The prompt never mentions @{missing[0]}.",
            why="Every subject needs something to do, or the model cannot tell where it belongs.",
            next_step=f"Write @{missing[0]} into the prompt, or remove that subject.",
            field="prompt",
        )


# --- reading and writing ---------------------------------------------------------------------------------------------


def _pictures_became_objects(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 wrote a picture as its bare path. What has another shape is left for validation to refuse."""
    subjects = values.get("subjects")
    for subject in subjects if isinstance(subjects, list) else ():
        if isinstance(subject, dict) and isinstance(pictures := subject.get("pictures"), list):
            subject["pictures"] = [{"path": p} if isinstance(p, str) else p for p in pictures]
    return values


def _as_it_is(values: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knew no step cache, no LoRA and no precision; without them a job means what it meant."""
    return values


def rename_sampling_words(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling as version 3 wrote it, in the words of version 4: `step_cache` was `cache`, CFG and APG had other names.

    Presets that were written before version 4 hold the same words.
    """
    renamed = {"step_cache" if key == "cache" else key: value for key, value in sampling.items()}
    guidance = renamed.get("guidance")
    if isinstance(guidance, str):
        renamed["guidance"] = GUIDANCE_BEFORE_4.get(guidance, guidance)
    return renamed


def _sampling_got_field_words(values: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had its own words for the step cache and for two kinds of guidance."""
    sampling = values.get("sampling")
    if isinstance(sampling, dict):
        values["sampling"] = rename_sampling_words(sampling)
    return values


def _sampling_went_down_to_no_noise(values: dict[str, Any]) -> dict[str, Any]:
    """Up to version 4 all steps led evenly down to no noise. A job that names its steps keeps meaning that; one that
    leaves them to the preset takes the preset's last noise level together with them."""
    sampling = values.get("sampling")
    if isinstance(sampling, dict) and sampling.get("num_inference_steps") is not None:
        values["sampling"] = {"final_sigma": 0.0, **sampling}
    return values


def _prompts_were_read_as_written(values: dict[str, Any]) -> dict[str, Any]:
    """Since version 6 a prompt is cleaned as Wan's captions were: one with typographic quotes, HTML entities or a
    broken encoding may draw another clip than before. The text stays as it was written."""
    return values


GUIDANCE_BEFORE_4 = {"joint": "cfg", "projected": "apg"}
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _pictures_became_objects,
    2: _as_it_is,
    3: _sampling_got_field_words,
    4: _sampling_went_down_to_no_noise,
    5: _prompts_were_read_as_written,
}


def read_job(source: str | bytes | Mapping[str, Any]) -> GenerateJob:
    """A job from JSON text or plain values; older versions migrate, newer ones are refused.

    Raises:
        StudioError: not JSON, not a job, a newer version, or a value out of range.
    """
    values = _plain_values(source)
    version = values.get("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _refused(f"The document's version is {str(version)[:40]!r}.", "A version is a whole number from 1 up.")
    if version > VERSION:
        raise StudioError(
            what=f"This document has version {version}.",
            why=f"This studio reads versions up to {VERSION}; a newer one wrote it.",
            next_step="Update the studio, then open the document again.",
        )
    for old in range(version, VERSION):
        values = MIGRATIONS[old](values)
    return make_job(**{**values, "version": VERSION})


def make_job(**values: Any) -> GenerateJob:
    """Build a job from plain values.

    Raises:
        StudioError: with `field` naming the value that does not fit.
    """
    try:
        return GenerateJob(**values)
    except ValidationError as error:
        raise explain_validation_error(error) from None


def write_job(job: GenerateJob, *, indent: int | None = 2) -> str:
    """The document as JSON text, without the fields that were left out."""
    return job.model_dump_json(indent=indent, exclude_none=True)


def _plain_values(source: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source))
    try:
        values = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _refused("The job document cannot be read.", f"It is not valid JSON ({str(error)[:120]}).") from None
    if not isinstance(values, dict):
        raise _refused("The job document cannot be read.", "It is JSON, but not an object with named fields.")
    return values


def _refused(what: str, why: str) -> StudioError:
    return StudioError(what, why, "Use a document or a clip that this studio wrote.")
