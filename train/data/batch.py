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


@dataclass(frozen=True)
class Batch:
    """What one training step reads. All tensors share their first dimension."""

    latents: Tensor  # (B, C, F, h, w), normalised
    instance_ids: Tensor  # (B, F, h, w), the slot that holds each latent pixel, 0 for the background
    text: Tensor  # (B, L, text_dim), UMT5's states
    numbers: Tensor  # (B, L), the slot that a word of the caption numbers, 0 for all other words
    references: Tensor  # (B, N, V, C, h, w), normalised
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


def cut_from_clip(batch: Batch, white: Tensor, rng: np.random.Generator) -> Tensor:
    """In-pair references: every subject alone on white, as it is in one frame, moved by up to 3 latent pixels.

    Latents are cut, not pixels, so the VAE has to encode every latent pixel's patch by itself, as the toybox's does.

    Returns:
        (B, N, V, C, h, w), all V pictures of a subject alike.
    """
    B, N, V, C, h, w = batch.references.shape
    frame, reach = int(rng.integers(batch.latents.shape[2])), 3
    paper = white.view(1, 1, C, 1, 1).expand(B, N, C, h + 2 * reach, w + 2 * reach).clone()
    held = batch.instance_ids[:, None, frame] == torch.arange(1, N + 1, device=white.device).view(1, N, 1, 1)
    alone = torch.where(held.unsqueeze(2), batch.latents[:, None, :, frame], white.view(1, 1, C, 1, 1))
    top, left = rng.integers(0, 2 * reach + 1, 2)
    paper[..., top : top + h, left : left + w] = alone
    return paper[..., reach : reach + h, reach : reach + w].unsqueeze(2).expand(B, N, V, C, h, w)


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """The samples at these row numbers, in this order."""
    index = torch.from_numpy(rows)
    return Batch(**{field.name: getattr(batch, field.name)[index] for field in fields(batch)})


def join_batches(parts: list[Batch]) -> Batch:
    """One batch of all samples, in fp32; VLM tokens are padded to the longest sample that counts."""
    longest = max(int(part.vlm_mask.sum(1).max()) for part in parts)

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

    names = [field.name for field in fields(Batch)]
    whole = {}
    for name in names:
        own = [pad_and_widen(getattr(part, name), name) for part in parts]
        whole[name] = torch.cat(own)
    return Batch(**whole)
