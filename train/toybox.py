"""The recipe of the toybox checkpoint: each stage is one command that can be cut at any moment and goes on from there.

In:  the drawn world (`train.world`), minutes to spend, a folder for the state.
Out: assets/toybox in diffusers' and transformers' layout. Order: vae, tokenizers, text, vlm, cache, base, identity, export.
Knows nothing of the studio.

    python -m train.toybox vae --minutes 30
    python -m train.toybox all
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "toybox"
STATE = Path.home() / ".cache" / "idcrafter-studio" / "toybox"


def vae(state: Path, seconds: float) -> bool:
    """Train the video VAE."""
    from train import vae as stage

    return stage.train(state / "vae", seconds=seconds)


def tokenizers(state: Path, seconds: float) -> bool:
    """Train both tokenizers."""
    from train import text

    text.write_tokenizers(state)
    return True


def read_captions(state: Path, seconds: float) -> bool:
    """Teach UMT5 what captions say."""
    from train import text

    return text.train_text_encoder(state / "text", text.load_tokenizer(state / "tokenizer"), seconds=seconds)


STAGES = {"vae": vae, "tokenizers": tokenizers, "text": read_captions}


def main(argv: list[str] | None = None) -> int:
    """Run one stage, or all of them in order; 0 when what was asked for is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.toybox", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    parser.add_argument("--state", type=Path, default=STATE, help="folder that holds the training state between calls")
    options = parser.parse_args(argv)
    for name in STAGES if options.stage == "all" else [options.stage]:
        if not STAGES[name](options.state, options.minutes * 60):
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
