"""The toybox's video VAE: a linear encoder in AutoencoderKLWan's clothes, fitted in seconds, and a fresh decoder.

In:  frames drawn by `train.toybox.world`, in [-1, 1].
Out: an `AutoencoderKLWan` folder: latents 4x smaller in space, with latents_mean and latents_std. Its decoder has
     random weights until `train.toybox.decoder` has taught it.
Knows nothing of prompts, subjects or transformers.

Shapes: B clips, C channels, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResidualBlock,
    patchify,
)
from torch import Tensor, nn

from train.toybox import world

# Pixels are folded 4x4 before the first convolution and nothing is resampled after it. Every resampling of Wan's VAE
# enlarges by repeating pixels, and what tells the copies apart has to be learned: 15 minutes on two cores gave 19 dB
# where 16 principal components of 4x4 patches give 28 (docs/log.md). Time is not compressed for the same reason: Wan's
# VAE halves time only where it halves space.
CONFIG: dict[str, Any] = {
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
    "base_dim": 64,
    "decoder_base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1],
    "num_res_blocks": 2,
    "temperal_downsample": [],
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 1,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
STILL_BATCH = 14
LOUD = 6.0  # offset before the encoder's last SiLU: there it is almost a straight line


def new_vae() -> AutoencoderKLWan:
    """A VAE whose encoder gives the principal components of 4x4 patches, and whose decoder knows nothing yet.

    The encoder's residual branches are at zero, its last convolution is fitted by least squares to undo the norm and
    SiLU before it. The decoder starts from random weights: behind such a loud offset nothing would train.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)
    rng = np.random.default_rng(10)
    pixels = to_model(np.stack([draw_still(rng)[None] for _ in range(400)]))
    with torch.no_grad(), stills(vae):
        for module in vae.encoder.modules():
            ends = {WanResidualBlock: "conv2", WanAttentionBlock: "proj"}
            if type(module) in ends:
                for parameter in module.get_submodule(ends[type(module)]).parameters():
                    nn.init.zeros_(parameter)
        wanted = principal_components(patchify(pixels, CONFIG["patch_size"]))
        padded = torch.cat([wanted, torch.zeros_like(wanted)], 1)  # the second half: log variance
        _fit_encoder(vae.encoder, patchify(pixels, CONFIG["patch_size"]), padded)
        _set_to_identity(vae.quant_conv)
        vae.quant_conv.get_parameter("bias")[CONFIG["z_dim"] :] = -8.0
        _set_to_identity(vae.post_quant_conv)
        start_decoder(vae)
    return vae


def grow_decoder(shipped: AutoencoderKLWan) -> AutoencoderKLWan:
    """The VAE with the same encoder, bit for bit in its latents, and a decoder of today's size that knows nothing yet.

    For checkpoints of before the decoder was taught: they have one residual block where CONFIG has two. The encoder's
    new block adds nothing.
    """
    torch.manual_seed(0)
    config: Any = shipped.config
    measured = {"latents_mean": config.latents_mean, "latents_std": config.latents_std}
    vae = AutoencoderKLWan(**{**CONFIG, **measured})
    held = {key: value for key, value in shipped.state_dict().items() if not key.startswith("decoder.")}
    missing, unexpected = vae.load_state_dict(held, strict=False)
    strangers = [key for key in missing if not key.startswith(("decoder.", "encoder.down_blocks.1."))] + unexpected
    if strangers:
        raise ValueError(f"the VAE to start from has another encoder, the first key is {strangers[0]}")
    with torch.no_grad():
        if any(key.startswith("encoder.down_blocks.1.") for key in missing):
            for parameter in vae.encoder.down_blocks[1].get_submodule("conv2").parameters():
                nn.init.zeros_(parameter)
        start_decoder(vae)
    return vae


@torch.no_grad()
def start_decoder(vae: AutoencoderKLWan) -> None:
    """The decoder's older temporal taps at zero: until it is taught on clips, each frame is decoded as a still."""
    for module in vae.decoder.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1].zero_()


def principal_components(patches: Tensor) -> Tensor:
    """(B, X, 1, h, w) -> (B, z_dim, 1, h, w): the loudest components, as loud beside each other as in the picture.

    Not whitened: made alike in size, twelve components of fine detail would outweigh the four that hold colour, and a
    transformer then learns neither (docs/log.md).
    """
    flat = patches.transpose(0, 1).flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    kept = slice(-CONFIG["z_dim"], None)
    codes = axes[:, kept].flip(1).T @ centred
    codes = codes / codes.std()
    B, _, F_, h, w = patches.shape
    return codes.view(-1, B, F_, h, w).transpose(0, 1)


def _set_to_identity(conv: Any) -> None:
    """A 1x1 convolution that passes everything on."""
    conv.weight.copy_(torch.eye(conv.weight.shape[0]).view_as(conv.weight))
    conv.bias.zero_()


def _fit_encoder(encoder: Any, inputs: Tensor, outputs: Tensor) -> None:
    """Spread the input over all channels, then least squares from what the last SiLU gives."""
    first, last = encoder.conv_in, encoder.conv_out
    for conv in (first, last):
        conv.weight.zero_()
    newest = first.weight[:, :, -1, 1, 1]
    spread = nn.init.orthogonal_(torch.empty_like(newest))
    scale = inputs.std()
    newest.copy_(spread / scale)
    first.bias.copy_(LOUD - spread @ inputs.mean((0, 2, 3, 4)) / scale)
    nn.init.constant_(encoder.norm_out.gamma, LOUD)
    seen = encoder.nonlinearity(encoder.norm_out(first(inputs))).transpose(0, 1).flatten(1)
    # In fp32 the solver would take every direction quieter than a hundredth of the offset for noise.
    seen = torch.cat([seen, torch.ones_like(seen[:1])]).T.double()
    fit = torch.linalg.lstsq(seen, outputs.transpose(0, 1).flatten(1).T.double()).solution.T.float()
    last.weight[:, :, -1, 1, 1] = fit[:, :-1]
    last.bias.copy_(fit[:, -1])


@contextmanager
def stills(vae: nn.Module) -> Iterator[None]:
    """Inside, one-frame inputs run through 2-D convolutions: the other taps only ever see zero padding.

    Exact for one frame, three times less work (tests/train/test_sft.py compares both).
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


def draw_still(rng: np.random.Generator) -> np.ndarray:
    """One picture of the world: a scene, a reference, a background, or loose shapes a user's picture may hold."""
    seed, pick = int(rng.integers(2**28)), rng.random()
    if pick < 0.6:
        return world.render(world.make_scene(seed), num_frames=1).frames[0]
    if pick < 0.9:
        subject = world.make_subject(world.subject_seed(seed, "train"))
        back = "white" if rng.random() < 0.8 else "scene"
        return world.reference_picture(subject, seed, background=back)[0]
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8)) if pick > 0.97 else _draw_crop(rng, seed)


def _draw_crop(rng: np.random.Generator, seed: int) -> np.ndarray:
    """A scene drawn at double size and cut: larger shapes, half subjects at the rim."""
    whole = world.render(world.make_scene(seed), size=128, num_frames=1).frames[0]
    y, x = rng.integers(0, 64, 2)
    return whole[y : y + 64, x : x + 64]


def batch_at(step: int) -> Tensor:
    """The stills of one step, the same whenever it is asked: (B, 3, 1, H, W) in [-1, 1]."""
    rng = np.random.default_rng((11, step, 0))
    return to_model(np.stack([draw_still(rng)[None] for _ in range(STILL_BATCH)]))


def encode_posterior(vae: AutoencoderKLWan, pixels: Tensor) -> Any:
    """The distribution of the latents, not yet normalised."""
    return vae.encode(pixels, return_dict=False)[0]


@torch.no_grad()
def write(folder: Path) -> AutoencoderKLWan:
    """Write the fitted encoder in half precision, with the latents' means and their one scale, measured on stills."""
    vae = new_vae().eval()
    with stills(vae):
        flat = torch.cat(
            [encode_posterior(vae, batch_at(step)).mean.transpose(0, 1).flatten(1) for step in range(40)], 1
        )
        # One scale for all channels: coarse ones stay louder than fine ones.
        scale = float(flat.std(1).square().mean().sqrt())
        vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=[scale] * CONFIG["z_dim"])
    vae.half().save_pretrained(folder, safe_serialization=True)
    return vae.float()
