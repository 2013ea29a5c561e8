"""The page: four tabs over one queue, and the server that shows them.

In:  `Settings`.
Out: a Gradio page, a worker beside it, an API and an MCP server.
Knows nothing of torch: all of that lives in the worker's process, whose death this one survives.
"""

from __future__ import annotations

import sys
import webbrowser
from html import escape
from typing import Any

import gradio as gr

from app.keeper import WorkerKeeper
from app.page import api, theme
from app.page.clip_view import STAGES
from app.page.context import ASSETS, SAMPLES, Studio
from app.page.tabs import gallery, generate
from app.page.tabs import models as models_tab
from app.page.tabs import queue as queue_tab
from app.page.tabs.wiring import Ticket, quiet
from app.queue import Row
from app.settings import Settings
from engine.messages import StudioError

TITLE = "ID-Crafter Studio"
LOOK_S = 1.0  # how often the page asks the queue whether anything changed; the answer is one number
UPLOAD_LIMIT = "512mb"  # a dropped clip; a picture is checked by its pixels
# The queue's count of changes, when the latest clip was finished, the pulls' count of changes, and which presets are
# to be had: what the page last showed.
Seen = tuple[int, float, int, tuple[tuple[str, str], ...]]
NOTHING: Seen = (-1, -1.0, -1, ())


def build(settings: Settings) -> gr.Blocks:
    """The page of these settings, not yet served."""
    studio = Studio.of(settings)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        ticket = gr.State(Ticket())
        with gr.Row(elem_id="top"):
            gr.HTML(_brand(), apply_default_css=False)
            bell = gr.HTML("", js_on_load=_TELL, elem_id="bell", apply_default_css=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                first = generate.layout(studio)
            with gr.Tab("Gallery", id="gallery"):
                second = gallery.layout()
            with gr.Tab("Queue", id="queue"):
                third = queue_tab.layout()
            with gr.Tab("Models", id="models"):
                fourth = models_tab.layout()
        changed = [
            *generate.wire(first, studio, ticket, page.load, tabs),
            *gallery.wire(second, studio, ticket, tabs),
            *queue_tab.wire(third, studio, ticket, tabs),
            *models_tab.wire(fourth, studio),
        ]
        queue_shows = [first.clip_view, second.grid, third.head, third.rows, bell]
        asks = [first.form["preset"], fourth.asked]
        pulls_show = [*fourth.shown, first.form["preset"], first.lack, fourth.like]
        _wire_looks(page, studio, asks, queue_shows, pulls_show, changed)
        api.register(studio)
    return page


def _wire_looks(
    page: gr.Blocks, studio: Studio, asks: list[Any], queue_shows: list[Any], pulls_show: list[Any], changed: list[Any]
) -> None:
    """Repaint what the queue and the pulls decide: at the start, after a person acted, and when they change."""

    def of_queue(seen: Seen) -> tuple[float, list[Any]]:
        if studio.queue.changes() == seen[0]:
            return seen[1], [gr.skip()] * len(queue_shows)
        rows = studio.queue.rows()
        latest = max((row.finished for row in rows if row.state == "done" and row.finished), default=0.0)
        return latest, [
            generate.paint_stage(rows, studio.queue.paused),
            gallery.render_grid(studio) if latest != seen[1] else gr.skip(),
            queue_tab.render_head(rows, studio.queue.paused),
            queue_tab.render_rows(rows),
            _news(rows),
        ]

    def of_pulls(seen: Seen, preset: str, asked: str) -> tuple[tuple[tuple[str, str], ...], list[Any]]:
        if studio.pulls.changes() == seen[2]:
            return seen[3], [gr.skip()] * len(pulls_show)
        choices = tuple(models_tab.choices(studio))
        painted = models_tab.paint(studio, asked)
        if choices == seen[3]:  # an open dropdown is left alone while a bar moves
            return choices, [*painted, gr.skip(), gr.skip(), gr.skip()]
        lack = models_tab.missing(studio, preset)
        likes = gr.Dropdown(choices=models_tab.likes())
        return choices, [*painted, gr.Dropdown(choices=list(choices)), lack, likes]

    def repaint(seen: Seen, preset: str, asked: str) -> list[Any]:
        counts = (studio.queue.changes(), studio.pulls.changes())
        latest, first = of_queue(seen)
        choices, second = of_pulls(seen, preset, asked)
        now = (counts[0], latest, counts[1], choices)
        return [gr.skip() if now == seen else now, *first, *second]

    seen = gr.State(NOTHING)
    inputs, outputs = [seen, *asks], [seen, *queue_shows, *pulls_show]
    page.load(repaint, inputs, outputs, **quiet())
    for event in changed:
        event.then(repaint, inputs, outputs, **quiet())
    gr.Timer(LOOK_S).tick(repaint, inputs, outputs, **quiet())


_TELL = "watch('value', () => window.studio?.tell(element)); window.studio?.tell(element);"


def _brand() -> str:
    first, _, rest = TITLE.partition(" ")
    return (
        f'<h1 class="brand"><img alt="" src="/pwa_icon/192"><span>{first}<span class="wide"> {rest}</span></span></h1>'
    )


def _news(rows: list[Row]) -> str:
    """What the window's title and a notice say, and one line for the top of the page."""
    running = next((row for row in rows if row.state == "running"), None)
    ended = [row for row in rows if row.finished and row.state in ("done", "failed", "interrupted")]
    latest = max(ended, key=lambda row: row.finished or 0, default=None)
    title, line = TITLE, "Ready"
    if running:
        progress = running.progress or {}
        line = STAGES.get(str(progress.get("stage")), "Starting")
        if running.cancel:
            line = "Cancelling"
        elif progress.get("total"):
            line = f"{line} {progress['step']}/{progress['total']}"
        title = f"{line} · {TITLE}"
    elif any(row.state == "waiting" for row in rows):
        line = "Waiting"
    headline = {"done": "Your clip is done", "failed": "A clip failed", "interrupted": "A clip was interrupted"}
    said = headline[latest.state] if latest else ""
    body = latest.job.prompt if latest and latest.job else ""
    return (
        f'<div class="news" data-title="{escape(title)}" data-finished="{(latest.finished or 0) if latest else 0}" '
        f'data-headline="{said}" data-body="{escape(body)}">'
        f'<span class="light {"on" if running else ""}"></span><span>{escape(line)}</span>'
        '<button type="button" class="btn" data-bell hidden>Notify me</button></div>'
    )


# --- serving ---------------------------------------------------------------------------------------------------------


def launch(page: gr.Blocks, settings: Settings) -> str:
    """Serve the page without blocking, and return its address.

    Only finished clips, samples and our own assets can be fetched: the queue, saved subjects and uploads lie in
    `settings.data`, which is blocked even where it is a folder inside the outputs.

    Raises:
        StudioError: the port is taken.
    """
    served = [settings.outputs, SAMPLES, theme.STUDIO, ASSETS / "sanity.mp4", ASSETS / "sanity.webp"]
    try:
        _, url, _ = page.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.share,
            auth=settings.auth,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            num_workers=0,
            allowed_paths=[str(path.resolve()) for path in served],
            blocked_paths=[str(settings.data.resolve())],
            max_file_size=UPLOAD_LIMIT,
            favicon_path=str(theme.ICON),
            pwa=True,
            mcp_server=True,
            theme=theme.StudioTheme(),
            css=theme.css(settings.theme),
            head=theme.head(settings.theme),
        )
    except OSError as error:
        raise StudioError(
            f"The page cannot listen on {settings.host}:{settings.port}.",
            "Another program has that port, perhaps another studio.",
            f"Close it, or choose another port: --port {settings.port + 1}.",
            field="port",
        ) from error
    return url


def serve(settings: Settings) -> None:
    """Show the page and keep its workers beside it until somebody presses Ctrl-C.

    Raises:
        StudioError: the port is taken, another studio keeps this queue, or the folders cannot be written.
    """
    page = build(settings)
    keeper = WorkerKeeper(settings.data / "queue.db", settings.outputs, devices=settings.devices)
    try:
        url = launch(page, settings)
        keeper.start()  # after the page: importing torch beside it would make the page wait
        sys.stdout.write(f"{TITLE} is at {url}\nPress Ctrl-C to stop.\n")
        sys.stdout.flush()
        if settings.inbrowser:
            webbrowser.open(url)
        page.block_thread()
    finally:
        keeper.stop()
        page.close()
