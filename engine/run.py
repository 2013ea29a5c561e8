"""The whole story of a clip, from a document to a file that carries that document.

In:  a job, and a `say` that hears how it goes and may stop it.
Out: an mp4 with its document inside, the same document beside it, a poster, and the identity report.
Knows nothing of queues, pages or processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine import (
    caching,
    conditioning,
    decode,
    encode,
    identity,
    lora,
    lora_files,
    memory,
    pictures,
    presets,
    sampling,
    video,
    witnesses,
)
from engine.guidance import guided
from engine.job import GenerateJob, write_job
from engine.load import ModelPool, fingerprint
from engine.messages import Cancelled, Message, Preview, Progress, Saved, StudioError
from engine.report import REPORT, STRIP, IdentityReport

PREVIEWS = ".previews"  # folder of pictures of clips in the making, one folder each
log = logging.getLogger(__name__)

PREVIEW_SHARE = 10  # a preview waits ten times as long as the one before took: a tenth of the time at most
PREVIEW_GAP_S = 0.5  # nobody looks more often
LOADING_GAP_S = 0.5


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
        warm: what to keep between two clips.

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
    job = lora_files.hashed(pictures.pack(job, preset))
    target = clip or free_name(outputs, job)
    check_writable(target.parent)
    here = pool.hardware()
    plan = memory.plan_or_raise(job, preset, here) if preset.shape is not None else None
    with Previews(outputs / PREVIEWS / target.stem) as previews:
        saved, lacked = None, ""
        try:
            saved = make_clip(job, preset, plan, say, target, pool, previews)
        except memory.OutOfMemory as lack:
            lacked = lack.what
        # Not inside the handler: an error holds the frames it came through, and they the model that was too large.
        if saved is None:
            log.warning("out of memory (%s); once more, sparing", lacked)
            say(Progress("load", 0, 0, note=f"{lacked} ran out; trying once more with less."))
            pool.empty()
            less = memory.make_plan(job, preset, here.shrunk()) if preset.shape is not None else None
            try:
                saved = make_clip(job, preset, less, say, target, pool, previews)
            except memory.OutOfMemory as again:
                raise memory.explain_oom(again, job, preset, here) from again
    return replace(saved, seconds=time.monotonic() - began)


def make_clip(
    job: GenerateJob,
    preset: presets.Preset,
    plan: memory.Plan | None,
    say: Callable[[Message], None],
    target: Path,
    pool: ModelPool,
    previews: Previews,
) -> Saved:
    """The clip, made as the plan says.

    Raises:
        Lack: some memory ran out.
    """
    pool.follow(plan)
    if plan is not None:
        job = job.model_copy(update={"precision": plan.parts["transformer"].precision})
    with memory.classify_oom():
        kept = KeptLatents(target, job, preset)
        drawn = kept.read(pool.device)
        if drawn is None:
            drawn = sample_latents(job, preset, say, pool, previews)
            kept.write(*drawn)
        latents, notes = drawn
        try:
            saved = decode_and_write(latents, job, preset, plan is not None and plan.tiled, say, target, pool)
        except Cancelled:
            kept.forget()
            raise
        kept.forget()
    return replace(saved, notes=notes)


def sample_latents(
    job: GenerateJob, preset: presets.Preset, say: Callable[[Message], None], pool: ModelPool, previews: Previews
) -> tuple[Tensor, tuple[str, ...]]:
    """The clip's latents (1, C, F, h, w), and what was not done as a creator may have expected."""
    say(Progress("encode", 0, 1))
    encoded = encode.job_states(job, preset, pool)

    say(Progress("load", 0, 1))
    transformer, vae = pool.part("transformer", preset), pool.part("vae", preset)
    # A LoRA comes before the subjects are read: it may change how. And before any block visits the device.
    with lora.added(transformer, job.loras) as matched, pool.visiting("transformer", transformer):
        for file in matched:
            say(Progress("load", 1, 1, note=file.sentence))
        conditions = conditioning.prepare(preset.conditioning, transformer, encoded)
        lead = conditions.lead

        solver = new_solver(job)
        predict = caching.chosen(job.sampling.cache, preset.caching, guided_prediction(job, conditions, solver), solver)
        pace = Pace()

        def on_step(step: sampling.Step) -> None:
            say(Progress("sample", step.index + 1, step.total, eta_s=pace.left(step.index + 1, step.total)))
            if previews.due(step.index + 1, step.total):
                picture = previews.write(
                    lambda: decode.decode_preview(step.x_0[:, :, lead:], vae), preset.display_scale
                )
                say(Preview(step.index + 1, step.total, picture))
            pace.go_on()

        noise = starting_latents(job, preset, transformer, vae, lead)
        say(Progress("sample", 0, job.sampling.num_inference_steps or 0))
        latents = sampling.denoise(noise, predict, solver, on_step)[:, :, lead:]
    return latents, (*(file.sentence for file in matched if file.left), *unused_pictures(job, preset))


def unused_pictures(job: GenerateJob, preset: presets.Preset) -> tuple[str, ...]:
    names = [f"@{subject.name}" for subject in job.subjects if subject.pictures]
    if preset.conditioning != "none" or not names:
        return ()
    return (f"{preset.title} reads words alone: the pictures of {' and '.join(names)} were not used.",)


def decode_and_write(
    latents: Tensor,
    job: GenerateJob,
    preset: presets.Preset,
    tiled: bool,
    say: Callable[[Message], None],
    target: Path,
    pool: ModelPool,
) -> Saved:
    """Decode, judge and write, frame by frame."""
    reporter = new_reporter(job, preset, pool)
    document = write_job(lora_files.portable(pictures.portable(job)))
    size = (job.width or 0, job.height or 0)
    with video.ClipWriter(
        target, fps=preset.fps, size=size, display_scale=preset.display_scale, document=document
    ) as writer:
        pace, total = Pace(), latents.shape[2]
        say(Progress("decode", 0, total))
        for number, group in enumerate(decode.decode_frames(latents, pool.part("vae", preset), tiled=tiled), start=1):
            for frame in group:
                writer.write(frame)
                if reporter is not None:
                    reporter.see(frame)
            say(Progress("decode", number, total, eta_s=pace.left(number, total)))
            pace.go_on()

    say(Progress("save", 0, 1))
    report = reporter.finish() if reporter is not None else None
    return Saved(
        clip=writer.path,
        document=write_beside(writer.path, document),
        poster=video.write_poster(writer.path),
        seconds=0.0,
        num_frames=writer.frames,
        report=write_report(reporter, report, writer.path),
        weakest=report.weakest if report is not None else None,
    )


class KeptLatents:
    """What was sampled, beside the clip until it is decoded: a decode that fails costs no sampling.

    The file is named by what was sampled, so another try of the same job finds it, whatever its clip is called. If
    nobody asks for it again, it is swept away with half-written clips.
    """

    def __init__(self, target: Path, job: GenerateJob, preset: presets.Preset) -> None:
        drawing = ("transformer", "distill", "vae", "text_encoder", "tokenizer", "vlm", "vlm_tokenizer")
        marks = [str(fingerprint(preset.place(part))) for part in drawing if getattr(preset.components, part)]
        whole = "\n".join([write_job(job), *marks])
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


def new_reporter(job: GenerateJob, preset: presets.Preset, pool: ModelPool) -> identity.Reporter | None:
    """Who judges the clip while it is decoded; None where nobody is to be recognised, or no judge is there."""
    answers = witnesses.assign_evaluators(job, preset, pool)
    if not answers:
        return None
    # Judges of drawings are quick; those of the real world look at one frame of each that the VAE packs together.
    every = 1 if preset.components.judges else preset.frames_per_latent
    return identity.Reporter(answers, fps=preset.fps, num_frames=job.num_frames or 1, every=every)


def write_report(reporter: identity.Reporter | None, report: IdentityReport | None, clip: Path) -> Path | None:
    """Report and outlined frames beside the clip; what an earlier clip of that name left there goes."""
    path = clip.with_suffix(REPORT)
    with explain_os_errors(clip.parent):
        for old in (path, clip.with_suffix(STRIP)):
            old.unlink(missing_ok=True)
        if reporter is None or report is None:
            return None
        path.write_text(report.as_json(), encoding="utf-8")
        reporter.write_strip(clip.with_suffix(STRIP))
    return path


def new_solver(job: GenerateJob) -> sampling.Solver:
    settings = job.sampling
    assert settings.scheduler and settings.num_inference_steps and settings.shift, "presets.resolve fills these in"
    return sampling.SOLVERS[settings.scheduler](settings.num_inference_steps, settings.shift)


def guided_prediction(
    job: GenerateJob, conditions: conditioning.Conditioning, solver: sampling.Solver
) -> sampling.Predict:
    """The model's guided velocity, as the denoise loop asks for it."""

    def asked(latents: Tensor, time: float) -> Tensor:
        sigma = sampling.level(solver, time)
        return guided(job.sampling, lambda branch: conditions.predict(latents, time, branch), latents, sigma)

    return asked


def starting_latents(job: GenerateJob, preset: presets.Preset, transformer: Any, vae: Any, lead: int) -> Tensor:
    """Starting noise (1, C, lead + F, h, w), drawn on the CPU: every device then starts from the same."""
    frames, height, width = job.num_frames or 1, job.height or 0, job.width or 0
    config = vae.config
    shape = (
        1,
        transformer.config.in_channels,
        lead + (frames - 1) // config.scale_factor_temporal + 1,
        height // config.scale_factor_spatial,
        width // config.scale_factor_spatial,
    )
    generator = torch.Generator("cpu").manual_seed(job.seed)
    return sampling.starting_noise(shape, generator, preset.shared_noise).to(transformer.device)


# --- names, folders, pace and previews ------------------------------------------------------------------------------


def free_name(outputs: Path, job: GenerateJob) -> Path:
    """`<YYYY-MM-DD>/<HHMMSS>-<what>-s<seed>.mp4`, with a number behind it if such a clip is there."""
    now = datetime.now()
    words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:40].strip("-") or "clip"
    stem = f"{now:%H%M%S}-{words}-s{job.seed}"
    folder = outputs / f"{now:%Y-%m-%d}"
    number, target = 1, folder / f"{stem}.mp4"
    while target.exists() or not _claimed(outputs / PREVIEWS / target.stem):
        number += 1
        target = folder / f"{stem}-{number}.mp4"
    return target


def _claimed(folder: Path) -> bool:
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


class Pace:
    """How long the rest will take, by the last eight steps; the first ones warm up and are slower."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=8)
        self._since = time.monotonic()

    def left(self, done: int, total: int) -> float:
        """A step has ended: seconds until the last one does."""
        self._took.append(time.monotonic() - self._since)
        return (total - done) * sum(self._took) / len(self._took)

    def go_on(self) -> None:
        """The next step begins; what came between two steps, such as a preview, is not counted as a step."""
        self._since = time.monotonic()


class LoadingProgress:
    """Says how far a part is that takes longer than a moment to load; loading an encoder belongs to reading."""

    def __init__(self, say: Callable[[Message], None]) -> None:
        self._say = say
        self._began: dict[str, float] = {}
        self._next = 0.0

    def __call__(self, part: str, share: float) -> None:
        now = time.monotonic()
        began = self._began.setdefault(part, now)
        if share == 1:
            del self._began[part]
        elif now - began > LOADING_GAP_S and now >= self._next:
            self._next = now + LOADING_GAP_S
            stage, left = "load" if part == "transformer" else "encode", (now - began) * (1 - share) / share
            self._say(Progress(stage, int(100 * share), 100, eta_s=left, note=f"loading the {part.replace('_', ' ')}"))


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
