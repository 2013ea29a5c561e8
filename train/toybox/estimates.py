"""Drawn clips, their latents, and what a transformer takes the clean clip for when it sees them noised.

In:  cached shards of clips (`train.toybox.scenes`), a transformer, noise levels to choose from.
Out: `Estimates`: pixels, clean latents, estimated latents. They show a decoder the errors that it meets in use.
Knows nothing of decoders.

Shapes: C latent channels, F frames, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.diffusion.guidance import cfg
from engine.diffusion.solvers import add_noise, starting_noise
from engine.models.subject_tower import References
from engine.models.vae import to_vae_range
from train.cpu_attention import fast_training
from train.data.batch import Batch, NullConditioning, join_shards, take_rows
from train.data.cache import read_shard
from train.runs.metrics import MetricsLog
from train.toybox import world
from train.toybox.scenes import Format, scene_of

LEVELS = (0.35, 0.65)  # noise levels at which the transformer is asked
AT_ONCE = 4


@dataclass(frozen=True)
class Estimates:
    """Clips as drawn, as encoded and as estimated."""

    frames: list[np.ndarray]  # uint8 (F, H, W, 3) of each clip
    latents: Tensor  # (P, C, F, h, w), half precision, normalised
    estimates: Tensor  # the same shape: x_sigma - sigma * v

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def num_frames(self) -> int:
        """Frames of each clip."""
        return self.latents.shape[2]

    @property
    def side(self) -> int:
        """Latent pixels across and down."""
        return self.latents.shape[-1]

    def pixels_at(self, number: int, moments: slice, place: tuple[slice, slice]) -> Tensor:
        """Pixels (3, F, H, W) in [-1, 1] of some moments of a clip, at a square of latent pixels."""
        scale = self.frames[number].shape[1] // self.side
        rows, columns = (slice(each.start * scale, each.stop * scale) for each in place)
        cut = self.frames[number][moments, rows, columns]
        return to_vae_range(torch.from_numpy(np.ascontiguousarray(cut))).permute(3, 0, 1, 2)


@torch.no_grad()
def estimate_clips(
    cache: Path,
    transformer: Any,
    *,
    clips: int,
    guidance_scale: float,
    shared_noise: float,
    form: Format,
) -> Estimates:
    """Estimates of `clips` cached clips, at a noise level of their own each; half of them guided.

    Args:
        cache: folder of shards; those of clips are read, evenly.
        transformer: with identity blocks, for evaluation.
        guidance_scale: of classifier-free guidance, as clips are made with.
    """
    shards = sorted(cache.glob("clip-*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no cached clips in {cache}; the stage `cache` writes them")
    blank = NullConditioning.load(cache)
    rng = np.random.default_rng(15)
    frames: list[np.ndarray] = []
    latents, found = [], []
    each = -(-clips // len(shards))
    meter = MetricsLog("estimates", min(clips, len(shards)), cache)
    for place, path in enumerate(shards[:clips], start=1):
        number = int(path.stem.split("-")[1])
        shard = read_shard(path)
        there = len(shard["latents"])
        rows = np.sort(rng.choice(there, min(each, there), replace=False))
        for first in range(0, len(rows), AT_ONCE):
            chosen = rows[first : first + AT_ONCE]
            frames += [world.render(scene_of(number, int(row)), form.pixels, form.num_frames).frames for row in chosen]
            batch = join_shards([take_rows(shard, chosen)], blank.white, rng)
            scale = guidance_scale if rng.random() < 0.5 else 1.0
            latents.append(batch.latents.half())
            found.append(_estimate(transformer, batch, blank, scale, shared_noise, rng).half())
        meter.tick(place, {})
    return Estimates(frames, torch.cat(latents), torch.cat(found))


def _estimate(
    transformer: Any, batch: Batch, blank: NullConditioning, scale: float, shared_noise: float, rng: np.random.Generator
) -> Tensor:
    """What the transformer takes the clean clips for, (B, C, F, h, w) in fp32."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    sigma = torch.from_numpy(rng.uniform(*LEVELS, len(batch)).astype(np.float32))
    noisy, _ = add_noise(batch.latents, starting_noise(tuple(batch.latents.shape), generator, shared_noise), sigma)
    there = torch.ones(batch.references.shape[:3], dtype=torch.bool)

    def velocity(shown: bool) -> Tensor:
        text, heard = batch.text, batch.vlm_mask
        if not shown:
            text, heard = blank.text.expand_as(text), torch.zeros_like(heard)
        references = References(batch.references, there & shown, vlm_states=batch.vlm, vlm_mask=heard)
        identity = transformer.encode_identity(references)
        with fast_training():
            return transformer(noisy, sigma * 1000, text, return_dict=False, identity=identity)[0].float()

    full = velocity(True)
    if scale != 1:
        full = cfg(velocity(False), full, scale)
    return noisy - sigma.view(-1, 1, 1, 1, 1) * full
