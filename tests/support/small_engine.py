"""An engine without a model, for tests of queue, worker and library: real clips of a moving square, in real steps.

What goes wrong is asked for by the prompt's first word: refused, unforeseen, memory, stuck, crash.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.job import GenerateJob, write_job
from engine.media import video
from engine.messages import Message, Progress, Saved, StudioError

STEP_S = 0.05


def run(job: GenerateJob, say: Callable[[Message], None], *, outputs: Path) -> Saved:
    """As `engine.run.run`; `num_inference_steps` steps of a twentieth of a second each."""
    began = time.monotonic()
    steps = job.sampling.num_inference_steps or 3
    trouble = job.prompt.split()[0]
    for step in range(steps):
        say(Progress("sample", step + 1, steps))
        time.sleep(STEP_S)
        if trouble == "refused":
            raise StudioError("The clip came out black.", "A value was not a number.", "Use fewer steps.")
        if trouble == "unforeseen":
            raise ZeroDivisionError("no such luck")
        if trouble == "memory":
            raise MemoryError
        if trouble == "crash":
            os.abort()
        if trouble == "stuck":
            time.sleep(600)
    return write_clip(outputs / "2026-11-23" / f"{job.seed:06}-clip-s{job.seed}.mp4", job, began, say)


def write_clip(path: Path, job: GenerateJob, began: float, say: Callable[[Message], None]) -> Saved:
    """A square that walks, its document inside and beside it, and its poster."""
    frames = job.num_frames or 5
    with video.ClipWriter(path, fps=8, size=(64, 64), display_scale=4, document=write_job(job)) as writer:
        for t in range(frames):
            frame = np.full((64, 64, 3), 200, np.uint8)
            frame[20:40, t : t + 20] = (30, 60, job.seed % 256)
            writer.write(frame)
            say(Progress("decode", t + 1, frames))
    document = path.with_suffix(".json")
    document.write_text(write_job(job), encoding="utf-8")
    return Saved(path, document, video.write_poster(path), time.monotonic() - began, frames)
