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
from dataclasses import dataclass, replace
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
from engine.resolve import ResolvedJob, resolve

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
        """The command line by which this module measures it."""
        words = ["--size", self.size, "--precision", self.precision, "--where", self.where]
        return [*words, "--cap", f"{self.cap:g}", "--how", self.how]

    @property
    def key(self) -> str:
        """The key of its row in the report."""
        parts = ["card", self.size, self.precision, self.where, f"{self.cap:g}"]
        if self.how:
            parts.append(self.how)
        return "-".join(parts)

    @property
    def words(self) -> str:
        """What its row is about."""
        model = f"Wan {self.size} with identity blocks"
        if self.is_plain:
            model = f"Wan {self.size}"
        parts = [model, self.precision, WORDS[self.where]]
        if self.how:
            parts.append(HOW[self.how])
        if self.cap:
            parts.append(f"at most {self.cap:g} GB")
        else:
            parts.append("all memory")
        return f"{', '.join(parts)}, 832x480x81: a step"

    @property
    def is_plain(self) -> bool:
        """Whether the model is Wan as diffusers has it, without identity blocks."""
        return self.where.startswith("plain")

    @property
    def is_resident(self) -> bool:
        """Whether the whole model stays on the card."""
        return self.where in ("device", "plain")

    @property
    def is_baseline(self) -> bool:
        """Whether the other ways of this size are compared with it."""
        return self.where == "device" and self.precision == "bf16" and not self.how


WAYS = (
    Way("1.3B", "bf16", "device", 0, ""),
    Way("1.3B", "bf16", "plain", 0, ""),
    Way("1.3B", "bf16", "plain-visiting", 0, ""),
    Way("1.3B", "bf16", "memory", 8, "≤ 8 GB, ≤ 1.05x the resident time", 1.05),
    Way("1.3B", "nf4", "memory", 6, "≤ 6 GB"),
    Way("1.3B", "int8", "device", 8, "≤ 8 GB"),
    Way("1.3B", "bf16", "device", 0, "", how="uncached"),
    Way("1.3B", "bf16", "plain", 0, "", how="frames"),
    *(Way("1.3B", "bf16", "device", 0, "", how=how) for how in HOW if how not in ("", "uncached", "frames")),
    Way("14B", "bf16", "device", 0, ""),
    Way("14B", "bf16", "memory", 12, "≤ 12 GB"),
    Way("14B", "bf16", "plain-visiting", 0, ""),
    Way("14B", "int8", "memory", 12, "≤ 12 GB"),
    Way("14B", "nf4", "memory", 12, "≤ 12 GB"),
)


# --- one way, in a process of its own ---------------------------------------------------------------------------------


def build_random_model(
    shape: Shape, precision: Any, device: torch.device, keep: torch.device, *, plain: bool = False
) -> nn.Module:
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
        spread = 1.0
        if len(form) > 1:
            spread = 0.02
        tensor = torch.randn(form, generator=generator, device=device, dtype=torch.float32) * spread
        kept_dtype = dtype
        if quantize.keeps_fp32(model, name):
            kept_dtype = torch.float32
        quantize.put(model, name, tensor, kept_dtype, keep)
    for name, table in list(model.named_buffers()):  # RoPE's, and what quantized layers bring
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, table.to(keep))
    return model.eval().requires_grad_(False)


def _dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16
    return torch.float32


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
        shape: of a preset; None takes that of `way.size`.
        reference: side of a subject's picture in pixels; 0 takes the clip's height.
        lead: latent frames that are sampled beside the clip's.
        steps: number of timed steps, after one that warms up; 0 times the first one.
    """
    shape = shape or SHAPES[way.size]
    if way.is_plain:
        shape = shape.model_copy(update=NOTHING_ADDED)
    cuda, dtype = device.type == "cuda", _dtype(device)
    if cuda and way.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (way.cap * GB - CONTEXT) / total))
    keep = torch.device("cpu")
    if way.is_resident:
        keep = device
    model: Any = build_random_model(shape, way.precision, device, keep, plain=way.is_plain)
    _set_up(model, way.how, device)
    lead += 2 * (way.how == "frames")
    latents = torch.randn(1, 16, 1 + (frames - 1) // 4 + lead, height // 8, width // 8, device=device, dtype=dtype)
    text = torch.randn(1, costs.TEXT_TOKENS, shape.text_dim, device=device, dtype=dtype)
    side = (reference or height) // 8
    with _visiting(model, way.where, device):
        more = _subjects(model, shape, latents, side, cached=way.how != "uncached")
        took = list(_time_steps(model, latents, text, more, steps, cuda))
    found = {"step_s": sorted(took)[len(took) // 2], "peak": 0.0, "reserved": 0.0}
    if cuda:
        found["peak"] = float(torch.cuda.max_memory_allocated(device))
        found["reserved"] = float(torch.cuda.max_memory_reserved(device))
    subject_tokens = 0
    if shape.identity_layers:
        subject_tokens = 2 * (side // 2) ** 2 + costs.VLM_TOKENS
    load = costs.Load(
        tokens=latents[0, 0].numel() // 4,
        latent_frames=latents.shape[2],
        pixels=width * height,
        pictures=2,
        subject_tokens=subject_tokens,
        forwards=1,
        steps=1,
    )
    found["predicted"] = _predict_bytes(way, shape, load, dtype.itemsize)
    return found


def _predict_bytes(way: Way, shape: Shape, load: costs.Load, itemsize: int) -> float:
    """The plan's figure for a step: weights on the card, the identity cache and the forward."""
    weights = costs.transformer_weights(shape)
    held: Any = weights.visiting
    if way.is_resident:
        held = weights.num_bytes
    beside = costs.cache_bytes(shape, load, itemsize) + costs.forward_bytes(shape, load.tokens, itemsize)
    return float(held(way.precision, itemsize) + beside)


def _visiting(model: Any, where: str, device: torch.device) -> AbstractContextManager[None]:
    if where == "memory":
        lists, once = VISITING["transformer"]
        return offload.offload_blocks(model, lists, device, once=once)
    if where == "plain-visiting":
        streams = device.type == "cuda"
        model.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams)
    return nullcontext()


def _set_up(model: Any, how: str, device: torch.device) -> None:
    """Switch attention kernels or compiled blocks on.

    Raises:
        StudioError: this machine does not have them.
    """
    available = True
    if how in attention_kernels.BACKENDS:
        available = attention_kernels.use_attention(model, how, device) == how
    elif how == "compiled":
        available = attention_kernels.compile_blocks(model)
    if not available:
        raise StudioError(f"There is no {how} here.", "The line in the log says why.", "Install what it needs.")


def _subjects(model: Any, shape: Shape, latents: Tensor, side: int, *, cached: bool = True) -> dict[str, Any]:
    """What the model's forward takes beside latents, time and text: two subjects, or VACE's side branch."""
    if shape.identity_layers:
        pictures = latents.new_zeros(1, 2, 1, 16, side, side).normal_()
        states = latents.new_zeros(1, costs.VLM_TOKENS, shape.vlm_dim).normal_()
        references = References(pictures, vlm_states=states)
        if not cached:
            return {"references": references}
        return {"identity": model.encode_identity(references)}
    if shape.vace_layers:
        scales = latents.new_ones(shape.vace_layers)
        channels = 6 * shape.z_dim
        control = latents.new_zeros(1, channels, *latents.shape[2:]).normal_()
        return {"control_hidden_states": control, "control_hidden_states_scale": scales}
    return {}


def _time_steps(
    model: Any, latents: Tensor, text: Tensor, more: dict[str, Any], steps: int, cuda: bool
) -> Iterator[float]:
    """Seconds of each step; the first one warms up and counts only when it is the only one."""
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
    vae: Any = AutoencoderKLWan(**smaller).eval()
    vae.to(device)
    scale: int = vae.config["scale_factor_spatial"]
    latents = torch.randn(1, vae.config["z_dim"], 3, height // scale, width // scale, device=device)
    began = time.perf_counter()
    for _ in decode_frames(latents, vae, tiled=tiled):
        pass
    took, reserved = time.perf_counter() - began, 0.0
    if device.type == "cuda":
        reserved = float(torch.cuda.max_memory_reserved(device))
    pixels = width * height
    if tiled:
        pixels = min(pixels, costs.DECODE_TILE**2)
    return {
        "step_s": took,
        "reserved": reserved,
        "predicted": (quantize.num_bytes(vae) + costs.DECODE * pixels) * SLACK,
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def measure_cards(_: str) -> Iterator[Figure]:
    """Everything on the card of this machine, each in a process of its own; without a card the rows stay open."""
    yield from _measure_ways()
    if not torch.cuda.is_available():
        what = "Every preset, size and profile, and Wan's VAE: peaks as planned"
        yield Figure("card-fits", what, "open: no card here", "within 10 %")
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        here = probe_hardware("all")
        yield from measure_fits(Hardware("cuda", torch.cuda.get_device_name(0), total, here.ram, here.disk))
        yield from _measure_decodes()


def _measure_ways() -> Iterator[Figure]:
    """All of WAYS in one run: resident and visiting blocks, and diffusers' own offloading."""
    baselines: dict[str, float] = {}  # seconds of a step by size
    for way in WAYS:
        if not torch.cuda.is_available():
            yield Figure(way.key, way.words, "open: no card here", way.promised)
            continue
        found = _run_child(way.arguments())
        if isinstance(found, str):
            failed = Figure(way.key, way.words, found, way.promised)
            if way.promised:
                failed = replace(failed, holds=False)
            yield failed
            continue
        if way.is_baseline:
            baselines[way.size] = found["step_s"]
        yield _step_figure(way, found, baselines.get(way.size))
        if way.where in ("device", "memory") and not way.how:
            key, what = f"{way.key}-predicted", f"{way.words}: peak as planned"
            yield _compare(key, what, found["predicted"], found["peak"])


def _step_figure(way: Way, found: dict[str, float], baseline: float | None) -> Figure:
    """A step's time and peak; `baseline` is the time of the resident model's step, None before it is known."""
    step = f"{found['step_s']:.2f} s"
    holds = not way.cap or found["reserved"] + CONTEXT <= way.cap * GB
    if baseline is not None:
        times = found["step_s"] / baseline
        step += f" ({times:.2f}x)"
        if way.slower:
            holds = holds and times <= way.slower
    elif way.slower:
        holds = False
    figure = Figure(way.key, way.words, f"{step}, peak {found['peak'] / GB:.2f} GB", way.promised)
    if way.promised:
        return replace(figure, holds=holds)
    return figure


def measure_fits(card: Hardware) -> Iterator[Figure]:
    """What a plan says beside what is measured, while sampling, for every preset, size and profile of this card."""
    known: dict[tuple[Any, ...], dict[str, float] | str] = {}
    for name, preset, width, height in _full_size_presets():
        resolved = resolve(sample_job(name, width=width, height=height))
        for profile in get_args(Profile):
            if profile == "auto" or (profile != "all" and float(profile) * GB > card.vram):
                continue
            plan = make_plan(resolved, card.limited(profile))
            if not plan.fits:
                continue
            fit, vae = plan.parts["transformer"], plan.parts["vae"]
            where = "memory"
            if fit.where == "device":
                where = "device"
            lead = _lead_frames(resolved)
            setting = (preset.shape, lead, width, height, resolved.num_frames, fit.precision, where)
            if setting not in known:
                size = ["--width", str(width), "--height", str(height), "--frames", str(resolved.num_frames)]
                kept = ["--preset", name, "--precision", fit.precision, "--where", where]
                known[setting] = _run_child([*kept, *size, "--lead", str(lead), "--steps", "0"])
            key = f"fit-{name}-{width}x{height}-{profile}"
            what = f"{name}, {width}x{height}, profile {profile} ({fit.precision}, {WORDS[where]}): peak while sampling"
            sampling = next(phase for phase in plan.phases if phase.name == "sampling")
            planned = sampling.vram - CONTEXT - vae.device * SLACK  # which are not in that process's figure
            yield _compare_reserved(key, what, planned, known[setting])


def _lead_frames(resolved: ResolvedJob) -> int:
    """Latent frames that the job samples beside the clip's; pictures of another size count by their tokens."""
    tokens_per_frame = (resolved.width // 16) * (resolved.height // 16)
    clip_frames = 1 + (resolved.num_frames - 1) // 4
    return round(costs.load_of(resolved).tokens / tokens_per_frame) - clip_frames


def _full_size_presets() -> Iterator[tuple[str, Preset, int, int]]:
    """Full-size presets and their sizes, without portrait ones: they have as many pixels as the landscape ones."""
    for name in presets.names():
        preset = presets.load(name)
        if preset.shape is None or preset.shape.vae_spatial != 8:
            continue
        for size in preset.sizes:
            if size.width >= size.height:
                yield name, preset, size.width, size.height


def _measure_decodes() -> Iterator[Figure]:
    for width, height in ((832, 480), (1280, 720)):
        size = ["--width", str(width), "--height", str(height)]
        for how, switches in (("whole", []), ("in tiles", ["--tiled"])):
            found = _run_child(["--decode", *size, *switches])
            key, what = f"fit-decode-{width}x{height}-{how}", f"Wan's VAE, {width}x{height}, {how}: peak while decoding"
            planned = 0.0
            if not isinstance(found, str):
                planned = found["predicted"]
            yield _compare_reserved(key, what, planned, found)


def _compare_reserved(key: str, what: str, planned: float, found: dict[str, float] | str) -> Figure:
    """The planned peak beside what a child reserved; `found` is a line of text when the child failed."""
    if isinstance(found, str):
        return Figure(key, what, found, "within 10 %", False)
    return _compare(key, what, planned, found["reserved"])


def _compare(key: str, what: str, planned: float, measured: float) -> Figure:
    off = planned / measured - 1
    told = f"{off:+.1%}: planned {planned / GB:.2f} GB, measured {measured / GB:.2f} GB"
    return Figure(key, what, told, "within 10 %", abs(off) <= 0.1)


def _run_child(arguments: list[str]) -> dict[str, float] | str:
    """What this module measures in a process of its own; a line of text when that process failed."""
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
        more: dict[str, Any] = {}
        if given.preset:
            preset = presets.load(given.preset)
            more = {"shape": preset.shape, "reference": preset.reference_size}
        found = measure(way, device, frames=given.frames, lead=given.lead, steps=given.steps, **size, **more)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
