"""What one training step reads, whatever world the samples come from.

In:  tensors of one shard, or several shards of one shape.
Out: `Batch` (samples) and `NullConditioning` (what stands for an empty prompt and no picture).
Knows nothing of how samples are drawn, filmed or encoded, nor of losses.

Shapes: B samples, N subjects, V pictures of each, C latent channels, F latent frames, h x w latent pixels, L text
tokens, T VLM tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

DRAWN = 0.02  # mean square by which a latent pixel has to differ from white paper to show anything


@dataclass(frozen=True)
class Batch:
    """What one training step reads. All tensors share their first dimension."""

    latents: Tensor  # (B, C, F, h, w), normalised
    instance_ids: Tensor  # (B, F, h, w), the slot that holds each latent pixel, 0 for the background
    text: Tensor  # (B, L, text_dim), UMT5's states
    numbers: Tensor  # (B, L), the slot that a word of the caption numbers, 0 for all other words
    references: Tensor  # (B, N, V, C, h, w), normalised
    reference_masks: Tensor  # (B, N, V, h, w), True where a picture shows its subject and not the paper around it
    in_pair: Tensor  # (B, N, V, C, h, w), pictures of the same subjects cut from the clip itself
    in_pair_masks: Tensor  # (B, N, V, h, w)
    vlm: Tensor  # (B, T, vlm_dim), last hidden states
    vlm_mask: Tensor  # (B, T), True where a token counts

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, where: torch.device) -> Batch:
        """The same on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(where) for field in fields(self)})


@dataclass(frozen=True)
class NullConditioning:
    """What stands where nothing is said or shown."""

    text: Tensor  # (1, L, text_dim), UMT5's states of the empty prompt
    white: Tensor  # (C,), the latent of white paper

    @classmethod
    def load(cls, cache: Path, where: torch.device | None = None) -> NullConditioning:
        """Read it from the folder of a cache."""
        return cls(**load_file(cache / "null" / "blank.safetensors", device=str(where or "cpu")))


def cut_from_clip(
    latents: Tensor, instance_ids: Tensor, white: Tensor, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """In-pair references: every subject alone on white, as it is in one frame, moved by up to 3 latent pixels.

    Latents are cut, not pixels, so the VAE has to encode every latent pixel's patch by itself, as the toybox's does.

    Args:
        latents: (B, C, F, h, w). instance_ids: (B, F, h, w), slots.
        white: (C,), the latent of white paper.
        shape: N subjects, and V pictures of each.

    Returns:
        (B, N, V, C, h, w), all V pictures of a subject alike; and where they show it, (B, N, V, h, w).
    """
    (B, C, F, h, w), (N, V) = latents.shape, shape
    frame, reach = int(rng.integers(F)), 3
    top, left = rng.integers(0, 2 * reach + 1, 2)
    held = instance_ids[:, None, frame] == torch.arange(1, N + 1, device=white.device).view(1, N, 1, 1)
    masks = held.new_zeros(B, N, h + 2 * reach, w + 2 * reach)
    masks[..., top : top + h, left : left + w] = held
    pages = white.view(1, 1, C, 1, 1).expand(B, N, C, h + 2 * reach, w + 2 * reach).clone()
    alone = torch.where(held.unsqueeze(2), latents[:, None, :, frame], white.view(1, 1, C, 1, 1))
    pages[..., top : top + h, left : left + w] = alone
    pages = pages[..., reach : reach + h, reach : reach + w].unsqueeze(2).expand(B, N, V, C, h, w)
    masks = masks[..., reach : reach + h, reach : reach + w].unsqueeze(2).expand(B, N, V, h, w)
    return pages, masks


def mask_pictures(references: Tensor, white: Tensor) -> Tensor:
    """Where pictures (B, N, V, C, h, w) differ from white paper, whose latent is (C,): (B, N, V, h, w)."""
    return (references - white.view(-1, 1, 1)).square().mean(3) > DRAWN


Shard = dict[str, Tensor]
"""Tensors of one shape as a cache's file holds them, by their names in `Batch`."""


def take_rows(shard: Shard, rows: np.ndarray) -> Shard:
    """The samples at these row numbers, in this order."""
    index = torch.from_numpy(rows)
    return {name: tensor[index] for name, tensor in shard.items()}


def join_shards(parts: list[Shard], white: Tensor, rng: np.random.Generator) -> Batch:
    """One batch of all samples, in fp32; VLM tokens are padded to the longest sample that counts.

    Args:
        white: (C,), the latent of white paper: where shards do not say themselves where their pictures show a subject,
            or what it looks like cut from the clip, it is found by that.
        rng: which frame of a clip that is cut from.
    """
    longest = max(int(part["vlm_mask"].sum(1).max()) for part in parts)

    def pad_and_widen(tensor: Tensor, name: str) -> Tensor:
        if name in ("vlm", "vlm_mask"):
            short = longest - tensor.shape[1]
            edge: tuple[int, ...] = (0, 0, 0, short)
            if tensor.ndim == 2:
                edge = (0, short)
            tensor = torch.nn.functional.pad(tensor, edge)
        if tensor.is_floating_point():
            return tensor.float()
        return tensor

    whole: Shard = {}
    for name in parts[0]:
        own = [pad_and_widen(part[name], name) for part in parts]
        whole[name] = torch.cat(own)
    pictures = whole["references"]
    if "reference_masks" not in whole:
        whole["reference_masks"] = mask_pictures(pictures, white)
    if "in_pair" not in whole:
        shape = (pictures.shape[1], pictures.shape[2])
        whole["in_pair"], whole["in_pair_masks"] = cut_from_clip(
            whole["latents"], whole["instance_ids"], white, shape, rng
        )
    return Batch(**whole)
