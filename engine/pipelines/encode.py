"""Prompt and pictures in the model's terms: UMT5 states, VLM states, reference latents.

In:  text, prepared pictures (uint8 squares on white), and the loaded encoders; or a whole job and a model pool.
Out: tensors on the encoder's device, fp32. Training calls the same functions on batches.
Knows nothing of the transformer, of schedules or of clips.

Shapes: B texts, L text tokens, T VLM tokens, P pictures, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.diffusion.conditioning import Encoded
from engine.job import GenerateJob
from engine.loading.pool import ModelPool, fingerprint
from engine.media.pictures import Pixels, at_own_size, on_canvas, prepare_subject
from engine.models.encoders import text_states, vlm_states
from engine.models.subject_tower import References
from engine.models.vae import normalize, picture_latents
from engine.pipelines.prompt import render_job
from engine.presets import Preset

# --- a whole job ----------------------------------------------------------------------------------------------------


def job_states(job: GenerateJob, preset: Preset, pool: ModelPool) -> Encoded:
    """Everything a clip needs from its encoders, each thing encoded once and remembered by the hash of its content.

    Args:
        job: resolved, its pictures readable.
        preset: names the encoders and how mentions are written.
        warm: loads an encoder only when something is not remembered. Large ones have left it before the VAE works.

    Raises:
        StudioError: a picture or an encoder cannot be read.
    """
    prompt = render_job(job, preset)
    text, negative = (_text(words, preset, pool) for words in (prompt, job.negative_prompt or ""))
    # A weight of 0 leaves a subject out everywhere, also where the VLM would see it.
    shown = [prepare_subject(s, size=preset.reference_size) if s.weight > 0 else [] for s in job.subjects]
    with_identity = preset.conditioning.startswith("identity") and any(shown)
    states, mask = _vlm(prompt, shown, preset, pool) if with_identity else (None, None)
    pool.make_room()
    if preset.conditioning == "sources":
        return Encoded(text, negative, sources=_sources(job, shown, preset, pool))
    if preset.conditioning in ("frames", "side"):
        frames = _reference_frames(job, shown, preset, pool)
        side = _side(job, frames, preset, pool) if preset.conditioning == "side" else None
        return Encoded(text, negative, frames=frames, side=side)
    if not with_identity:
        return Encoded(text, negative)  # without subjects the model is plain Wan, as it was in training
    references = _references(shown, [subject.weight for subject in job.subjects], preset, pool)
    frames = _reference_frames(job, shown, preset, pool) if preset.conditioning == "identity+frames" else None
    return Encoded(text, negative, replace(references, vlm_states=states, vlm_mask=mask), frames)


def _text(text: str, preset: Preset, pool: ModelPool) -> Tensor:
    key = ("text", fingerprint(preset.place("text_encoder")), fingerprint(preset.place("tokenizer")), text)

    def made() -> Tensor:
        with pool.at_work("text_encoder", preset) as encoder:
            return text_states([text], pool.part("tokenizer", preset), encoder)

    return pool.remembered(key, made)


def _vlm(
    prompt: str, shown: Sequence[Sequence[Pixels]], preset: Preset, pool: ModelPool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not preset.components.vlm:
        return None, None
    hashes = tuple(tuple(_hash(picture) for picture in subject) for subject in shown)
    key = ("vlm", fingerprint(preset.place("vlm")), fingerprint(preset.place("vlm_tokenizer")), prompt, hashes)

    def made() -> tuple[Tensor, Tensor]:
        with pool.at_work("vlm", preset) as vlm:
            return vlm_states([prompt], [shown], pool.part("vlm_tokenizer", preset), vlm)

    return pool.remembered(key, made)


def _references(
    shown: Sequence[Sequence[Pixels]], weights: Sequence[float], preset: Preset, pool: ModelPool
) -> References:
    """The pictures of all subjects as one padded batch of one clip."""
    most = max(len(subject) for subject in shown)
    vae_files = fingerprint(preset.place("vae"))

    def latents(picture: Pixels) -> Tensor:
        return pool.remembered(("picture", vae_files, _hash(picture)), lambda: _still(picture, preset, pool)[0])

    rows = [[latents(picture) for picture in subject] for subject in shown]
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    padded = torch.stack([torch.stack(row + [nothing] * (most - len(row))) for row in rows])
    there = torch.tensor([[number < len(row) for number in range(most)] for row in rows], device=padded.device)
    return References(
        latents=padded.unsqueeze(0),
        mask=None if bool(there.all()) else there.unsqueeze(0),
        weights=None if all(weight == 1 for weight in weights) else torch.tensor([weights], device=padded.device),
    )


def _reference_frames(
    job: GenerateJob, shown: Sequence[Sequence[Pixels]], preset: Preset, pool: ModelPool
) -> Tensor | None:
    """Every picture at the clip's size on white, each a latent frame: (1, C, N, h, w); None without any.

    A subject's weight, 1 as trained, scales its latents, since zeros are what a model of this kind takes for nobody.
    """
    latents = list(_pages(job, shown, lambda own: on_canvas(own, job.width or 0, job.height or 0), preset, pool))
    return torch.stack(latents, dim=2) if latents else None


def _sources(
    job: GenerateJob, shown: Sequence[Sequence[Pixels]], preset: Preset, pool: ModelPool
) -> tuple[Tensor, ...]:
    """Every picture at its own size, each (1, C, 1, h, w).

    A subject's weight scales its latents here, too: a paler picture. Nothing else of the kind was trained.
    """
    pages = _pages(job, shown, lambda own: at_own_size(own, preset.size_multiple), preset, pool)
    return tuple(latents.unsqueeze(2) for latents in pages)


def _pages(
    job: GenerateJob,
    shown: Sequence[Sequence[Pixels]],
    page_of: Callable[[Pixels], Pixels],
    preset: Preset,
    pool: ModelPool,
) -> Iterator[Tensor]:
    """Latents (1, C, h, w) of what is made of every picture, times its subject's weight."""
    vae_files = fingerprint(preset.place("vae"))
    for subject, own in zip(job.subjects, shown, strict=True):
        for page in map(page_of, own):
            key = ("frame", vae_files, _hash(page))
            made = pool.remembered(key, lambda page=page: _still(page, preset, pool))
            yield subject.weight * made


def _still(page: Pixels, preset: Preset, pool: ModelPool) -> Tensor:
    with pool.at_work("vae", preset) as vae:
        return picture_latents([page], vae)


def _side(job: GenerateJob, frames: Tensor | None, preset: Preset, pool: ModelPool) -> Tensor:
    """What VACE's side branch reads where everything is to be made: an even grey video, and a mask that says "all".

    Pictures come first, the last one first of all, as kept content with a mask of zeros.

    Source: `prepare_video_latents` and `prepare_masks` of diffusers' `WanVACEPipeline`, for a clip without a video.
    """
    shape = (1, 3, job.num_frames or 1, job.height or 0, job.width or 0)

    def empty() -> Tensor:
        with pool.at_work("vae", preset) as vae, torch.no_grad():
            grey = torch.zeros(shape, device=vae.device, dtype=vae.dtype)
            return normalize(vae.encode(grey, return_dict=False)[0].mode().float(), vae)

    video = pool.remembered(("grey", fingerprint(preset.place("vae")), shape), empty)
    cells: Any = pool.part("vae", preset).config.scale_factor_spatial
    mask = video.new_ones(1, cells**2, *video.shape[2:])
    clip = torch.cat([video, video, mask], 1)
    if frames is None:
        return clip
    kept = frames.flip(2)
    nothing = kept.new_zeros(1, kept.shape[1] + cells**2, *kept.shape[2:])
    return torch.cat([torch.cat([kept, nothing], 1), clip], 2)


def _hash(picture: Pixels) -> str:
    return hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).hexdigest()
