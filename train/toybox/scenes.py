"""Toybox scenes encoded ahead of training: latents, text states and VLM states, written as shards.

In:  the drawn world and the frozen VAE, UMT5 and Qwen2.5-VL of a folder.
Out: shards `<folder>/<kind>-<number>.safetensors`, each of one shape, which `train.data.cache` reads.
Knows nothing of losses or optimizers.

Shapes: N subjects, V pictures of each, C latent channels, F latent frames, h x w latent pixels, L text tokens,
T VLM tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from engine.models.encoders import text_states, vlm_states
from engine.models.vae import clip_latents, picture_latents
from train.distributed import ProcessGroup
from train.runs.metrics import MetricsLog
from train.toybox import world
from train.toybox.text import load_tokenizer, slots_of_words
from train.toybox.vae import stills

SHARD = {"still": 256, "clip": 96}

CLIP_SHARE = 2  # every second shard holds clips

FIRST_SCENE = 2_000_000  # earlier ones taught the readers of words


@dataclass(frozen=True)
class Encoders:
    """The frozen parts that turn pictures and words into tensors."""

    vae: AutoencoderKLWan
    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vlm_tokenizer: PreTrainedTokenizerBase
    vlm: Qwen2_5_VLForConditionalGeneration

    @classmethod
    def load(cls, folder: Path) -> Encoders:
        """Read them from a folder in the layout of assets/toybox, in fp32."""
        return cls(
            AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval(),
            load_tokenizer(folder / "tokenizer"),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            load_tokenizer(folder / "vlm_tokenizer"),
            Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "vlm", dtype=torch.float32).eval(),
        )


@dataclass(frozen=True)
class Format:
    """What clips a cache holds: square frames of so many pixels, so many of them."""

    pixels: int = 64
    num_frames: int = 17


def shape_of_shard(number: int) -> tuple[str, int, int]:
    """Kind, subjects and pictures of each. Half of the samples have three or four subjects, which are the hardest."""
    rng = np.random.default_rng((41, number))
    kind = "still"
    if number % CLIP_SHARE == CLIP_SHARE - 1:
        kind = "clip"
    subjects = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.3, 0.25, 0.25]))
    pictures = 1
    if subjects < 3 and rng.random() < 0.2:
        pictures = 2
    return kind, subjects, pictures


def scene_of(number: int, row: int) -> world.Scene:
    """The scene of one row of a shard."""
    _, subjects, _ = shape_of_shard(number)
    return world.make_scene(FIRST_SCENE + number * 1000 + row, num_subjects=subjects)


def _references(scene: world.Scene, pictures: int, rng: np.random.Generator, pixels: int) -> list[list[np.ndarray]]:
    """Cross-pair references: other pose, size and light than the scene's, mostly cut out on white."""

    def draw_picture(subject: world.ToySubject) -> np.ndarray:
        background = "scene"
        if rng.random() < 0.88:
            background = "white"
        return world.reference_picture(subject, int(rng.integers(2**28)), size=pixels, background=background)[0]

    references = []
    for subject in scene.subjects:
        references.append([draw_picture(subject) for _ in range(pictures)])
    return references


def _instance_ids_of_latents(instance_ids: np.ndarray, frames: int, cells: int) -> Tensor:
    """(F', H, W) instance ids of pixels -> (F, h, w): the subject that fills most of a latent cell's last frame.

    A cell is background only where it shows no subject at all. Latent frame 0 is pixel frame 0; with time compressed
    k times, latent frame i covers pixel frames up to ki.
    """
    side = instance_ids.shape[-1] // cells
    last = instance_ids
    if frames > 1:
        last = instance_ids[:: max(1, (len(instance_ids) - 1) // (frames - 1))]
    blocks = last.reshape(frames, cells, side, cells, side).transpose(0, 1, 3, 2, 4).reshape(frames, cells, cells, -1)
    counts = np.stack([(blocks == slot).sum(-1) for slot in range(1, world.MAX_SUBJECTS + 1)])
    return torch.from_numpy(np.where(counts.max(0) > 0, counts.argmax(0) + 1, 0).astype(np.uint8))


@torch.no_grad()
def make_shard(number: int, encoders: Encoders, form: Format = Format()) -> dict[str, Tensor]:
    """Draw and encode one shard; the same number gives the same shard."""
    kind, subjects, pictures = shape_of_shard(number)
    rng = np.random.default_rng((43, number))
    num_frames, clips_at_once = 1, 32
    if kind == "clip":
        num_frames, clips_at_once = form.num_frames, 4
    clips, captions, references = [], [], []
    for i in range(SHARD[kind]):
        scene = scene_of(number, i)
        clips.append(world.render(scene, form.pixels, num_frames=num_frames))
        captions.append(clips[-1].caption)
        references.append(_references(scene, pictures, rng, form.pixels))
    vae = encoders.vae
    with stills(vae):
        flat = list(chain.from_iterable(chain.from_iterable(references)))
        pages = [picture_latents(flat[i : i + 32], vae) for i in range(0, len(flat), 32)]
        parts = []
        for first in range(0, len(clips), clips_at_once):
            frames = np.stack([clip.frames for clip in clips[first : first + clips_at_once]])
            parts.append(clip_latents(torch.from_numpy(frames), vae))
        latents = torch.cat(parts)
    shape = (len(clips), subjects, pictures)
    cells = latents.shape[-1]
    text = text_states(captions, encoders.tokenizer, encoders.text_encoder)
    seen = [
        vlm_states(captions[i : i + 32], references[i : i + 32], encoders.vlm_tokenizer, encoders.vlm)
        for i in range(0, len(clips), 32)
    ]
    longest = max(states.shape[1] for states, _ in seen)
    vlm = [torch.nn.functional.pad(states, (0, 0, 0, longest - states.shape[1])) for states, _ in seen]
    mask = [torch.nn.functional.pad(there, (0, longest - there.shape[1])) for _, there in seen]
    return {
        "latents": latents.half(),
        "instance_ids": torch.stack([_instance_ids_of_latents(c.instance_ids, latents.shape[2], cells) for c in clips]),
        "text": text.half(),
        "numbers": _slots_of_captions(captions, text.shape[1], encoders.tokenizer),
        "references": torch.cat(pages).unflatten(0, shape).half(),
        "vlm": torch.cat(vlm).half(),
        "vlm_mask": torch.cat(mask),
    }


def _slots_of_captions(captions: list[str], length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(B, L): which subject each word of a caption numbers."""
    words = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return slots_of_words(words["input_ids"], tokenizer).to(torch.uint8)


def write_cache(folder: Path, encoders: Encoders, *, shards: int, seconds: float, form: Format = Format()) -> bool:
    """Write shards that are not there yet, up to `shards`; True once all are. A team shares them out."""
    team = ProcessGroup()
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(team.rank, shards, team.size)
    have = sum(any(folder.glob(f"*-{number:05d}.safetensors")) for number in mine)
    meter, until = MetricsLog("cache", len(mine), folder, start=have), time.monotonic() + seconds
    for number in mine:
        kind = shape_of_shard(number)[0]
        path = folder / f"{kind}-{number:05d}.safetensors"
        if path.exists():
            continue
        if time.monotonic() > until:
            return False
        fresh = path.with_suffix(".new")
        save_file({key: tensor.contiguous() for key, tensor in make_shard(number, encoders, form).items()}, fresh)
        fresh.replace(path)
        have += 1
        meter.tick(have, {})
    return True
