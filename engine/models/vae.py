"""Latents back to frames, one latent frame at a time.

In:  normalised latents and the VAE.
Out: uint8 frames as they become ready, bit-equal to decoding the whole clip at once.
Knows nothing of files, jobs or sampling.

Shapes: C latent channels, F latent frames, h x w latent pixels; frames are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from numpy.typing import NDArray
from torch import Tensor

from engine.media.pictures import Pixels
from engine.messages import StudioError

TILE, OVERLAP = 256, 64  # pixels: side of a tile, and what it shares with its neighbour


def decode_frames(
    latents_1CFhw: Tensor, vae: AutoencoderKLWan, *, tiled: bool = False
) -> Iterator[list[NDArray[np.uint8]]]:
    """Decode a clip: for each latent frame the frames that came out of it (one for the first, then four).

    Wan's decoder is causal and carries what it needs of the past in a feature cache, so memory does not grow with the
    clip: what leaves here can be written and forgotten.

    Args:
        tiled: decode in tiles of 256 pixels that fade into each other, a sixth of the memory at 480 x 832. All of a
            tile's frames are decoded before the next tile's, so frames leave only at the end; until then they wait in
            a file.

    Raises:
        StudioError: a frame holds NaN.
    """
    config: Any = vae.config
    side = TILE // config.scale_factor_spatial
    if not tiled or max(latents_1CFhw.shape[-2:]) <= side:
        yield from (list(to_levels(decoded[0])) for decoded in _decode_latent_frames(latents_1CFhw, vae))
        return
    # Windows keeps a file for as long as it is mapped: also by an error that is on its way up.
    with tempfile.TemporaryDirectory(prefix="idcrafter-", ignore_cleanup_errors=True) as folder:
        whole = _decode_tiles(latents_1CFhw, vae, side, Path(folder) / "frames.bin")
        try:
            for first, last in _groups(latents_1CFhw.shape[2], vae):
                yield list(to_levels(torch.from_numpy(whole[:, first:last])))
        finally:
            del whole


@torch.no_grad()
def _decode_latent_frames(latents_1CFhw: Tensor, vae: AutoencoderKLWan) -> Iterator[Tensor]:
    """Pixels (1, 3, 1 or 4, H, W) in [-1, 1] of one latent frame after the other.

    Source: diffusers' `AutoencoderKLWan._decode`, whose loop this is, without the list of all frames.
    """
    mean, std = latent_statistics(vae, latents_1CFhw)
    net: Any = vae
    net.clear_cache()
    try:
        for index in range(latents_1CFhw.shape[2]):
            latent = latents_1CFhw[:, :, index : index + 1].float() * std + mean
            net._conv_idx = [0]
            hidden = net.post_quant_conv(latent.to(vae.dtype))
            decoded = net.decoder(hidden, feat_cache=net._feat_map, feat_idx=net._conv_idx, first_chunk=index == 0)
            if net.config.patch_size is not None:
                decoded = unpatchify(decoded, patch_size=net.config.patch_size)
            yield decoded
    finally:
        net.clear_cache()


def _decode_tiles(latents_1CFhw: Tensor, vae: AutoencoderKLWan, side: int, path: Path) -> NDArray[np.float16]:
    """All frames (3, F, H, W) in a memory-mapped file, each tile weighted less towards the edges it shares."""
    config: Any = vae.config
    scale = config.scale_factor_spatial
    height, width = latents_1CFhw.shape[-2:]
    last = _groups(latents_1CFhw.shape[2], vae)[-1][1]
    whole = np.memmap(path, np.float16, "w+", shape=(3, last, height * scale, width * scale))
    rows, columns = (_weights(length, side, scale, latents_1CFhw.device) for length in (height, width))
    for top, down in rows.items():
        for left, across in columns.items():
            tile = latents_1CFhw[..., top : top + side, left : left + side]
            part = whole[:, :, top * scale : (top + side) * scale, left * scale : (left + side) * scale]
            start = 0
            for decoded in _decode_latent_frames(tile, vae):
                weighed = (decoded[0].float().clamp(-1, 1) * down[:, None] * across).half().cpu().numpy()
                part[:, start : start + weighed.shape[1]] += weighed
                start += weighed.shape[1]
    return whole


def _weights(length: int, side: int, scale: int, device: torch.device) -> dict[int, Tensor]:
    """Where tiles begin along one side, in latent pixels, and how much each of their pixels counts; in all, one.

    As few tiles as cover the length, evenly spread; each counts less and less towards an edge that is not the clip's.
    """
    side, shared = min(side, length), OVERLAP // scale
    count = 1
    if side != length:
        count = -(-(length - shared) // (side - shared))
    starts = [round(number * (length - side) / max(1, count - 1)) for number in range(count)]
    own = torch.arange(side * scale, device=device) + 0.5
    total = torch.zeros(length * scale, device=device)
    weights = {}
    for start in starts:
        to_left = to_right = torch.full_like(own, OVERLAP)
        if start > 0:
            to_left = own
        if start + side < length:
            to_right = own.flip(0)
        weights[start] = torch.minimum(to_left, to_right).clamp(max=OVERLAP) / OVERLAP
        total[start * scale : (start + side) * scale] += weights[start]
    return {start: weight / total[start * scale : (start + side) * scale] for start, weight in weights.items()}


def _groups(latent_frames: int, vae: AutoencoderKLWan) -> list[tuple[int, int]]:
    """First and behind-the-last frame of what comes out of each latent frame."""
    config: Any = vae.config
    each = config.scale_factor_temporal
    return [(0, 1)] + [(1 + each * (number - 1), 1 + each * number) for number in range(1, latent_frames)]


def to_levels(decoded_3FHW: Tensor) -> NDArray[np.uint8]:
    """[-1, 1] -> uint8 levels, (F, H, W, 3).

    Raises:
        StudioError: the decoder gave NaN.
    """
    pixels = decoded_3FHW.float()
    if not bool(torch.isfinite(pixels).all()):
        raise StudioError(
            what="The clip broke while it was decoded: a frame holds NaN.",
            why="The video VAE overflowed, or its weights are damaged.",
            next_step="Run `python launch.py doctor`, which checks the files.",
        )
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).cpu().numpy()


def decode_preview(x_0_1CFhw: Tensor, vae: AutoencoderKLWan) -> NDArray[np.uint8]:
    """The first, the middle and the last moment side by side, (H, n * W, 3), as the model sees the clip so far.

    Each latent frame is decoded as a still: a seventh of the clip's own decoding at 17 frames, less for longer ones,
    and a little softer than the clip will be.
    """
    last = x_0_1CFhw.shape[2] - 1
    moments = sorted({0, last // 2, last})
    return np.concatenate([next(decode_frames(x_0_1CFhw[:, :, i : i + 1], vae))[0] for i in moments], axis=1)


# --- the VAE --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def picture_latents(pictures: Sequence[Pixels], vae: AutoencoderKLWan) -> Tensor:
    """Normalised latents of P still pictures of one size: (P, C, h, w), fp32. Each is a video of one frame."""
    frames = torch.from_numpy(np.stack(pictures)).to(vae.device).permute(0, 3, 1, 2).unsqueeze(2)
    return _encode(frames, vae).squeeze(2)


@torch.no_grad()
def clip_latents(frames_BFHW3: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """Normalised latents of B clips of uint8 frames (B, F, H, W, 3), F = 4k + 1: (B, C, k + 1, h, w), fp32."""
    return _encode(frames_BFHW3.to(vae.device).permute(0, 4, 1, 2, 3), vae)


def _encode(levels_B3FHW: Tensor, vae: AutoencoderKLWan) -> Tensor:
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
