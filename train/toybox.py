"""The recipe of the toybox checkpoint: each stage is one command that can be cut at any moment and goes on from there.

In:  the drawn world (`train.world`), minutes to spend, a folder for the state.
Out: assets/toybox in diffusers' and transformers' layout. STAGES below holds the order.
Knows nothing of the studio.

    python -m train.toybox text --minutes 30
    python -m train.toybox all
    GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m train.toybox identity

Under torchrun the stages cache, base and identity are done by all processes together. `adopt`, then cache and
identity, goes on from the shipped checkpoint where the state is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "toybox"
STATE = Path.home() / ".cache" / "idcrafter-studio" / "toybox"

# Identity blocks in four of six layers (the paper: 20 of 30). A token is 8x8 pixels of one frame.
WAN: dict[str, Any] = {
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 96,
    "freq_dim": 64,
    "ffn_dim": 640,
    "num_layers": 6,
    "rope_max_seq_len": 512,
}
IDENTITY: dict[str, Any] = {
    "identity_layers": 4,
    "max_subjects": 4,
    "vlm_dim": 128,
    "subject_positions": True,
    "subject_zoom": 2,
}
# What the shipped run had and SftConfig's defaults have not; clips share as much noise as their preset says.
RECIPE: dict[str, Any] = {"ema": 0.999, "in_pair": 0.0, "clip_every": 3}
SHARDS = 240
BASE_STEPS, IDENTITY_STEPS = 4000, 9600


def vae(state: Path, seconds: float) -> bool:
    """Fit the video VAE and write it under `<state>/parts`."""
    from train import vae as stage

    stage.write(state / "parts" / "vae")
    return True


def tokenizers(state: Path, seconds: float) -> bool:
    """Train both tokenizers."""
    from train import text

    text.write_tokenizers(state)
    return True


def read_captions(state: Path, seconds: float) -> bool:
    """Teach UMT5 what captions say."""
    from train import text

    return text.train_text_encoder(state / "text", text.load_tokenizer(state / "tokenizer"), seconds=seconds)


def describe_pictures(state: Path, seconds: float) -> bool:
    """Teach Qwen2.5-VL what pictures show."""
    from train import text

    return text.train_vlm(state / "vlm", text.load_tokenizer(state / "vlm_tokenizer"), seconds=seconds)


def write_parts(state: Path, seconds: float) -> bool:
    """Write the readers of words (tokenizers, UMT5, Qwen2.5-VL) under `<state>/parts`, half precision."""
    from train import text

    text.export(state, state / "parts")
    return True


def cache(state: Path, seconds: float) -> bool:
    """Draw and encode the training scenes."""
    import numpy as np
    from safetensors.torch import save_file

    from engine.encode import picture_latents, text_states
    from train.data import Encoders, write_cache

    encoders = Encoders.load(state / "parts")
    null = state / "cache" / "null"
    null.mkdir(parents=True, exist_ok=True)
    fresh = null / f"blank.{os.getpid()}.new"
    paper = picture_latents([np.full((64, 64, 3), 255, np.uint8)], encoders.vae)
    blank = {"text": text_states([""], encoders.tokenizer, encoders.text_encoder), "white": paper[0, :, 8, 8]}
    save_file({name: tensor.contiguous() for name, tensor in blank.items()}, fresh)
    fresh.replace(null / "blank.safetensors")
    return write_cache(state / "cache", encoders, shards=SHARDS, seconds=seconds)


def run_of(state: Path, kind: Literal["base", "identity"], **values: Any) -> Path:
    """The run folder of a transformer stage, with its document written once."""
    from engine import presets
    from train.sft import SftConfig

    run = state / kind
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "run.json").exists():
        shared = presets.load("toybox").shared_noise
        config = SftConfig(kind=kind, cache=str(state / "cache"), shared_noise=shared, **{**RECIPE, **values})
        fresh = run / f"run.{os.getpid()}.new"  # every process of a team writes the same
        fresh.write_text(config.model_dump_json(indent=2), encoding="utf-8")
        fresh.replace(run / "run.json")
    return run


def base(state: Path, seconds: float) -> bool:
    """Train the plain text-to-video base that every later run starts from."""
    from train import sft

    return sft.train(run_of(state, "base", architecture=WAN, steps=BASE_STEPS), seconds=seconds)


def identity(state: Path, seconds: float) -> bool:
    """Train the identity blocks, and the base with them; from the shipped checkpoint where `adopt` brought it."""
    from train import sft

    adopted = state / "adopted"
    start = adopted if adopted.is_dir() else state / "base"
    run = run_of(state, "identity", architecture={**WAN, **IDENTITY}, start=str(start), steps=IDENTITY_STEPS)
    return sft.train(run, seconds=seconds)


def adopt(state: Path, seconds: float) -> bool:
    """Go on from the shipped checkpoint where the training state is lost: its frozen parts and its transformer."""
    import shutil

    for part in ASSETS.iterdir():
        target = state / "adopted" if part.name == "transformer" else state / "parts" / part.name
        shutil.copytree(part, target, dirs_exist_ok=True)
    return True


def export(state: Path, seconds: float) -> bool:
    """Write assets/toybox: the frozen parts and the averaged transformer."""
    import shutil

    from train import sft

    for part in (state / "parts").iterdir():
        shutil.copytree(part, ASSETS / part.name, dirs_exist_ok=True)
    sft.export(state / "identity", ASSETS / "transformer")
    return True


STAGES: dict[str, Callable[[Path, float], bool]] = {
    "vae": vae,
    "tokenizers": tokenizers,
    "text": read_captions,
    "vlm": describe_pictures,
    "parts": write_parts,
    "cache": cache,
    "base": base,
    "identity": identity,
    "export": export,
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage, or all of them in order; 0 when what was asked for is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.toybox", description="Train the toybox checkpoint.")
    parser.add_argument("stage", choices=[*STAGES, "all", "adopt"])
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    parser.add_argument("--state", type=Path, default=STATE, help="folder that holds the training state between calls")
    options = parser.parse_args(argv)
    for name in STAGES if options.stage == "all" else [options.stage]:
        if not (STAGES | {"adopt": adopt})[name](options.state, options.minutes * 60):
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
