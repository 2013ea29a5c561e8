"""Prompt and pictures in the model's terms: UMT5 states, VLM states, reference latents.

In:  text, prepared pictures (uint8 squares on white), and the loaded encoders; or a whole job and a model pool.
Out: tensors on the encoder's device, fp32. Training calls the same functions on batches.
Knows nothing of the transformer, of schedules or of clips.

Shapes: B texts, L text tokens, T VLM tokens, P pictures, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.conditioning import Encoded
from engine.job import MENTION, GenerateJob, Subject
from engine.load import ModelPool, fingerprint
from engine.pictures import Pixels, at_own_size, on_canvas, prepare_subject
from engine.presets import Preset
from engine.subject_tower import References

MAX_TEXT_TOKENS = 512  # Wan's; a tokenizer with a smaller `model_max_length` lowers it
# What Bernini's prompts begin with: `SYSTEM_PROMPTS` of bernini/prompt_enhancer.py, bytedance/Bernini 8c805a5.
BERNINI = "You are a helpful assistant specialized in {}-to-video generation."
PICTURE_TOKENS = 64  # most tokens of one picture in the VLM; more cost attention in every step and say little


# --- how a mention is written for the model -------------------------------------------------------------------------


def render(prompt: str, subjects: Sequence[Subject], mention: Literal["slot", "noun", "image"]) -> str:
    """The prompt as the model was taught to read it.

    Args:
        prompt: with @names; every name belongs to one of the subjects (`engine.job` sees to that).
        subjects: in slot order; the first one is subject 1.
        mention: "slot" writes "subject 2, a red fox," the first time and "subject 2" after that (ID-Crafter, toybox);
            "noun" writes "a red fox", then "the red fox" (Phantom, VACE); "image" writes "the red fox from image0",
            with the numbers of its pictures among all that are shown (Bernini).
    """
    numbers = {subject.name: number for number, subject in enumerate(subjects, start=1)}
    images = itertools.count()
    shown = {s.name: [f"image{next(images)}" for _ in s.pictures] if s.weight > 0 else [] for s in subjects}
    said: set[str] = set()
    pieces, end = [], 0
    for match in MENTION.finditer(prompt):
        name = match[1].lower()
        noun = noun_phrase(subjects[numbers[name] - 1])
        known = noun if with_article(noun) == noun else f"the {noun}"
        first = name not in said
        said.add(name)
        if mention == "noun":
            words = with_article(noun) if first else known
        elif mention == "image":
            sources = " and ".join(shown[name])
            words = f"{known} from {sources}" if sources else known
        else:
            words = f"subject {numbers[name]}"
            if first:
                # The comma that closes the apposition, unless the sentence brings one or stops here.
                follows = prompt[match.end() :].lstrip()[:1]
                words += f", {with_article(noun)}" + ("," if follows.isalnum() or follows == "@" else "")
        pieces += [prompt[end : match.start()], words]
        end = match.end()
    return " ".join(("".join(pieces) + prompt[end:]).split())


def render_job(job: GenerateJob, preset: Preset) -> str:
    """The job's prompt as its preset's encoders read it."""
    prompt = render(job.prompt, job.subjects, preset.mention)
    if preset.conditioning != "sources":
        return prompt
    return BERNINI.format("subject" if any(subject.weight > 0 for subject in job.subjects) else "text") + prompt


def noun_phrase(subject: Subject) -> str:
    """What a subject is, in words: its noun, or its name."""
    return subject.noun.strip() or subject.name.replace("_", " ")


def with_article(words: str) -> str:
    """ "a fox", "an orange fox"; nothing is added where an article or a possessive already stands."""
    if words.split()[0].lower() in {"a", "an", "the", "my", "our", "his", "her", "their", "some"}:
        return words
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


# --- UMT5 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_states(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel) -> Tensor:
    """UMT5's states of B texts, zero behind each text's end: (B, L, text_dim), fp32.

    L is the tokenizer's `model_max_length`, at most 512: Wan attends to the zeros too, so the length is a part of
    what it was trained on.
    """
    length = min(MAX_TEXT_TOKENS, tokenizer.model_max_length)
    words = tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    numbers, mask = words["input_ids"].to(encoder.device), words["attention_mask"].to(encoder.device)
    states = encoder(numbers, mask).last_hidden_state.float()
    return states * mask.unsqueeze(-1)


# --- Qwen2.5-VL -----------------------------------------------------------------------------------------------------


def vlm_turn(prompt: str, picture_tokens: Sequence[Sequence[int]]) -> str:
    """The user's turn as text: every subject's pictures behind its number, then the prompt.

    Args:
        prompt: rendered.
        picture_tokens: for each subject, how many tokens each of its pictures takes.
    """
    shown = ""
    for number, counts in enumerate(picture_tokens, start=1):
        marks = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
        shown += f"subject {number}: {marks}\n"
    return f"<|im_start|>user\n{shown}{prompt}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def vlm_states(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Sequence[Pixels]]],
    tokenizer: PreTrainedTokenizerBase,
    vlm: Qwen2_5_VLForConditionalGeneration,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the VLM after reading prompts and pictures (R6: prompt and all references at once).

    Args:
        prompts: B rendered prompts.
        pictures: for each prompt, for each subject, its pictures; an empty list where there is none.

    Returns:
        States (B, T, vlm_dim), fp32, and a mask (B, T) that is True where a token is no padding.
    """
    inputs = vlm_inputs(prompts, pictures, tokenizer, vlm)
    states = vlm.model(**inputs).last_hidden_state.float()
    return states, inputs["attention_mask"].bool()


def vlm_inputs(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Sequence[Pixels]]],
    tokenizer: PreTrainedTokenizerBase,
    vlm: Qwen2_5_VLForConditionalGeneration,
) -> dict[str, Tensor]:
    """What the VLM takes: input_ids, attention_mask, mm_token_type_ids, and the pictures' patches when there are any.

    transformers' own processor needs torchvision, which does not exist for every torch build; this is the tokenizer,
    the picture processor and the expansion of `<|image_pad|>` in ten lines.
    """
    flat = [picture for subjects in pictures for subject in subjects for picture in subject]
    patches: dict[str, Any] = {}
    counts: list[int] = []
    if flat:
        processor = picture_processor(vlm)
        patches = dict(processor(images=flat, return_tensors="pt"))
        counts = (patches["image_grid_thw"].prod(dim=-1) // processor.merge_size**2).tolist()
    each = iter(counts)
    turns = [
        vlm_turn(prompt, [[next(each) for _ in subject] for subject in subjects])
        for prompt, subjects in zip(prompts, pictures, strict=True)
    ]
    words = tokenizer(turns, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    numbers = words["input_ids"]
    inputs = {
        "input_ids": numbers,
        "attention_mask": words["attention_mask"],
        "mm_token_type_ids": (numbers == vlm.config.image_token_id).int(),
        **patches,
    }
    return {name: value.to(vlm.device) for name, value in inputs.items()}


def picture_processor(vlm: Qwen2_5_VLForConditionalGeneration) -> Qwen2VLImageProcessorPil:
    """Cuts pictures into this VLM's patches, at most 64 tokens a picture."""
    vision: Any = vlm.config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": token, "longest_edge": PICTURE_TOKENS * token},
    )


# --- the VAE --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def picture_latents(pictures: Sequence[Pixels], vae: AutoencoderKLWan) -> Tensor:
    """Normalised latents of P still pictures of one size: (P, C, h, w), fp32. Each is a video of one frame."""
    frames = torch.from_numpy(np.stack(pictures)).to(vae.device).permute(0, 3, 1, 2).unsqueeze(2)
    return _encoded(frames, vae).squeeze(2)


@torch.no_grad()
def clip_latents(frames_BFHW3: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """Normalised latents of B clips of uint8 frames (B, F, H, W, 3), F = 4k + 1: (B, C, k + 1, h, w), fp32."""
    return _encoded(frames_BFHW3.to(vae.device).permute(0, 4, 1, 2, 3), vae)


def _encoded(levels_B3FHW: Tensor, vae: AutoencoderKLWan) -> Tensor:
    posterior: Any = vae.encode(to_vae_range(levels_B3FHW).to(vae.dtype), return_dict=False)[0]
    return normalize(posterior.mode().float(), vae)


def to_vae_range(pixels: Tensor) -> Tensor:
    """uint8 levels -> [-1, 1], the range of the VAE."""
    return pixels.float() / 127.5 - 1


def normalize(latents: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The VAE's latents -> about zero mean and unit spread, by the statistics in its config; (P, C, F, h, w)."""
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each latent channel, (1, C, 1, 1, 1)."""
    config: Any = vae.config
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=like.device).view(shape)
    std = torch.tensor(config.latents_std, dtype=torch.float32, device=like.device).view(shape)
    return mean, std


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
