"""The toybox's VAE: a linear encoder that stays, and a decoder that is taught to see through what a model leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from engine.models.vae import clip_latents, decode_frames
from engine.paths import ROOT
from train.evaluation.grain import measure_grain
from train.runs import checkpoint
from train.toybox import decoder, vae, world
from train.toybox.decoder import Phase
from train.toybox.estimates import Estimates

SHIPPED = ROOT / "assets" / "toybox" / "vae"


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKLWan:
    torch.set_num_threads(1)
    return AutoencoderKLWan.from_pretrained(SHIPPED, torch_dtype=torch.float32).eval()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases of three updates."""
    monkeypatch.setattr(decoder, "PHASES", {"stills": Phase(3, 1e-3), "clips": Phase(3, 1e-3)})


def known_clips() -> Estimates:
    frames = [world.render(world.make_scene(number), num_frames=9).frames for number in range(2)]
    latents = torch.randn(2, 16, 9, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    return Estimates(frames, latents, latents + 0.1)


def test_a_still_runs_through_flat_convolutions_with_the_same_result() -> None:
    model = vae.new_vae().eval().double()  # the loud offset before the encoder's last SiLU costs fp32 four digits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))  # the older taps too
        pixels = torch.rand(2, 3, 1, 32, 32).double() * 2 - 1
        latents = model.encode(pixels).latent_dist.mean
        frames = model.decode(latents).sample
        with vae.stills(model):
            assert torch.allclose(model.encode(pixels).latent_dist.mean, latents, atol=1e-8)
            assert torch.allclose(model.decode(latents).sample, frames, atol=1e-8)
        assert frames.abs().median() < 1  # or clamping would make everything equal
        assert "forward" not in vars(model.encoder.conv_in)


def test_a_new_encoder_is_linear_and_keeps_what_a_linear_decoder_needs() -> None:
    model = vae.new_vae().eval()
    with torch.no_grad(), vae.stills(model):
        pixels = vae.batch_at(2)
        latents, halved, black = (
            model.encode(each).latent_dist.mean for each in (pixels, 0.5 * pixels, torch.zeros_like(pixels))
        )
    assert (halved - (latents + black) / 2).square().mean() < 1e-3 * latents.square().mean()
    assert model.config.scale_factor_temporal == 1 and latents.shape[-2:] == (16, 16)
    codes = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).transpose(0, 1).flatten(1).T.double()
    patches = vae.patchify(pixels, 4).transpose(0, 1).flatten(1).T.double()
    missed = patches - codes @ torch.linalg.lstsq(codes, patches).solution
    assert -10 * torch.log10(missed.square().mean() / 4) > 25  # dB


def test_a_decoder_is_begun_anew_upon_an_encoder_that_stays_bit_for_bit(shipped: AutoencoderKLWan) -> None:
    grown = vae.grow_decoder(shipped).eval()
    pixels = torch.rand(1, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(grown.encode(pixels).latent_dist.mode(), shipped.encode(pixels).latent_dist.mode())
        latents = torch.randn(1, 16, 3, 8, 8)
        later = latents.clone()
        later[:, :, :2] += 1
        # Its older temporal taps are at zero: a frame does not depend on those before it.
        assert torch.equal(grown.decode(latents).sample[:, :, 2], grown.decode(later).sample[:, :, 2])
    assert not torch.equal(grown.decoder.conv_in.weight, shipped.decoder.conv_in.weight)
    assert grown.config.latents_mean == shipped.config.latents_mean


def test_a_stranger_s_encoder_is_refused() -> None:
    other = AutoencoderKLWan(**{**vae.CONFIG, "num_res_blocks": 3})
    with pytest.raises(ValueError, match="another encoder"):
        vae.grow_decoder(other)


def test_teaching_that_is_cut_and_goes_on_ends_with_the_same_decoder(tmp_path: Path, short: None) -> None:
    ends = {}
    for name, cuts in (("whole", ()), ("cut", (0.0, 0.1, 0.1))):
        for seconds in cuts:
            assert not decoder.train(tmp_path / name, SHIPPED, known_clips, 0.6, seconds)
        assert decoder.train(tmp_path / name, SHIPPED, known_clips, 0.6, 60.0)
        saved = [checkpoint.load(tmp_path / name / "decoder" / phase) for phase in decoder.PHASES]
        ends[name] = [each[1]["model"] for each in saved if each is not None]
    for whole, cut in zip(ends["whole"], ends["cut"], strict=True):
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    written = AutoencoderKLWan.from_pretrained(tmp_path / "whole" / "parts" / "vae")
    assert written.config.decoder_base_dim == vae.CONFIG["decoder_base_dim"]


def test_clips_teach_the_older_taps_and_stills_do_not(tmp_path: Path, short: None) -> None:
    decoder.train(tmp_path, SHIPPED, known_clips, 0.6, 60.0)
    for phase, taught in (("stills", False), ("clips", True)):
        saved = checkpoint.load(tmp_path / "decoder" / phase)
        assert saved is not None
        assert bool((saved[1]["model"]["conv_in.weight"][:, :, :-1] != 0).any()) == taught


def test_the_shipped_decoder_sees_through_noise_and_keeps_a_clean_still(shipped: AutoencoderKLWan) -> None:
    found = decoder.measure(shipped, scenes=12)
    assert found["noise 0.0"] > 27 and found["noise 0.2"] > 26 and found["noise 0.4"] > 24  # dB; 28.5, 24 and 19 linear


def test_the_shipped_decoder_draws_even_colour_without_a_hatch(shipped: AutoencoderKLWan) -> None:
    colours = torch.rand(32, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), vae.stills(shipped):
        decoded = shipped.decode(shipped.encode(colours.expand(-1, -1, -1, 32, 32)).latent_dist.mean).sample
    within = decoded[..., 8:-8, 8:-8].std((-1, -2)).mean() * 127.5
    assert within < 2  # levels of 255


def test_the_shipped_decoder_leaves_no_more_grain_than_drawings_have(shipped: AutoencoderKLWan) -> None:
    clips = [world.render(world.make_scene(number, split="heldout"), num_frames=5) for number in range(6)]
    drawn, seen = [], []
    for clip in clips:
        latents = clip_latents(torch.from_numpy(clip.frames)[None], shipped)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        frames = np.concatenate([np.stack(group) for group in decode_frames(latents + 0.3 * noise, shipped)])
        drawn.append(measure_grain(clip.frames, clip.instance_ids > 0).within)
        seen.append(measure_grain(frames, clip.instance_ids > 0).within)
    assert np.mean(seen) < 1.5 * np.mean(drawn) + 1


def test_grain_is_what_an_even_place_has_and_flicker_what_changes_there() -> None:
    even = np.full((3, 32, 32, 3), 120, np.uint8)
    nobody = np.zeros((3, 32, 32), bool)
    assert measure_grain(even, nobody) == (0.0, 0.0)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 10, (1, 32, 32, 1))
    still = np.clip(even + noise, 0, 255).astype(np.uint8)
    still_grain = measure_grain(still, nobody)
    assert still_grain.within > 7 and still_grain.flicker == 0
    flickering = np.clip(even + rng.normal(0, 10, (3, 32, 32, 1)), 0, 255).astype(np.uint8)
    assert measure_grain(flickering, nobody).flicker > 7
    half = still.copy()
    half[:, :16] = 120  # the evenest quarter counts
    assert measure_grain(half, nobody).within == 0
    everywhere = np.ones_like(nobody)
    assert all(np.isnan(figure) for figure in measure_grain(still, everywhere))
    upper = nobody.copy()
    upper[:, :16] = True
    assert measure_grain(half, upper).within > 7, "where somebody is does not count"
