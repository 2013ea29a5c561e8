"""A job with no gaps: what a document leaves out is taken from its preset and checked against it.

In:  a job that may leave values out.
Out: a frozen `ResolvedJob`; everything after it takes its values as they are.
Knows nothing of torch, or of how a clip is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from engine import presets
from engine.document import Document
from engine.job import GenerateJob, Sampling
from engine.messages import StudioError
from engine.presets import Preset


class ResolvedSampling(Document):
    """`Sampling` with every value that a clip needs. Scales are there where the guidance uses them."""

    num_inference_steps: int
    scheduler: Literal["euler", "unipc", "wan_unipc"]
    shift: float
    final_sigma: float
    guidance: Literal["none", "cfg", "dual", "apg", "chained"]
    guidance_scale: float | None = None
    subject_scale: float | None = None
    text_scale: float | None = None
    step_cache: Literal["off", "careful", "fast"]


@dataclass(frozen=True)
class PreparedSubject:
    """A subject as a clip's stages need it: who it is, and its pictures as the model reads them."""

    name: str
    role: str
    noun: str
    """What it is in words, as the creator wrote it; may be empty."""
    weight: float
    pictures: tuple[NDArray[np.uint8], ...]
    """(size, size, 3) each, RGB, cut out on white; size is the preset's `reference_size`."""

    @property
    def is_shown(self) -> bool:
        """Whether anything reads its pictures; a weight of 0 leaves it out everywhere."""
        return self.weight > 0


@dataclass(frozen=True)
class ResolvedJob:
    """A job, its preset, and every value that the document may leave out."""

    document: GenerateJob
    """What was asked for, filled in; what goes into the clip."""
    preset: Preset
    num_frames: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    sampling: ResolvedSampling
    subjects: tuple[PreparedSubject, ...] = ()
    """In the document's order, once `engine.media.pictures.prepare_subjects` has made them."""

    def changed(self, **values: Any) -> ResolvedJob:
        """The same with other values in its document, checked again; prepared subjects stay unless they are changed.

        Raises:
            StudioError: see `resolve`.
        """
        changed = resolve(self.document.model_copy(update=values), self.preset)
        if "subjects" in values:
            return changed
        return replace(changed, subjects=self.subjects)


def resolve(job: GenerateJob, preset: Preset | None = None) -> ResolvedJob:
    """Fill in what the job left out and check it against its preset.

    Args:
        preset: instead of the one that the job names.

    Raises:
        StudioError: unknown preset, too many subjects, or a size or length the model does not take.
    """
    preset = preset or presets.load(job.preset)
    check_count(len(job.subjects), preset)
    given = job.sampling.model_dump(exclude_none=True)
    sampling = Sampling(**{"final_sigma": 0.0, **preset.sampling.model_dump(exclude_none=True), **given})
    num_frames = check_frames(job.num_frames or preset.num_frames, preset)
    width = check_side(job.width or preset.sizes[0].width, "width", preset)
    height = check_side(job.height or preset.sizes[0].height, "height", preset)
    negative_prompt = job.negative_prompt
    if negative_prompt is None:
        negative_prompt = preset.negative_prompt
    values = {"negative_prompt": negative_prompt, "num_frames": num_frames, "width": width, "height": height}
    document = job.model_copy(update={**values, "sampling": sampling})
    return ResolvedJob(document, preset, num_frames, width, height, _without_gaps(sampling, preset))


def _without_gaps(sampling: Sampling, preset: Preset) -> ResolvedSampling:
    """Sampling of a preset whose file says what every clip needs; a creator may have written it.

    Raises:
        StudioError: it does not.
    """
    usual = {"guidance": "none", "step_cache": "off"}
    try:
        return ResolvedSampling.model_validate({**usual, **sampling.model_dump(exclude_none=True)})
    except ValidationError as error:
        missing = ", ".join(str(each["loc"][-1]) for each in error.errors())
        raise StudioError(
            what=f"The preset {preset.name} does not say how a clip is drawn.",
            why=f"Its sampling has no {missing}.",
            next_step=f"Add that to {preset.name}.json, or to the job.",
            field="preset",
        ) from None


def check_count(subjects: int, preset: Preset) -> None:
    """Refuse more subjects than the preset takes."""
    if subjects > preset.max_subjects:
        raise StudioError(
            what=f"The job has {subjects} subjects.",
            why=f"{preset.title} takes at most {preset.max_subjects}.",
            next_step=f"Keep {preset.max_subjects} or fewer, or choose another preset.",
            field="subjects",
        )


def check_frames(frames: int, preset: Preset) -> int:
    """The number of frames, when the video VAE takes it and the preset is not out of its depth."""
    low = max(1, (frames - 1) // 4 * 4 + 1)
    if frames > preset.max_frames:
        raise StudioError(
            what=f"{frames} frames are too many for {preset.title}.",
            why=f"It makes up to {preset.max_frames}.",
            next_step=f"Use {preset.max_frames} or fewer.",
            field="num_frames",
        )
    if (frames - 1) % 4:
        raise StudioError(
            what=f"{frames} frames do not fit the video VAE.",
            why="It takes 4k + 1 frames: one, then groups of four.",
            next_step=f"Use {low} or {low + 4}.",
            field="num_frames",
        )
    return frames


def check_side(pixels: int, field: str, preset: Preset) -> int:
    """A width or height, when it is a multiple the model takes and not far from what it was trained at."""
    multiple = preset.size_multiple
    most = 2 * max(max(size.width, size.height) for size in preset.sizes)
    if pixels % multiple:
        low = max(multiple, pixels // multiple * multiple)
        raise StudioError(
            what=f"A {field} of {pixels} px does not fit.",
            why=f"Width and height are multiples of {multiple} for {preset.title}.",
            next_step=f"Use {low} or {low + multiple}.",
            field=field,
        )
    if pixels > most:
        raise StudioError(
            what=f"A {field} of {pixels} px is too large for {preset.title}.",
            why=f"It was trained at {preset.sizes[0].width} x {preset.sizes[0].height}.",
            next_step=f"Use {most} px or less.",
            field=field,
        )
    return pixels
