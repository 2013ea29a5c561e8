"""`python launch.py plan`: what a clip would need here or on a card of another size, part by part, before it is begun.

In:  a preset, a job's size and subjects, perhaps another machine's memory.
Out: a table on stdout and what binds; exit code 1 when it does not fit.
Knows nothing of torch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import psutil

from engine import presets
from engine.hardware.plan import Plan, make_plan, plan_or_raise
from engine.hardware.probe import GB, Hardware, probe_hardware
from engine.job import Picture, Sampling, Subject, make_job
from engine.messages import StudioError, duration
from engine.presets import Preset
from engine.resolve import ResolvedJob, resolve

WHERE = {"device": "on the device", "memory": "block by block from memory", "disk": "block by block from files"}
CARD_TFLOPS = 60  # a card for creators in bf16, attention included; a finished clip on this machine says better
PROCESSOR_TFLOPS = 0.06


def main(given: argparse.Namespace) -> int:
    """Print the plan; see the header."""
    preset, here = presets.load(given.preset), _machine(given)
    if preset.shape is None:
        raise StudioError(
            f"Nothing is known of what {preset.title} needs.",
            "Its preset has no `shape`.",
            "Add one, as presets/wan-1.3b.json has it.",
            field="preset",
        )
    resolved = _job(given, preset)
    made = make_plan(resolved, here)
    sys.stdout.write("\n".join(report(resolved, made, given.tflops)) + "\n")
    if made.fits:
        return 0
    plan_or_raise(resolved, here)  # says what would
    return 1


def _job(given: argparse.Namespace, preset: Preset) -> ResolvedJob:
    """The job that the options describe."""
    width = height = None
    if given.size:
        width, height = (int(side) for side in given.size.split("x"))
    return typical_job(
        preset,
        subjects=given.subjects,
        num_frames=given.frames,
        width=width,
        height=height,
        precision=given.precision,
        sampling=Sampling(num_inference_steps=given.steps),
    )


def typical_job(preset: Preset, *, subjects: int | None = None, **values: Any) -> ResolvedJob:
    """A job with blank subjects, two unless said: what they show does not change what they need."""
    if subjects is None:
        subjects = min(2, preset.max_subjects)
    cast = tuple(Subject(name=f"s{i}", pictures=(Picture(path="-"),)) for i in range(1, subjects + 1))
    prompt = " ".join(f"@{subject.name}" for subject in cast) or "-"
    return resolve(make_job(preset=preset.name, prompt=prompt, subjects=cast, **values), preset)


def _machine(given: argparse.Namespace) -> Hardware:
    """This machine, or one with a card of so many GB; its other memory is this machine's unless said."""
    here = probe_hardware(given.profile)
    if given.vram is None:
        ram = round(given.ram * GB) if given.ram else here.ram
        vram = ram if here.shared else here.vram
        return replace(here, vram=vram, ram=ram)
    ram = psutil.virtual_memory().total
    if given.ram:
        ram = round(given.ram * GB)
    return Hardware("cuda", f"a card of {given.vram:g} GB", round(given.vram * GB), ram, here.disk)


def report(resolved: ResolvedJob, made: Plan, tflops: float | None) -> list[str]:
    """The plan in lines."""
    here, preset = made.machine, resolved.preset
    subjects, steps = len(resolved.document.subjects), resolved.sampling.num_inference_steps
    limits = f"({here.vram / GB:.1f} GB on it, {here.ram / GB:.1f} GB of memory beside it)"
    if here.shared:
        limits = f"({here.ram / GB:.1f} GB of memory)"
    lines = [
        f"{preset.title}: {resolved.width} x {resolved.height}, {resolved.num_frames} frames, {subjects} subjects, "
        f"{steps} steps",
        f"on {here.name} {limits}",
        "",
    ]
    for part, fit in made.parts.items():
        if getattr(preset.components, part):
            size = f"{fit.device / GB:6.2f} GB there, {fit.memory / GB:6.2f} GB in memory"
            lines.append(f"  {part.replace('_', ' '):<13} {fit.precision:<5} {WHERE[fit.where]:<27} {size}")
    lines += ["", f"  {'while':<24} {'VRAM':>7} {'RAM':>7}   GB"]
    for phase in made.phases:
        vram, ram = phase.vram, phase.ram
        if here.shared:
            vram, ram = 0, phase.ram + phase.vram
        lines.append(f"  {phase.name:<24} {vram / GB:7.1f} {ram / GB:7.1f}")
    lines += ["", made.words()]
    if made.tiled:
        lines.append("The VAE decodes in tiles.")
    speed, source = CARD_TFLOPS, "a guess; a finished clip on this machine says better"
    if here.shared:
        speed = PROCESSOR_TFLOPS
    if tflops:
        speed, source = tflops, "as you said"
    work = made.petaflop * 1000
    rounded = f"{work:.2g}"
    if work >= 10:
        rounded = f"{work:,.0f}"
    lines.append(f"{rounded} TFLOP, about {duration(work / speed)} at {speed:g} TFLOP/s ({source}).")
    lines.append(f"Disk: {made.disk / GB:.1f} GB beside the model's files, {here.disk / GB:.1f} GB are free.")
    return lines
