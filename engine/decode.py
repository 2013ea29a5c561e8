"""Latents back to frames, one latent frame at a time.

In:  normalised latents and the VAE.
Out: uint8 frames as they become ready, bit-equal to decoding the whole clip at once.
Knows nothing of files, jobs or sampling.

Shapes: C latent channels, F latent frames, h x w latent pixels; frames are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from numpy.typing import NDArray
from torch import Tensor

from engine.encode import latent_statistics
from engine.messages import StudioError


@torch.no_grad()
def frames(latents_1CFhw: Tensor, vae: AutoencoderKLWan) -> Iterator[list[NDArray[np.uint8]]]:
    """Decode a clip: for each latent frame the frames that came out of it (one for the first, then four).

    Wan's decoder is causal and carries what it needs of the past in a feature cache, so memory does not grow with the
    clip: what leaves here can be written and forgotten.

    Raises:
        StudioError: a frame holds NaN.

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
            yield list(to_levels(decoded[0]))
    finally:
        net.clear_cache()


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


def preview(x_0_1CFhw: Tensor, vae: AutoencoderKLWan) -> NDArray[np.uint8]:
    """The first, the middle and the last moment side by side, (H, n * W, 3), as the model sees the clip so far.

    Each latent frame is decoded as a still: a seventh of the clip's own decoding at 17 frames, less for longer ones,
    and a little softer than the clip will be.
    """
    last = x_0_1CFhw.shape[2] - 1
    moments = sorted({0, last // 2, last})
    return np.concatenate([next(frames(x_0_1CFhw[:, :, i : i + 1], vae))[0] for i in moments], axis=1)
