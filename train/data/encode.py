"""Samples as a person has them, encoded for training: clips, masks, captions and pictures -> tensors of one shard.

In:  uint8 frames and pictures, slots of pixels, captions, and the frozen encoders.
Out: the tensors of a shard (`train.data.batch.Shard`); files that `train.data.cache` reads.
Knows nothing of where samples come from, of losses or of optimizers.

Shapes: P samples, F' frames, F latent frames, H x W pixels, h x w latent pixels, L text tokens, T VLM tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from engine.models.encoders import text_states, vlm_states
from engine.models.vae import clip_latents, picture_latents
from train.data.batch import Shard

Pixels = NDArray[np.uint8]
PICTURES_AT_ONCE, FRAMES_AT_ONCE = 32, 68
PAPER = 250  # lighter than this in every colour is white paper


@dataclass(frozen=True)
class Encoders:
    """The frozen parts that turn pictures and words into tensors."""

    vae: AutoencoderKLWan
    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vlm_tokenizer: PreTrainedTokenizerBase
    vlm: Qwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class Sample:
    """One clip with everything that is known of it."""

    frames: Pixels
    """(F', H, W, 3), F' = 4k + 1; one frame is a still."""
    instance_ids: Pixels
    """(F', H, W), the slot that each pixel shows, 0 for the background."""
    caption: str
    """As the model reads it, subjects numbered."""
    pictures: Sequence[Sequence[Pixels]]
    """Of each subject in slot order, squares on white."""


@torch.no_grad()
def encode_samples(samples: Sequence[Sample], encoders: Encoders) -> Shard:
    """Tensors of samples that have as many frames, subjects and pictures as one another; floats in half precision."""
    vae, first = encoders.vae, samples[0]
    shape = (len(samples), len(first.pictures), len(first.pictures[0]))
    pictures = list(chain.from_iterable(chain.from_iterable(sample.pictures for sample in samples)))
    pages = torch.cat([picture_latents(some, vae) for some in _in_groups(pictures, PICTURES_AT_ONCE)])
    at_once = min(PICTURES_AT_ONCE, max(1, FRAMES_AT_ONCE // len(first.frames)))
    clips = [
        clip_latents(torch.from_numpy(np.stack([sample.frames for sample in some])), vae)
        for some in _in_groups(samples, at_once)
    ]
    latents = torch.cat(clips)
    text = text_states([sample.caption for sample in samples], encoders.tokenizer, encoders.text_encoder)
    vlm, vlm_mask = _read_by_vlm(samples, encoders)
    cells = (latents.shape[-2], latents.shape[-1])
    ids = [instance_ids_of_latents(sample.instance_ids, latents.shape[2], cells) for sample in samples]
    shown = np.stack([_shows(picture, (pages.shape[-2], pages.shape[-1])) for picture in pictures])
    return {
        "latents": latents.half(),
        "instance_ids": torch.stack(ids),
        "text": text.half(),
        "numbers": torch.zeros(text.shape[:2], dtype=torch.uint8),
        "references": pages.unflatten(0, shape).half(),
        "reference_masks": torch.from_numpy(shown).unflatten(0, shape),
        "vlm": vlm.half(),
        "vlm_mask": vlm_mask,
    }


def _in_groups(values: Sequence[object], size: int) -> list:
    return [values[first : first + size] for first in range(0, len(values), size)]


def _read_by_vlm(samples: Sequence[Sample], encoders: Encoders) -> tuple[Tensor, Tensor]:
    """States of caption and pictures (P, T, vlm_dim), padded to the longest, and which of them count (P, T)."""
    seen = []
    for some in _in_groups(samples, PICTURES_AT_ONCE):
        captions, pictures = [sample.caption for sample in some], [sample.pictures for sample in some]
        seen.append(vlm_states(captions, pictures, encoders.vlm_tokenizer, encoders.vlm))
    longest = max(states.shape[1] for states, _ in seen)
    states = [torch.nn.functional.pad(own, (0, 0, 0, longest - own.shape[1])) for own, _ in seen]
    masks = [torch.nn.functional.pad(there, (0, longest - there.shape[1])) for _, there in seen]
    return torch.cat(states), torch.cat(masks)


def instance_ids_of_latents(instance_ids: Pixels, frames: int, cells: tuple[int, int]) -> Tensor:
    """(F', H, W) slots of pixels -> (F, h, w): the subject that fills most of a latent cell's last frame.

    A cell is background only where it shows no subject at all. Latent frame 0 is pixel frame 0; with time compressed
    k times, latent frame i covers pixel frames up to ki.
    """
    last = instance_ids
    if frames > 1:
        last = instance_ids[:: max(1, (len(instance_ids) - 1) // (frames - 1))]
    blocks = _cells_of(last, cells)
    counts = np.stack([(blocks == slot).sum(-1) for slot in range(1, max(1, int(instance_ids.max())) + 1)])
    return torch.from_numpy(np.where(counts.max(0) > 0, counts.argmax(0) + 1, 0).astype(np.uint8))


def _shows(picture: Pixels, cells: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W, 3) -> (h, w): which latent cells of a picture show anything but white paper."""
    drawn: Any = picture.min(-1) < PAPER
    cells_shown: Any = _cells_of(drawn[None], cells).any(-1)
    return cells_shown[0]


def _cells_of(pixels: NDArray, cells: tuple[int, int]) -> NDArray:
    """(F, H, W) -> (F, h, w, pixels of a cell)."""
    (F, H, W), (h, w) = pixels.shape, cells
    blocks = pixels.reshape(F, h, H // h, w, W // w).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(F, h, w, -1)


def write_null(folder: Path, encoders: Encoders, *, pixels: int, mark: str = "") -> None:
    """What stands for an empty prompt and no picture, beside the shards of a cache.

    Args:
        pixels: side of the white page that is encoded; its middle is the latent of white paper.
        mark: tells apart what several processes write at once.
    """
    null = folder / "null"
    null.mkdir(parents=True, exist_ok=True)
    paper = picture_latents([np.full((pixels, pixels, 3), 255, np.uint8)], encoders.vae)
    middle = paper.shape[-1] // 2
    text = text_states([""], encoders.tokenizer, encoders.text_encoder)
    fresh = null / f"blank.{mark}.new"
    save_file({"text": text.detach().contiguous(), "white": paper[0, :, middle, middle].contiguous()}, fresh)
    fresh.replace(null / "blank.safetensors")


def write_shard(path: Path, shard: Shard) -> None:
    """One shard, written whole or not at all."""
    fresh = path.with_suffix(".new")
    save_file({name: tensor.contiguous() for name, tensor in shard.items()}, fresh)
    fresh.replace(path)
