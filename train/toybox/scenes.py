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
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from train.data.batch import Shard
from train.data.encode import Encoders, Sample, encode_samples, write_shard
from train.distributed import count_processes
from train.runs.metrics import MetricsLog
from train.toybox import world
from train.toybox.text import load_tokenizer, slots_of_words
from train.toybox.vae import stills

SHARD = {"still": 256, "clip": 96}

CLIP_SHARE = 2  # every second shard holds clips

FIRST_SCENE = 2_000_000  # earlier ones taught the readers of words


def load_encoders(folder: Path) -> Encoders:
    """The frozen parts of a folder in the layout of assets/toybox, in fp32."""
    return Encoders(
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


@torch.no_grad()
def make_shard(number: int, encoders: Encoders, form: Format = Format()) -> Shard:
    """Draw and encode one shard; the same number gives the same shard."""
    kind, _, pictures = shape_of_shard(number)
    rng = np.random.default_rng((43, number))
    num_frames = 1
    if kind == "clip":
        num_frames = form.num_frames
    samples = []
    for row in range(SHARD[kind]):
        scene = scene_of(number, row)
        clip = world.render(scene, form.pixels, num_frames=num_frames)
        references = _references(scene, pictures, rng, form.pixels)
        samples.append(Sample(clip.frames, clip.instance_ids, clip.caption, references))
    with stills(encoders.vae):
        shard = encode_samples(samples, encoders)
    captions = [sample.caption for sample in samples]
    return {**shard, "numbers": _slots_of_captions(captions, shard["text"].shape[1], encoders.tokenizer)}


def _slots_of_captions(captions: list[str], length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(B, L): which subject each word of a caption numbers."""
    words = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return slots_of_words(words["input_ids"], tokenizer).to(torch.uint8)


def write_cache(folder: Path, encoders: Encoders, *, shards: int, seconds: float, form: Format = Format()) -> bool:
    """Write shards that are not there yet, up to `shards`; True once all are. A team shares them out."""
    rank, size = count_processes()
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(rank, shards, size)
    have = sum(any(folder.glob(f"*-{number:05d}.safetensors")) for number in mine)
    meter, until = MetricsLog("cache", len(mine), folder, start=have), time.monotonic() + seconds
    for number in mine:
        kind = shape_of_shard(number)[0]
        path = folder / f"{kind}-{number:05d}.safetensors"
        if path.exists():
            continue
        if time.monotonic() > until:
            return False
        write_shard(path, make_shard(number, encoders, form))
        have += 1
        meter.tick(have, {})
    return True
