"""What a clip will need, before it is begun: where each part of the model lies, how precise, and which limit binds.

In:  a checked job, its preset, and what the machine has.
Out: a `Plan`; or a StudioError with the cheapest changes that would fit. And, when memory ran out all the same, which
     memory it was.
Imports no torch, so the page may ask; `engine.loading.parts` and `engine.loading.offload` do what a plan says.

Units: bytes unless a name says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from engine.hardware import costs
from engine.hardware.costs import MB, Load, Precision, Weights
from engine.hardware.oom import OutOfMemory
from engine.hardware.probe import GB, Hardware
from engine.messages import StudioError
from engine.presets import Preset
from engine.resolve import ResolvedJob

Where = Literal[
    "device", "memory", "disk"
]  # whole on the device; visiting it block by block from memory, or from files


CONTEXT = 600 * MB  # CUDA's own, on every card that computes
SLACK = 1.05  # the card's allocator cannot use every hole
READING = 200 * MB  # of an encoder beside its weights, for each byte of a number: one prompt and its pictures
BASE_RAM = 500 * MB  # the worker with its libraries
SMALL = 200 * MB  # of a transformer in bf16; below it a processor's time is not spent in products
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
    plain: int = 4  # bytes of a number that is not quantized: 2 where models compute in bf16

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
        """The need a creator is shown: of the card, or of both together where it shares the machine's memory."""
        if self.machine.shared:
            return max(phase.vram + phase.ram for phase in self.phases)
        return self.vram

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
            wanted.append(("RAM", self._need("RAM", phase) / max(1, here.ram), phase))
        return max(wanted, key=lambda each: each[1])

    def words(self) -> str:
        """What binds and why, in a sentence."""
        what, share, phase = self.binding
        limit = {"VRAM": self.machine.vram, "RAM": self.machine.ram, "disk": self.machine.disk}[what]
        verdict = "binds"
        if share > 1:
            verdict = "does not suffice"
        when = ""
        if phase is not None:
            when = f" while {phase.name}"
        return f"{what} {verdict}: {_gb(self._need(what, phase))} of {_gb(limit)} GB{when}."

    def _need(self, what: str, phase: Phase | None) -> int:
        """Bytes of "VRAM" or "RAM" that a phase needs, or of the disk where there is no phase."""
        if phase is None:
            return self.disk
        if what == "VRAM":
            return phase.vram
        if self.machine.shared:
            return phase.ram + phase.vram
        return phase.ram


_JUDGES = ("judges", "detector", "segmenter", "embedder")  # of frames; on the processor, and kept between two clips


def make_plan(resolved: ResolvedJob, here: Hardware) -> Plan:
    """The first way to make this clip that fits; the smallest way if none does.

    The ways are tried in order, the most exact and quickest first.

    Args:
        resolved: its document's `precision`, where it has one, is kept; its preset has a shape.
        here: with a profile already taken into account (`Hardware.limited`).
    """
    load, preset = costs.load_of(resolved), resolved.preset
    plain = _plain_bytes(preset, here)
    vae = _fit(costs.part_weights(preset, "vae"), "fp32", "device", plain)
    plans: list[Plan] = []
    for transformer, encoders, tiled in itertools.product(
        _ways(preset, "transformer", plain, load.precision), _encoder_ways(preset, plain), _tiling_choices(preset, load)
    ):
        parts = {"transformer": transformer, **encoders, "vae": vae}
        plan = _plan(preset, load, here, plain, parts, tiled)
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.binding[1])


def _plain_bytes(preset: Preset, here: Hardware) -> int:
    """Bytes of a number that is not quantized: 2 on a card, and for a large model on a processor with bf16 products."""
    large = costs.part_weights(preset, "transformer").num_bytes("bf16") >= SMALL
    if here.device in ("cuda", "xpu") or (here.fast_bf16 and large):
        return 2
    return 4


def _tiling_choices(preset: Preset, load: Load) -> tuple[bool, ...]:
    """Whole frames first, then tiles; tiles only where a frame is larger than about half a tile."""
    assert preset.shape is not None
    if preset.shape.vae_spatial * costs.DECODE_TILE // 8 < math.sqrt(load.pixels) * 2:
        return (False, True)
    return (False,)


def _judge_bytes(preset: Preset, load: Load) -> int:
    """Memory of the models that judge frames; none is loaded for a clip without subjects."""
    if not load.is_judged:
        return 0
    return sum(costs.part_weights(preset, part).num_bytes("fp32") for part in _JUDGES if preset.has(part))


def _ways(preset: Preset, part: str, plain: int, wanted: Precision | None) -> list[Fit]:
    """One part, from whole and exact to small."""
    weights = costs.part_weights(preset, part)
    exact: Precision = "fp32"
    if plain == 2:
        exact = "bf16"
    if wanted == "bf16" and plain == 4:
        wanted = "fp32"  # where bf16 is no faster than this, the more exact of the two
    tried: list[Precision] = [exact, "int8", "nf4"]
    if wanted is not None:
        tried = [wanted]
    places: list[Where] = ["device", "memory"]
    order: list[tuple[Precision, Where]] = list(itertools.product(tried, places))
    for precision in dict.fromkeys((tried[0], tried[-1])):
        order.append((precision, "disk"))
    return [_fit(weights, precision, where, plain) for precision, where in order]


def _fit(weights: Weights, precision: Precision, where: Where, plain: int) -> Fit:
    whole = weights.num_bytes(precision, plain)
    if where == "device":
        return Fit(precision, where, whole, 0)
    outside = round(whole - weights.rest.num_bytes(precision, plain))
    pinned = min(outside, 2 * weights.largest_block(precision, plain))
    visiting = weights.visiting(precision, plain)
    if where == "memory":
        return Fit(precision, where, visiting, outside + pinned)
    return Fit(precision, where, visiting, pinned, disk=outside)


def _encoder_ways(preset: Preset, plain: int) -> list[dict[str, Fit]]:
    """Both encoders in the same way, since one has left the device before the other comes."""
    text_ways = _ways(preset, "text_encoder", plain, None)
    vlm_ways = _ways(preset, "vlm", plain, None)
    ways = []
    for text, vlm in zip(text_ways, vlm_ways, strict=True):
        ways.append({"text_encoder": _with_reading(text, plain), "vlm": _with_reading(vlm, plain)})
    return ways


def _with_reading(fit: Fit, plain: int) -> Fit:
    """An encoder with what it needs beside its weights while it reads."""
    return replace(fit, working=min(READING * plain, fit.device))


def _plan(preset: Preset, load: Load, here: Hardware, plain: int, parts: dict[str, Fit], tiled: bool) -> Plan:
    shape = preset.shape
    assert shape is not None
    cache = costs.cache_bytes(shape, load, plain)
    vae = replace(parts["vae"], working=_encode_bytes(preset, load))
    decoded_pixels, frames_held = load.pixels, 0
    if tiled:
        decoded_pixels = min(load.pixels, costs.DECODE_TILE**2)
        frames_held = 6 * load.pixels * load.frames
    fixed, slack, base = _overheads(here)
    base += _judge_bytes(preset, load)
    transformer, text, vlm = parts["transformer"], parts["text_encoder"], parts["vlm"]
    stay = transformer.device + vae.device
    decoding = stay + costs.DECODE * decoded_pixels
    if transformer.where != "device":
        decoding -= transformer.device  # its blocks have left the device by then
    # Wherever the blocks wait, what LoRAs add to them is on the device; files have two bytes a number.
    loras = load.lora_bytes * plain // 2
    needs = [
        ("the prompt is read", text.device + text.working, text.memory),
        ("the VLM reads", vlm.device + vlm.working, vlm.memory),
        ("pictures are encoded", vae.device + vae.working, 0),
        ("sampling", stay + loras + cache + costs.forward_bytes(shape, load.tokens, plain), transformer.memory),
        ("decoding", decoding, transformer.memory),
    ]
    if not preset.components.vlm or not load.pictures:
        needs.pop(1)
    phases = tuple(Phase(name, round(device * slack) + fixed, memory + base) for name, device, memory in needs)
    disk = sum(fit.disk for fit in parts.values()) + frames_held + 300 * MB
    work = costs.clip_flops(shape, load) / 1e15
    return Plan(here, {**parts, "vae": vae}, phases, tiled, disk, work, plain)


def _encode_bytes(preset: Preset, load: Load) -> int:
    """What the VAE needs beside its weights to encode the pictures, or the video of a side branch."""
    if preset.conditioning == "side":
        return costs.ENCODE_VIDEO * load.pixels
    if not load.pictures:
        return 0
    return costs.ENCODE_PICTURE * max(load.pixels, preset.reference_size**2)


def _overheads(here: Hardware) -> tuple[int, float, int]:
    """Fixed bytes on the device, the factor for its allocator's holes, and bytes of memory before any model."""
    if here.device == "cpu":
        return 0, 1.0, BASE_RAM
    fixed = 0
    if here.device == "cuda":
        fixed = CONTEXT
    return fixed, SLACK, BASE_RAM + DRIVER_RAM


# --- when it does not fit ---------------------------------------------------------------------------------------------


def plan_or_raise(resolved: ResolvedJob, here: Hardware) -> Plan:
    """`make_plan`, where it fits.

    Raises:
        StudioError: it does not; the three cheapest changes that would, or what binds where none does.
    """
    plan = make_plan(resolved, here)
    if plan.fits:
        return plan
    changes = [words for words, changed in cheaper(resolved) if make_plan(changed, here).fits][:3]
    next_step = "Choose a smaller preset, or free some memory."
    if changes:
        next_step = f"Choose {_join_with_or(changes)}."
    raise StudioError(
        what=f"{resolved.preset.title} at {_size_in_words(resolved)} does not fit this machine.",
        why=plan.words(),
        next_step=next_step,
        field="num_frames",
    )


def _size_in_words(resolved: ResolvedJob) -> str:
    return f"{resolved.width} x {resolved.height} with {resolved.num_frames} frames"


def cheaper(resolved: ResolvedJob) -> Iterator[tuple[str, ResolvedJob]]:
    """Jobs that need less than this one, each with the change in words; of each kind the smallest change first."""
    frames, preset = resolved.num_frames, resolved.preset
    shorter = sorted({max(5, frames * part // 8 // 4 * 4 + 1) for part in (6, 4, 2)} - {frames}, reverse=True)
    for fewer in shorter:
        yield f"{fewer} frames", resolved.changed(num_frames=fewer)
    area = resolved.width * resolved.height
    for size in sorted(preset.sizes, key=lambda size: -size.width * size.height):
        if size.width * size.height < area:
            smaller = resolved.changed(width=size.width, height=size.height)
            yield f"{size.width} x {size.height}", smaller
            for fewer in shorter:
                words = f"{size.width} x {size.height} with {fewer} frames"
                yield words, smaller.changed(num_frames=fewer)
    if resolved.document.precision not in (None, "nf4"):
        yield "another precision (automatic)", resolved.changed(precision=None)
    subjects = resolved.document.subjects
    if preset.conditioning != "identity" and any(len(subject.pictures) > 1 for subject in subjects):
        single = tuple(subject.model_copy(update={"pictures": subject.pictures[:1]}) for subject in subjects)
        yield "one picture of each subject", resolved.changed(subjects=single)


def _join_with_or(words: list[str]) -> str:
    if len(words) > 1:
        return ", ".join(words[:-1]) + " or " + words[-1]
    return "".join(words)


def _gb(count: float) -> str:
    return f"{count / GB:.1f}"


def explain_oom(lack: OutOfMemory, resolved: ResolvedJob, here: Hardware) -> StudioError:
    """What to change when memory ran out twice: the cheapest jobs that need a third less than this one did."""
    less = here.shrunk()
    changes: list[str] = []
    if resolved.preset.shape is not None:
        changes = [words for words, changed in cheaper(resolved) if make_plan(changed, less).fits][:3]
    if not changes:
        changes = [words for words, _ in cheaper(resolved)][:3]
    next_step = "Close other programs."
    if changes:
        next_step = f"Close other programs, or choose {_join_with_or(changes)}."
    where = {"VRAM": "The card's memory", "disk": "The disk's space"}.get(
        lack.what, f"The machine's memory ({lack.what})"
    )
    return StudioError(
        what=f"{where} ran out while the clip was made, also in the most sparing way.",
        why=f"{_size_in_words(resolved)} and {len(resolved.document.subjects)} subjects needs more than is free.",
        next_step=next_step,
        field="num_frames",
    )
