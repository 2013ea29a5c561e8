"""What a clip will need, before it is begun: where each part of the model lies, how precise, and which limit binds.

In:  a checked job, its preset, and what the machine has.
Out: a `Plan`; or a StudioError with the cheapest changes that would fit. And, when memory ran out all the same, which
     memory it was.
Imports no torch, so the page may ask; `engine.loading.parts` and `engine.loading.offload` do what a plan says.

Units: bytes unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from engine import lora_files
from engine.hardware import costs
from engine.hardware.costs import MB, Load, Precision, Weights
from engine.hardware.oom import OutOfMemory
from engine.hardware.probe import GB, Hardware
from engine.job import GenerateJob
from engine.messages import StudioError
from engine.presets import Preset

Where = Literal[
    "device", "memory", "disk"
]  # whole on the device; visiting it block by block from memory, or from files


CONTEXT = 600 * MB  # CUDA's own, on every card that computes
SLACK = 1.05  # the card's allocator cannot use every hole
READING = 200 * MB  # of an encoder beside its weights, for each byte of a number: one prompt and its pictures
BASE_RAM = 500 * MB  # the worker with its libraries
DRIVER_RAM = 1_100 * MB  # of the machine's own memory, what a card's driver and its libraries take


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How one part is kept."""

    precision: Precision
    where: Where
    device: int  # bytes on the device while it works
    memory: int  # bytes of the machine's memory
    disk: int = 0  # bytes of files that blocks visit from
    working: int = 0  # bytes on the device beside its weights, while an encoder or the VAE reads


@dataclass(frozen=True)
class Phase:
    """What one stage of a clip needs while it lasts."""

    name: str
    vram: int
    ram: int


@dataclass(frozen=True)
class Plan:
    """How a clip will be made, and what it will take."""

    machine: Hardware
    parts: dict[str, Fit]
    phases: tuple[Phase, ...]
    tiled: bool  # the VAE decodes in tiles
    disk: int  # bytes that have to be free, fetched files not among them
    petaflop: float

    @property
    def vram(self) -> int:
        """Highest need on the device."""
        return max(phase.vram for phase in self.phases)

    @property
    def ram(self) -> int:
        """Highest need of the machine's memory."""
        return max(phase.ram for phase in self.phases)

    @property
    def peak(self) -> int:
        """What a creator is told: of the card, or where it shares the machine's memory, of both together."""
        return max(p.vram + p.ram for p in self.phases) if self.machine.shared else self.vram

    @property
    def fits(self) -> bool:
        """Whether nothing is over its limit."""
        return self.binding[1] <= 1

    @property
    def binding(self) -> tuple[str, float, Phase | None]:
        """The limit that comes first: what of ("VRAM", "RAM" or "disk"), the share of it that is needed, and when."""
        here = self.machine
        wanted: list[tuple[str, float, Phase | None]] = [("disk", self.disk / max(1, here.disk), None)]
        for phase in self.phases:
            if not here.shared:
                wanted.append(("VRAM", phase.vram / max(1, here.vram), phase))
            ram = phase.ram + (phase.vram if here.shared else 0)
            wanted.append(("RAM", ram / max(1, here.ram), phase))
        return max(wanted, key=lambda each: each[1])

    def words(self) -> str:
        """What binds and why, in a sentence."""
        what, share, phase = self.binding
        limit = {"VRAM": self.machine.vram, "RAM": self.machine.ram, "disk": self.machine.disk}[what]
        need = self.disk if phase is None else phase.vram if what == "VRAM" else phase.ram
        if phase is not None and what == "RAM" and self.machine.shared:
            need += phase.vram
        when = f" while {phase.name}" if phase is not None else ""
        verdict = "binds" if share <= 1 else "does not suffice"
        return f"{what} {verdict}: {_gb(need)} of {_gb(limit)} GB{when}."


_JUDGES = ("judges", "detector", "segmenter", "embedder")  # of frames; on the processor, and kept between two clips


def make_plan(job: GenerateJob, preset: Preset, here: Hardware) -> Plan:
    """The first of all ways to make this clip that fits, from the most exact and quickest on; else the smallest one.

    Args:
        job: resolved; its `precision`, where it has one, is kept.
        here: with a profile already taken into account (`Hardware.limited`).
    """
    shape, load = preset.shape, costs.load_of(job, preset)
    assert shape is not None
    plain = 2 if here.device in ("cuda", "xpu") else 4
    tiled_choices = (
        (False, True) if shape.vae_spatial * costs.DECODE_TILE // 8 < math.sqrt(load.pixels) * 2 else (False,)
    )
    vae = _fit(costs.part_weights(preset, "vae"), "fp32", "device", plain)
    judges = sum(costs.part_weights(preset, part).num_bytes("fp32") for part in _JUDGES if preset.has(part))
    judges = judges if any(subject.weight > 0 for subject in job.subjects) else 0
    ways = [
        _plan(job, preset, here, load, plain, {"transformer": transformer, **encoders, "vae": vae}, judges, tiled)
        for transformer in _ways(preset, "transformer", plain, job.precision)
        for encoders in _encoder_ways(preset, plain)
        for tiled in tiled_choices
    ]
    fitting = next((way for way in ways if way.fits), None)
    return fitting or min(ways, key=lambda way: way.binding[1])


def _ways(preset: Preset, part: str, plain: int, wanted: Precision | None) -> list[Fit]:
    """One part, from whole and exact to small."""
    weights = costs.part_weights(preset, part)
    exact: Precision = "bf16" if plain == 2 else "fp32"
    if wanted == "bf16" and plain == 4:
        wanted = "fp32"  # where bf16 is no faster than this, the more exact of the two
    tried: list[Precision] = [exact, "int8", "nf4"] if wanted is None else [wanted]
    places: list[Where] = ["device", "memory"]
    order: list[tuple[Precision, Where]] = [(precision, where) for precision in tried for where in places]
    for precision in dict.fromkeys((tried[0], tried[-1])):
        order.append((precision, "disk"))
    return [_fit(weights, precision, where, plain) for precision, where in order]


def _fit(weights: Weights, precision: Precision, where: Where, plain: int) -> Fit:
    whole = weights.num_bytes(precision, plain)
    if where == "device":
        return Fit(precision, where, whole, 0)
    outside = round(whole - weights.rest.num_bytes(precision, plain))
    pinned = min(outside, 2 * weights.largest_block(precision, plain))
    kept = outside if where == "memory" else 0
    return Fit(precision, where, weights.visiting(precision, plain), kept + pinned, outside if where == "disk" else 0)


def _encoder_ways(preset: Preset, plain: int) -> list[dict[str, Fit]]:
    """Both encoders alike, since one is gone before the other comes."""
    ways = {part: _ways(preset, part, plain, None) for part in ("text_encoder", "vlm")}
    ways = {
        part: [replace(fit, working=min(READING * plain, fit.device)) for fit in fits] for part, fits in ways.items()
    }
    return [dict(zip(ways, each, strict=True)) for each in zip(*ways.values(), strict=True)]


def _plan(
    job: GenerateJob,
    preset: Preset,
    here: Hardware,
    load: Load,
    plain: int,
    parts: dict[str, Fit],
    judges: int,
    tiled: bool,
) -> Plan:
    shape = preset.shape
    assert shape is not None
    cache = costs.cache_bytes(shape, load, plain)
    encode = 0 if not load.pictures else costs.ENCODE_PICTURE * max(load.pixels, preset.reference_size**2)
    if preset.conditioning == "side":
        encode = costs.ENCODE_VIDEO * load.pixels
    vae = replace(parts["vae"], working=encode)
    tile = min(load.pixels, costs.DECODE_TILE**2)
    decode = costs.DECODE * (tile if tiled else load.pixels)
    frames_held = 6 * load.pixels * (job.num_frames or 1) if tiled else 0
    fixed = CONTEXT if here.device == "cuda" else 0
    slack, base = (1.0, BASE_RAM) if here.device == "cpu" else (SLACK, BASE_RAM + DRIVER_RAM)
    base += judges
    transformer, text, vlm = parts["transformer"], parts["text_encoder"], parts["vlm"]
    stay = transformer.device + vae.device
    # Wherever the blocks wait, what LoRAs add to them is on the device; files have two bytes a number.
    loras = lora_files.num_bytes(job) * plain // 2
    needs = [
        ("the prompt is read", text.device + text.working, text.memory),
        ("the VLM reads", vlm.device + vlm.working, vlm.memory),
        ("pictures are encoded", vae.device + vae.working, 0),
        ("sampling", stay + loras + cache + costs.forward_bytes(shape, load.tokens, plain), transformer.memory),
        ("decoding", stay - (transformer.device if transformer.where != "device" else 0) + decode, transformer.memory),
    ]
    if not preset.components.vlm or not load.pictures:
        needs.pop(1)
    phases = tuple(Phase(name, round(device * slack) + fixed, memory + base) for name, device, memory in needs)
    disk = sum(fit.disk for fit in parts.values()) + frames_held + 300 * MB
    work = costs.clip_flops(shape, load) / 1e15
    return Plan(here, {**parts, "vae": vae}, phases, tiled, disk, work)


# --- when it does not fit ---------------------------------------------------------------------------------------------


def plan_or_raise(job: GenerateJob, preset: Preset, here: Hardware) -> Plan:
    """`make_plan`, where it fits.

    Raises:
        StudioError: it does not; the three cheapest changes that would, or what binds where none does.
    """
    made = make_plan(job, preset, here)
    if made.fits:
        return made
    changes = [words for words, changed in cheaper(job, preset) if make_plan(changed, preset, here).fits][:3]
    raise StudioError(
        what=f"{preset.title} at {job.width} x {job.height} with {job.num_frames} frames does not fit this machine.",
        why=made.words(),
        next_step=f"Choose {_or(changes)}." if changes else "Choose a smaller preset, or free some memory.",
        field="num_frames",
    )


def cheaper(job: GenerateJob, preset: Preset) -> Iterator[tuple[str, GenerateJob]]:
    """The job with one thing less, in words and as a job, what is missed least first of its kind."""
    frames = job.num_frames or preset.num_frames
    shorter = sorted({max(5, frames * part // 8 // 4 * 4 + 1) for part in (6, 4, 2)} - {frames}, reverse=True)
    for fewer in shorter:
        yield f"{fewer} frames", job.model_copy(update={"num_frames": fewer})
    area = (job.width or 0) * (job.height or 0)
    for size in sorted(preset.sizes, key=lambda size: -size.width * size.height):
        if size.width * size.height < area:
            smaller = job.model_copy(update={"width": size.width, "height": size.height})
            yield f"{size.width} x {size.height}", smaller
            for fewer in shorter:
                words = f"{size.width} x {size.height} with {fewer} frames"
                yield words, smaller.model_copy(update={"num_frames": fewer})
    if job.precision not in (None, "nf4"):
        yield "another precision (automatic)", job.model_copy(update={"precision": None})
    if preset.conditioning != "identity" and any(len(subject.pictures) > 1 for subject in job.subjects):
        single = tuple(s.model_copy(update={"pictures": s.pictures[:1]}) for s in job.subjects)
        yield "one picture of each subject", job.model_copy(update={"subjects": single})


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _gb(count: float) -> str:
    return f"{count / GB:.1f}"


"""What allocators say who raise a plain RuntimeError, the more telling ones first."""


def explain_oom(lack: OutOfMemory, job: GenerateJob, preset: Preset, here: Hardware) -> StudioError:
    """What to change when memory ran out twice: the cheapest jobs that need a third less than this one did."""
    less = here.shrunk()
    changes = [words for words, changed in cheaper(job, preset) if make_plan(changed, preset, less).fits][:3]
    words = list(changes) or [words for words, _ in cheaper(job, preset)][:3]
    where = {"VRAM": "The card's memory", "disk": "The disk's space"}.get(
        lack.what, f"The machine's memory ({lack.what})"
    )
    return StudioError(
        what=f"{where} ran out while the clip was made, also in the most sparing way.",
        why=f"{job.width} x {job.height} with {job.num_frames} frames and {len(job.subjects)} subjects needs more "
        "than is free.",
        next_step=f"Close other programs, or choose {_or(words)}." if words else "Close other programs.",
        field="num_frames",
    )
