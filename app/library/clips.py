"""The clips in the outputs folder: what the gallery shows, compares and deletes.

In:  the outputs folder as it is on disk, with whatever a person has put there, renamed or removed.
Out: `Clip`s, newest first; what differs between two; the job inside a clip from anywhere.
Knows nothing of Gradio and keeps no list of its own: the folder is the truth, so it survives refresh and restart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from engine import lora_files, presets, wan2gp
from engine.identity.report import REPORT, STRIP
from engine.job import GenerateJob, read_job
from engine.media import video
from engine.messages import StudioError
from engine.wan2gp import ForeignJob


@dataclass(frozen=True)
class Clip:
    """One mp4 in the outputs folder.

    `id` is its path there without the suffix, with forward slashes. `poster` is None when there is none beside it.
    `document` is the text of its job, "" when it has none; `job` is None when that text cannot be read by this studio.
    `created` is in seconds since the epoch, `seconds` its length by its document, 0 when unknown.
    """

    id: str
    path: Path
    poster: Path | None
    document: str
    job: GenerateJob | None
    created: float
    seconds: float
    outputs: Path


def list_clips(outputs: Path) -> list[Clip]:
    """Every clip below the outputs folder, newest first. Files that nobody can read are shown by name, not refused."""
    found = [clip for path in _mp4s(outputs) if (clip := _clip(outputs, path)) is not None]
    return sorted(found, key=lambda clip: (clip.created, clip.id), reverse=True)


def find_clip(outputs: Path, id: str) -> Clip:
    """The clip of that id. Where the document beside it is missing, the one inside the file is read.

    Raises:
        StudioError: there is no such clip in the outputs folder.
    """
    parts = PurePosixPath(id).parts
    is_inside = bool(parts) and not any(part.startswith((".", "/")) or "\\" in part or ":" in part for part in parts)
    path = outputs.joinpath(*parts[:-1], f"{parts[-1]}.mp4") if is_inside else None
    clip = _clip(outputs, path, look_inside=True) if path is not None and path.is_file() else None
    if clip is None:
        raise StudioError(
            f"There is no clip called {id[:80]!r}.",
            "It was moved, renamed or deleted.",
            "Look at the gallery as it is now.",
        )
    return clip


def delete_clip(clip: Clip) -> None:
    """Remove a clip, its document, poster and report; nothing else, and nothing outside the outputs folder.

    Raises:
        StudioError: the clip lies elsewhere, or another program holds it open; then nothing is removed.
    """
    if not clip.path.resolve().is_relative_to(clip.outputs.resolve()):
        raise StudioError(
            f"{clip.path.name} was not deleted.", "It does not lie in the outputs folder.", "Delete it by hand."
        )
    try:
        for suffix in (".mp4", ".json", ".webp", REPORT, STRIP):
            clip.path.with_suffix(suffix).unlink(missing_ok=True)
    except OSError as error:
        raise StudioError(
            f"{error.filename or clip.path.name} was not deleted.",
            f"The system refuses it ({error.strerror}); a player may hold it open.",
            "Close what shows it, then delete it again.",
        ) from error


def compare_clips(a: Clip, b: Clip) -> list[tuple[str, str, str]]:
    """Where the documents of two clips differ: field, value in `a`, value in `b`, in the order of the document.

    Pictures are the same when their files' hashes are. A value that only one of them has is "-" in the other.
    """
    first, second = (dict(_facts(clip.job)) for clip in (a, b))
    fields = [*first, *(field for field in second if field not in first)]
    pairs = [(field, first.get(field, "-"), second.get(field, "-")) for field in fields]
    return [(field, x, y) for field, x, y in pairs if x != y]


def open_clip(path: Path) -> ForeignJob:
    """The job inside a clip, or in a clip or picture of Wan2GP, from wherever that comes.

    The paths of its pictures are a stranger's words.

    Raises:
        StudioError: not a video, no document inside, or one that this studio does not read.
    """
    found = wan2gp.read_file(path)
    if found is None:
        raise StudioError(
            f"{path.name} carries no document.",
            "Another program made it, or a messenger or editor has stripped it.",
            "Use the mp4 as this studio or Wan2GP wrote it, or the .json beside it.",
        )
    return found


# --- reading the folder ----------------------------------------------------------------------------------------------


def _mp4s(outputs: Path) -> Iterator[Path]:
    """Every mp4, without what is hidden: half-written clips, previews, the studio's own data."""
    for folder, inner, files in os.walk(outputs):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(".mp4") and not name.startswith("."):
                yield Path(folder) / name


def _clip(outputs: Path, path: Path, *, look_inside: bool = False) -> Clip | None:
    """One clip; None when it vanished while we looked."""
    try:
        created = path.stat().st_mtime
    except OSError:  # deleted between the listing and now, by a person or another page
        return None
    beside, poster = path.with_suffix(".json"), path.with_suffix(".webp")
    document, job, seconds = _document(beside, _stamp(beside))
    if not document and look_inside:
        document, job, seconds = _inside(path)
    return Clip(
        id=path.relative_to(outputs).with_suffix("").as_posix(),
        path=path,
        poster=poster if poster.is_file() else None,
        document=document,
        job=job,
        created=created,
        seconds=seconds,
        outputs=outputs,
    )


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when the file does; nought for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1024)  # a gallery is repainted often, and a document may carry 1 MB of pictures
def _document(path: Path, stamp: tuple[int, int]) -> tuple[str, GenerateJob | None, float]:
    if not 0 < stamp[1] <= video.MAX_DOCUMENT:
        return "", None, 0.0
    try:
        return _understood(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):  # somebody else's file: the clip is shown by its name
        return "", None, 0.0


def _inside(path: Path) -> tuple[str, GenerateJob | None, float]:
    try:
        return _understood(video.read_document(path) or "")
    except StudioError:  # not one of ours, or not a video at all: shown by its name
        return "", None, 0.0


def _understood(document: str) -> tuple[str, GenerateJob | None, float]:
    try:
        job = read_job(document)
    except StudioError:
        return document, None, 0.0
    preset = presets.find(job.preset)
    return document, job, (job.num_frames or 0) / preset.fps if preset else 0.0


def _facts(job: GenerateJob | None) -> Iterator[tuple[str, str]]:
    """The document as (field, value) lines a person can compare."""
    own_lines = {"version", "kind", "subjects", "sampling", "loras"}
    values: dict[str, Any] = job.model_dump(exclude=own_lines) if job else {}
    values.update(job.sampling.model_dump() if job else {})
    yield from ((field, str(value)) for field, value in values.items() if value not in (None, ""))
    for lora in job.loras if job else ():
        yield f"LoRA {lora_files.base_name(lora.path)}", f"weight {lora.weight:g}, {lora.sha256[:8] or 'any file'}"
    for subject in job.subjects if job else ():
        for field, value in subject.model_dump(exclude={"name", "pictures"}).items():
            yield f"@{subject.name} {field}", str(value) or subject.name
        prints = [picture.sha256[:8] or Path(picture.path).name for picture in subject.pictures]
        yield f"@{subject.name} pictures", ", ".join(prints)
