"""The Queue tab: everything that was asked for, and what a person may do about it.

In:  rows of the queue.
Out: wishes told to the queue; a `Ticket` when a waiting job is to be edited in Generate.
Knows nothing of workers, of the form, or of how a clip is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from app.page import markup
from app.page.clip_view import STAGES, thumb
from app.page.context import Studio
from app.page.tabs.wiring import CLICKS, Ticket, quiet, select, sending
from app.queue import Row
from engine import presets
from engine.job import GenerateJob, Subject
from engine.messages import StudioError, duration

WORDS = {
    "waiting": "Waiting",
    "running": "Being made",
    "done": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "interrupted": "Interrupted, run again?",
}
SHOWN = 60  # rows on the page; older ones stay in the file, and their clips in the gallery


@dataclass(frozen=True)
class QueueTab:
    """The tab's components."""

    head: gr.HTML
    refused: gr.HTML
    rows: gr.HTML


# --- layout ----------------------------------------------------------------------------------------------------------


def layout() -> QueueTab:
    """A line that says how things stand, then one card per job."""
    with gr.Column(elem_id="queue"):
        head = gr.HTML("", js_on_load=CLICKS, elem_id="queue-head", apply_default_css=False)
        refused = gr.HTML("", elem_classes="beside", apply_default_css=False)
        rows = gr.HTML("", js_on_load=CLICKS, elem_id="queue-rows", apply_default_css=False)
    return QueueTab(head, refused, rows)


# --- what it shows ---------------------------------------------------------------------------------------------------


def render_head(rows: Sequence[Row], paused: bool) -> str:
    """How many wait, and the switch that holds the line."""
    waiting = sum(row.state == "waiting" for row in rows)
    running = any(row.state == "running" for row in rows)
    doing = "Nothing is being made"
    if running:
        doing = "One is being made"
    parts = [doing, f"{waiting} waiting"]
    switch = markup.button("Pause the queue", "pause")
    if paused:
        parts.append("paused: no further job starts")
        switch = markup.button("Resume", "resume", kind="primary")
    clear = ""
    if any(row.state in ("done", "failed", "cancelled", "interrupted") for row in rows):
        clear = markup.button("Clear ended jobs", "clear", title="Forget ended jobs; their clips stay")
    return (
        f'<div class="queue-head"><h2>Queue</h2><p>{" · ".join(parts)}</p><div class="acts">{switch}{clear}</div></div>'
    )


def render_rows(rows: Sequence[Row]) -> str:
    """One card per job, in the order in which they will be made, then what has ended."""
    if not rows:
        return markup.empty("The queue is empty", "Jobs you make in Generate line up here.")
    waiting = sum(row.state == "waiting" for row in rows)
    return f'<ol class="rows">{"".join(_card(row, waiting) for row in rows[:SHOWN])}</ol>'


def _card(row: Row, waiting: int) -> str:
    prompt, faces, facts = "A document this studio cannot read", "", ""
    if row.job:
        names = [subject.name for subject in row.job.subjects]
        prompt = markup.prompt_text(row.job.prompt, names)
        faces = "".join(_face(place, subject) for place, subject in enumerate(row.job.subjects))
        facts = _facts(row.job)
    error = ""
    if row.error:
        error = f'<p class="refusal">{escape(_error(row))}</p>'
    return (
        f'<li class="job {row.state}"><span class="number">{row.id}</span><div class="faces">{faces}</div>'
        f'<div class="what"><p class="said">{prompt}</p><p class="facts">{facts}</p>{error}</div>'
        f'<div class="state"><b>{_state(row)}</b><small>{_when(row)}</small></div>'
        f'<div class="acts">{_buttons(row, waiting)}</div></li>'
    )


def _facts(job: GenerateJob) -> str:
    preset = presets.find(job.preset)
    title = preset.title if preset else job.preset
    return (
        f"{escape(title)} · seed {job.seed} · {job.width} x {job.height} · "
        f"{job.num_frames} frames · {job.sampling.num_inference_steps or '?'} steps"
    )


def _face(place: int, subject: Subject) -> str:
    url = thumb(subject)
    if not url:
        return ""
    return f'<img{markup.colour(place)} alt="@{escape(subject.name)}" src="{url}">'


def _state(row: Row) -> str:
    if row.cancel:
        return "Cancelling"
    if row.state == "running" and row.progress:
        progress = row.progress
        said = STAGES.get(str(progress.get("stage")), "Being made")
        if progress.get("total"):
            said += f" {progress['step']}/{progress['total']}"
        return said
    return WORDS[row.state]


def _when(row: Row) -> str:
    if row.state == "waiting":
        if row.position == 0:
            return "next"
        return f"{row.position} before it"
    if row.finished:
        ago = time.time() - row.finished
        if ago < 60:
            return "just now"
        return f"{duration(ago)} ago"
    return ""


def _error(row: Row) -> str:
    error = row.error or {}
    return " ".join(str(error.get(key, "")) for key in ("what", "why", "next_step")).strip()


def _buttons(row: Row, waiting: int) -> str:
    act, buttons = markup.button, []
    if row.state == "waiting":
        if row.position > 0:
            buttons.append(act("↑", "up", title=f"Move job {row.id} up", row=row.id))
        if row.position < waiting - 1:
            buttons.append(act("↓", "down", title=f"Move job {row.id} down", row=row.id))
        buttons.append(act("Edit", "edit", title=f"Edit job {row.id}", row=row.id))
    if row.state in ("failed", "cancelled", "interrupted"):
        buttons.append(act("Run again", "again", kind="primary", title=f"Run job {row.id} again", row=row.id))
    if row.job is not None:
        buttons.append(act("Duplicate", "duplicate", title=f"Duplicate job {row.id}", row=row.id))
    if row.state == "running" and not row.cancel:
        buttons.append(act("Cancel", "cancel", title=f"Cancel job {row.id}", row=row.id))
    elif row.state != "running":
        buttons.append(act("Remove", "remove", title=f"Remove job {row.id}", row=row.id))
    return "".join(buttons)


# --- handlers --------------------------------------------------------------------------------------------------------


def act(studio: Studio, what: str, id: int) -> Ticket | None:
    """One button of one row. Returns a ticket when Generate should open its job.

    Raises:
        StudioError: the row has moved on since the page was painted.
    """
    queue = studio.queue
    row = queue.get(id)
    if what == "up":
        queue.move(id, max(0, row.position - 1))
    elif what == "down":
        queue.move(id, row.position + 1)
    elif what == "again":
        queue.run_again(id)
    elif what == "duplicate":
        queue.duplicate(id)
    elif what == "cancel":
        queue.cancel(id)
    elif what == "remove":
        queue.remove(id)
    elif what == "edit" and row.job is not None:
        return Ticket.of(row.job, row=id)
    return None


def hold(studio: Studio, what: str) -> None:
    """The buttons of the head: pause, resume, clear."""
    if what == "pause":
        studio.queue.pause()
    elif what == "resume":
        studio.queue.resume()
    elif what == "clear":
        for row in studio.queue.rows(states=["done", "failed", "cancelled", "interrupted"]):
            studio.queue.remove(row.id)


# --- wiring ----------------------------------------------------------------------------------------------------------


def wire(tab: QueueTab, studio: Studio, ticket: gr.State, tabs: gr.Tabs) -> list[Any]:
    """Connect the tab. Returns the events after which the whole page should look again at the queue."""

    def pressed(evt: gr.EventData) -> list[Any]:
        try:
            found = act(studio, evt.act, int(evt.row))
        except StudioError as error:
            return [markup.refusal(error), gr.skip(), gr.skip()]
        return ["", found, select("generate")] if found else ["", gr.skip(), gr.skip()]

    def held(evt: gr.EventData) -> str:
        try:
            hold(studio, evt.act)
        except StudioError as error:
            return markup.refusal(error)
        return ""

    return [
        tab.rows.click(pressed, None, [tab.refused, ticket, tabs], **sending()),
        tab.head.click(held, None, tab.refused, **quiet()),
    ]
