"""The loss of one training step: noise levels, known regions, dropped conditions, weighted error, attention losses.

In:  a batch, a model and the run's config.
Out: a scalar to differentiate, and its parts as numbers for the log.
Knows nothing of optimizers, files or the toybox.

Shapes: B samples, C latent channels, F latent frames, h x w latent pixels, N subjects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.diffusion.solvers import add_noise, shifted, starting_noise, unshifted
from engine.models.subject_tower import References
from train.data.batch import Batch, NullConditioning, cut_from_clip
from train.sft.attention_losses import (
    RecordedAttention,
    counterparts,
    record_attention,
    region_alignment_loss,
    slot_alignment_loss,
    token_instance_ids,
    word_alignment_loss,
)
from train.sft.config import Kind, SftConfig

COARSE = 4  # latent pixels; two video tokens


def noise_levels(
    count: int, shift: float, generator: torch.Generator, final_sigma: float = 0.0, below: float = 0.1
) -> Tensor:
    """Logit-normal noise levels, shifted, (B,) in (0, 1).

    Args:
        final_sigma: where above 0, at most the share `below` of the levels lies under it; the others follow the same
            distribution above it.
    """
    drawn = torch.randn(count, generator=generator, device=generator.device)
    if final_sigma > 0:
        normal = torch.distributions.Normal(0.0, 1.0)
        start = unshifted(final_sigma, shift)
        under = normal.cdf(torch.tensor(start / (1 - start)).log()).item()  # share of the levels below final_sigma
        kept = min(below, under)
        share = normal.cdf(drawn)  # uniform; its first part is narrowed, the rest stretched
        low, high = share * (under / kept if kept else 0.0), 1 - (1 - share) * (1 - under) / (1 - kept)
        drawn = normal.icdf(torch.where(share < kept, low, high).clamp(1e-6, 1 - 1e-6))
    return shifted(torch.sigmoid(drawn), shift)


def surroundings(instance_ids: Tensor, patch: int, rng: np.random.Generator) -> Tensor:
    """Where a clip is to be made anew: one subject's patches over all frames, a patch wider on every side.

    Args:
        instance_ids: (B, F, h, w), slots.

    Returns:
        (B, F, h / patch, w / patch), True inside.
    """
    slots = [_draw_slot(clip, rng) for clip in instance_ids.cpu().numpy()]
    held = (instance_ids == torch.tensor(slots, device=instance_ids.device).view(-1, 1, 1, 1)).float()
    coarse = nn.functional.max_pool2d(held, patch)
    return nn.functional.max_pool2d(coarse, 3, stride=1, padding=1) > 0


def _draw_slot(clip: np.ndarray, rng: np.random.Generator) -> int:
    """One of the slots that a clip shows, at random; 0 where it shows no subject."""
    slots = np.unique(clip[clip > 0])
    if len(slots) == 0:
        return 0
    return int(rng.choice(slots))


@contextmanager
def at_moments(model: Any, moments: Tensor, frames: int) -> Iterator[None]:
    """Inside, a clip of M frames is taken for those `moments` (M,) of one of `frames` frames."""

    def whole(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :, :1].expand(-1, -1, frames, -1, -1),)

    def chosen(module: nn.Module, inputs: tuple[Tensor], output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(chosen(module, inputs, each) for each in output)
        return output.unflatten(1, (frames, -1))[:, moments].flatten(1, 2)

    places = [model.rope, getattr(model, "video_position_embedding", None)]
    handles = []
    for module in places:
        if module is not None:
            handles.append(module.register_forward_pre_hook(whole))
            handles.append(module.register_forward_hook(chosen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditions(
    batch: Batch, config: SftConfig, blank: NullConditioning, generator: torch.Generator, in_pair: float = 0.0
) -> tuple[Tensor, Any]:
    """UMT5 states and `References` of a batch after condition dropout: text .1, subjects .1, both .1."""
    roll = torch.rand(len(batch), generator=generator, device=generator.device)
    no_text = roll < config.drop_text + config.drop_both
    no_subjects = (roll >= config.drop_text) & (roll < config.drop_text + config.drop_both + config.drop_subjects)
    text = torch.where(no_text.view(-1, 1, 1), blank.text, batch.text)
    if config.kind == "base":
        return text, None
    there = (~no_subjects).view(-1, 1, 1).expand(batch.references.shape[:3])
    heard = batch.vlm_mask & ~(no_text | no_subjects).unsqueeze(1)
    pictures = batch.references
    if in_pair > 0:
        same = torch.rand(len(batch), generator=generator, device=generator.device) < in_pair
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
        pictures = torch.where(same.view(-1, 1, 1, 1, 1, 1), cut_from_clip(batch, blank.white, rng), pictures)
    return text, References(pictures, there, vlm_states=batch.vlm, vlm_mask=heard)


def loss_at(
    model: Any, batch: Batch, config: SftConfig, blank: NullConditioning, place: tuple[int, ...], sparse: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, v = noise - x_0, mean of |v_model - v|^2 over what has to be made.

    Reading two subjects costs as much as the frame they are in, so each sample meets several levels at once.
    `place` is the update, and whatever tells this batch from others of it; it seeds noise and dropout. `sparse`: of
    clips, only some moments.

    Returns:
        The loss, and its parts as numbers.
    """
    rng = np.random.default_rng((config.seed, *place, 1))
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))
    in_pair = config.in_pair * max(0.0, 1 - 2 * place[0] / config.steps)
    text, references = conditions(batch, config, blank, generator, in_pair)
    identity = None if references is None else model.encode_identity(references)

    frames = batch.latents.shape[2]
    moving, placed = frames > 1, nullcontext()
    if sparse:
        moments = _draw_moments(frames, config.sparse_frames, generator)
        batch = replace(batch, latents=batch.latents[:, :, moments], instance_ids=batch.instance_ids[:, moments])
        placed = at_moments(model, moments, frames)
    repeats, shift, shared_noise = _noise_settings(config, moving=moving, sparse=sparse)
    clean, instance_ids, text = (
        each.repeat_interleave(repeats, 0) for each in (batch.latents, batch.instance_ids, text)
    )
    t = noise_levels(len(clean), shift, generator, config.final_sigma, config.below_final)
    noise = starting_noise(tuple(clean.shape), generator, shared_noise)
    noisy, target = add_noise(clean, noise, t)
    weight = 1 + config.subject_weight * (instance_ids > 0).float().unsqueeze(1)
    timestep = t * 1000
    patch = int(config.architecture.get("patch_size", (1, 2, 2))[-1])
    if moving and rng.random() < config.known_region:
        made = surroundings(instance_ids, patch, rng)
        timestep = (timestep.view(-1, 1, 1, 1) * made).flatten(1)
        wide = made.float().repeat_interleave(patch, -1).repeat_interleave(patch, -2).unsqueeze(1)
        noisy = torch.where(wide > 0, noisy, clean)
        weight = weight * wide
    if identity is None or references is None:
        with placed:
            predicted = model(noisy, timestep, text, return_dict=False)[0]
        looks = names = reads = predicted.new_zeros(())
    else:
        repeated = identity.repeat_interleave(repeats)
        with record_attention(model) as seen, placed:
            predicted = model(noisy, timestep, text, return_dict=False, identity=repeated)[0]
        looks = names = predicted.new_zeros(())
        if repeated.num_subject_tokens:
            looks, names = _alignment_losses(seen, batch, references, blank, patch)
        without_text = (text == blank.text).flatten(1).all(1, keepdim=True)
        asked = torch.where(without_text, 0, token_instance_ids(instance_ids, patch))
        reads = word_alignment_loss(seen, asked, batch.numbers.repeat_interleave(repeats, 0))
    error = weighted_error(predicted - target, weight, config.motion_weight)
    parts = {"error": error, "looks": looks, "names": names, "reads": reads}
    whole = error + config.subject_alignment * (looks + names) + config.caption_alignment * reads
    return whole, {name: part.item() for name, part in parts.items()}


def _draw_moments(frames: int, count: int, generator: torch.Generator) -> Tensor:
    """The first frame, the last, and random ones between them: `count` frame numbers of `frames`, sorted.

    Wan's positions are relative: without both ends no frame could tell which moment it is.
    """
    between = 1 + torch.randperm(frames - 2, generator=generator, device=generator.device)
    ends = between.new_tensor([0, frames - 1])
    return torch.cat([ends, between[: count - 2]]).sort().values


def _noise_settings(config: SftConfig, *, moving: bool, sparse: bool) -> tuple[int, float, float]:
    """Noise levels of each sample, their shift, and the share of noise that its frames have in common."""
    if not moving:
        return config.timesteps_per_sample, config.shift, 0.0
    if sparse:
        return config.timesteps_per_clip, config.sparse_shift, config.shared_noise
    return config.timesteps_per_clip, config.clip_shift, config.shared_noise


def weighted_error(missed: Tensor, weight: Tensor, motion_weight: float) -> Tensor:
    """Mean square of what a prediction missed, with more weight on what differs between frames, seen coarsely.

    What is asked for stays the same, the mean of all that fits: each part of the error is least there by itself. Fine
    detail cannot be foretold from words and drowns what can; in means of COARSE x COARSE latent pixels it is quiet.

    Args:
        missed: (B, C, F, h, w). weight: (B, 1, F, h, w), of the places; 0 where nothing is asked.
    """
    channels = missed.shape[1]
    error = (missed.square() * weight).sum() / (weight.sum() * channels).clamp(min=1)
    if motion_weight == 0 or missed.shape[2] == 1:
        return error
    asked = (weight > 0).to(missed.dtype)
    mean = (missed * asked).sum(2, keepdim=True) / asked.sum(2, keepdim=True).clamp(min=1)
    moving, share = (_coarse(each) for each in ((missed - mean) * asked, weight))
    # A mean of n numbers that have nothing in common is n times quieter; those that move together are not.
    moved = COARSE**2 * (moving.square() * share).sum() / (share.sum() * channels).clamp(min=1e-6)
    return error + motion_weight * moved


def _coarse(values: Tensor) -> Tensor:
    """Means over squares of COARSE latent pixels: (B, C, F, h, w) -> (B, C, F, h', w')."""
    flat = nn.functional.avg_pool2d(values.flatten(0, 1), COARSE, ceil_mode=True)
    return flat.unflatten(0, values.shape[:2])


def _alignment_losses(
    seen: RecordedAttention, batch: Batch, references: References, blank: NullConditioning, patch: int
) -> tuple[Tensor, Tensor]:
    """Region and slot alignment losses of a batch.

    Samples without subjects are left out, and so is the background of samples without a VLM.
    """
    assert references.latents is not None and references.mask is not None and references.vlm_mask is not None
    there, heard = (mask.flatten(1).any(1, keepdim=True) for mask in (references.mask, references.vlm_mask))
    instance_ids = token_instance_ids(batch.instance_ids, patch)
    asked = torch.where(there & (heard | (instance_ids > 0)), instance_ids, -1)
    near = counterparts(batch.latents, batch.instance_ids, references.latents, blank.white, patch)
    repeats = len(seen.pictures[0][1]) // len(batch)
    asked, near = (each.repeat_interleave(repeats, 0) for each in (asked, near))
    return region_alignment_loss(seen, asked, near), slot_alignment_loss(seen, asked, references.latents.shape[1])


def kind_at(step: int, config: SftConfig) -> Kind:
    """Whether an update takes stills, clips, or some moments of clips; each share is spread evenly."""

    def turn(number: int, share: float) -> bool:
        return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)

    if not turn(step, config.clip_share):
        return "still"
    clips_so_far = int(step * config.clip_share + 1e-9)
    if turn(clips_so_far, config.sparse_share):
        return "sparse"
    return "clip"
