"""The files of one clip beside the mp4 itself: its name, its document, its previews, its latents until it is decoded.

In:  a job, the outputs folder.
Out: files, and a StudioError in words where the disk refuses.
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine import lora_files
from engine.job import GenerateJob, write_job
from engine.loading.pool import fingerprint
from engine.media import pictures, video
from engine.messages import StudioError
from engine.resolve import ResolvedJob

PREVIEWS = ".previews"  # folder of pictures of clips in the making, one folder each

PREVIEW_SHARE = 10  # a preview waits ten times as long as the one before took: a tenth of the time at most

PREVIEW_GAP_S = 0.5  # nobody looks more often


class KeptLatents:
    """What was sampled, beside the clip until it is decoded: a decode that fails costs no sampling.

    The file is named by what was sampled, so another try of the same job finds it, whatever its clip is called. If
    nobody asks for it again, it is swept away with half-written clips.
    """

    def __init__(self, target: Path, resolved: ResolvedJob) -> None:
        preset = resolved.preset
        drawing = ("transformer", "distill", "vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer")
        marks = [str(fingerprint(preset.place(part))) for part in drawing if getattr(preset.components, part)]
        whole = "\n".join([write_job(resolved.document), *marks])
        self._path = target.parent / f".{hashlib.sha256(whole.encode()).hexdigest()[:24]}{video.PART}.safetensors"

    def read(self, device: torch.device) -> tuple[Tensor, tuple[str, ...]] | None:
        """Latents of an earlier try on the device, and what was noted; None without one, or where it is damaged."""
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as opened:
                # A copy: Windows does not delete a file that a tensor still lies in.
                latents = opened.get_tensor("latents").to(device, copy=True)
                return latents, tuple(json.loads(opened.metadata()["notes"]))
        except SafetensorError:
            return None

    def write(self, latents: Tensor, notes: tuple[str, ...]) -> None:
        """Keep them until `forget`."""
        with explain_os_errors(self._path.parent):
            self._path.write_bytes(save({"latents": latents.contiguous().cpu()}, {"notes": json.dumps(notes)}))

    def forget(self) -> None:
        """They have become a clip."""
        self._path.unlink(missing_ok=True)


def free_name(outputs: Path, job: GenerateJob) -> Path:
    """`<YYYY-MM-DD>/<HHMMSS>-<what>-s<seed>.mp4`, with a number behind it if such a clip is there."""
    now = datetime.now()
    words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:40].strip("-") or "clip"
    stem = f"{now:%H%M%S}-{words}-s{job.seed}"
    folder = outputs / f"{now:%Y-%m-%d}"
    number, target = 1, folder / f"{stem}.mp4"
    while target.exists() or not _claim_folder(outputs / PREVIEWS / target.stem):
        number += 1
        target = folder / f"{stem}-{number}.mp4"
    return target


def _claim_folder(folder: Path) -> bool:
    """Whether the previews' folder is new: two workers may begin the same job within a second."""
    with explain_os_errors(folder.parent):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def check_writable(folder: Path) -> None:
    """Find out now, not when the clip has been drawn, that it cannot be saved.

    Raises:
        StudioError: the folder cannot be made or written, or the disk is full.
    """
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))


def document_of(job: GenerateJob) -> str:
    """The document as it goes into a clip, which may be shown to others: with its pictures, without paths."""
    return write_job(lora_files.shorten_paths(pictures.drop_embedded_paths(job)))


def write_beside(clip: Path, document: str) -> Path:
    path = clip.with_suffix(".json")
    with explain_os_errors(clip.parent):
        path.write_text(document, encoding="utf-8")
    return path


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudioError(
            what=f"The folder {folder} cannot be written.",
            why=f"The system says: {error.strerror or error}.",
            next_step="Make room on the disk, or choose another folder with --outputs.",
        ) from error


class Previews:
    """Pictures of a clip in the making, in a folder that goes when the run ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._next = 0.0  # the first one comes as soon as it may

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, *_: object) -> None:
        # A page may be reading one of them, and Windows then keeps it: a run of that name takes another.
        shutil.rmtree(self._folder, ignore_errors=True)

    def due(self, step: int, total: int) -> bool:
        """Not after the first step, which shows fog, nor after the last, when the clip itself is next."""
        return 1 < step < total and time.monotonic() >= self._next

    def write(self, draw: Callable[[], NDArray[np.uint8]], display_scale: int) -> Path:
        """A new file each time: the one before may still be open in a reader."""
        began = time.monotonic()
        self._count += 1
        path = self._folder / f"{self._count:02}.png"
        image = Image.fromarray(draw())
        image = image.resize((image.width * display_scale, image.height * display_scale), Image.Resampling.NEAREST)
        with explain_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            image.save(path)
        took = time.monotonic() - began
        self._next = time.monotonic() + max(PREVIEW_SHARE * took, PREVIEW_GAP_S)
        return path


@dataclass(frozen=True)
class Target:
    """Where a clip goes, and where it shows itself until then."""

    clip: Path
    previews: Previews
