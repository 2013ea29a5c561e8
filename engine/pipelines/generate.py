"""Generate: a prompt and its subjects become a clip, as the plan says.

In:  a resolved job with its subjects prepared, a plan, the model pool.
Out: the clip with its document inside, the report beside it, and a `Saved` message.
Knows nothing of second tries (`engine.run`), queues or pages.

Shapes: C latent channels, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.diffusion import conditioning, solvers, step_cache
from engine.diffusion.guidance import apply_guidance
from engine.hardware.oom import classify_oom
from engine.hardware.plan import Plan
from engine.job import Sampling
from engine.loading import lora
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import Cancelled, Message, Preview, Progress, Saved
from engine.models.vae import decode_frames, decode_preview
from engine.pipelines import encode
from engine.pipelines.files import KeptLatents, Target, document_of, write_beside
from engine.pipelines.progress import Pace
from engine.pipelines.report import new_reporter, write_report
from engine.resolve import ResolvedJob, ResolvedSampling

Say = Callable[[Message], None]


def make_clip(resolved: ResolvedJob, plan: Plan | None, pool: ModelPool, target: Target, say: Say) -> Saved:
    """The clip, made as the plan says; without a plan whole and exact.

    Raises:
        OutOfMemory: the memory of the card or of the machine ran out.
    """
    pool.follow(plan)
    if plan is not None:
        resolved = resolved.changed(precision=plan.parts["transformer"].precision)
    with classify_oom():
        kept = KeptLatents(target.clip, resolved)
        sampled = kept.read(pool.device)
        if sampled is None:
            sampled = sample_latents(resolved, pool, target, say)
            kept.write(*sampled)
        latents, notes = sampled
        try:
            saved = decode_and_write(latents, resolved, pool, target, say)
        except Cancelled:
            kept.forget()
            raise
        kept.forget()
    return replace(saved, notes=notes)


def sample_latents(resolved: ResolvedJob, pool: ModelPool, target: Target, say: Say) -> tuple[Tensor, tuple[str, ...]]:
    """The clip's latents (1, C, F, h, w), and what was not done as a creator may have expected."""
    preset, sampling = resolved.preset, resolved.sampling
    say(Progress("encode", 0, 1))
    encoded = encode.encode_job(resolved, pool)

    say(Progress("load", 0, 1))
    transformer, vae = pool.part("transformer", preset), pool.part("vae", preset)
    # A LoRA comes before the subjects are read: it may change how. And before any block visits the device.
    loras = lora.use_loras(transformer, resolved.document.loras)
    with loras as matched, pool.visiting("transformer", transformer):
        for file in matched:
            say(Progress("load", 1, 1, note=file.sentence))
        conditions = conditioning.prepare(preset.conditioning, transformer, encoded)
        lead = conditions.lead

        solver = new_solver(sampling)
        predict = step_cache.with_step_cache(
            sampling.step_cache, preset.step_cache, guided_prediction(sampling, conditions, solver), solver
        )
        pace = Pace()

        def on_step(step: solvers.Step) -> None:
            say(Progress("sample", step.index + 1, step.total, eta_s=pace.seconds_left(step.index + 1, step.total)))
            previews = target.previews
            if previews.due(step.index + 1, step.total):
                picture = previews.write(lambda: decode_preview(step.x_0[:, :, lead:], vae), preset.display_scale)
                say(Preview(step.index + 1, step.total, picture))
            pace.go_on()

        noise = starting_latents(resolved, transformer, vae, lead)
        say(Progress("sample", 0, sampling.num_inference_steps))
        latents = solvers.denoise(noise, predict, solver, on_step)[:, :, lead:]
    return latents, (*(file.sentence for file in matched if file.left), *unused_pictures(resolved))


def unused_pictures(resolved: ResolvedJob) -> tuple[str, ...]:
    """A sentence where subjects have pictures that the preset cannot read."""
    names = [f"@{subject.name}" for subject in resolved.subjects]
    if resolved.preset.conditioning != "none" or not names:
        return ()
    return (f"{resolved.preset.title} reads words alone: the pictures of {' and '.join(names)} were not used.",)


def decode_and_write(latents: Tensor, resolved: ResolvedJob, pool: ModelPool, target: Target, say: Say) -> Saved:
    """Decode, judge and write, frame by frame."""
    preset = resolved.preset
    reporter = new_reporter(resolved, pool)
    document = document_of(resolved.document)
    size = (resolved.width, resolved.height)
    with video.ClipWriter(
        target.clip, fps=preset.fps, size=size, display_scale=preset.display_scale, document=document
    ) as writer:
        pace, total = Pace(), latents.shape[2]
        say(Progress("decode", 0, total))
        groups = decode_frames(latents, pool.part("vae", preset), tiled=pool.decodes_in_tiles)
        for number, group in enumerate(groups, start=1):
            for frame in group:
                writer.write(frame)
                if reporter is not None:
                    reporter.see(frame)
            say(Progress("decode", number, total, eta_s=pace.seconds_left(number, total)))
            pace.go_on()

    say(Progress("save", 0, 1))
    report, weakest, judging_s = None, None, 0.0
    if reporter is not None:
        report = reporter.finish()
        weakest, judging_s = report.weakest, reporter.seconds
    return Saved(
        clip=writer.path,
        document=write_beside(writer.path, document),
        poster=video.write_poster(writer.path),
        seconds=0.0,
        num_frames=writer.frames,
        report=write_report(reporter, report, writer.path),
        weakest=weakest,
        judging_s=judging_s,
    )


def new_solver(sampling: ResolvedSampling) -> solvers.Solver:
    """The solver that the job names, at its noise levels."""
    make = solvers.SOLVERS[sampling.scheduler]
    return make(sampling.num_inference_steps, sampling.shift, sampling.final_sigma)


def guided_prediction(
    sampling: Sampling | ResolvedSampling, conditions: conditioning.Conditioning, solver: solvers.Solver
) -> solvers.Predict:
    """The model's guided velocity, as the denoise loop asks for it."""

    def predict(latents: Tensor, time: float) -> Tensor:
        sigma = solvers.level(solver, time)
        return apply_guidance(sampling, lambda branch: conditions.predict(latents, time, branch), latents, sigma)

    return predict


def starting_latents(resolved: ResolvedJob, transformer: Any, vae: Any, lead: int) -> Tensor:
    """Starting noise (1, C, lead + F, h, w), drawn on the CPU: every device then starts from the same."""
    config = vae.config
    shape = (
        1,
        transformer.config.in_channels,
        lead + (resolved.num_frames - 1) // config.scale_factor_temporal + 1,
        resolved.height // config.scale_factor_spatial,
        resolved.width // config.scale_factor_spatial,
    )
    generator = torch.Generator("cpu").manual_seed(resolved.document.seed)
    return solvers.starting_noise(shape, generator, resolved.preset.shared_noise).to(transformer.device)
