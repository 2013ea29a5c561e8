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
from engine.loading.pool import ModelPool, fingerprint
from engine.media.pictures import Pixels, place_on_canvas, resize_to_multiple
from engine.models.encoders import text_states, vlm_states
from engine.models.subject_tower import References
from engine.models.vae import normalize, picture_latents
from engine.pipelines.prompt import clean, render_job
from engine.presets import Preset
from engine.resolve import ResolvedJob

# --- a whole job ----------------------------------------------------------------------------------------------------


def encode_job(resolved: ResolvedJob, pool: ModelPool) -> Encoded:
    """Everything a clip needs from its encoders, each thing encoded once and remembered by the hash of its content.

    Args:
        resolved: with its subjects prepared.
        pool: loads an encoder only when something is not remembered. Large encoders have left it before the VAE works.

    Raises:
        StudioError: an encoder cannot be read.
    """
    preset = resolved.preset
    prompt = render_job(resolved)
    text = _encode_text(prompt, preset, pool)
    negative = _encode_text(clean(resolved.document.negative_prompt or ""), preset, pool)
    shown = [subject.pictures if subject.is_shown else () for subject in resolved.subjects]
    with_identity = preset.conditioning.startswith("identity") and any(shown)
    states, mask = None, None
    if with_identity:
        states, mask = _encode_vlm(prompt, shown, preset, pool)
    pool.make_room()
    if preset.conditioning == "sources":
        return Encoded(text, negative, sources=_source_latents(resolved, pool))
    if preset.conditioning == "frames":
        return Encoded(text, negative, frames=_frame_latents(resolved, pool))
    if preset.conditioning == "side":
        frames = _frame_latents(resolved, pool)
        return Encoded(text, negative, frames=frames, side=_side_latents(resolved, frames, pool))
    if not with_identity:
        return Encoded(text, negative)  # without subjects the model is plain Wan, as it was in training
    references = _identity_references(shown, [subject.weight for subject in resolved.subjects], preset, pool)
    frames = None
    if preset.conditioning == "identity+frames":
        frames = _frame_latents(resolved, pool)
    return Encoded(text, negative, replace(references, vlm_states=states, vlm_mask=mask), frames)


def _encode_text(text: str, preset: Preset, pool: ModelPool) -> Tensor:
    key = ("text", fingerprint(preset.place("text_encoder")), fingerprint(preset.place("tokenizer")), text)

    def encode() -> Tensor:
        with pool.at_work("text_encoder", preset) as encoder:
            return text_states([text], pool.part("tokenizer", preset), encoder)

    return pool.remembered(key, encode)


def _encode_vlm(
    prompt: str, shown: Sequence[Sequence[Pixels]], preset: Preset, pool: ModelPool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not preset.components.vlm:
        return None, None
    hashes = tuple(tuple(map(_hash_picture, subject)) for subject in shown)
    key = ("vlm", fingerprint(preset.place("vlm")), fingerprint(preset.place("vlm_tokenizer")), prompt, hashes)

    def encode() -> tuple[Tensor, Tensor]:
        with pool.at_work("vlm", preset) as vlm:
            return vlm_states([prompt], [shown], pool.part("vlm_tokenizer", preset), vlm)

    return pool.remembered(key, encode)


def _identity_references(
    shown: Sequence[Sequence[Pixels]], weights: Sequence[float], preset: Preset, pool: ModelPool
) -> References:
    """The pictures of all subjects as one padded batch of one clip."""
    most = max(len(subject) for subject in shown)
    vae_files = fingerprint(preset.place("vae"))

    def encode(picture: Pixels) -> Tensor:
        key = ("picture", vae_files, _hash_picture(picture))
        return pool.remembered(key, lambda: _encode_picture(picture, preset, pool)[0])

    rows = [list(map(encode, subject)) for subject in shown]
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    padded_rows: list[Tensor] = []
    is_there: list[list[bool]] = []
    for row in rows:
        missing = most - len(row)
        padded_rows.append(torch.stack(row + [nothing] * missing))
        is_there.append([True] * len(row) + [False] * missing)
    latents = torch.stack(padded_rows)
    mask = torch.tensor(is_there, device=latents.device)
    subject_weights = None
    if any(weight != 1 for weight in weights):
        subject_weights = torch.tensor([weights], device=latents.device)
    return References(
        latents=latents.unsqueeze(0),
        mask=None if bool(mask.all()) else mask.unsqueeze(0),
        weights=subject_weights,
    )


def _frame_latents(resolved: ResolvedJob, pool: ModelPool) -> Tensor | None:
    """Every picture at the clip's size on white, each a latent frame: (1, C, N, h, w); None without any.

    A subject's weight, 1 as trained, scales its latents, since zeros are what a model of this kind takes for nobody.
    """

    def page_of(picture: Pixels) -> Pixels:
        return place_on_canvas(picture, resolved.width, resolved.height)

    latents = list(_picture_latents(resolved, page_of, pool))
    if not latents:
        return None
    return torch.stack(latents, dim=2)


def _source_latents(resolved: ResolvedJob, pool: ModelPool) -> tuple[Tensor, ...]:
    """Every picture at its own size, each (1, C, 1, h, w).

    A subject's weight scales its latents here, too, which makes a paler picture. The model was trained on nothing else
    of the kind.
    """
    multiple = resolved.preset.size_multiple
    pages = _picture_latents(resolved, lambda own: resize_to_multiple(own, multiple), pool)
    return tuple(latents.unsqueeze(2) for latents in pages)


def _picture_latents(resolved: ResolvedJob, page_of: Callable[[Pixels], Pixels], pool: ModelPool) -> Iterator[Tensor]:
    """Latents (1, C, h, w) of what is made of every picture that is shown, times its subject's weight."""
    preset = resolved.preset
    vae_files = fingerprint(preset.place("vae"))
    for subject in resolved.subjects:
        if not subject.is_shown:
            continue
        for page in map(page_of, subject.pictures):
            key = ("frame", vae_files, _hash_picture(page))
            latents = pool.remembered(key, lambda page=page: _encode_picture(page, preset, pool))
            yield subject.weight * latents


def _encode_picture(page: Pixels, preset: Preset, pool: ModelPool) -> Tensor:
    with pool.at_work("vae", preset) as vae:
        return picture_latents([page], vae)


def _side_latents(resolved: ResolvedJob, frames: Tensor | None, pool: ModelPool) -> Tensor:
    """What VACE's side branch reads where everything is to be made: an even grey video, and a mask that says "all".

    Pictures come first, the last one first of all, as kept content with a mask of zeros.

    Source: `prepare_video_latents` and `prepare_masks` of diffusers' `WanVACEPipeline`, for a clip without a video.
    """
    preset = resolved.preset
    shape = (1, 3, resolved.num_frames, resolved.height, resolved.width)

    def encode_grey() -> Tensor:
        with pool.at_work("vae", preset) as vae, torch.no_grad():
            grey = torch.zeros(shape, device=vae.device, dtype=vae.dtype)
            return normalize(vae.encode(grey, return_dict=False)[0].mode().float(), vae)

    video = pool.remembered(("grey", fingerprint(preset.place("vae")), shape), encode_grey)
    cells: Any = pool.part("vae", preset).config.scale_factor_spatial
    mask = video.new_ones(1, cells**2, *video.shape[2:])
    clip = torch.cat([video, video, mask], 1)
    if frames is None:
        return clip
    kept = frames.flip(2)
    nothing = kept.new_zeros(1, kept.shape[1] + cells**2, *kept.shape[2:])
    return torch.cat([torch.cat([kept, nothing], 1), clip], 2)


def _hash_picture(picture: Pixels) -> str:
    return hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).hexdigest()
