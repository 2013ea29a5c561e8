"""The stage: which clips the right side of Generate shows, and how each of them looks while it is made and after.

In:  rows of the queue, and the identity reports beside their clips.
Out: HTML text. The same rows always give the same stage, so a reloaded page shows what the old one showed.
Knows nothing of Gradio, of the form, or of how rows change.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from app.page import identity_panel, markup
from app.page.context import ASSETS, prepared
from app.queue import Row
from engine import presets
from engine.document import cached
from engine.job import GenerateJob, Subject
from engine.messages import StudioError, duration
from engine.presets import Preset

LIKE = "like-"  # group of variants that were asked for after the fact: like-<id of the first clip>
SANITY_GROUP = "sanity"  # group of the fixed job whose expected clip ships
MOST = 4  # cells side by side
STAGES = {
    "load": "Loading the model",
    "encode": "Reading prompt and pictures",
    "sample": "Drawing",
    "decode": "Making frames",
    "save": "Saving",
}


def on_stage(rows: Sequence[Row], pinned: int | None = None) -> list[Row]:
    """The row that matters now, with the variants of its group, oldest first.

    What is running comes first, then what waits for a worker, then what ended last; `pinned` is a row a person chose.
    """
    chosen = next((row for row in rows if row.id == pinned), None)
    if chosen is None:
        running = [row for row in rows if row.state == "running"]
        waiting = [row for row in rows if row.state == "waiting"]
        ended = sorted((row for row in rows if row.finished), key=lambda row: row.finished or 0, reverse=True)
        # A cancelled row that never started has nothing to show.
        ended = [row for row in ended if row.state != "cancelled" or row.started] or ended
        chosen = next(iter([*running, *waiting, *ended]), None)
    if chosen is None:
        return []
    shown = sorted(_group(chosen, rows), key=lambda row: row.id)
    if any(row.state in ("waiting", "running") for row in shown):
        return shown[-MOST:]
    # All have ended: the clip whose weakest subject is the likest comes first.
    return sorted(shown, key=_weakest, reverse=True)[:MOST]


def _weakest(row: Row) -> float:
    """What variants are sorted by; a clip without a report keeps its place behind those that have one."""
    weakest = (row.saved or {}).get("weakest")
    if weakest is None:
        return -1.0
    return float(weakest)


def _group(chosen: Row, rows: Sequence[Row]) -> list[Row]:
    if chosen.group == SANITY_GROUP:  # stands beside the clip that ships, not beside earlier checks
        return [chosen]
    first = None
    if chosen.group.startswith(LIKE):
        first = int(chosen.group.removeprefix(LIKE))
    return [row for row in rows if row.id in (chosen.id, first) or (chosen.group and row.group == chosen.group)]


def render(rows: Sequence[Row], *, waiting: int = 0, paused: bool = False) -> str:
    """The whole stage. `waiting`: how many jobs stand behind what is shown; `paused`: whether the line stands still."""
    if not rows:
        return _empty()
    expected = ""
    if rows[-1].group == SANITY_GROUP:
        expected = _expected()
        rows = rows[-1:]
    cells = "".join(_cell(row, alone=len(rows) == 1) for row in rows) + expected
    behind = []
    if waiting:
        behind.append(f"{waiting} more waiting in the queue.")
    if paused:
        behind.append("The queue is paused: no further job starts.")
    return f'<div class="cells n{len(rows) + bool(expected)}">{cells}</div><p class="behind">{" ".join(behind)}</p>'


def _empty() -> str:
    return (
        '<div class="cells n1"><section class="cell">'
        + markup.empty("Your clip appears here", "Choose who is in it, write what they do, press <b>Make clip</b>.")
        + "</section></div>"
    )


def _expected() -> str:
    """The clip that the sanity check should give, as it ships."""
    shown = video(ASSETS / "sanity.mp4", ASSETS / "sanity.webp", label="The expected clip")
    words = '<p class="said">This is how it should look.</p>'
    frame, under = f'<div class="frame">{shown}</div>', f'<div class="under">{words}</div>'
    return f'<section class="cell" aria-label="The expected clip">{frame}{under}</section>'


def _cell(row: Row, *, alone: bool) -> str:
    frame, below = _PARTS[row.state](row)
    job = row.job
    names: list[str] = []
    prompt = seed = ""
    if job:
        names = [subject.name for subject in job.subjects]
        seed = f'<span class="fact">seed <b>{job.seed}</b></span>'
        if alone:
            prompt = f'<p class="said">{markup.prompt_text(job.prompt, names)}</p>'
    likeness = _likeness(row, names, alone=alone)
    return (
        f'<section class="cell {row.state}" data-row="{row.id}" aria-label="Clip {row.id}, {row.state}">'
        f'{frame}<div class="under">{below}{prompt}<p class="facts">{seed}{_facts(row, alone)}</p>{likeness}'
        f"{_actions(row, alone)}</div></section>"
    )


def _likeness(row: Row, names: list[str], *, alone: bool) -> str:
    """How recognisable everyone is: in full under a clip alone, in a line under each of several."""
    if row.state != "done":
        return ""
    clip = Path(str((row.saved or {}).get("clip", "")))
    if alone:
        return identity_panel.panel(clip, names)
    return identity_panel.line(clip, names)


# --- what each state shows: the frame, and the line below it ---------------------------------------------------------


def _waiting(row: Row) -> tuple[str, str]:
    place = f"Waiting, {row.position} before it"
    if row.position == 0:
        place = "Next in line"
    return f'<div class="frame idle">{_cast(row.job)}</div>', _bar(None, place)


def _running(row: Row) -> tuple[str, str]:
    progress = row.progress or {}
    step, total = int(progress.get("step") or 0), int(progress.get("total") or 0)
    share = None
    if total:
        share = step / total
    said = STAGES.get(str(progress.get("stage")), "Starting")
    eta = progress.get("eta_s")
    if row.cancel:
        said, eta = "Cancelling", None
    if progress.get("stage") == "sample" and total:
        said = f"{said}, step {step} of {total}"
    left = ""
    if eta is not None:
        left = f"about {duration(float(eta))} left"
    picture = _preview(row.preview)
    frame = f'<img class="draft" alt="Preview of the clip so far" src="{picture}">'
    if not picture:
        frame = _cast(row.job)
    return f'<div class="frame busy">{frame}</div>', _bar(share, said, left, escape(str(progress.get("note") or "")))


def _done(row: Row) -> tuple[str, str]:
    saved = row.saved or {}
    clip, poster = Path(str(saved.get("clip", ""))), Path(str(saved.get("poster", "")))
    if not clip.is_file():
        words = "Its file was moved or deleted. Run the job again to remake it."
        return markup.empty("The clip is gone", words), ""
    notes = "".join(f'<p class="about">{escape(str(note))}</p>' for note in saved.get("notes") or ())
    return f'<div class="frame">{video(clip, poster, label=f"Clip {row.id}")}</div>', notes


def _failed(row: Row) -> tuple[str, str]:
    error = row.error or {}
    said = [str(error.get(key, "")) for key in ("what", "why", "next_step")]
    return markup.empty(escape(said[0]), f"{escape(said[1])} <b>{escape(said[2])}</b>", kind="bad"), ""


def _cancelled(row: Row) -> tuple[str, str]:
    return markup.empty("Cancelled", "Nothing was kept."), ""


def _interrupted(row: Row) -> tuple[str, str]:
    said = escape(str((row.error or {}).get("what") or "The worker stopped in the middle of this clip."))
    return markup.empty("Interrupted, run again?", f"{said} The job itself is safe.", kind="bad"), ""


_PARTS = {
    "waiting": _waiting,
    "running": _running,
    "done": _done,
    "failed": _failed,
    "cancelled": _cancelled,
    "interrupted": _interrupted,
}


def video(clip: Path, poster: Path, *, label: str) -> str:
    """A clip that plays by itself in a loop, without sound, with its controls."""
    still = ""
    if poster.is_file():
        still = f' poster="{markup.file_url(poster)}"'
    return (
        f'<video src="{markup.file_url(clip)}"{still} controls loop autoplay muted playsinline '
        f'aria-label="{escape(label)}"></video>'
    )


def _bar(share: float | None, said: str, left: str = "", more: str = "") -> str:
    look, values, width = "bar unknown", "", ""
    if share is not None:
        percent = round(100 * share)
        look, values, width = "bar", f' aria-valuenow="{percent}"', f' style="width:{percent}%"'
    words = escape(said)
    if more:
        words += " · " + more
    return (
        f'<div class="{look}" role="progressbar" aria-label="{escape(said)}" '
        f'aria-valuemin="0" aria-valuemax="100"{values}><i{width}></i></div>'
        f'<p class="step"><span>{words}</span><span>{escape(left)}</span></p>'
    )


def _cast(job: GenerateJob | None) -> str:
    """The subjects' own pictures while there is nothing else to look at."""
    if job is None:
        return ""
    shown = [(place, subject, thumb(subject)) for place, subject in enumerate(job.subjects)]
    return "".join(
        f'<figure{markup.colour(place)}><img alt="" src="{url}">'
        f"<figcaption>@{escape(subject.name)}</figcaption></figure>"
        for place, subject, url in shown
        if url
    )


@cached(maxsize=128)  # the stage is painted at every step, its subjects do not change
def thumb(subject: Subject) -> str:
    """A subject's first picture, small, as the model sees it; nothing when it cannot be read."""
    try:
        pixels = prepared(subject.pictures[0], role=subject.role, cut_out=subject.cut_out)
    except StudioError:
        return ""  # the form says beside the subject what is wrong with its picture
    return markup.data_url(pixels, side=128)


def _preview(path: Path | None) -> str:
    """The preview picture inside the page; a worker may be writing the next one at this very moment."""
    if path is None:
        return ""
    try:
        with Image.open(path) as image:
            return markup.data_url(np.asarray(image.convert("RGB")))
    except OSError:
        return ""


# --- facts and actions -----------------------------------------------------------------------------------------------


def _facts(row: Row, alone: bool) -> str:
    """Beside each other, clips differ by seed: what they share is left out there."""
    if row.job is None:
        return ""
    job = row.job
    preset = _preset(job)
    facts = []
    if alone:
        title = preset.title if preset else job.preset
        steps = f"{job.sampling.num_inference_steps} steps"
        facts = [title, f"{job.width} x {job.height}", f"{job.num_frames} frames", steps]
    if is_draft(job, preset):
        facts.append("draft")
    if row.state == "done" and row.started and row.finished:
        facts.append(f"made in {duration(row.finished - row.started)}")
    return "".join(f'<span class="fact">{escape(fact)}</span>' for fact in facts)


def _actions(row: Row, alone: bool) -> str:
    act = markup.button
    buttons: list[str] = []
    if row.state in ("waiting", "running"):
        if not row.cancel:
            buttons.append(act("Cancel", "cancel", row=row.id))
    elif row.state == "done" and row.job:
        if is_draft(row.job, _preset(row.job)):
            buttons.append(act("Finish this one", "finish", kind="primary", row=row.id, title="Same seed, all steps"))
        if alone:
            buttons.append(act("3 more seeds", "variants", row=row.id))
        buttons.append(act("Keep this seed", "seed", row=row.id))
        clip = Path(str((row.saved or {}).get("clip", "")))
        if clip.is_file():
            name = escape(clip.name)
            buttons.append(f'<a class="btn" href="{markup.file_url(clip)}" download="{name}">Download</a>')
    else:
        buttons = [act("Run again", "again", kind="primary", row=row.id), act("Change settings", "reuse", row=row.id)]
    return f'<div class="acts">{"".join(buttons)}</div>'


def is_draft(job: GenerateJob, preset: Preset | None) -> bool:
    """Whether the job takes fewer steps than its preset's own number."""
    full = preset.sampling.num_inference_steps if preset else None
    return bool(full and job.sampling.num_inference_steps and job.sampling.num_inference_steps < full)


def finished(job: GenerateJob) -> GenerateJob:
    """A draft's job with all of its preset's steps: same seed, same subjects.

    Raises:
        StudioError: its preset is not here.
    """
    own = presets.load(job.preset).sampling
    whole = {"num_inference_steps": own.num_inference_steps, "final_sigma": own.final_sigma or 0.0}
    return job.model_copy(update={"sampling": job.sampling.model_copy(update=whole)})


def _preset(job: GenerateJob) -> Preset | None:
    return presets.find(job.preset)
