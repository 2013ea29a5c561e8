"""The whole story of a clip, from a document to a file that carries that document.

In:  a job, and a `say` that hears how it goes and may stop it.
Out: an mp4 with its document inside, the same document beside it, a poster, and the identity report.
Knows nothing of queues, pages or processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine import lora_files, presets
from engine.hardware.oom import OutOfMemory
from engine.hardware.plan import explain_oom, make_plan, plan_or_raise
from engine.job import GenerateJob
from engine.loading.pool import ModelPool
from engine.media.pictures import prepare_subjects
from engine.messages import Message, Progress, Saved
from engine.pipelines.files import PREVIEWS, Previews, Target, check_writable, free_name
from engine.pipelines.generate import make_clip
from engine.pipelines.progress import LoadingProgress
from engine.resolve import ResolvedJob, resolve

log = logging.getLogger(__name__)

PIPELINES = {"generate": make_clip}  # by the document's kind


def run(
    job: GenerateJob,
    say: Callable[[Message], None],
    *,
    outputs: Path,
    clip: Path | None = None,
    pool: ModelPool | None = None,
) -> Saved:
    """Make one clip.

    Args:
        job: what to make; what it leaves out comes from its preset.
        say: hears of every denoising step and every decoded latent frame, and of previews. What it raises
            (`messages.Cancelled`) ends the run, and nothing of the clip is left behind.
        outputs: folder of all clips; a day's clips lie in `<YYYY-MM-DD>/`.
        clip: exactly this file instead.
        pool: what stays loaded between two clips.

    Returns:
        Where everything is. The same job gives the same frames on the same machine.

    Raises:
        StudioError: the job does not fit, a file is missing or damaged, memory or disk ran out, or the clip broke.
    """
    began = time.monotonic()
    pool = pool or ModelPool()
    pool.telling(LoadingProgress(say))
    resolved = resolve(job)
    presets.check_files(resolved.preset)
    resolved = prepare_subjects(resolved.changed(loras=lora_files.locate(job.loras)))
    path = clip or free_name(outputs, resolved.document)
    check_writable(path.parent)
    with Previews(outputs / PREVIEWS / path.stem) as previews:
        saved = _make_within_memory(resolved, pool, Target(path, previews), say)
    return replace(saved, seconds=time.monotonic() - began)


def _make_within_memory(
    resolved: ResolvedJob, pool: ModelPool, target: Target, say: Callable[[Message], None]
) -> Saved:
    """Make the clip as planned; where memory runs out all the same, once more with less."""
    make = PIPELINES[resolved.document.kind]
    here = pool.hardware()
    planned = resolved.preset.shape is not None
    plan = None
    if planned:
        plan = plan_or_raise(resolved, here)
    exhausted = ""
    try:
        return make(resolved, plan, pool, target, say)
    except OutOfMemory as error:
        exhausted = error.what
    # Not inside the handler: the error holds its stack frames, and these hold the model that was too large.
    log.warning("out of memory (%s); once more, sparing", exhausted)
    say(Progress("load", 0, 0, note=f"{exhausted} ran out; trying once more with less."))
    pool.empty()
    if planned:
        plan = make_plan(resolved, here.shrunk())
    try:
        return make(resolved, plan, pool, target, say)
    except OutOfMemory as again:
        raise explain_oom(again, resolved, here) from again
