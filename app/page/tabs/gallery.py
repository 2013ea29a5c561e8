"""The Gallery tab: every clip in the outputs folder, what it was made from, and two of them side by side.

In:  the library; an mp4 that a creator drops, or what Wan2GP made.
Out: `Ticket`s for Generate, exported files, deleted clips.
Knows nothing of the queue, of the form, or of how a clip is made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from app import wording
from app.library.clips import Clip, compare_clips, delete_clip, find_clip, list_clips, open_clip
from app.page import identity_panel, markup
from app.page.clip_view import video
from app.page.context import Studio
from app.page.generate_form import PRECISIONS
from app.page.tabs.wiring import CLICKS, Ticket, select, sending
from engine import lora_files, presets, wan2gp
from engine.job import GenerateJob
from engine.messages import StudioError

SHOWN = 120  # posters on the page; older clips stay on disk
EXPORTS: dict[str, Literal["gif", "webm", "png"]] = {"gif": "gif", "webm": "webm", "png": "png"}


@dataclass(frozen=True)
class View:
    """What a person has opened: one clip, or two to compare; and whether they were asked about deleting."""

    open: str = ""
    other: str = ""
    sure: bool = False
    said: str = ""

    def press(self, clip: str) -> View:
        """A click on a poster opens it, or closes it when it was open."""
        return View(open="" if clip == self.open and not self.other else clip)

    def compare(self, clip: str) -> View:
        """A click on Compare sets the clip beside the open one, or takes it away again."""
        if clip in (self.open, self.other):
            return View(open=self.open if clip == self.other else self.other)
        return View(open=self.open or clip, other=clip if self.open else "")


@dataclass(frozen=True)
class GalleryTab:
    """The tab's components; `view` holds what is open."""

    view: gr.State
    detail: gr.HTML
    drop: gr.File
    refused: gr.HTML
    grid: gr.HTML


# --- layout ----------------------------------------------------------------------------------------------------------


def layout() -> GalleryTab:
    """What is open on top, then all clips, then a place to drop one from elsewhere."""
    view = gr.State(View())
    with gr.Column(elem_id="gallery"):
        refused = gr.HTML("", elem_classes="beside", apply_default_css=False)
        detail = gr.HTML("", js_on_load=CLICKS, elem_id="detail", apply_default_css=False)
        grid = gr.HTML("", js_on_load=CLICKS, elem_id="posters", apply_default_css=False)
        drop = gr.File(
            label="Drop a clip here, of this studio or of Wan2GP, to open its settings in Generate",
            file_types=[".mp4", ".webm", ".mkv", *wan2gp.PICTURES],
            height=96,
            elem_id="drop-clip",
        )
    return GalleryTab(view, detail, drop, refused, grid)


# --- what it shows ---------------------------------------------------------------------------------------------------


def render_grid(studio: Studio, view: View | None = None) -> str:
    """All clips, newest first."""
    clips = list_clips(studio.settings.outputs)
    if not clips:
        return markup.empty("No clips yet", "What you make in Generate stays here, through refresh and restart.")
    chosen = {view.open, view.other} - {""} if view else set()
    more = (
        f'<p class="behind">{len(clips) - SHOWN} older clips are in the outputs folder.</p>'
        if len(clips) > SHOWN
        else ""
    )
    return f'<div class="posters">{"".join(_poster(clip, clip.id in chosen) for clip in clips[:SHOWN])}</div>{more}'


def _poster(clip: Clip, chosen: bool) -> str:
    words = _words(clip)
    image = f'<img loading="lazy" alt="" src="{markup.file_url(clip.poster)}">' if clip.poster else ""
    id = escape(clip.id)
    return (
        f'<div class="poster{" chosen" if chosen else ""}">'
        f'<button type="button" data-act="open" data-clip="{id}" aria-label="Open clip: {escape(_plain(clip))}">'
        f'{image}<span class="words">{words}</span></button>'
        f'<button type="button" class="btn compare" data-act="compare" data-clip="{id}" '
        f'aria-pressed="{str(chosen).lower()}" aria-label="Compare: {escape(_plain(clip))}">Compare</button></div>'
    )


def _plain(clip: Clip) -> str:
    return f"{clip.job.prompt[:80]}, seed {clip.job.seed}" if clip.job else clip.path.name


def _words(clip: Clip) -> str:
    if clip.job is None:
        return escape(clip.path.name)
    return markup.prompt_text(clip.job.prompt, [subject.name for subject in clip.job.subjects])


def render_detail(studio: Studio, view: View) -> str:
    """The open clip with its document, or two clips with what differs."""
    found = {clip.id: clip for clip in list_clips(studio.settings.outputs)}
    shown = [found[id] for id in (view.open, view.other) if id in found]
    if not shown:
        return ""
    if len(shown) == 2:
        return _two(shown[0], shown[1])
    clip = shown[0]
    return (
        f'<div class="detail"><div class="frame">{video(clip.path, clip.poster or Path("-"), label=_plain(clip))}</div>'
        f'<div class="side"><p class="said">{_words(clip)}</p>{_tools(clip, view)}{_who(clip)}'
        f"{_table(clip.job)}</div></div>"
    )


def _who(clip: Clip) -> str:
    return identity_panel.panel(clip.path, [subject.name for subject in clip.job.subjects] if clip.job else [])


def _tools(clip: Clip, view: View) -> str:
    act = markup.button
    if view.sure:
        question = "<p><b>Delete this clip for good?</b> Its file, document and poster go.</p>"
        answers = act("Delete it", "delete", kind="danger", clip=clip.id) + act("Keep it", "keep", clip=clip.id)
        return f'{question}<div class="acts">{answers}</div>'
    name = escape(clip.path.name)
    reuse = act("Reuse settings", "reuse", kind="primary", clip=clip.id) if clip.job else ""
    download = f'<a class="btn" href="{markup.file_url(clip.path)}" download="{name}">Download</a>'
    exports = "".join(act(kind.upper(), kind, title=f"Export as {kind.upper()}", clip=clip.id) for kind in EXPORTS)
    delete = act("Delete", "ask", clip=clip.id)
    close = act("Close", "open", clip=clip.id)
    return f'<div class="acts">{reuse}{download}{exports}{delete}{close}</div>{view.said}'


def _two(first: Clip, second: Clip) -> str:
    sides = "".join(
        f'<div class="side"><div class="frame">{video(clip.path, clip.poster or Path("-"), label=_plain(clip))}</div>'
        f'<p class="said">{_words(clip)}</p>{_who(clip)}'
        f'<div class="acts">{markup.button("Take away", "compare", clip=clip.id)}'
        f"{markup.button('Reuse settings', 'reuse', clip=clip.id) if clip.job else ''}</div></div>"
        for clip in (first, second)
    )
    differences = compare_clips(first, second)
    rows = "".join(
        f"<tr><th scope='row'>{escape(field)}</th><td>{escape(str(a))}</td><td>{escape(str(b))}</td></tr>"
        for field, a, b in differences
    )
    same = "<p>Both were made from the same document.</p>"
    table = f"<table class='document'><caption>What differs</caption><tbody>{rows}</tbody></table>" if rows else same
    return f'<div class="detail two">{sides}<div class="wide">{table}</div></div>'


def _table(job: GenerateJob | None) -> str:
    """A document as a person reads it."""
    if job is None:
        return "<p>This clip carries no document that this studio can read.</p>"
    sampling = job.sampling
    title = preset.title if (preset := presets.find(job.preset)) else job.preset
    weights = {"cfg": [sampling.guidance_scale]}.get(
        sampling.guidance or "", [sampling.subject_scale, sampling.text_scale]
    )
    guidance = (
        f"{sampling.guidance}, {' and '.join(str(w) for w in weights)}" if sampling.guidance != "none" else "none"
    )
    steps = f"{sampling.num_inference_steps}, {sampling.scheduler}, shift {sampling.shift}"
    if sampling.final_sigma:
        steps += f", last noise {sampling.final_sigma:g}"
    facts: dict[str, Any] = {
        "Seed": job.seed,
        "Model": title,
        "Size": f"{job.width} x {job.height}, {job.num_frames} frames",
        "Steps": steps,
        "Guidance": guidance,
    }
    if job.precision:
        facts["Precision"] = next(words for words, value in PRECISIONS if value == job.precision)
    for lora in job.loras:
        facts[f"LoRA {lora_files.base_name(lora.path)}"] = f"weight {lora.weight:g}"
    if job.negative_prompt:
        facts["Negative prompt"] = job.negative_prompt
    for subject in job.subjects:
        many = f"{len(subject.pictures)} picture{'s' if len(subject.pictures) > 1 else ''}"
        facts[f"@{subject.name}"] = f"{subject.noun or subject.name}, {subject.role}, weight {subject.weight:g}, {many}"
    rows = "".join(f"<tr><th scope='row'>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table class='document'><tbody>{rows}</tbody></table>"


# --- handlers --------------------------------------------------------------------------------------------------------


def act(studio: Studio, view: View, what: str, id: str) -> tuple[View, Ticket | None]:
    """One button of the gallery.

    Raises:
        StudioError: the clip is gone, or a file cannot be written or deleted.
    """
    if what == "open":
        return view.press(id), None
    if what == "compare":
        return view.compare(id), None
    if what in ("ask", "keep"):
        return replace(view, sure=what == "ask", said=""), None
    clip = find_clip(studio.settings.outputs, id)
    if what == "delete":
        delete_clip(clip)
        return View(), None
    if what == "reuse" and clip.job is not None:
        return view, Ticket.of(studio.own(clip.job))
    if what in EXPORTS:
        return replace(view, said=_link(export(clip, what))), None
    return view, None


def export(clip: Clip, kind: str) -> Path:
    """The clip in another format, as one file that a browser can take; PNG frames travel as a zip."""
    from engine.media import video as files

    made = files.export(clip.path, EXPORTS[kind])
    if not made.is_dir():
        return made
    packed = shutil.make_archive(str(made), "zip", made)
    shutil.rmtree(made)
    return Path(packed)


def _link(path: Path) -> str:
    name = escape(path.name)
    size = wording.size(path.stat().st_size)
    link = f'<a href="{markup.file_url(path)}" download="{name}">{name}</a>'
    return f'<p class="note" role="status">Ready: {link}, {size}</p>'


# --- wiring ----------------------------------------------------------------------------------------------------------


def wire(tab: GalleryTab, studio: Studio, ticket: gr.State, tabs: gr.Tabs) -> Sequence[Any]:
    """Connect the tab. It changes nothing that the queue tells, so no event asks for a repaint of the page."""

    def pressed(view: View, evt: gr.EventData) -> list[Any]:
        try:
            view, found = act(studio, view, evt.act, evt.clip)
        except StudioError as error:
            return [view, gr.skip(), gr.skip(), markup.refusal(error), gr.skip(), gr.skip()]
        shown = [view, render_detail(studio, view), render_grid(studio, view), ""]
        return [*shown, found, select("generate")] if found else [*shown, gr.skip(), gr.skip()]

    def dropped(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip()] * 4
        try:
            opened = open_clip(Path(path))
            found = Ticket.of(studio.own(opened.job), said=opened.said)
        except StudioError as error:
            return [markup.refusal(error), gr.skip(), gr.skip(), None]
        return ["", found, select("generate"), None]

    outputs = [tab.view, tab.detail, tab.grid, tab.refused, ticket, tabs]
    tab.grid.click(pressed, tab.view, outputs, **sending())
    tab.detail.click(pressed, tab.view, outputs, **sending())
    tab.drop.upload(dropped, tab.drop, [tab.refused, ticket, tabs, tab.drop], **sending())
    return []
