"""Training data cached ahead: scenes become latents, words become states, once; training only reads tensors.

In:  the drawn world and the frozen VAE, UMT5 and Qwen2.5-VL of a folder.
Out: shards `<folder>/<kind>-<number>.safetensors`, each of one shape; `Cache` holds them in memory and deals batches.
Knows nothing of losses or optimisers.

Shapes: B samples, N subjects, V pictures of each, C latent channels, F latent frames, h x w latent pixels, L text
tokens, T VLM tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from engine import encode
from train import world
from train.checkpoint import Meter
from train.team import Team
from train.text import asked, load_tokenizer
from train.vae import stills

SHARD = {"still": 256, "clip": 96}
CLIP_SHARE = 4  # every fourth shard holds clips
MIXED = 240  # later ones all do
FIRST_SCENE = 2_000_000  # earlier ones taught the readers of words


@dataclass(frozen=True)
class Batch:
    """What one training step reads. All tensors share their first dimension."""

    latents: Tensor  # (B, C, F, h, w), normalised
    owner: Tensor  # (B, F, h, w), the slot that holds each latent pixel, 0 for the background
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
class Blank:
    """What stands where nothing is said or shown."""

    text: Tensor  # (1, L, text_dim), UMT5's states of the empty prompt
    white: Tensor  # (C,), the latent of white paper

    @classmethod
    def load(cls, cache: Path, where: torch.device | None = None) -> Blank:
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
    held = batch.owner[:, None, frame] == torch.arange(1, N + 1, device=white.device).view(1, N, 1, 1)
    alone = torch.where(held.unsqueeze(2), batch.latents[:, None, :, frame], white.view(1, 1, C, 1, 1))
    top, left = rng.integers(0, 2 * reach + 1, 2)
    paper[..., top : top + h, left : left + w] = alone
    return paper[..., reach : reach + h, reach : reach + w].unsqueeze(2).expand(B, N, V, C, h, w)


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
    num_frames: int = 9


def shape_of_shard(number: int) -> tuple[str, int, int]:
    """Kind, subjects and pictures of each: cut so that two subjects with one picture are most common."""
    rng = np.random.default_rng((41, number))
    kind = "clip" if number % CLIP_SHARE == CLIP_SHARE - 1 or number >= MIXED else "still"
    subjects = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.42, 0.18, 0.1]))
    pictures = 2 if subjects < 3 and rng.random() < 0.2 else 1
    return kind, subjects, pictures


def _references(scene: world.Scene, pictures: int, rng: np.random.Generator, pixels: int) -> list[list[np.ndarray]]:
    """Cross-pair references: other pose, size and light than the scene's, mostly cut out on white."""

    def one(subject: world.ToySubject) -> np.ndarray:
        back = "white" if rng.random() < 0.88 else "scene"
        return world.reference_picture(subject, int(rng.integers(2**28)), size=pixels, background=back)[0]

    return [[one(subject) for _ in range(pictures)] for subject in scene.subjects]


def _owner_of_latents(owner: np.ndarray, frames: int, cells: int) -> Tensor:
    """(F', H, W) pixel owners -> (F, h, w): whoever fills most of a latent cell's last frame, background only if alone.

    Latent frame 0 is pixel frame 0; with time compressed k times, latent frame i covers pixel frames up to ki.
    """
    side = owner.shape[-1] // cells
    last = owner[:: max(1, (len(owner) - 1) // max(1, frames - 1))] if frames > 1 else owner
    blocks = last.reshape(frames, cells, side, cells, side).transpose(0, 1, 3, 2, 4).reshape(frames, cells, cells, -1)
    counts = np.stack([(blocks == slot).sum(-1) for slot in range(1, world.MAX_SUBJECTS + 1)])
    return torch.from_numpy(np.where(counts.max(0) > 0, counts.argmax(0) + 1, 0).astype(np.uint8))


@torch.no_grad()
def make_shard(number: int, encoders: Encoders, form: Format = Format()) -> dict[str, Tensor]:
    """Draw and encode one shard; the same number gives the same shard."""
    kind, subjects, pictures = shape_of_shard(number)
    rng = np.random.default_rng((43, number))
    clips, captions, references = [], [], []
    for i in range(SHARD[kind]):
        scene = world.make_scene(FIRST_SCENE + number * 1000 + i, num_subjects=subjects)
        clips.append(world.render(scene, form.pixels, num_frames=form.num_frames if kind == "clip" else 1))
        captions.append(clips[-1].caption)
        references.append(_references(scene, pictures, rng, form.pixels))
    vae = encoders.vae
    with stills(vae):
        flat = [p for row in references for subject in row for p in subject]
        pages = [encode.picture_latents(flat[i : i + 32], vae) for i in range(0, len(flat), 32)]
        step = 4 if kind == "clip" else 32
        frames = [
            torch.from_numpy(np.stack([c.frames for c in clips[i : i + step]])) for i in range(0, len(clips), step)
        ]
        latents = torch.cat([encode.clip_latents(part, vae) for part in frames])
    shape = (len(clips), subjects, pictures)
    cells = latents.shape[-1]
    text = encode.text_states(captions, encoders.tokenizer, encoders.text_encoder)
    seen = [
        encode.vlm_states(captions[i : i + 32], references[i : i + 32], encoders.vlm_tokenizer, encoders.vlm)
        for i in range(0, len(clips), 32)
    ]
    longest = max(states.shape[1] for states, _ in seen)
    vlm = [torch.nn.functional.pad(states, (0, 0, 0, longest - states.shape[1])) for states, _ in seen]
    mask = [torch.nn.functional.pad(there, (0, longest - there.shape[1])) for _, there in seen]
    return {
        "latents": latents.half(),
        "owner": torch.stack([_owner_of_latents(c.owner, latents.shape[2], cells) for c in clips]),
        "text": text.half(),
        "numbers": _numbers(captions, text.shape[1], encoders.tokenizer),
        "references": torch.cat(pages).unflatten(0, shape).half(),
        "vlm": torch.cat(vlm).half(),
        "vlm_mask": torch.cat(mask),
    }


def _numbers(captions: list[str], length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(B, L): which subject each word of a caption numbers."""
    words = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return asked(words["input_ids"], tokenizer).to(torch.uint8)


def write_cache(folder: Path, encoders: Encoders, *, shards: int, seconds: float, form: Format = Format()) -> bool:
    """Write shards that are not there yet, up to `shards`; True once all are. A team shares them out."""
    team = Team()
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(team.rank, shards, team.size)
    have = sum(any(folder.glob(f"*-{number:05d}.safetensors")) for number in mine)
    meter, until = Meter("cache", len(mine), folder, start=have), time.monotonic() + seconds
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


class Cache:
    """All shards of a folder in memory, sorted into buckets of one shape, so that no batch holds padding subjects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: set[str] = set()
        self.buckets: dict[str, dict[tuple[int, int], list[Batch]]] = {"still": {}, "clip": {}}

    def refresh(self) -> int:
        """Read shards written since the last call (a cache can grow while training runs); returns how many are held."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.read:
                continue
            batch = Batch(**load_file(path))
            shape = (batch.references.shape[1], batch.references.shape[2])
            self.buckets[path.name.split("-")[0]].setdefault(shape, []).append(batch)
            self.read.add(path.name)
        return len(self.read)

    def draw(self, kind: str, size: int, rng: np.random.Generator, shape: np.random.Generator | None = None) -> Batch:
        """A random batch of one shape, in fp32: bucket by its share of samples, rows evenly from up to four shards.

        `shape` decides the bucket, `rng` all else; left out, `rng` decides both.
        """
        buckets = list(self.buckets[kind].values())
        weights = np.array([sum(map(len, shards)) for shards in buckets], float)
        shards = buckets[int((shape or rng).choice(len(buckets), p=weights / weights.sum()))]
        chosen = [shards[int(i)] for i in rng.integers(0, len(shards), min(4, size))]
        shares = [size // len(chosen) + (i < size % len(chosen)) for i in range(len(chosen))]
        parts = [_rows(shard, rng.integers(0, len(shard), share)) for shard, share in zip(chosen, shares, strict=True)]
        return _joined(parts)


def _rows(batch: Batch, rows: np.ndarray) -> Batch:
    index = torch.from_numpy(rows)
    return Batch(**{field.name: getattr(batch, field.name)[index] for field in fields(batch)})


def _joined(parts: list[Batch]) -> Batch:
    longest = max(int(part.vlm_mask.sum(1).max()) for part in parts)

    def trimmed(tensor: Tensor, name: str) -> Tensor:
        if name in ("vlm", "vlm_mask"):
            short = longest - tensor.shape[1]
            edge = (0, short) if tensor.ndim == 2 else (0, 0, 0, short)
            tensor = torch.nn.functional.pad(tensor, edge)
        return tensor.float() if tensor.is_floating_point() else tensor

    names = [field.name for field in fields(Batch)]
    return Batch(**{name: torch.cat([trimmed(getattr(part, name), name) for part in parts]) for name in names})
