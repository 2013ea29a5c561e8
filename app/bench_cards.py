"""How fast and how large a full-size model runs on a card: random weights, since neither depends on their values.

In:  a size of Wan, the way it is kept (whole, visiting, quantized), a cap on the card's memory.
Out: one line of JSON: seconds a step, peak bytes, what the plan had said.
Knows nothing of files: every weight is drawn where it is needed, one tensor at a time.

    python -m app.bench_cards --size 1.3B --where memory --precision bf16 --cap 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.bench import ROOT, Figure
from engine import counts, offload, quantize
from engine.load import VISITING
from engine.memory import CONTEXT, GB
from engine.model import IdentityWanTransformer3DModel
from engine.presets import Shape
from engine.subject_tower import References

WAN = {"text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
SHAPES = {
    "tiny": Shape(dim=256, num_layers=3, ffn_dim=512, num_heads=2, identity_layers=2, vlm_dim=64, **WAN),
    "1.3B": Shape(dim=1536, num_layers=30, ffn_dim=8960, num_heads=12, identity_layers=20, vlm_dim=3584, **WAN),
    "14B": Shape(dim=5120, num_layers=40, ffn_dim=13824, num_heads=40, identity_layers=20, vlm_dim=3584, **WAN),
}
STEPS = 3


@dataclass(frozen=True)
class Way:
    """One row: how the model is kept, under how much memory, and what was promised of it."""

    size: str
    precision: str
    where: str
    cap: float  # GB, 0 for all there is
    promised: str

    def arguments(self) -> list[str]:
        """As this module takes them."""
        words = ["--size", self.size, "--precision", self.precision, "--where", self.where]
        return [*words, "--cap", f"{self.cap:g}"]


WAYS = (
    Way("1.3B", "bf16", "device", 0, ""),
    Way("1.3B", "bf16", "memory", 8, "≤ 8 GB, ≤ 1.05x the resident time"),
    Way("1.3B", "nf4", "memory", 6, "≤ 6 GB"),
    Way("1.3B", "int8", "device", 8, "≤ 8 GB"),
    Way("14B", "bf16", "memory", 12, "≤ 12 GB"),
    Way("14B", "int8", "memory", 12, "≤ 12 GB"),
    Way("14B", "nf4", "memory", 12, "≤ 12 GB"),
)


def drawn(shape: Shape, precision: Any, device: torch.device, keep: torch.device) -> nn.Module:
    """A model of that shape with random weights, quantized as they come, on the device `keep`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with quantize.no_weights():
        model = IdentityWanTransformer3DModel(
            num_attention_heads=shape.num_heads,
            attention_head_dim=shape.dim // shape.num_heads,
            num_layers=shape.num_layers,
            ffn_dim=shape.ffn_dim,
            identity_layers=shape.identity_layers,
            vlm_dim=shape.vlm_dim,
        )
    weights = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    quantize.swap(model, precision)
    generator = torch.Generator(device).manual_seed(0)
    for name, form in weights.items():
        spread = 0.02 if len(form) > 1 else 1.0
        tensor = torch.randn(form, generator=generator, device=device, dtype=torch.float32) * spread
        kept = torch.float32 if quantize.keeps_fp32(model, name) else dtype
        quantize.put(model, name, tensor, kept, keep)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure(way: Way, device: torch.device, *, frames: int, width: int, height: int) -> dict[str, float]:
    """Seconds a step (the median), the peak on the device, and the plan's own figure for the same."""
    shape = SHAPES[way.size]
    cuda = device.type == "cuda"
    if cuda and way.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (way.cap * GB - CONTEXT) / total), device)
    dtype = torch.bfloat16 if cuda else torch.float32
    model: Any = drawn(shape, way.precision, device, device if way.where == "device" else torch.device("cpu"))
    lists, once = VISITING["transformer"]
    visiting = offload.visiting(model, lists, device, once=once) if way.where == "memory" else nullcontext()
    latents = torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8, device=device, dtype=dtype)
    text = torch.randn(1, counts.TEXT_TOKENS, shape.text_dim, device=device, dtype=dtype)
    side = height // 8
    pictures = torch.randn(1, 2, 1, 16, side, side, device=device, dtype=dtype)
    states = torch.randn(1, counts.VLM_TOKENS, shape.vlm_dim, device=device, dtype=dtype)
    with visiting:
        identity = model.encode_identity(References(pictures, vlm_states=states))
        took = list(_steps(model, latents, text, identity, cuda))
    load = counts.Load(
        tokens=latents[0, 0].numel() // 4,
        latent_frames=latents.shape[2],
        pixels=width * height,
        pictures=2,
        subject_tokens=2 * (side // 2) ** 2 + counts.VLM_TOKENS,
        forwards=1,
        steps=1,
    )
    weights, plain = counts.transformer_weights(shape), dtype.itemsize
    held: Any = weights.num_bytes if way.where == "device" else weights.visiting
    beside = counts.cache_bytes(shape, load, plain) + counts.forward_bytes(shape, load.tokens, plain)
    return {
        "step_s": sorted(took)[len(took) // 2],
        "peak": float(torch.cuda.max_memory_allocated(device)) if cuda else 0.0,
        "predicted": float(held(way.precision, plain) + beside),
    }


def _steps(model: Any, latents: torch.Tensor, text: torch.Tensor, identity: Any, cuda: bool) -> Iterator[float]:
    for number in range(STEPS + 1):
        began = time.perf_counter()
        [velocity] = model(latents, latents.new_tensor([500.0]), text, identity=identity, return_dict=False)
        assert velocity.isfinite().all()  # waits for the device, too
        if cuda:
            torch.cuda.synchronize()
        if number:  # the first one warms up
            yield time.perf_counter() - began


def cards(_: str) -> Iterator[Figure]:
    """Every way on the card of this machine, each in a process of its own; without a card the rows stay open."""
    whole: dict[str, float] = {}
    for way in WAYS:
        command = [sys.executable, "-X", "utf8", "-m", "app.bench_cards", *way.arguments()]
        key = f"card-{way.size}-{way.precision}-{way.where}-{way.cap:g}"
        cap = f"at most {way.cap:g} GB" if way.cap else "all memory"
        what = f"Wan {way.size} with identity blocks, {way.precision}, {WORDS[way.where]}, {cap}, 832x480x81: a step"
        if not torch.cuda.is_available():
            yield Figure(key, what, "open: no card here", way.promised)
            continue
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        if ran.returncode:
            yield Figure(key, what, f"failed: {ran.stderr.strip().splitlines()[-1][:120]}", way.promised, False)
            continue
        found = json.loads(ran.stdout.splitlines()[-1])
        whole.setdefault(way.size, found["step_s"])
        told = f"{found['step_s']:.2f} s ({found['step_s'] / whole[way.size]:.2f}x), peak {found['peak'] / GB:.2f} GB"
        fits = not way.cap or found["peak"] + CONTEXT <= way.cap * GB
        yield Figure(key, what, told, way.promised, fits if way.promised else None)
        off = found["predicted"] / found["peak"] - 1
        yield Figure(f"{key}-predicted", f"{what}: peak as planned", f"{off:+.1%}", "within 10 %", abs(off) <= 0.1)


WORDS = {"device": "whole on the card", "memory": "blocks visiting"}


def main() -> None:
    """One way, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m app.bench_cards")
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8", "nf4"), default="fp32")
    parser.add_argument("--where", choices=("device", "memory"), default="device")
    parser.add_argument("--cap", type=float, default=0, help="GB of the card")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    given = parser.parse_args()
    way = Way(given.size, given.precision, given.where, given.cap, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(way, device, frames=given.frames, width=given.width, height=given.height)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
