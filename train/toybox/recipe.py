"""The recipe of the toybox checkpoint: each stage is one command that can be cut at any moment and goes on from there.

In:  the drawn world (`train.toybox.world`), minutes to spend, a folder for the state.
Out: assets/toybox in diffusers' and transformers' layout. STAGES below holds the order.
Knows nothing of the studio.

    python -m train.toybox text --minutes 30
    python -m train.toybox all
    python -m train.toybox all --size s    # larger, for a large card
    GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m train.toybox motion

Under torchrun the stages cache, base, identity and motion are done by all processes together. `adopt`, then cache and
motion, goes on from the shipped checkpoint where the state is lost. Size s has a transformer of its own, upon the
frozen parts of size xs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.paths import ROOT
from engine.presets import Preset
from train.toybox.scenes import Format

ASSETS = ROOT / "assets" / "toybox"
STATE = Path.home() / ".cache" / "idcrafter-studio" / "toybox"


@dataclass(frozen=True)
class Size:
    """One size of the checkpoint. Identity blocks are in two of three layers, as in the paper (20 of 30)."""

    preset: str
    form: Format
    heads: int
    ffn_dim: int
    layers: int

    @property
    def wan(self) -> dict[str, Any]:
        """Arguments of Wan's transformer. A token is 8x8 pixels of one frame."""
        names = {"num_attention_heads": self.heads, "ffn_dim": self.ffn_dim, "num_layers": self.layers}
        ends = {"attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "text_dim": 96, "freq_dim": 64}
        return {**names, **ends, "rope_max_seq_len": 512}

    @property
    def identity(self) -> dict[str, Any]:
        """The same with identity blocks."""
        own = {"identity_layers": 2 * self.layers // 3, "max_subjects": 4, "vlm_dim": 128}
        return {
            **self.wan,
            **own,
            "subject_positions": True,
            "subject_zoom": 2,
            "video_positions": True,
            "slot_keys": True,
        }


SIZES = {
    "xs": Size("toybox", Format(64, 17), heads=5, ffn_dim=640, layers=6),  # 4M parameters, for two processor cores
    "s": Size("toybox-s", Format(128, 17), heads=7, ffn_dim=896, layers=8),  # 10M, for one large card
}
# What SftConfig's defaults have not; clips share as much noise as their preset says. The shipped checkpoint got its
# positions, slots, sparse clips and losses one after the other (docs/log.md); these are the last ones.
IDENTITY = {"steps": 9600, "data": {"clip_share": 0.4, "in_pair": 0.0}, "checkpoint": {"ema": 0.999}}
MOTION = {
    "steps": 30_000,
    "data": {"clip_share": 0.6, "sparse_share": 0.4, "in_pair": 0.0},
    "noise": {"sparse_shift": 12.0, "clip_shift": 3.5},
    "losses": {"motion_weight": 1.0, "subject_alignment": 0.25, "caption_alignment": 0.3},
    "optimizer": {"learning_rate": 4e-4, "decay_fraction": 0.3},
    "checkpoint": {"ema": 0.999},
}
SHARDS = 300
BASE_STEPS = 4000
ESTIMATED_CLIPS = 600  # that the decoder learns from


def vae(state: Path, seconds: float, size: Size) -> bool:
    """Fit the video VAE and write it under `<state>/parts`."""
    from train.toybox import vae as stage

    stage.write(state / "parts" / "vae")
    return True


def tokenizers(state: Path, seconds: float, size: Size) -> bool:
    """Train both tokenizers."""
    from train.toybox import text

    text.write_tokenizers(state)
    return True


def read_captions(state: Path, seconds: float, size: Size) -> bool:
    """Teach UMT5 what captions say."""
    from train.toybox import text

    return text.train_text_encoder(state / "text", text.load_tokenizer(state / "tokenizer"), seconds=seconds)


def describe_pictures(state: Path, seconds: float, size: Size) -> bool:
    """Teach Qwen2.5-VL what pictures show."""
    from train.toybox import text

    return text.train_vlm(state / "vlm", text.load_tokenizer(state / "vlm_tokenizer"), seconds=seconds)


def write_parts(state: Path, seconds: float, size: Size) -> bool:
    """Write the readers of words (tokenizers, UMT5, Qwen2.5-VL) under `<state>/parts`, half precision."""
    from train.toybox import text

    text.export(state, state / "parts")
    return True


def cache(state: Path, seconds: float, size: Size) -> bool:
    """Draw and encode the training scenes."""
    from train.data.encode import write_null
    from train.toybox.scenes import load_encoders, write_cache

    parts = state / "parts"
    if not parts.is_dir():
        parts = ASSETS
    encoders = load_encoders(parts)
    write_null(state / "cache", encoders, pixels=64, mark=str(os.getpid()))
    return write_cache(state / "cache", encoders, shards=SHARDS, seconds=seconds, form=size.form)


def prepare_run(state: Path, name: str, size: Size, start: Path | None, **values: Any) -> Path:
    """The run folder of a transformer stage, with its document written once."""
    from engine import presets
    from train.sft.config import SftConfig

    run = state / name
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "run.json").exists():
        kind, architecture = "identity", size.identity
        if name == "base":
            kind, architecture = "base", size.wan
        preset = presets.load(ASSETS.name)
        noise = {"shared_noise": preset.shared_noise, "final_sigma": preset.sampling.final_sigma or 0.0}
        own = {
            **values,
            "model": {"kind": kind, "start": str(start or ""), "architecture": architecture},
            "data": {**values.get("data", {}), "cache": str(state / "cache")},
            "noise": {**values.get("noise", {}), **noise},
        }
        fresh = run / f"run.{os.getpid()}.new"  # every process of a team writes the same
        fresh.write_text(SftConfig.model_validate(own).model_dump_json(indent=2), encoding="utf-8")
        fresh.replace(run / "run.json")
    return run


def _train(run: Path, seconds: float) -> bool:
    """Go on with a transformer's run; attention is taught by who is where, which a drawn world knows."""
    from train.sft import trainer
    from train.sft.attention_losses import AttentionAlignment
    from train.sft.config import read_run
    from train.sft.loss import AuxiliaryLoss

    config = read_run(run)
    auxiliary: list[AuxiliaryLoss] = []
    if config.model.kind == "identity":
        losses, patch = config.losses, int(config.model.architecture.get("patch_size", (1, 2, 2))[-1])
        auxiliary.append(AttentionAlignment(patch, subject=losses.subject_alignment, caption=losses.caption_alignment))
    return trainer.train(run, seconds=seconds, auxiliary=auxiliary)


def base(state: Path, seconds: float, size: Size) -> bool:
    """Train the plain text-to-video base that every later run starts from."""
    return _train(prepare_run(state, "base", size, None, steps=BASE_STEPS), seconds)


def identity(state: Path, seconds: float, size: Size) -> bool:
    """Train the identity blocks, and the base with them, to show each subject as its pictures do."""
    return _train(prepare_run(state, "identity", size, state / "base", **IDENTITY), seconds)


def motion(state: Path, seconds: float, size: Size) -> bool:
    """Train on, mostly with clips, to have each subject do what the prompt says.

    It starts from the shipped checkpoint where `adopt` brought one, else from the stage `identity`.
    """
    start = state / "adopted"
    if not start.is_dir():
        start = state / "identity"
    return _train(prepare_run(state, "motion", size, start, **MOTION), seconds)


def adopt(state: Path, seconds: float, size: Size) -> bool:
    """Go on from the shipped checkpoint where the training state is lost: its frozen parts and its transformer."""
    import shutil

    for part in ASSETS.iterdir():
        target = state / "parts" / part.name
        if part.name == "transformer":
            target = state / "adopted"
        shutil.copytree(part, target, dirs_exist_ok=True)
    return True


def decoder(state: Path, seconds: float, size: Size) -> bool:
    """Teach the VAE's decoder to take away what the transformer leaves; the encoder stays."""
    from engine import presets
    from train.sft import models
    from train.toybox import decoder as stage
    from train.toybox.estimates import Estimates, estimate_clips

    preset = presets.load(ASSETS.name)

    def estimate() -> Estimates:
        return estimate_clips(
            state / "cache",
            models.load_start(_latest_transformer(state)).eval(),
            clips=ESTIMATED_CLIPS,
            guidance_scale=preset.sampling.guidance_scale or 1.0,
            shared_noise=preset.shared_noise,
            form=size.form,
        )

    return stage.train(state, state / "parts" / "vae", estimate, preset.shared_noise, seconds)


def _latest_transformer(state: Path) -> Path:
    """The run that has trained longest, or the shipped checkpoint where `adopt` brought one."""
    for name in ("motion", "identity"):
        if (state / name / "state.safetensors").is_file():
            return state / name
    return state / "adopted"


def export(state: Path, seconds: float, size: Size) -> bool:
    """Write assets/toybox: frozen parts and averaged transformer; of another size its transformer and its preset."""
    import shutil

    from engine import presets
    from train.sft import models

    if size.preset == ASSETS.name:
        for part in (state / "parts").iterdir():
            shutil.copytree(part, ASSETS / part.name, dirs_exist_ok=True)
    else:
        path = presets.PRESETS / f"{size.preset}.json"
        path.write_text(preset_of(size).model_dump_json(indent=2) + "\n", encoding="utf-8")
    models.export(state / "motion", ASSETS.with_name(size.preset) / "transformer")
    return True


def sanity(state: Path, seconds: float, size: Size) -> bool:
    """Make the clip of "Test my setup" with the checkpoint that ships now."""
    import torch

    from engine.loading.pool import ModelPool
    from train.evaluation.clips import remake_clip

    remake_clip(ASSETS.parent / "sanity.json", ModelPool(torch.device("cpu")))
    return True


def preset_of(size: Size) -> Preset:
    """The toybox's preset with another size's transformer, pixels and frames."""
    from engine import presets

    small, pixels = presets.load(ASSETS.name), size.form.pixels
    parts = small.components.model_copy(update={"transformer": f"assets/{size.preset}/transformer"})
    changed = {
        "name": size.preset,
        "title": f"Toybox, {pixels} pixels",
        "components": parts,
        "reference_size": pixels,
        "sizes": (presets.Size(width=pixels, height=pixels),),
        "num_frames": size.form.num_frames,
        "display_scale": 256 // pixels,
    }
    return small.model_copy(update=changed)


STAGES: dict[str, Callable[[Path, float, Size], bool]] = {
    "vae": vae,
    "tokenizers": tokenizers,
    "text": read_captions,
    "vlm": describe_pictures,
    "parts": write_parts,
    "cache": cache,
    "base": base,
    "identity": identity,
    "motion": motion,
    "decoder": decoder,
    "export": export,
    "sanity": sanity,
}
OF_ANY_SIZE = ("cache", "base", "identity", "motion", "export")  # the stages before them are size xs's, for all


def main(argv: list[str] | None = None) -> int:
    """Run one stage, or all of them in order; 0 when what was asked for is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.toybox", description="Train the toybox checkpoint.")
    parser.add_argument("stage", choices=[*STAGES, "all", "adopt"])
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    parser.add_argument("--size", choices=[*SIZES], default="xs", help="xs: two processor cores; s: one large card")
    parser.add_argument("--state", type=Path, help="folder that holds the training state between calls")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    state = options.state or STATE.with_name(size.preset)
    stages = [name for name in STAGES if options.size == "xs" or name in OF_ANY_SIZE]
    allowed = ["all", *stages]
    if options.size == "xs":
        allowed.append("adopt")
    if options.stage not in allowed:
        parser.error(f"size {options.size} has the stages {', '.join(stages)}; the others are size xs's")
    if options.stage != "all":
        stages = [options.stage]
    for name in stages:
        if not (STAGES | {"adopt": adopt})[name](state, options.minutes * 60, size):
            return 3
    return 0
