"""Generate: a prompt and its subjects become a clip, as the plan says.

In:  a resolved job with its pictures, its preset, a plan, the model pool.
Out: the clip with its document inside, the report beside it, and a `Saved` message.
Knows nothing of second tries (`engine.run`), queues or pages.

Shapes: C latent channels, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import lora_files, presets
from engine.diffusion import conditioning, solvers, step_cache
from engine.diffusion.guidance import apply_guidance
from engine.hardware.oom import classify_oom
from engine.hardware.plan import Plan
from engine.job import GenerateJob, write_job
from engine.loading import lora
from engine.loading.pool import ModelPool
from engine.media import pictures, video
from engine.messages import Cancelled, Message, Preview, Progress, Saved
from engine.models.vae import decode_frames, decode_preview
from engine.pipelines import encode
from engine.pipelines.files import KeptLatents, Previews, write_beside
from engine.pipelines.progress import Pace
from engine.pipelines.report import new_reporter, write_report


def make_clip(
    job: GenerateJob,
    preset: presets.Preset,
    plan: Plan | None,
    say: Callable[[Message], None],
    target: Path,
    pool: ModelPool,
    previews: Previews,
) -> Saved:
    """The clip, made as the plan says.

    Raises:
        OutOfMemory: the memory of the card or of the machine ran out.
    """
    pool.follow(plan)
    if plan is not None:
        job = job.model_copy(update={"precision": plan.parts["transformer"].precision})
    with classify_oom():
        kept = KeptLatents(target, job, preset)
        sampled = kept.read(pool.device)
        if sampled is None:
            sampled = sample_latents(job, preset, say, pool, previews)
            kept.write(*sampled)
        latents, notes = sampled
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
    encoded = encode.encode_job(job, preset, pool)

    say(Progress("load", 0, 1))
    transformer, vae = pool.part("transformer", preset), pool.part("vae", preset)
    # A LoRA comes before the subjects are read: it may change how. And before any block visits the device.
    with lora.use_loras(transformer, job.loras) as matched, pool.visiting("transformer", transformer):
        for file in matched:
            say(Progress("load", 1, 1, note=file.sentence))
        conditions = conditioning.prepare(preset.conditioning, transformer, encoded)
        lead = conditions.lead

        solver = new_solver(job)
        predict = step_cache.with_step_cache(
            job.sampling.step_cache, preset.step_cache, guided_prediction(job, conditions, solver), solver
        )
        pace = Pace()

        def on_step(step: solvers.Step) -> None:
            say(Progress("sample", step.index + 1, step.total, eta_s=pace.seconds_left(step.index + 1, step.total)))
            if previews.due(step.index + 1, step.total):
                picture = previews.write(lambda: decode_preview(step.x_0[:, :, lead:], vae), preset.display_scale)
                say(Preview(step.index + 1, step.total, picture))
            pace.go_on()

        noise = starting_latents(job, preset, transformer, vae, lead)
        say(Progress("sample", 0, job.sampling.num_inference_steps or 0))
        latents = solvers.denoise(noise, predict, solver, on_step)[:, :, lead:]
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
    document = write_job(lora_files.shorten_paths(pictures.drop_embedded_paths(job)))
    size = (job.width or 0, job.height or 0)
    with video.ClipWriter(
        target, fps=preset.fps, size=size, display_scale=preset.display_scale, document=document
    ) as writer:
        pace, total = Pace(), latents.shape[2]
        say(Progress("decode", 0, total))
        for number, group in enumerate(decode_frames(latents, pool.part("vae", preset), tiled=tiled), start=1):
            for frame in group:
                writer.write(frame)
                if reporter is not None:
                    reporter.see(frame)
            say(Progress("decode", number, total, eta_s=pace.seconds_left(number, total)))
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


def new_solver(job: GenerateJob) -> solvers.Solver:
    settings = job.sampling
    assert settings.scheduler and settings.num_inference_steps and settings.shift, "presets.resolve fills these in"
    make = solvers.SOLVERS[settings.scheduler]
    return make(settings.num_inference_steps, settings.shift, settings.final_sigma or 0.0)


def guided_prediction(
    job: GenerateJob, conditions: conditioning.Conditioning, solver: solvers.Solver
) -> solvers.Predict:
    """The model's guided velocity, as the denoise loop asks for it."""

    def predict(latents: Tensor, time: float) -> Tensor:
        sigma = solvers.level(solver, time)
        return apply_guidance(job.sampling, lambda branch: conditions.predict(latents, time, branch), latents, sigma)

    return predict


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
    return solvers.starting_noise(shape, generator, preset.shared_noise).to(transformer.device)
