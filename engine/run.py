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
from engine.media import pictures
from engine.messages import Message, Progress, Saved
from engine.pipelines.files import PREVIEWS, Previews, check_writable, free_name
from engine.pipelines.generate import make_clip
from engine.pipelines.progress import LoadingProgress

log = logging.getLogger(__name__)


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
    job, preset = presets.resolve(job)
    presets.check_files(preset)
    job = lora_files.add_hashes(pictures.pack(job, preset))
    target = clip or free_name(outputs, job)
    check_writable(target.parent)
    here = pool.hardware()
    plan = None
    if preset.shape is not None:
        plan = plan_or_raise(job, preset, here)
    with Previews(outputs / PREVIEWS / target.stem) as previews:
        saved, exhausted = None, ""
        try:
            saved = make_clip(job, preset, plan, say, target, pool, previews)
        except OutOfMemory as error:
            exhausted = error.what
        # Not inside the handler: the error holds its stack frames, and these hold the model that was too large.
        if saved is None:
            log.warning("out of memory (%s); once more, sparing", exhausted)
            say(Progress("load", 0, 0, note=f"{exhausted} ran out; trying once more with less."))
            pool.empty()
            smaller_plan = None
            if preset.shape is not None:
                smaller_plan = make_plan(job, preset, here.shrunk())
            try:
                saved = make_clip(job, preset, smaller_plan, say, target, pool, previews)
            except OutOfMemory as again:
                raise explain_oom(again, job, preset, here) from again
    return replace(saved, seconds=time.monotonic() - began)
