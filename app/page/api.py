"""The studio's verbs for programs: Gradio's API and MCP tools, typed and documented.

In:  documents and row ids, as text and numbers.
Out: plain JSON values.
Knows nothing of the page; every verb is one call into the queue, the library or the presets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from app import estimate as costs
from app.library.clips import list_clips
from app.page.context import Studio
from app.queue import Row
from engine import lora_files
from engine import presets as models
from engine.job import GenerateJob, read_job
from engine.messages import StudioError
from engine.resolve import resolve

Verb = Callable[..., Any]


def register(studio: Studio) -> None:
    """Add the verbs to the page being built."""
    for verb in (*queue_verbs(studio), *library_verbs(studio)):
        gr.api(verb, api_name=verb.__name__)


def queue_verbs(studio: Studio) -> tuple[Verb, ...]:
    """What programs do with the queue: generate, status, cancel."""

    def generate(document: str) -> int:
        """Queue one clip.

        Args:
            document: a job document as JSON text: {"prompt": "@fox waves", "subjects": [{"name": "fox", "pictures":
                [{"png": "<base64 PNG>"}]}], "seed": 7}. A picture is base64 PNG under "png", or the path of a picture
                that this studio already keeps.

        Returns:
            The row's id, for `status` and `cancel`.
        """
        return said(lambda: studio.queue.add(_filled(studio, document)))

    def status(row: int) -> dict[str, Any]:
        """How one job stands: its state, progress, and the clip's files or the error once it ended.

        Args:
            row: the id that `generate` gave.

        Returns:
            {"row", "state", "progress", "saved", "error", "seed"}.
        """
        return said(lambda: _row(studio.queue.get(row)))

    def cancel(row: int) -> dict[str, Any]:
        """Stop a job: a waiting one at once, a running one within a step.

        Args:
            row: the id that `generate` gave.

        Returns:
            The row as `status` gives it.
        """

        def stop() -> dict[str, Any]:
            studio.queue.cancel(row)
            return _row(studio.queue.get(row))

        return said(stop)

    return generate, status, cancel


def library_verbs(studio: Studio) -> tuple[Verb, ...]:
    """What programs ask: clips, estimate, presets."""

    def clips() -> dict[str, Any]:
        """Finished clips, newest first: {"clips": [{"id", "clip", "prompt", "seed", "created"}]}."""
        found = list_clips(studio.settings.outputs)
        # "clip" and not "path": Gradio's clients take {"path": ...} for a file and fetch it.
        shown = []
        for clip in found:
            known: dict[str, Any] = {"prompt": "", "seed": None}
            if clip.job:
                known = {"prompt": clip.job.prompt, "seed": clip.job.seed}
            shown.append({"id": clip.id, "clip": str(clip.path), **known, "created": clip.created})
        return {"clips": shown}  # not a bare list: Gradio would take its items for several outputs

    def estimate(document: str) -> dict[str, Any]:
        """What a clip would cost on this machine, without making it.

        Args:
            document: a job document as JSON text, as for `generate`.

        Returns:
            {"seconds", "memory_mb", "clip_bytes", "free_bytes"}.
        """

        def count() -> dict[str, Any]:
            history = studio.queue.rows(states=["done"], limit=40)
            cost = costs.clip_costs(_filled(studio, document), history, studio.settings.outputs)
            return {
                "seconds": round(cost.seconds, 1),
                "memory_mb": cost.memory_mb,
                "clip_bytes": cost.clip_bytes,
                "free_bytes": cost.free_bytes,
            }

        return said(count)

    def presets() -> dict[str, Any]:
        """The models there are: {"presets": [...]}, each with its sizes, lengths, most subjects and defaults."""
        return {"presets": [preset.model_dump(exclude={"components"}) for preset in models.list_readable()]}

    return clips, estimate, presets


def said(call: Any) -> Any:
    """The call's result; a `StudioError` reaches the caller as one sentence instead of "Internal error"."""
    try:
        return call()
    except StudioError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _filled(studio: Studio, document: str) -> GenerateJob:
    """A stranger's document as a job with every value filled in; its pictures are this studio's own, or ride along."""
    job = resolve(studio.own(read_job(document))).document
    lora_files.check(job)
    return job


def _row(row: Row) -> dict[str, Any]:
    seed = None
    if row.job:
        seed = row.job.seed
    return {
        "row": row.id,
        "state": row.state,
        "progress": row.progress,
        "saved": row.saved,
        "error": row.error,
        "seed": seed,
    }
