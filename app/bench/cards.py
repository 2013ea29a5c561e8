"""How fast and how large a full-size model runs on a card: random weights, since neither depends on their values.

In:  a size of Wan or a preset, the way it is kept (whole, visiting, quantized), a cap on the card's memory.
Out: one line of JSON: seconds a step, peak bytes, what the plan had said. Without a card the rows stay open.
Knows nothing of files: every weight is drawn where it is needed, one tensor at a time.

    python launch.py bench cards                                    # everything, an hour or two; no model is needed
    python -m app.bench.cards --size 1.3B --where memory --precision bf16 --cap 8
    python -m app.bench.cards --preset phantom-14b --where memory --precision int8 --width 1280 --height 720
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from app.bench.random_files import wan
from app.bench.report import Figure
from app.bench.speed import sample_job
from engine import presets
from engine.hardware import costs
from engine.hardware.options import Profile
from engine.hardware.plan import CONTEXT, SLACK, make_plan
from engine.hardware.probe import GB, Hardware, probe_hardware
from engine.loading import attention_kernels, offload, quantize
from engine.loading.pool import VISITING
from engine.messages import StudioError
from engine.models.subject_tower import References
from engine.models.vae import decode_frames
from engine.paths import ROOT
from engine.presets import Preset, Shape

WAN = {"text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
SHAPES = {
    "tiny": Shape(dim=256, num_layers=4, ffn_dim=512, num_heads=2, identity_layers=2, vlm_dim=64, **WAN),
    "1.3B": Shape(dim=1536, num_layers=30, ffn_dim=8960, num_heads=12, identity_layers=20, vlm_dim=3584, **WAN),
    "14B": Shape(dim=5120, num_layers=40, ffn_dim=13824, num_heads=40, identity_layers=20, vlm_dim=3584, **WAN),
}
NOTHING_ADDED = {"identity_layers": 0, "vlm_dim": 0, "vace_layers": 0}  # plain Wan
STEPS = 3
WORDS = {
    "device": "whole on the card",
    "memory": "blocks visiting",
    "plain": "plain Wan of diffusers, whole on the card",
    "plain-visiting": "plain Wan of diffusers, its own group offloading",
}
HOW = {
    "": "",
    "uncached": "subjects read anew in every step",
    "frames": "two pictures as frames behind the clip",
    "compiled": "blocks compiled",
    **{name: f"attention by {name}" for name in attention_kernels.BACKENDS if name != "native"},
}


@dataclass(frozen=True)
class Way:
    """One row: how the model is kept, under how much memory, and what was promised of it."""

    size: str
    precision: str
    where: str  # of WORDS
    cap: float  # GB, 0 for all there is
    promised: str
    slower: float = 0.0  # most times the resident one's step; 0 where nothing was promised
    how: str = ""  # of HOW

    def arguments(self) -> list[str]:
        """As this module takes them."""
        words = ["--size", self.size, "--precision", self.precision, "--where", self.where]
        return [*words, "--cap", f"{self.cap:g}", "--how", self.how]

    @property
    def key(self) -> str:
        """Of its row in the report."""
        return f"card-{self.size}-{self.precision}-{self.where}-{self.cap:g}{'-' * bool(self.how)}{self.how}"

    @property
    def words(self) -> str:
        """What its row is about."""
        cap = f"at most {self.cap:g} GB" if self.cap else "all memory"
        ours = "" if self.where.startswith("plain") else " with identity blocks"
        how = f", {HOW[self.how]}" if self.how else ""
        return f"Wan {self.size}{ours}, {self.precision}, {WORDS[self.where]}{how}, {cap}, 832x480x81: a step"


WAYS = (
    Way("1.3B", "bf16", "device", 0, ""),
    Way("1.3B", "bf16", "plain", 0, ""),
    Way("1.3B", "bf16", "plain-visiting", 0, ""),
    Way("1.3B", "bf16", "memory", 8, "≤ 8 GB, ≤ 1.05x the resident time", 1.05),
    Way("1.3B", "nf4", "memory", 6, "≤ 6 GB"),
    Way("1.3B", "int8", "device", 8, "≤ 8 GB"),
    *(Way("1.3B", "bf16", "plain" if how == "frames" else "device", 0, "", how=how) for how in HOW if how),
    Way("14B", "bf16", "device", 0, ""),
    Way("14B", "bf16", "memory", 12, "≤ 12 GB"),
    Way("14B", "bf16", "plain-visiting", 0, ""),
    Way("14B", "int8", "memory", 12, "≤ 12 GB"),
    Way("14B", "nf4", "memory", 12, "≤ 12 GB"),
)


# --- one way, in a process of its own ---------------------------------------------------------------------------------


def drawn(shape: Shape, precision: Any, device: torch.device, keep: torch.device, *, plain: bool = False) -> nn.Module:
    """A model of that shape with random weights, quantized as they come, on the device `keep`.

    Args:
        plain: without what the shape adds to Wan.
    """
    dtype = _dtype(device)
    if plain:
        shape = shape.model_copy(update=NOTHING_ADDED)
    with quantize.no_weights():
        model = wan(shape)
    weights = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    quantize.swap(model, precision)
    generator = torch.Generator(device).manual_seed(0)
    for name, form in weights.items():
        spread = 0.02 if len(form) > 1 else 1.0
        tensor = torch.randn(form, generator=generator, device=device, dtype=torch.float32) * spread
        kept = torch.float32 if quantize.keeps_fp32(model, name) else dtype
        quantize.put(model, name, tensor, kept, keep)
    for name, table in list(model.named_buffers()):  # RoPE's, and what quantized layers bring
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, table.to(keep))
    return model.eval().requires_grad_(False)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def measure(
    way: Way,
    device: torch.device,
    *,
    frames: int,
    width: int,
    height: int,
    shape: Shape | None = None,
    reference: int = 0,
    lead: int = 0,
    steps: int = STEPS,
) -> dict[str, float]:
    """Seconds a step (the median), the peak on the device, and the plan's own figure for the same.

    Args:
        shape: of a preset; that of `way.size` where left out.
        reference: side of a subject's picture in pixels; the clip's height where left out.
        lead: latent frames that are drawn beside the clip's.
        steps: that are timed, behind one that warms up.
    """
    shape = shape or SHAPES[way.size]
    plain = way.where.startswith("plain")
    if plain:
        shape = shape.model_copy(update=NOTHING_ADDED)
    cuda, dtype = device.type == "cuda", _dtype(device)
    if cuda and way.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (way.cap * GB - CONTEXT) / total))
    resident = way.where in ("device", "plain")
    model: Any = drawn(shape, way.precision, device, device if resident else torch.device("cpu"), plain=plain)
    _set_up(model, way.how, device)
    lead += 2 * (way.how == "frames")
    latents = torch.randn(1, 16, 1 + (frames - 1) // 4 + lead, height // 8, width // 8, device=device, dtype=dtype)
    text = torch.randn(1, costs.TEXT_TOKENS, shape.text_dim, device=device, dtype=dtype)
    side = (reference or height) // 8
    with _visiting(model, way.where, device):
        more = _subjects(model, shape, latents, side, cached=way.how != "uncached")
        took = list(_steps(model, latents, text, more, steps, cuda))
    load = costs.Load(
        tokens=latents[0, 0].numel() // 4,
        latent_frames=latents.shape[2],
        pixels=width * height,
        pictures=2,
        subject_tokens=2 * (side // 2) ** 2 + costs.VLM_TOKENS if shape.identity_layers else 0,
        forwards=1,
        steps=1,
    )
    weights, each = costs.transformer_weights(shape), dtype.itemsize
    held: Any = weights.num_bytes if resident else weights.visiting
    beside = costs.cache_bytes(shape, load, each) + costs.forward_bytes(shape, load.tokens, each)
    return {
        "step_s": sorted(took)[len(took) // 2],
        "peak": float(torch.cuda.max_memory_allocated(device)) if cuda else 0.0,
        "reserved": float(torch.cuda.max_memory_reserved(device)) if cuda else 0.0,
        "predicted": float(held(way.precision, each) + beside),
    }


def _visiting(model: Any, where: str, device: torch.device) -> AbstractContextManager[None]:
    if where == "memory":
        lists, once = VISITING["transformer"]
        return offload.visiting(model, lists, device, once=once)
    if where == "plain-visiting":
        streams = device.type == "cuda"
        model.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams)
    return nullcontext()


def _set_up(model: Any, how: str, device: torch.device) -> None:
    """Attention kernels or compiled blocks.

    Raises:
        StudioError: they cannot be had here.
    """
    got = attention_kernels.use_attention(model, how, device) == how if how in attention_kernels.BACKENDS else True
    if how == "compiled":
        got = attention_kernels.compile_blocks(model)
    if not got:
        raise StudioError(f"There is no {how} here.", "The line in the log says why.", "Install what it needs.")


def _subjects(model: Any, shape: Shape, latents: Tensor, side: int, *, cached: bool = True) -> dict[str, Any]:
    """What the model's forward takes beside latents, time and text: two subjects, or VACE's side branch."""
    if shape.identity_layers:
        pictures = latents.new_zeros(1, 2, 1, 16, side, side).normal_()
        states = latents.new_zeros(1, costs.VLM_TOKENS, shape.vlm_dim).normal_()
        references = References(pictures, vlm_states=states)
        return {"identity": model.encode_identity(references)} if cached else {"references": references}
    if shape.vace_layers:
        scales = latents.new_ones(shape.vace_layers)
        channels = 6 * shape.z_dim
        control = latents.new_zeros(1, channels, *latents.shape[2:]).normal_()
        return {"control_hidden_states": control, "control_hidden_states_scale": scales}
    return {}


def _steps(model: Any, latents: Tensor, text: Tensor, more: dict[str, Any], steps: int, cuda: bool) -> Iterator[float]:
    """Seconds of each step; the first one, which warms up, only where it is the only one."""
    for number in range(steps + 1):
        began = time.perf_counter()
        [velocity] = model(latents, latents.new_tensor([500.0]), text, return_dict=False, **more)
        assert velocity.isfinite().all()  # waits for the device, too
        if cuda:
            torch.cuda.synchronize()
        if number or not steps:
            yield time.perf_counter() - began


@torch.no_grad()
def measure_decode(device: torch.device, *, width: int, height: int, tiled: bool, **smaller: Any) -> dict[str, float]:
    """Wan's VAE with random weights, on three latent frames: peak on the device, and what the plan says of it.

    Args:
        smaller: of the VAE's config, for a rehearsal.
    """
    vae = AutoencoderKLWan(**smaller).eval().to(device)
    scale: int = vae.config["scale_factor_spatial"]
    latents = torch.randn(1, vae.config["z_dim"], 3, height // scale, width // scale, device=device)
    began = time.perf_counter()
    for _ in decode_frames(latents, vae, tiled=tiled):
        pass
    pixels = min(width * height, costs.DECODE_TILE**2) if tiled else width * height
    cuda = device.type == "cuda"
    return {
        "step_s": time.perf_counter() - began,
        "reserved": float(torch.cuda.max_memory_reserved(device)) if cuda else 0.0,
        "predicted": (quantize.num_bytes(vae) + costs.DECODE * pixels) * SLACK,
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def cards(_: str) -> Iterator[Figure]:
    """Everything on the card of this machine, each in a process of its own; without a card the rows stay open."""
    yield from _ways()
    if not torch.cuda.is_available():
        what = "Every preset, size and profile, and Wan's VAE: peaks as planned"
        yield Figure("card-fits", what, "open: no card here", "within 10 %")
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        here = probe_hardware("all")
        yield from fits(Hardware("cuda", torch.cuda.get_device_name(0), total, here.ram, here.disk))
        yield from _decodes()


def _ways() -> Iterator[Figure]:
    """Resident beside visiting beside diffusers' own, in one run."""
    whole: dict[str, float] = {}
    for way in WAYS:
        key, what = way.key, way.words
        if not torch.cuda.is_available():
            yield Figure(key, what, "open: no card here", way.promised)
            continue
        found = _child(way.arguments())
        if isinstance(found, str):
            yield Figure(key, what, found, way.promised, False if way.promised else None)
            continue
        if way.where == "device" and way.precision == "bf16" and not way.how:
            whole[way.size] = found["step_s"]
        times = found["step_s"] / whole[way.size] if way.size in whole else None
        beside = "" if times is None else f" ({times:.2f}x)"
        holds = not way.cap or found["reserved"] + CONTEXT <= way.cap * GB
        holds = holds and (not way.slower or (times is not None and times <= way.slower))
        told = f"{found['step_s']:.2f} s{beside}, peak {found['peak'] / GB:.2f} GB"
        yield Figure(key, what, told, way.promised, holds if way.promised else None)
        if way.where in ("device", "memory") and not way.how:
            yield _off(f"{key}-predicted", f"{what}: peak as planned", found["predicted"], found["peak"])


def fits(card: Hardware) -> Iterator[Figure]:
    """What a plan says beside what is measured, while sampling, for every preset, size and profile of this card."""
    known: dict[tuple[Any, ...], dict[str, float] | str] = {}
    for name, preset, width, height in _presets():
        job, _ = presets.resolve(sample_job(name, width=width, height=height))
        for profile in get_args(Profile):
            if profile == "auto" or (profile != "all" and float(profile) * GB > card.vram):
                continue
            plan = make_plan(job, preset, card.limited(profile))
            if not plan.fits:
                continue
            fit, vae = plan.parts["transformer"], plan.parts["vae"]
            sampling = next(phase for phase in plan.phases if phase.name == "sampling")
            each = (width // 16) * (height // 16)  # tokens of a latent frame; pictures of their own size count as such
            lead = round(costs.load_of(job, preset).tokens / each) - 1 - ((job.num_frames or 1) - 1) // 4
            where = "device" if fit.where == "device" else "memory"
            mark = (preset.shape, lead, width, height, job.num_frames, fit.precision, where)
            if mark not in known:
                size = ["--width", str(width), "--height", str(height), "--frames", str(job.num_frames)]
                kept = ["--preset", name, "--precision", fit.precision, "--where", where]
                known[mark] = _child([*kept, *size, "--lead", str(lead), "--steps", "0"])
            found, key = known[mark], f"fit-{name}-{width}x{height}-{profile}"
            what = f"{name}, {width}x{height}, profile {profile} ({fit.precision}, {WORDS[where]}): peak while sampling"
            if isinstance(found, str):
                yield Figure(key, what, found, "within 10 %", False)
            else:
                planned = sampling.vram - CONTEXT - vae.device * SLACK  # which are not in that process's figure
                yield _off(key, what, planned, found["reserved"])


def _presets() -> Iterator[tuple[str, Preset, int, int]]:
    """Full-size presets and their sizes, upright ones left out: they are as large as those that lie."""
    for name in presets.names():
        preset = presets.load(name)
        if preset.shape is not None and preset.shape.vae_spatial == 8:
            yield from ((name, preset, size.width, size.height) for size in preset.sizes if size.width >= size.height)


def _decodes() -> Iterator[Figure]:
    for width, height in ((832, 480), (1280, 720)):
        for tiled in (False, True):
            size = ["--width", str(width), "--height", str(height), *(["--tiled"] if tiled else [])]
            found, how = _child(["--decode", *size]), "in tiles" if tiled else "whole"
            key, what = f"fit-decode-{width}x{height}-{how}", f"Wan's VAE, {width}x{height}, {how}: peak while decoding"
            if isinstance(found, str):
                yield Figure(key, what, found, "within 10 %", False)
            else:
                yield _off(key, what, found["predicted"], found["reserved"])


def _off(key: str, what: str, planned: float, measured: float) -> Figure:
    off = planned / measured - 1
    told = f"{off:+.1%}: planned {planned / GB:.2f} GB, measured {measured / GB:.2f} GB"
    return Figure(key, what, told, "within 10 %", abs(off) <= 0.1)


def _child(arguments: list[str]) -> dict[str, float] | str:
    """What that process measured, or why it did not, in a line."""
    command = [sys.executable, "-X", "utf8", "-m", "app.bench.cards", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"it ended with code {ran.returncode} and said nothing"]
        return f"failed: {said[-1][:120]}"
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """One way, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m app.bench.cards")
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--preset", help="the shape of a preset instead of a size")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8", "int8", "nf4"), default="fp32")
    parser.add_argument("--where", choices=WORDS, default="device")
    parser.add_argument("--cap", type=float, default=0, help="GB of the card")
    parser.add_argument("--how", choices=HOW, default="")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--lead", type=int, default=0, help="latent frames beside the clip's")
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed behind the first; 0 times that one")
    parser.add_argument("--decode", action="store_true", help="the VAE instead")
    parser.add_argument("--tiled", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = {"width": given.width, "height": given.height}
    if given.decode:
        found = measure_decode(device, tiled=given.tiled, **size)
    else:
        way = Way(given.size, given.precision, given.where, given.cap, "", how=given.how)
        preset = presets.load(given.preset) if given.preset else None
        more = {} if preset is None else {"shape": preset.shape, "reference": preset.reference_size}
        found = measure(way, device, frames=given.frames, lead=given.lead, steps=given.steps, **size, **more)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
