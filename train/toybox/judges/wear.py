"""Drawings as a generator's clips look: through the video VAE, with noise, blurred, lit otherwise, masks frayed.

In:  frames and masks of the drawn world.
Out: worn copies of the same shape.
Knows nothing of networks but the VAE.

Shapes: P pictures, C channels, H x W pixels, h x w latent pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from engine.identity.crops import CROP
from train.toybox.recipe import ASSETS
from train.toybox.vae import stills


def load_vae() -> AutoencoderKLWan:
    """The shipped video VAE, in fp32."""
    return AutoencoderKLWan.from_pretrained(ASSETS / "vae", torch_dtype=torch.float32).eval()


class Wear:
    """Makes drawings look as a generator's do: through the VAE, with noise on the latents."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    @torch.no_grad()
    def round_trip(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """(P, 3, H, W) in [0, 1] -> the same after encoding and decoding, with noise (P, C, h, w) on the latents."""
        with stills(self.vae), torch.autocast("cpu", enabled=False):  # the codec needs all of its bits
            posterior: Any = self.vae.encode(frames.unsqueeze(2) * 2 - 1, return_dict=False)[0]
            latents = posterior.mode()
            if noise is not None:
                latents = latents + noise.unsqueeze(2) * float(self.vae.config["latents_std"][0])
            decoded: Any = self.vae.decode(latents, return_dict=False)[0]
        return decoded.squeeze(2).add(1).div(2).clamp(0, 1)

    def __call__(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """(P, 3, H, W) -> worn copies, each with a strength of noise of its own, up to half of the latents' size."""
        strength = rng.choice([0, 0, 0.15, 0.3, 0.5], (len(frames), 1, 1, 1))
        side = frames.shape[-1] // 4
        noise = rng.standard_normal((len(frames), self.vae.config["z_dim"], side, side)) * strength
        return self.round_trip(frames, torch.from_numpy(noise.astype(np.float32)))


def blur(frames: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels over (P, C, H, W)."""
    reach = max(1, round(2.5 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).view(1, 1, -1)
    C = frames.shape[1]
    across = functional.pad(frames, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(across, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
    return functional.conv2d(across, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)


def blur_or_light(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """What needs no VAE: blur in two of five batches, a light of its own for each frame."""
    if rng.random() < 0.4:
        frames = blur(frames, float(rng.uniform(0.4, 1.1)))
    light = torch.from_numpy(rng.uniform(0.92, 1.08, (len(frames), 3, 1, 1)).astype(np.float32))
    return (frames * light).clamp(0, 1)


def fray_masks(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Masks as a locator gives them: some a pixel wider or narrower, some with a hole."""
    out = masks.clone()
    for i, roll in enumerate(rng.random(len(masks))):
        if roll < 0.2:
            out[i] = functional.max_pool2d(masks[i][None], 3, 1, 1)[0]
        elif roll < 0.4:
            out[i] = -functional.max_pool2d(-masks[i][None], 3, 1, 1)[0]
        if rng.random() < 0.15:
            y, x = rng.integers(0, masks.shape[-1] - 8, 2)
            out[i, y : y + 8, x : x + 8] = 0
    return torch.where(out.flatten(1).any(1)[:, None, None], out, masks)


def coarsen(cuts: Tensor, rng: np.random.Generator) -> Tensor:
    """Cut-outs as if they had been small in their frame: a batch made smaller, then as large as before."""
    side = int(rng.integers(16, CROP + 1))
    small = functional.interpolate(cuts, (side, side), mode="bilinear", antialias=True)
    return functional.interpolate(small, (CROP, CROP), mode="bilinear", align_corners=False)
