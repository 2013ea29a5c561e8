"""The toybox's video VAE, trained on stills and clips in turn.

In:  frames drawn by `train.world`, in [-1, 1].
Out: an `AutoencoderKLWan` folder: latents 8x smaller in space and 4x in time, with their own latents_mean and latents_std.
Knows nothing of prompts, subjects or transformers.

Shapes: B clips, C channels, F frames, H x W pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from torch import Tensor, nn

from train import checkpoint, world
from train.optim import MuonAdam, Team

# Wan 2.2's layout: pixels folded 2x2 before the first convolution, shortcuts without weights around every change of
# size, in time too. At 8x in space a face is about one latent, so a latent has 48 channels: as many numbers a picture as
# 4x and 12 channels, at half the convolutions' cost (docs/log.md).
CONFIG: dict[str, Any] = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 32,
    "decoder_base_dim": 40,
    "z_dim": 48,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
STEPS = 1700
STILL_BATCH, CLIP_BATCH, CLIP_FRAMES, CLIP_CROP = 8, 3, 9, 48
RATES = {"matrix_rate": 0.02, "rate": 2e-3}


def new_vae() -> AutoencoderKLWan:
    """An untrained VAE whose latents start with little noise: at variance 1 the noise drowns them for 200 updates."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)
    bias = vae.quant_conv.bias
    assert bias is not None
    nn.init.constant_(bias[CONFIG["z_dim"] :], -5.0)
    return vae


@contextmanager
def stills(vae: nn.Module) -> Iterator[None]:
    """Inside, one-frame inputs run through 2-D convolutions: the other taps only ever see zero padding.

    Exact for one frame, three times less work (tests/test_vae.py compares both).
    """
    convs = [m for m in vae.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[0] == 3]

    def flat(conv: WanCausalConv3d) -> Any:
        whole = type(conv).forward

        def forward(x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            if x.shape[2] != 1 or cache_x is not None or conv.stride[0] != 1:
                return whole(conv, x, cache_x)
            pad = conv._padding[0]
            return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], pad).unsqueeze(2)

        return forward

    for conv in convs:
        conv.forward = flat(conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def to_model(frames: np.ndarray) -> Tensor:
    """uint8 (..., F, H, W, 3) -> float (..., 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -4).copy()).float().div_(127.5).sub_(1)


def _still(rng: np.random.Generator) -> np.ndarray:
    """One picture of the world: a scene, a reference, a background, or loose shapes a user's picture may hold."""
    seed, pick = int(rng.integers(2**28)), rng.random()
    if pick < 0.6:
        return world.render(world.make_scene(seed), num_frames=1).frames[0]
    if pick < 0.9:
        subject = world.make_subject(world.subject_seed(seed, "train"))
        back = "white" if rng.random() < 0.8 else "scene"
        return world.reference_picture(subject, seed, background=back)[0]
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8)) if pick > 0.97 else _cropped(rng, seed)


def _cropped(rng: np.random.Generator, seed: int) -> np.ndarray:
    """A scene drawn at double size and cut: larger shapes, half subjects at the rim."""
    whole = world.render(world.make_scene(seed), size=128, num_frames=1).frames[0]
    y, x = rng.integers(0, 64, 2)
    return whole[y : y + 64, x : x + 64]


def _clip(rng: np.random.Generator) -> np.ndarray:
    """A random window of a clip: convolutions do not care where it was cut."""
    frames = world.render(world.make_scene(int(rng.integers(2**28))), num_frames=17).frames
    start = int(rng.integers(0, 17 - CLIP_FRAMES + 1))
    y, x = rng.integers(0, 64 - CLIP_CROP + 1, 2)
    return frames[start : start + CLIP_FRAMES, y : y + CLIP_CROP, x : x + CLIP_CROP]


def batch_at(step: int) -> Tensor:
    """The pictures of one step, the same whenever it is asked: (B, 3, F, H, W) in [-1, 1]; stills and clips in turn."""
    rng = np.random.default_rng((11, step))
    if step % 2 == 0:
        return to_model(np.stack([_still(rng)[None] for _ in range(STILL_BATCH)]))
    return to_model(np.stack([_clip(rng) for _ in range(CLIP_BATCH)]))


def posterior_of(vae: AutoencoderKLWan, pixels: Tensor) -> Any:
    """The distribution of the latents, not yet normalised."""
    return vae.encode(pixels, return_dict=False)[0]


def loss_of(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1, plus L1 of neighbouring differences so that outlines stay sharp, plus a trace of KL."""
    posterior = posterior_of(vae, pixels)
    decoded: Any = vae.decode(posterior.sample(), return_dict=False)[0]
    error = (decoded - pixels).abs().mean()
    edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    with torch.no_grad():
        psnr = -10 * torch.log10(((decoded.clamp(-1, 1) - pixels) / 2).square().mean())
    return error + 0.5 * edges + 3e-5 * kl, {"l1": error.item(), "psnr": psnr.item(), "kl": kl.item()}


def schedule(step: int, total: int) -> float:
    """Share of the peak rate: short warm-up, flat, linear decay over the last third."""
    return min(1.0, (step + 1) / 50, max(0.02, (total - step) / (0.33 * total)))


def train(state: Path, *, seconds: float) -> bool:
    """Go on training for at most `seconds`; True once all steps are done. Under torchrun gradients are averaged."""
    team, vae = Team(), new_vae().train()
    optimizer = MuonAdam(vae, **RATES)
    ema = checkpoint.Ema(vae, 0.995)
    step = 0
    if saved := checkpoint.load(state):
        step, groups, _ = saved
        vae.load_state_dict(groups["model"])
        ema.restore(groups["ema"], step)
        checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    meter, until, last = checkpoint.Meter("vae", STEPS, state, start=step), time.monotonic() + seconds, time.monotonic()

    def keep() -> None:
        groups = {"model": vae.state_dict(), "ema": ema.tensors, "optimizer": checkpoint.optimizer_tensors(optimizer)}
        checkpoint.save(state, step, groups)

    stop = False
    while step < STEPS and not stop:
        optimizer.scale = schedule(step, STEPS)
        pixels = batch_at(step + 2 * STEPS * team.rank)
        with stills(vae):
            loss, values = loss_of(vae, pixels)
            loss.backward()
        stop = team.average_gradients(vae, stop=time.monotonic() > until)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(vae)
        step += 1
        if team.rank == 0:
            kind = "still" if pixels.shape[2] == 1 else "clip"
            meter.tick(step, {f"{kind} {name}": value for name, value in values.items()})
            if time.monotonic() - last > 120:
                keep()
                last = time.monotonic()
    if team.rank == 0:
        keep()
    return step == STEPS


def export(state: Path, folder: Path) -> AutoencoderKLWan:
    """Write the averaged weights with latents_mean and latents_std measured on stills and clips."""
    saved = checkpoint.load(state)
    if saved is None:
        raise FileNotFoundError(f"no VAE has been trained in {state}")
    vae = new_vae().eval()
    vae.load_state_dict(saved[1]["ema"])
    with torch.no_grad(), stills(vae):
        latents = [posterior_of(vae, batch_at(step)).mean for step in range(40)]
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], 1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())
    vae.half().save_pretrained(folder, safe_serialization=True)
    return vae.float()


def main(argv: list[str] | None = None) -> int:
    """Train in this process, or in all that torchrun started; 0 when done, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.vae", description="Train the toybox's video VAE.")
    parser.add_argument("state", type=Path, help="folder of the training state")
    parser.add_argument("--minutes", type=float, default=600.0)
    options = parser.parse_args(argv)
    return 0 if train(options.state, seconds=options.minutes * 60) else 3


if __name__ == "__main__":
    sys.exit(main())
