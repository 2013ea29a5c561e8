"""Clips made for measuring: a job becomes its native frames, frames become a picture inside a document.

In:  jobs and a model pool.
Out: uint8 frames; base64 PNG.
Knows nothing of what is measured, or of the toybox.
"""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from engine import presets, run
from engine.job import GenerateJob, Sampling, read_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import Message


def as_png(picture: np.ndarray) -> str:
    """uint8 (H, W, 3) as base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def make_frames(job: GenerateJob, clip: Path, pool: ModelPool) -> np.ndarray:
    """Make a job's clip into a file and give its native frames, uint8 (F, H, W, 3)."""
    run.run(job, _quiet, outputs=clip.parent, clip=clip, pool=pool)
    return video.read_frames(clip, display_scale=presets.load(job.preset).display_scale)


def remake_clip(document: Path, pool: ModelPool) -> None:
    """Make a document's clip anew at its preset's own settings; clip, poster and document take their old places.

    For the clip that a studio shows as the expected one, after every new checkpoint. Prompt, subjects and seed stay.
    """
    job = read_job(document.read_text(encoding="utf-8"))
    own = {"sampling": Sampling(), "num_frames": None, "width": None, "height": None, "precision": None}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        saved = run.run(job.model_copy(update=own), _quiet, outputs=clip.parent, clip=clip, pool=pool)
        for made, suffix in ((saved.clip, ".mp4"), (saved.poster, ".webp"), (saved.document, ".json")):
            shutil.copyfile(made, document.with_suffix(suffix))


def _quiet(message: Message) -> None:
    """Whoever makes many clips has a progress of their own."""
