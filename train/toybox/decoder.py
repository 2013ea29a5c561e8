"""Teach the toybox's decoder to draw clean frames from latents that are not quite right.

In:  drawings and their latents, which the fixed encoder gives; for clips also the transformer's own estimates of them.
Out: the VAE in `<state>/parts/vae`, with a decoder that takes away what a transformer leaves: grain and flicker.
Knows nothing of prompts or judges. The encoder stays as it is, so latents that were cached before stay valid.

    python -m train.toybox decoder --minutes 30

First stills with white noise on their latents, then short clips, whose latents carry white noise or are what the
transformer makes of a noised drawing: those are the errors that it meets in use.

Shapes: B clips, C latent channels, F frames, h x w latent pixels, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from torch import Tensor

from engine.diffusion.solvers import starting_noise
from engine.models.vae import clip_latents, latent_statistics, normalize, to_levels
from train.cpu_attention import fast_training
from train.evaluation.step_cache import psnr
from train.runs import checkpoint
from train.runs.updates import descend, run_updates
from train.toybox import world
from train.toybox.estimates import Estimates
from train.toybox.vae import CONFIG, draw_still, encode_posterior, grow_decoder, stills, to_model


@dataclass(frozen=True)
class Phase:
    """One part of the decoder's training: how many updates, AdamW's peak rate, and the share over which it falls."""

    updates: int
    rate: float
    fall: float = 0.4


PHASES = {"stills": Phase(6000, 1.5e-3), "clips": Phase(6000, 4e-4)}
STILLS, CLIPS = 8, 2  # samples of an update
FRAMES, CROP = 9, 10  # of a clip: frames, and latent pixels a side
REMEMBERED = 0.2  # share of the second phase's updates that are still those of the first
ESTIMATED = 0.7  # share of clips that are a transformer's estimates; the others carry white noise
NOISE = 0.5  # strongest white noise on normalised latents, as a standard deviation
MEASURED = (0.0, 0.1, 0.2, 0.4)  # strengths of noise that `measure` asks about
EDGES, CHANGES = 0.5, 1.5  # weight of the differences between neighbouring pixels, and between moments


def noised_stills(vae: AutoencoderKLWan, step: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 1, H, W) in [-1, 1] and their normalised latents, each with noise of a strength of its own."""
    rng = np.random.default_rng((12, step))
    pixels = to_model(np.stack([draw_still(rng)[None] for _ in range(STILLS)]))
    with torch.no_grad(), stills(vae):
        latents = normalize(encode_posterior(vae, pixels).mode(), vae)
    strength = rng.uniform(0, NOISE, (STILLS, 1, 1, 1, 1))
    noise = rng.standard_normal(tuple(latents.shape)) * strength
    return pixels, latents + torch.from_numpy(noise.astype(np.float32))


class NoisedClips:
    """Short crops of clips and what stands for their latents: with white noise, or a transformer's estimate.

    Args:
        known: drawn clips with their latents and with estimates of them.
        shared_noise: share of the white noise that all frames have in common, as when a clip is sampled.
    """

    def __init__(self, known: Estimates, shared_noise: float) -> None:
        self.known, self.shared_noise = known, shared_noise

    def __call__(self, vae: AutoencoderKLWan, step: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, F, H, W) in [-1, 1] and normalised latents (B, C, F, h, w) of one update."""
        rng = np.random.default_rng((13, step))
        if rng.random() < REMEMBERED:
            return noised_stills(vae, PHASES["stills"].updates + step)
        pixels, latents = [], []
        for number in rng.integers(0, len(self.known), CLIPS):
            first = int(rng.integers(0, self.known.num_frames - FRAMES + 1))
            moments = slice(first, first + FRAMES)
            top, left = rng.integers(0, self.known.side - CROP + 1, 2)
            place = (slice(top, top + CROP), slice(left, left + CROP))
            pixels.append(self.known.pixels_at(int(number), moments, place))
            if rng.random() < ESTIMATED:
                latents.append(self.known.estimates[number][:, moments, *place].float())
                continue
            clean = self.known.latents[number][:, moments, *place].float()
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            noise = starting_noise((1, *clean.shape), generator, self.shared_noise)[0]
            latents.append(clean + float(rng.uniform(0, NOISE)) * noise)
        return torch.stack(pixels), torch.stack(latents)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, F, h, w) -> pixels (B, 3, F, H, W) about in [-1, 1], all frames at once."""
    mean, std = latent_statistics(vae, latents)
    hidden = vae.post_quant_conv(latents * std + mean)
    return unpatchify(vae.decoder(hidden).float(), CONFIG["patch_size"])


def drawing_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """|error|, and the error of differences between neighbours, in space and where there are moments in time."""
    error = decoded - pixels
    loss = error.abs().mean()
    for axis, weight in ((-1, EDGES), (-2, EDGES), (-3, CHANGES)):
        if error.shape[axis] > 1:
            loss = loss + weight * error.diff(dim=axis).abs().mean()
    return loss


def teach(
    vae: AutoencoderKLWan, name: str, folder: Path, batch: Callable[..., tuple[Tensor, Tensor]], seconds: float
) -> bool:
    """Go on with one phase for at most `seconds`; True once all its updates are done."""
    phase = PHASES[name]
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    step = 0
    if (saved := checkpoint.load(folder)) is not None:
        step, groups, _ = saved
        vae.decoder.load_state_dict(groups["model"])
        checkpoint.restore_optimizer(optimizer, groups.get("optimizer", {}))  # none yet: cut before the first update

    def update(step: int) -> dict[str, float]:
        falling = (phase.updates - step) / (phase.fall * phase.updates)
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * min(1.0, (step + 1) / 50, max(0.01, falling))
        pixels, latents = batch(vae, step)
        with fast_training(), stills(vae):
            loss = drawing_loss(decode(vae, latents), pixels)
        descend(loss, parameters, optimizer)
        return {"loss": loss.item()}

    def keep(step: int) -> None:
        groups = {"model": dict(vae.decoder.named_parameters())}
        checkpoint.save(folder, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    return run_updates(f"decoder {name}", folder, update, keep, start=step, total=phase.updates, seconds=seconds)


def train(state: Path, vae_folder: Path, known: Callable[[], Estimates], shared_noise: float, seconds: float) -> bool:
    """Both phases, then the VAE in half precision in `<state>/parts/vae`; False when time ran out first.

    Args:
        state: folder of the training state.
        vae_folder: the VAE whose encoder is kept.
        known: gives drawn clips and estimates of them; asked only when the second phase begins.
    """
    until = time.monotonic() + seconds
    vae = grow_decoder(AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float32)).eval()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    done = teach(vae, "stills", state / "decoder" / "stills", noised_stills, until - time.monotonic())
    if done:
        clips = NoisedClips(known(), shared_noise)
        done = teach(vae, "clips", state / "decoder" / "clips", clips, until - time.monotonic())
    write(vae, state / "parts" / "vae")
    return done


@torch.no_grad()
def write(vae: AutoencoderKLWan, folder: Path) -> None:
    """Write the VAE in half precision.

    Rounding moves every pixel of a 4x4 cell by a constant of its own, which is seen as a hatch on even colour; the last
    bias takes it back.
    """
    rng = np.random.default_rng(14)
    pixels = to_model(np.stack([draw_still(rng)[None] for _ in range(64)]))
    with stills(vae):
        latents = normalize(encode_posterior(vae, pixels).mode(), vae)
        before: Any = decode(vae, latents)
        vae.half().float()
        off = patchify(decode(vae, latents) - before, CONFIG["patch_size"]).mean((0, 2, 3, 4))
        vae.decoder.conv_out.get_parameter("bias").sub_(off)
    vae.half().save_pretrained(folder, safe_serialization=True)
    vae.float()


@torch.no_grad()
def measure(vae: AutoencoderKLWan, *, scenes: int = 120) -> dict[str, float]:
    """dB of held-out stills after the decoder, by the noise on their normalised latents."""
    frames = [world.render(world.make_scene(number, split="heldout"), num_frames=1).frames for number in range(scenes)]
    with stills(vae):
        latents = clip_latents(torch.from_numpy(np.stack(frames)), vae)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        figures = {}
        for level in MEASURED:
            decoded = decode(vae, latents + level * noise).unbind(0)
            figures[f"noise {level}"] = psnr(np.stack(frames), np.stack([to_levels(each) for each in decoded]))
    return figures
